"""Released LlamaGen files: every layout is read, and no file runs code or ends in a traceback."""

import argparse
import io
import os
import pickle
import random
import sys
import zipfile

import pytest
import torch

from mutor_img.checkpoints.llamagen import read_pt, read_released
from mutor_img.common.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

WEIGHTS = {"norm.weight": torch.arange(4.0), "output.weight": torch.arange(12.0).view(3, 4).bfloat16()}
AVERAGED = {name: weight + 1 for name, weight in WEIGHTS.items()}
ARGUMENTS = argparse.Namespace(gpt_model="GPT-B", lr=1e-4, nested=argparse.Namespace(no_local_save=True))


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight)


LAYOUTS = {
    "flat": WEIGHTS,
    "under model": {"model": WEIGHTS},
    "under module": {"module": WEIGHTS},
    "under state_dict": {"state_dict": WEIGHTS},
    "flat with freqs_cis": {**WEIGHTS, "freqs_cis": torch.ones(3, 2)},
    "model with freqs_cis": {"model": {"freqs_cis": torch.ones(3, 2), **WEIGHTS}},
    "the trainer's": {"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
                      "steps": 300_000, "args": ARGUMENTS},
    "the trainer's with ema": {"model": WEIGHTS, "ema": AVERAGED, "steps": 3, "args": ARGUMENTS},
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_yields_the_named_weights(tmp_path, content, old_format):
    path = write(tmp_path / "c2i.pt", saved(content, _use_new_zipfile_serialization=not old_format))
    assert_same(read_pt(path), WEIGHTS)
    assert_same(read_pt(str(path)), WEIGHTS)


def test_ema_takes_the_averaged_weights_and_the_default_does_not(tmp_path):
    path = write(tmp_path / "c2i.pt", saved(LAYOUTS["the trainer's with ema"]))
    assert_same(read_released(path, ema=True)[0], AVERAGED)
    assert_same(read_pt(path), WEIGHTS)


@pytest.mark.parametrize("layout", ["flat", "the trainer's"])
def test_ema_of_a_file_without_it_is_an_error(tmp_path, layout):
    path = write(tmp_path / "c2i.pt", saved(LAYOUTS[layout]))
    assert "EMA" in refused(path, ema=True)


def refused(path, **options):
    """The message of the refusal, after checking that it is one line that names the file."""
    with pytest.raises(UserError) as error:
        read_released(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["at the top", "beside the weights", "among the weights", "inside the Namespace"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, place, form):
    trap = Trap(tmp_path / "sprung")
    content = {"at the top": trap, "beside the weights": {"model": WEIGHTS, "args": trap},
               "among the weights": {"model": {**WEIGHTS, "x": trap}},
               "inside the Namespace": {"model": WEIGHTS, "args": argparse.Namespace(x=trap)}}[place]
    data = pickle.dumps(content) if form == "pickle" else saved(
        content, _use_new_zipfile_serialization=form == "zip")
    path = write(tmp_path / "c2i.pt", data)
    message = refused(path)
    assert "run code" in message and "False" not in message  # torch's own words are how to read it all the same
    assert not (tmp_path / "sprung").exists()
    if form == "pickle":
        pickle.loads(data)
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap itself works


class Custom:
    """A harmless class that is on no allow-list."""


def test_only_namespaces_are_allowed_and_only_while_reading(tmp_path):
    before = list(torch.serialization.get_safe_globals())
    refused(write(tmp_path / "custom.pt", saved({"model": WEIGHTS, "args": Custom()})))
    read_pt(write(tmp_path / "c2i.pt", saved(LAYOUTS["the trainer's"])))
    assert list(torch.serialization.get_safe_globals()) == before


def zip_without_weights():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


FOREIGN = {"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "html": b"<html>\n",
           "png": b"\x89PNG\r\n\x1a\n" + bytes(64), "zeros": bytes(4096), "zip": zip_without_weights(),
           "half a file": saved(WEIGHTS)[:700], "a quarter of an old file":
               saved(WEIGHTS, _use_new_zipfile_serialization=False)[:200]}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_and_damaged_files_are_refused_in_one_line(tmp_path, data):
    refused(write(tmp_path / "c2i.pt", data))


@pytest.mark.parametrize("content", [
    [torch.ones(2)], torch.ones(2), "weights", 3, {}, {"model": {}}, {"model": {"norm.weight": 1.0}}, {"model": 3},
    {"args": ARGUMENTS}, {0: torch.ones(2)}, {"freqs_cis": torch.ones(2)}], ids=str)
def test_contents_that_are_no_named_weights_are_refused(tmp_path, content):
    refused(write(tmp_path / "c2i.pt", saved(content)))


@pytest.mark.parametrize("wrapper, tells", [
    ("module.{}", "DistributedDataParallel's"), ("_orig_mod.{}", "torch.compile's"),
    ("module._orig_mod.{}", "DeepSpeed's and '_orig_mod', torch.compile's"),
    ("layers.0._orig_mod.{}", "torch.compile's"), ("_fsdp_wrapped_module.{}", "FSDP's"),
])
@pytest.mark.parametrize("wrap", [None, "model"])
def test_weights_of_a_wrapped_model_are_called_that(tmp_path, wrapper, tells, wrap):
    weights = {wrapper.format(name): weight for name, weight in WEIGHTS.items()}
    message = refused(write(tmp_path / "c2i.pt", saved({wrap: weights} if wrap else weights)))
    assert "weights of a wrapped model" in message and tells in message and "remove" in message


@pytest.mark.parametrize("name", ["cls_embedding.cap_proj.fc1.weight", "cls_embedding.uncond_embedding"])
def test_a_text_to_image_file_is_called_that(tmp_path, name):
    weights = {**WEIGHTS, name: torch.ones(2, 2)}
    assert "a text-to-image generator" in refused(write(tmp_path / "t2i_XL_stage1_256.pt", saved({"model": weights})))


@pytest.mark.parametrize("table, grid", [
    (torch.zeros(577, 32, 2), (24, 24)), (torch.zeros(257, 32, 2), (16, 16)), (torch.zeros(577), (24, 24)),
    (torch.zeros(5, 2, 2), (2, 2)), (torch.ones(3, 2), None), (torch.zeros(1, 2, 2), None),
    (torch.zeros(696, 2, 2), None), (torch.tensor(5.0), None),
])
@pytest.mark.parametrize("place", ["flat", "beside the weights", "above them", "ema"])
def test_a_rotary_table_tells_the_grid(tmp_path, table, grid, place):
    content = {"flat": {**WEIGHTS, "freqs_cis": table},
               "beside the weights": {"module": {"freqs_cis": table, **WEIGHTS}},
               "above them": {"model": WEIGHTS, "freqs_cis": table},
               "ema": {"model": {**WEIGHTS, "freqs_cis": table}, "ema": AVERAGED}}[place]
    weights, found = read_released(write(tmp_path / "c2i.pt", saved(content)), ema=place == "ema")
    assert found == grid
    assert_same(weights, AVERAGED if place == "ema" else WEIGHTS)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere.pt")
    refused(tmp_path)


@pytest.mark.parametrize("old_format", [False, True])
def test_no_damage_anywhere_in_a_file_ends_in_a_traceback(tmp_path, old_format):
    whole = saved({"model": {"norm.weight": torch.arange(4.0)}, "args": ARGUMENTS},
                  _use_new_zipfile_serialization=not old_format)
    rng, path, outcomes = random.Random(0), tmp_path / "c2i.pt", set()
    for _ in range(400):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.choice([1, 1, 8])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_pt(write(path, data))
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_reading_does_not_import_anything_new(tmp_path):
    path = write(tmp_path / "c2i.pt", b"\x80\x02cantigravity\nfly\n.")
    refused(path)
    assert "antigravity" not in sys.modules


def test_weights_that_are_damaged_are_refused_though_torch_would_load_them(tmp_path):
    data = saved({"model": WEIGHTS})
    place = data.index(WEIGHTS["norm.weight"].numpy().tobytes())
    damaged = data[:place] + b"\1" + data[place + 1:]
    (tmp_path / "c.pt").write_bytes(damaged)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["model"]["norm.weight"][0] != 0
    with pytest.raises(UserError, match=r"c\.pt: not a PyTorch weights file .*Bad CRC-32"):
        read_pt(tmp_path / "c.pt")


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "c.pt").write_bytes(saved({"model": WEIGHTS}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pt(tmp_path / "c.pt")["norm.weight"], WEIGHTS["norm.weight"])
