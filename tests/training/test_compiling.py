"""What is compiled: once, for training alone, freed with the model, and with dropout that a resume repeats."""

import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mutor_img.attention import FlexAttention
from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import TrainConfig
from mutor_img.common.files import read_metrics
from mutor_img.decoding.cpu import PackedTransformer
from mutor_img.decoding.sampler import Sampler, SamplingSettings
from mutor_img.pretraining import task as generator
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import compiling, parallel
from mutor_img.training.parallel import prepare_blocks
from mutor_img.training.saved_bytes import SavedBytes

BOTH = ("train.compile=true", "train.activation_checkpointing=true")


@pytest.fixture
def counter(monkeypatch, usual_limits):
    """Compile without kernels, and count the graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(parallel, "compile_blocks", partial(compiling.compile_blocks, backend=counter))
    return counter


def settings():
    dynamo = torch._dynamo.config
    return (dynamo.recompile_limit, dynamo.accumulated_recompile_limit, dynamo.fail_on_recompile_limit_hit,
            dynamo.optimize_ddp)


def test_a_run_leaves_torchs_settings_as_it_found_them(counter, run_training, monkeypatch):
    before, within = settings(), []
    loss = GeneratorTask.loss
    monkeypatch.setattr(GeneratorTask, "loss", lambda *given: within.append(settings()) or loss(*given))
    run_training(*BOTH)
    assert set(within) != {before} and settings() == before


def resumed_and_whole(run_training, tmp_path, *overrides):
    """Train four updates, and two and a resume; returns the losses and the weights of both."""
    torch._dynamo.reset()
    whole = run_training(f"run_dir={tmp_path}/whole", "train.steps=4", *overrides)
    run_training(f"run_dir={tmp_path}/parts", "train.steps=2", *overrides)
    torch._dynamo.reset()  # a process of its own compiles anew
    parts = run_training(f"run_dir={tmp_path}/parts", "train.steps=4", *overrides)
    return [([row["loss"] for row in read_metrics(trainer.run_dir)],
             read_tensors(find_checkpoint(trainer.run_dir), "model")) for trainer in (whole, parts)]


def test_with_compiled_checkpoints_and_dropout_a_resume_is_exact(counter, run_training, tmp_path):
    whole, parts = resumed_and_whole(run_training, tmp_path, *BOTH, "model.dropout=0.3")
    assert whole[0] == parts[0] and all(torch.equal(whole[1][name], parts[1][name]) for name in whole[1])


@pytest.mark.gpu
def test_on_cuda_with_compiled_checkpoints_and_dropout_a_resume_is_exact(run_training, tmp_path, usual_limits):
    whole, parts = resumed_and_whole(run_training, tmp_path, *BOTH, "model.dropout=0.3", "model.attention=sdpa")
    assert whole[0] == pytest.approx(parts[0], abs=1e-4)  # another mask moves a loss by tenths
    assert all(torch.allclose(whole[1][name], parts[1][name], atol=1e-3) for name in whole[1])


def test_nothing_that_a_run_evaluates_is_compiled(counter, run_training, monkeypatch, tmp_path):
    def look(task, model, *others):
        model(torch.tensor([0, 1]), torch.zeros(2, 19, dtype=torch.int64))
        seen.append(model.training)
        return {}

    for name in ("validate", "score", "draw_pictures"):
        monkeypatch.setattr(GeneratorTask, name, look)
    monkeypatch.setattr(generator, "RunScores", lambda *given: None)
    graphs, seen = [], []
    for every in (0, 1):
        torch._dynamo.reset()
        counter.frame_count = 0
        run_training(f"run_dir={tmp_path}/{every}", "train.compile=true", "train.steps=2", "eval.reference=some.npz",
                     *(f"{name}_every={every}" for name in ("train.validate", "train.picture")), f"eval.every={every}")
        graphs.append(counter.frame_count)
    assert graphs == [1, 1] and seen == [False] * 6


def test_weights_go_with_the_model_though_its_blocks_are_checkpointed_and_compiled(counter, random_model, no_collector):
    model, codes = random_model(dropout=0.0), torch.zeros(2, 19, dtype=torch.int64)
    expected = model(torch.tensor([0, 1]), codes)
    with compiling.compile_settings():
        prepare_blocks(list(model.layers), TrainConfig(compile=True, activation_checkpointing=True))
        found = model(torch.tensor([0, 1]), codes)
    assert counter.frame_count == 1  # for both blocks
    torch.testing.assert_close(found, expected)
    gone = weakref.ref(model.layers[0].attention.wqkv.weight)
    with no_collector:
        del model, found, expected
        assert gone() is None


def test_a_trainer_that_is_dropped_is_freed_at_once_with_all_its_weights(run_training, no_collector):
    trainer = run_training("train.activation_checkpointing=true", "train.ema=0.9", "train.steps=1")
    gone = [weakref.ref(x) for x in (trainer, trainer.optimizer, trainer.task)]
    gone += [weakref.ref(x.layers[0].attention.wqkv.weight) for x in (trainer.model, trainer.ema.module)]
    with no_collector:
        del trainer
        assert [x() for x in gone] == [None] * 5


def test_nothing_that_holds_tensors_holds_itself(random_model, no_collector):
    model, weight = random_model(), torch.ones(3, requires_grad=True)
    with no_collector:
        with SavedBytes([]) as saved:
            (weight * weight).sum().backward()
        made = [saved, FlexAttention(20, torch.zeros(2, 3, dtype=torch.int64), False),
                Sampler(model, SamplingSettings(), 2), PackedTransformer(model)]
        gone = [weakref.ref(x) for x in made]
        del made, saved
        assert [x() for x in gone] == [None] * 4
