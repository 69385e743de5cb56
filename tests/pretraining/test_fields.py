"""Every field of a generator's config changes something that can be seen; a field without a row fails."""

from pathlib import Path

import pytest
import torch
from tiny_runs import rows_with, shapes, write_tokenizer

from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common.config import field_names, load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.pretraining import task as generator
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.plan import plan_generator
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.study.comparison.command import is_comparison
from mutor_img.training.parallel import is_sharded
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer


def steps_kept(trainer):
    return sorted(p.name for p in (trainer.run_dir / "checkpoints").glob("step_*"))


def weights(trainer):
    return [p.detach().sum().item() for p in trainer.model.parameters()]


def drawn(trainer):
    """The registers of the run's law: what every switch of the method acts on."""
    anchors, offsets = trainer.task.law.draw(0, 0, torch.arange(50))
    return anchors.tolist(), offsets.tolist()


def replaced_forward(trainer):
    return getattr(trainer.model.layers[0].forward, "func", None)


def flex_on_gpus(trainer):
    return trainer.task.wants_flex(torch.device("cuda"))


def loss_graph(trainer):
    """The names of the loss's backward functions."""
    nodes = [trainer.task.loss(trainer.model, 0, torch.arange(4))[0].grad_fn]
    for node in nodes:
        nodes += [below for below, _ in node.next_functions if below is not None and below not in nodes]
    return {node.name() for node in nodes}


def plan(trainer):
    return plan_generator(trainer.config)


def losses(trainer):
    return rows_with(trainer, "loss")


def logged(trainer):
    return set(read_metrics(trainer.run_dir)[0])


def verdict_on_a_bad_update(trainer):
    try:
        return trainer.judge(4, {"loss": float("nan"), "skipped": 1.0})
    except UserError as error:
        return type(error)


def pictures(trainer):
    return trainer.drawn


def compared(trainer):
    return trainer.compared


def scored(trainer):
    """What :class:`FakeScores` was asked to score with."""
    config = trainer.task.scores.config
    return config.samples, config.reference, config.metrics, config.features, config.features_weights, config.cfg_scale


class FakeScores:
    """Stands for the scores of a run, whose own test is test_run_scores.py."""

    def __init__(self, config, *others):
        self.config = config

    def __call__(self, model):
        return {"eval_fid": 1.0}


HEADS = ("registers.kind=none", "objective.kind=parallel-heads")
CHAIN = ("registers.kind=none", "objective.kind=sequential-heads")
MIRAI = ("registers.kind=none", "objective.kind=mirai", "train.ema=0.9")
SQUARE = ("data.codes={tmp}/square", "data.val_codes=null", "model.grid=[4,4]")  # codes of a tokenizer that is there
PATCHES = (*SQUARE, "registers.kind=none", "objective.kind=npp", "objective.stage_ends=[1]")
REAR = (*SQUARE, "registers.kind=none", "objective.kind=rear", "objective.noise_until=3", "objective.code_dim=4")
SCORED = "eval.reference=some.npz"

