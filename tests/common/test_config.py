"""Every shipped config builds; every field is read; wrong keys and values are one clear line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mutor_img.common.config import OptimConfig, TrainConfig, default_run_dir, field_names, load_config, to_yaml
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from tokenizer.network.vq import preset
from tokenizer.training.config import TokenizerConfig
from tokenizer.training.plan import plan_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Small:
    run_dir: str = ""
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_extends_another_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", "optim: {lr: 1e-4, clip: 2}\n")
    config = load_config(Small, write(tmp_path, "a.yaml", "extends: base.yaml\noptim: {clip: 3}\n"), ["train.steps=7"])
    assert (config.optim.lr, config.optim.clip, config.train.steps) == (1e-4, 3.0, 7)


def test_the_run_folder_is_the_configs_path_under_runs():
    assert default_run_dir("configs/mnist/ntp.yaml") == "runs/mnist/ntp"
    assert default_run_dir("/a/configs/b/configs/c.yaml") == "/a/configs/b/runs/c"
    assert default_run_dir("mine.yaml") == "runs/mine"


@pytest.mark.parametrize("override, message", [
    ("optim.lrr=1", "did you mean 'optim.lr'"),
    ("optm.lr=1", "did you mean 'optim.lr'"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr=-1", "optim.lr is -1"),
    ("optim.lr=nan", "optim.lr is nan"),
    ("optim.schedule=cosin", "did you mean 'cosine'"),
    ("train.precision=fp16", "train.precision is 'fp16'"),
    ("train.steps=0", "train.steps is 0"),
    ("seed=null", "seed"),
    ("steps", "key=value"),
    ("optim=3", "optim"),
])
def test_a_wrong_override_is_one_line_that_says_what(tmp_path, override, message):
    path = write(tmp_path, "a.yaml", "seed: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(Small, path, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("seed: [1\n", "not valid YAML"),
    ("- a\n", "mapping"),
    ("extends: missing.yaml\n", "no such config file"),
    ("extends: a.yaml\n", "extends itself"),
    ("sed: 1\n", "did you mean 'seed'"),
])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(UserError, match=message):
        load_config(Small, path)


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(GeneratorConfig, CONFIGS / "imagenet256" / "mutor2d_b_80.yaml")
    again = load_config(GeneratorConfig, write(tmp_path, "config.yaml", to_yaml(config)))
    assert again == config


def test_field_names_are_every_leaf():
    leaves = field_names(GeneratorConfig)
    assert "registers.d_max" in leaves and "optim.betas" in leaves and "optim" not in leaves
    assert len(leaves) == len(set(leaves)) > 30


# The paper's rows (section 6 and 7 of the method), spelled out once more.
PAPER = {
    "ntp_b": ("B", "none", None, 4, 360_000), "ntp_b_500k": ("B", "none", None, 4, 500_000),
    "mutor1d_b": ("B", "1d", None, 4, 360_000), "mutor2d_b": ("B", "2d", None, 4, 360_000),
    "mutor2d_b_80": ("B", "2d", 80, 4, 360_000), "mutor2d_b_80_d3": ("B", "2d", 80, 3, 360_000),
    "mutor2d_b_80_d5": ("B", "2d", 80, 5, 360_000), "mutor2d_l_80": ("L", "2d", 80, 4, 360_000),
    "mutor2d_xl_80": ("XL", "2d", 80, 4, 360_000), "mutor2d_xxl_80": ("XXL", "2d", 80, 4, 360_000),
    "mutor2d_3b_80": ("3B", "2d", 80, 4, 360_000), "ntp_l": ("L", "none", None, 4, 360_000),
    "ntp_xl": ("XL", "none", None, 4, 360_000), "ntp_xxl": ("XXL", "none", None, 4, 360_000),
    "ntp_3b": ("3B", "none", None, 4, 360_000),
}


@pytest.mark.parametrize("name", PAPER)
def test_an_imagenet_config_is_the_papers_recipe(name):
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
    assert (c.model.preset, c.registers.kind, c.registers.count, c.registers.d_max, c.train.steps) == PAPER[name]
    assert (c.optim.lr, tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == (4e-4, (0.9, 0.95), 0.05, 1.0)
    assert (c.optim.schedule, c.optim.warmup_steps, c.train.global_batch, c.train.ema) == ("constant", 0, 1024, 0.0)
    assert (c.model.dropout, c.model.class_dropout, c.registers.loss_weight) == (0.1, 0.1, 0.5)
    assert (tuple(c.model.grid), c.model.vocabulary, c.model.classes) == ((16, 16), 16384, 1000)
    assert c.run_dir.endswith(f"runs/imagenet256/{name}")


def test_the_tokenizer_config_is_llamagens_recipe():
    c = load_config(TokenizerConfig, CONFIGS / "imagenet256" / "tokenizer.yaml")
    assert c.model.options() == preset("vq16")
    assert (c.data.image_size, c.data.crop_min, c.data.mirror) == (256, 0.8, True)
    assert c.loss.terms == {"l2": 1.0, "lpips": 1.0} and (c.loss.codebook, c.loss.commitment) == (1.0, 0.25)
    assert (c.loss.adversarial_weight, c.loss.adversarial_start, c.loss.entropy) == (0.5, 20_000, 0.0)
    assert (c.loss.discriminator_channels, c.loss.discriminator_layers, c.revival.after) == (64, 3, 0)
    assert (c.optim.lr, tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == (1e-4, (0.9, 0.95), 0.0, 1.0)
    assert (c.train.global_batch, c.train.steps) == (128, 1_281_167 // 128 * 40)
    plan = plan_tokenizer(c)  # on shapes: the networks take images of 256 pixels
    assert (plan["parameters"], plan["parameters of the discriminator"]) == (71_883_403, 2_765_633)


def test_llamagen_b_is_llamagens_own_recipe():
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / "llamagen_b.yaml")
    assert (c.model.preset, c.registers.kind, c.optim.lr, c.optim.schedule) == ("B", "none", 1e-4, "constant")
    assert (tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == ((0.9, 0.95), 0.05, 1.0)
    assert (c.train.global_batch, c.train.precision, c.model.dropout, c.model.class_dropout) == (256, "bf16", 0.1, 0.1)
    images = c.train.steps * c.train.global_batch
    assert 300 * 1_281_167 <= images < 300 * 1_281_167 + c.train.global_batch


def test_only_3b_is_sharded_and_its_plan_is_for_that_many_devices():
    for name in PAPER:
        c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
        assert (c.train.parallel == "fsdp") == (c.model.preset == "3B")
        assert c.plan.devices == (32 if c.model.preset == "3B" else 8)


def test_every_imagenet_file_is_in_a_table():
    assert {p.stem for p in (CONFIGS / "imagenet256").glob("*.yaml")} == {*PAPER, "llamagen_b", "tokenizer"}


def test_shared_values_stand_once():
    for path in (CONFIGS / "imagenet256").glob("*.yaml"):
        if path.stem in ("ntp_b", "tokenizer"):
            continue
        layer = yaml.safe_load(path.read_text())
        assert "extends" in layer and not {"grid", "vocabulary", "classes"} & layer.get("model", {}).keys()
        assert not {"optim", "data"} & layer.keys() or path.stem == "llamagen_b"
