"""Shipped configs are found by name, from a clone and from any other folder; the nearest name is told."""

import pytest

from mutor_img.common import shipped
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study.config import StudyConfig

NAMES = ["imagenet256/mutor2d_b_80", "imagenet256/mutor2d_b_80.yaml", "configs/imagenet256/mutor2d_b_80.yaml",
         "configs/imagenet256/mutor2d_b_80"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_found_from_any_folder_and_its_run_lies_below_that(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(GeneratorConfig, name)
    assert (config.registers.count, config.model.preset) == (80, "B")  # its own, and what it extends
    assert config.run_dir == "runs/imagenet256/mutor2d_b_80"


def test_the_current_folders_configs_come_before_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "mnist").mkdir(parents=True)
    (tmp_path / "configs" / "mnist" / "ntp.yaml").write_text("extends: imagenet256/ntp_b\nseed: 7\n")
    config = load_config(GeneratorConfig, "mnist/ntp")
    assert (config.seed, config.model.preset, config.run_dir) == (7, "B", "runs/mnist/ntp")


def test_a_run_folder_of_the_same_name_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist" / "study").mkdir(parents=True)
    assert load_config(StudyConfig, "mnist/study").run_dir == "runs/mnist"


@pytest.mark.parametrize("name, near", [
    ("imagenet256/mutor2d_b8", "imagenet256/mutor2d_b_80"), ("mutor2d_b_80", "imagenet256/mutor2d_b_80"),
    ("configs/mnist/nttp.yaml", "mnist/ntp"), ("mnist/studdy", "mnist/study"), ("zzz", ": fashion/ablations, "),
])
def test_an_unknown_name_is_told_the_nearest(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{name}: no such config file; .*{near}") as caught:
        load_config(GeneratorConfig, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "./", "/", ".."])
def test_a_path_without_a_name_is_a_folder(path):
    with pytest.raises(UserError, match="a folder, not a config file; give --config the path of a YAML file"):
        load_config(GeneratorConfig, path)


def test_every_shipped_file_is_known_by_name():
    assert shipped.PACKAGED.is_dir() and "mnist/mutor2d" in shipped.shipped_names()
    assert len(shipped.shipped_names()) == len(list(shipped.PACKAGED.rglob("*.yaml")))