# field -> (overrides both runs share, changed value, what must differ)
FIELDS = {
    "run_dir": ((), "{tmp}/elsewhere", lambda t: t.run_dir.name == "elsewhere"),
    "seed": ((), "1", losses),
    "data.codes": ((), "{tmp}/other", losses),
    "data.val_codes": (("train.validate_every=1",), "{tmp}/other", lambda t: rows_with(t, "val_next_token")),
    "init_from": ((), "{tmp}/first", losses),
    "freeze": ((), "['layers.*']", weights),
    "expected_loss": ((), "[9,10]", lambda t: t.task.doubt(200, {"next_token": 2.5})),
    "model.preset": ((), "B", shapes),
    "model.grid": ((), "[2,10]", None),
    "model.vocabulary": ((), "17", None),
    "model.classes": ((), "4", None),
    "model.dropout": ((), "0.5", losses),
    "model.qk_norm": ((), "true", shapes),
    "model.loss_chunk": ((), "7", loss_graph),
    "model.drop_path": ((), "0.5", losses),
    "model.class_dropout": ((), "0.9", losses),
    "objective.kind": (("registers.kind=none",), "parallel-heads", logged),
    "objective.weight": (HEADS, "0.5", losses),
    "objective.offsets": (HEADS, "[3]", logged),
    "objective.tap_from_end": (HEADS, "0", losses),
    "objective.blocks": (HEADS, "2", shapes),
    "objective.own_output": (HEADS, "true", shapes),
    "objective.depths": (CHAIN, "2", shapes),
    "objective.late_weight": ((*CHAIN, "objective.late_from=1"), "0.2", losses),
    "objective.late_from": (CHAIN, "1", losses),
    "objective.tap": (MIRAI, "2", losses),
    "objective.starts_at": (MIRAI, "2", losses),
    "objective.patches": (PATCHES, "[1]", None),
    "objective.stage_ends": (PATCHES, "[2]", losses),
    "objective.noise_until": ((*REAR, "objective.noise_until=0"), "3", losses),
    "objective.code_dim": (REAR, "5", None),
    "objective.mlp_layers": (REAR, "3", shapes),
    "objective.keep_replaced": (REAR, "true", lambda t: rows_with(t, "encode")),
    "registers.kind": ((), "1d", drawn),
    "registers.offsets": (("registers.kind=set", "registers.offsets=[3]"), "[3,5]", drawn),
    "registers.count": ((), "5", drawn),
    "registers.d_max": ((), "2", drawn),
    "registers.loss_weight": ((), "0.1", losses),
    "registers.every": (("registers.count=null",), "2", drawn),
    "registers.mixed_offsets": ((), "true", drawn),
    "registers.embedding": ((), "per_offset", shapes),
    "registers.wrap": (("registers.count=null",), "false", drawn),
    "optim.lr": ((), "5e-3", weights),
    "optim.betas": ((), "[0.5,0.6]", weights),
    "optim.weight_decay": ((), "5", weights),
    "optim.clip": ((), "1e-9", weights),
    "optim.schedule": ((), "cosine", lambda t: rows_with(t, "lr")),
    "optim.warmup_steps": ((), "2", lambda t: rows_with(t, "lr")),
    "optim.decay_steps": (("optim.schedule=wsd",), "2", lambda t: rows_with(t, "lr")),
    "optim.decay_share": (("optim.schedule=wsd",), "0.7", lambda t: rows_with(t, "lr")),
    "optim.restarts": (("optim.warmup_steps=1",), "[2]", lambda t: rows_with(t, "lr")),
    "optim.final_lr": (("optim.schedule=cosine",), "5e-3", lambda t: rows_with(t, "lr")),
    "train.steps": ((), "2", lambda t: t.step),
    "train.global_batch": ((), "2", lambda t: rows_with(t, "samples")),
    "train.micro_batch": ((), "2", lambda t: t.micro_batch),
    "train.precision": ((), "bf16", losses),
    "train.compile": ((), "true", lambda t: hasattr(replaced_forward(t), "get_compiler_config")),
    "train.activation_checkpointing": ((), "true", replaced_forward),
    "train.parallel": ((), "fsdp", lambda t: is_sharded(t.config.train, Runtime(torch.device("cpu"), 0, 2))),
    "train.timeout_minutes": ((), "2", lambda t: t.runtime.timeout),
    "model.attention": (("train.steps=1", "train.compile=true"), "sdpa", flex_on_gpus),
    "train.ema": ((), "0.9", lambda t: t.ema is not None),
    "train.log_every": ((), "3", lambda t: len(losses(t))),
    "train.trackers": ((), "[]", lambda t: (t.run_dir / "tensorboard").exists()),
    "train.checkpoint_every": ((), "0", steps_kept),
    "train.keep": ((), "1", steps_kept),
    "train.milestones": (("train.keep=1",), "[1]", steps_kept),
    "train.validate_every": ((), "1", lambda t: len(rows_with(t, "val_next_token"))),
    "train.picture_every": ((), "1", pictures),
    "train.skip_bad_updates": ((), "1", verdict_on_a_bad_update),
    "train.check_ranks_every": ((), "2", compared),
    "pictures.cfg_scale": (("train.picture_every=1",), "3", pictures),
    "pictures.per_class": (("train.picture_every=1",), "2", pictures),
    "plan.devices": ((), "4", plan),
    "plan.device_gib": ((), "1", plan),
    "plan.usable": ((), "0.5", plan),
    "plan.peak_tflops": ((), "312", plan),
    "plan.memory_tbs": ((), "2.04", plan),
    "plan.mfu": ((), "0.2", plan),
    "eval.every": ((SCORED,), "1", lambda t: rows_with(t, "eval_fid")),
    "eval.samples": ((SCORED, "eval.every=1"), "30", scored),
    "eval.reference": ((SCORED, "eval.every=1"), "other.npz", scored),
    "eval.metrics": ((SCORED, "eval.every=1"), "[fid]", scored),
    "eval.features": ((SCORED, "eval.every=1"), "mnist", scored),
    "eval.features_weights": ((SCORED, "eval.every=1"), "weights.pth", scored),
    "eval.cfg_scale": ((SCORED, "eval.every=1"), "3", scored),
}


