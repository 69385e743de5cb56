"""eval.every: a generator in training gets the scores that evaluate_fid.py would give its checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from mutor_img.checkpoints.loading import load_run
from mutor_img.common.errors import UserError
from mutor_img.evaluation.command import main
from mutor_img.pretraining.config import EvalConfig
from mutor_img.pretraining.scores import RunScores, as_sampled
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime


@pytest.fixture
def config(digit_folders, classifier):
    return EvalConfig(every=1, samples=20, reference=str(digit_folders["train"]), metrics=["fid", "pr"],
                      features="mnist", features_weights=str(classifier), cfg_scale=3.0)


def opened(config, run):
    loaded = load_run(run)
    return RunScores(config, loaded.codes, loaded.model, 5, Runtime(torch.device("cpu"))), loaded.model


def test_scores_in_training_are_those_of_the_command(config, run):
    scores, model = opened(config, run)
    found = scores(model)
    expected = main(["--checkpoint", str(run), "--reference", config.reference, "--features", "mnist",
                     "--features-weights", config.features_weights, "--num-samples", "20", "--cfg-scale", "3",
                     "--seed", "5", "--metrics", "fid,pr", "--device", "cpu"])
    names = ("fd", "precision", "recall", "recognised", "distinct", "num_samples")
    assert found == {f"eval_{name}": expected[name] for name in names}
    json.dumps(found)
    assert scores(model) == found  # the same samples every time


def test_what_is_missing_ends_a_run_before_it_begins(config, run):
    with pytest.raises(UserError, match=r"eval\.reference is empty"):
        EvalConfig(every=1).validate()
    for change, words in (({"reference": "absent.npz"}, "no such reference"), ({"metrics": ["sfid"]}, "no spatial"),
                          ({"features": "mnits"}, "mean 'mnist'"), ({"metrics": ["fdi"]}, "mean 'fid'")):
        with pytest.raises(UserError, match=words):
            changed = EvalConfig(**{**vars(config), **change})
            changed.validate()
            opened(changed, run)


def test_weights_that_cannot_be_sampled_from_do_not_end_training(config, run, capsys):
    scores, model = opened(config, run)
    with torch.no_grad():
        model.output.weight.fill_(float("nan"))
    assert GeneratorTask.score(SimpleNamespace(scores=scores), model, 7) == {}
    assert "no scores at step 7" in capsys.readouterr().out


def test_the_copy_that_gpus_sample_from_is_of_half_precision_and_the_same_weights(run):
    model, state = load_run(run).model, torch.get_rng_state()
    with MemTracker() as tracker:
        copy = as_sampled(model)
    weights = sum(weight.numel() for weight in model.parameters())
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak < 7 * weights  # bytes: the model's 4, the copy's 2, the rotary table; no second 4
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(copy.rope.table, model.rope.table)
    assert copy.output.weight.dtype == torch.bfloat16 and not copy.training
    for ours, theirs in zip(copy.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-6)
