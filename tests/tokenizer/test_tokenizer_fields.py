"""Every field of a tokenizer's config changes something that can be seen; those of the loop have rows of their own."""

import pytest
import torch
from tiny_runs import rows_with, shapes

from mutor_img.common.config import OptimConfig, TrainConfig, field_names, load_config
from mutor_img.common.errors import UserError
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from tokenizer.train import TokenizerConfig, TokenizerTask


def losses(trainer):
    return rows_with(trainer, "loss")


def validated(trainer):
    return rows_with(trainer, "val_psnr")


JUDGED = ("loss.adversarial_weight=0.5", "loss.adversarial_start=0", "loss.discriminator_channels=4",
          "loss.discriminator_layers=1")

FIELDS = {
    "run_dir": ((), "{tmp}/elsewhere", lambda t: [t.run_dir.name == "elsewhere"]),
    "seed": ((), "1", losses),
    "data.images": ((), "{other}", losses),
    "data.val_images": ((), "{other}", validated),
    "data.val_count": ((), "3", validated),
    "data.image_size": ((), "8", losses),
    "data.mirror": ((), "false", losses),
    "data.crop_min": ((), "0.5", losses),
    "data.workers": ((), "2", lambda t: t.task.images.pool._max_workers),
    "model.preset": (("model.channels=null",), "vq8", shapes),
    "model.image_channels": ((), "3", shapes),
    "model.channels": ((), "16", shapes),
    "model.multipliers": ((), "[1,2]", lambda t: t.model.downsample),
    "model.vocabulary": ((), "16", shapes),
    "model.code_dim": ((), "2", shapes),
    "model.local": ((), "false", shapes),
    "loss.terms": ((), "{{l2: 2.0}}", losses),
    "loss.codebook": ((), "3", losses),
    "loss.commitment": ((), "3", losses),
    "loss.lpips_weights": ((), "", None),
    "loss.entropy": ((), "0.5", losses),
    "loss.adversarial_weight": (JUDGED[1:], "0.5", losses),
    "loss.adversarial_start": (JUDGED, "1", losses),
    "loss.discriminator_channels": (JUDGED, "8", losses),
    "loss.discriminator_layers": (JUDGED, "2", losses),
    "revival.after": (("train.steps=4",), "0", losses),
    "revival.until": (("train.steps=4",), "0.0", losses),
}


def test_every_field_has_a_row():
    shared = {f"optim.{n}" for n in field_names(OptimConfig)} | {f"train.{n}" for n in field_names(TrainConfig)}
    assert set(FIELDS) | shared == set(field_names(TokenizerConfig))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of the runs whose field is not changed."""
    return tmp_path_factory.mktemp("fields")


@pytest.fixture(scope="module")
def unchanged():
    """These runs, by what else is changed: many fields share one."""
    return {}


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("model.preset", "loss.lpips_weights")])
def test_a_field_changes_what_it_names(name, image_folder, tmp_path, root, unchanged):
    images = image_folder(size=16)
    other = image_folder("other", each=3, size=24)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
data: {{images: {images}, val_images: {images}, image_size: 16, crop_min: 1.0, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
revival: {{after: 1, until: 1.0}}
optim: {{lr: 3.0e-3}}
train: {{steps: 2, global_batch: 6, precision: fp32, compile: false, log_every: 1, checkpoint_every: 0,
        validate_every: 2, picture_every: 0}}
""")
    shared, value, observe = FIELDS[name]

    def trained(run, *extra):
        config = load_config(TokenizerConfig, path, [f"run_dir={run}", *shared, *extra])
        runtime = Runtime.start()
        return train(TokenizerTask(config, runtime), config, runtime)

    if shared not in unchanged:
        unchanged[shared] = trained(root / f"base{len(unchanged)}")
    changed = trained(tmp_path / "changed", f"{name}={value.format(tmp=tmp_path, other=other)}")
    seen = observe(unchanged[shared])
    assert seen not in ([], {}) and seen != observe(changed)


def test_the_preset_changes_the_network():
    seen = []
    for name in ("mnist", "vq8"):
        config = TokenizerConfig()
        config.model.preset = name
        with torch.device("meta"):
            from tokenizer.network.vq import VQModel

            seen.append({k: tuple(v.shape) for k, v in VQModel(**config.model.options()).state_dict().items()})
    assert seen[0] != seen[1]


def test_the_weights_of_lpips_are_looked_for_where_the_config_says(image_folder, tmp_path):
    config = TokenizerConfig()
    config.model.preset, config.data.images, config.data.image_size = "mnist", str(image_folder(size=16)), 16
    config.loss.terms, config.loss.lpips_weights = {"lpips": 1.0}, str(tmp_path / "here")
    with pytest.raises(UserError, match=r"here/vgg16-397923af\.pth is missing"):
        TokenizerTask(config, Runtime(torch.device("cpu")))
    config.data.image_size = 8
    with pytest.raises(UserError, match="LPIPS needs 16 pixels"):
        config.validate()