def test_every_field_has_a_row():
    assert set(FIELDS) == set(field_names(GeneratorConfig))


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes):
    """The folder of the code stores, of one tokenizer, and of the runs without a change."""
    root = tmp_path_factory.mktemp("fields")
    make_codes(root / "other", seed=1)
    make_codes(root / "square", vq=write_tokenizer(root / "vq", vocabulary=16))
    return root


@pytest.fixture(scope="module")
def codes_folder(root, make_codes):
    return make_codes(root / "codes")


@pytest.fixture(scope="module")
def unchanged():
    """The runs without a change, by their overrides: fields share them."""
    return {}


@pytest.fixture
def observed(run_training, monkeypatch):
    """Return a function that trains and returns the Trainer, with the pictures and comparisons that it asked for."""
    def run(*overrides):
        drawn, compared = [], []
        with monkeypatch.context() as patch:
            patch.setattr(generator, "draw_training_grid", lambda model, codes, pictures, seed, path: drawn.append(
                (pictures.cfg_scale, pictures.per_class)))
            patch.setattr(generator, "RunScores", FakeScores)
            patch.setattr(Trainer, "compare_ranks", lambda self: compared.append(self.step))
            trainer = run_training(*overrides)
        trainer.drawn, trainer.compared = drawn, compared
        return trainer

    return run


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_what_it_names(field, run_training, observed, unchanged, root, tmp_path):
    shared, value, observe = FIELDS[field]
    shared, change = tuple(option.format(tmp=root) for option in shared), f"{field}={value.format(tmp=root)}"
    if observe is None:  # checked against the code store and its tokenizer, or another setting
        with pytest.raises(ValueError, match=field.split(".")[1]):
            run_training("registers.kind=none", *shared, change)
        return
    if field == "init_from":
        run_training(f"run_dir={root}/first", "seed=7")
    if shared not in unchanged:
        unchanged[shared] = observed(f"run_dir={root}/{len(unchanged)}", *shared)
    assert observe(observed(f"run_dir={tmp_path}/changed", *shared, change)) != observe(unchanged[shared])


CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*/*.yaml")
                 if not path.stem.startswith(("tokenizer", "study")) and not is_comparison(str(path)))


def one_of_a_kind():
    """Return a config of each kind: others differ from it in sizes, rates and lengths alone, which are set here."""
    kinds = {}
    for path in CONFIGS:
        config = load_config(GeneratorConfig, path)
        kind = (config.objective, config.registers, config.model.grid, config.model.vocabulary, config.model.attention,
                config.optim.schedule, config.optim.restarts, bool(config.train.ema), config.train.parallel)
        kinds.setdefault(str(kind), path)
    return sorted(kinds.values())


@pytest.mark.parametrize("path", one_of_a_kind(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_kind_of_shipped_config_takes_two_steps_on_a_small_model(path, tiny, tmp_path, make_codes, monkeypatch):
    from mutor_img.data.store import Codes, block_checksum
    from mutor_img.training.loop import train

    class Fake(Codes):  # random codes of the config's own grid, vocabulary and classes
        def __init__(self, folder):
            super().__init__(codes)
            length = wanted.model.grid[0] * wanted.model.grid[1]
            self.info.grid, self.info.vocabulary = tuple(wanted.model.grid), wanted.model.vocabulary
            self.info.class_names = [str(i) for i in range(wanted.model.classes)]
            self.info.tokenizer, self.info.tokenizer_hash = vq.path, vq.hash
            self.info.image_size = vq.downsample * wanted.model.grid[0]
            self.codes = torch.randint(wanted.model.vocabulary, (10, 2, length)).numpy().astype("uint16")
            self.info.checksums = [block_checksum(self.codes, self.labels)]

    wanted = load_config(GeneratorConfig, path, [
        f"run_dir={tmp_path}/run", "train.steps=2", "train.global_batch=2", "train.compile=false", "train.log_every=1",
        "train.picture_every=0", "train.micro_batch=0", "train.precision=auto"])
    codes = make_codes(tmp_path / "codes")
    vq = write_tokenizer(tmp_path / "vq", vocabulary=wanted.model.vocabulary, code_dim=8)
    monkeypatch.setattr(generator, "Codes", Fake)
    runtime = Runtime.start()
    trainer = train(GeneratorTask(wanted, runtime), wanted, runtime)
    assert trainer.step == 2 and read_meta(find_checkpoint(trainer.run_dir))["kind"] == "generator"
    first = read_metrics(trainer.run_dir)[0][trainer.task.headline[1]]
    assert first == pytest.approx(torch.tensor(float(wanted.model.vocabulary)).log().item(), abs=1e-3)
