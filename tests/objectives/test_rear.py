"""reAR: what its noise changes, which vectors its states are held against, and what its gradients reach."""


import pytest
import torch
from readings import angle, losses, reached

from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.objectives.rear import Rear
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime
from tokenizer import load_tokenizer

N, V = 20, 11
LAYERS = 6  # of which D reads the fifth
OPTIONS = ("registers.kind=none", "objective.kind=rear", "objective.noise_until=9")


@pytest.fixture
def model(random_model):
    """Six blocks on 4 x 5 codes with drawn weights, reAR's networks, and vectors of three numbers."""
    model = random_model(register_offsets=None, layers=LAYERS)
    torch.manual_seed(0)
    model.objective = Rear(model.config, noise_until=6, code_dim=3)
    model.objective.take_codebook(torch.randn(V, 3))
    return model.eval()


@pytest.fixture
def noisy(model):
    codes = torch.randint(V, (2, N), generator=torch.Generator().manual_seed(0))
    batch = model.objective.prepare(0, 0, torch.tensor([3, 4]), torch.tensor([0, 2]), codes)
    assert 0 < (batch.codes != codes[:, :-1]).sum() < 2 * (N - 1)
    return batch


def test_each_terms_gradient_reaches_the_blocks_below_its_state_and_nothing_of_the_read_out(model, noisy):
    sums = losses(model, noisy)
    for name, own, other, below in (("encode", "encode", "decode", 1), ("decode", "decode", "encode", 5)):
        parts = [model.tok_embeddings, model.cls_embedding, *model.layers[:below], getattr(model.objective, own)]
        assert all(reached(sums[name], part) == {True} for part in parts)
        rest = [*model.layers[below:], model.norm, model.output, getattr(model.objective, other)]
        assert all(reached(sums[name], part) == {False} for part in rest)


@pytest.mark.parametrize("keep", [False, True])
def test_both_terms_are_those_of_a_loop_over_inputs(model, noisy, keep):
    objective, clean = model.objective, noisy.targets
    objective.keep_replaced = keep
    states = model.run(noisy.labels, noisy.codes, taps=(1, 5)).states
    encode, decode, count = 0.0, 0.0, 0
    for b in range(2):
        for t in range(N):  # input t stands for x_t and predicts x_{t+1}, which stands at t of the clean codes
            decode -= angle(objective.decode(states[5][b, t]), objective.codebook[clean[b, t]])
            if t >= 1:
                count += 1
                if keep or noisy.codes[b, t - 1] == clean[b, t - 1]:
                    encode -= angle(objective.encode(states[1][b, t]), objective.codebook[clean[b, t - 1]])
    sums, terms = losses(model, noisy), objective.terms(0, 0, torch.arange(2))
    assert sums["encode"].item() == pytest.approx(encode, rel=1e-5)
    assert sums["decode"].item() == pytest.approx(decode, rel=1e-5)
    assert terms == {"next_token": 2 * N, "encode": count, "decode": 2 * N}


@pytest.mark.parametrize("step", [0, 30, 75, 99])
def test_noise_replaces_the_share_that_its_law_says_and_ends_when_it_should(step):
    config = ModelConfig(2, 2, 16, (16, 16), vocabulary=5)
    samples = torch.arange(3000)
    clean = torch.randint(5, (3000, 256), generator=torch.Generator().manual_seed(1))
    batch = Rear(config, noise_until=75, weight=0).prepare(0, step, samples, samples % 3, clean)
    changed = (batch.codes != clean[:, :-1]).double()
    most = max(0.0, 1 - 4 / 3 * step / 100)  # of a run of 100 updates
    assert changed.mean().item() == pytest.approx(most / 2 * (1 - 1 / 5), abs=0.02)
    assert batch.targets is clean and torch.equal(batch.labels, samples % 3)
    if most == 0:
        assert torch.equal(batch.codes, clean[:, :-1])
        return
    shares = changed.mean(dim=1).sort().values / (most * (1 - 1 / 5))  # over sequences uniform in 0 .. 1
    assert shares[[750, 1500, 2250]].tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    drawn = torch.bincount(batch.codes[changed.bool()], minlength=5) / changed.sum()
    assert drawn.tolist() == pytest.approx([0.2] * 5, abs=0.02)


def test_noise_is_a_function_of_seed_step_and_sample():
    rear = Rear(ModelConfig(2, 2, 16, (4, 5), vocabulary=50), noise_until=9, weight=0)
    clean = torch.randint(50, (8, N), generator=torch.Generator().manual_seed(1))

    def noisy(seed=0, step=0, rows=range(8)):
        rows = list(rows)
        return rear.prepare(seed, step, torch.tensor(rows), torch.zeros(len(rows)), clean[rows]).codes

    assert torch.equal(noisy(rows=[6, 2]), noisy()[[6, 2]]) and torch.equal(noisy(), noisy())
    assert not torch.equal(noisy(seed=1), noisy()) and not torch.equal(noisy(step=1), noisy())


def test_the_vectors_are_the_tokenizers_as_its_decoder_sees_them_frozen_and_never_saved(run_training, tmp_path):
    trainer = run_training(*OPTIONS, "objective.code_dim=4", "train.ema=0.9")
    vectors, vq = trainer.model.objective.codebook, load_tokenizer(tmp_path / "vq")
    seen = vq.quantize.lookup(torch.arange(16)[None], (4, 4))[0].flatten(1).T  # (V, c): what the decoder is given
    assert torch.equal(vectors, seen) and vectors.dtype == torch.float32 and not vectors.requires_grad
    for group in ("model", "ema"):
        assert not [name for name in read_tensors(find_checkpoint(trainer.run_dir), group) if "codebook" in name]


def remove_tokenizer(tmp_path):
    (tmp_path / "vq").rename(tmp_path / "elsewhere")


def replace_tokenizer(tmp_path):
    from tiny_runs import write_tokenizer

    remove_tokenizer(tmp_path)
    write_tokenizer(tmp_path / "vq", seed=1, vocabulary=16)


@pytest.mark.parametrize("before, options, message", [
    (None, (), r"objective.code_dim is 8, but the codes of .*vq are vectors of 4 numbers; give objective.code_dim=4"),
    (remove_tokenizer, ("objective.code_dim=4",), "vq: no such file or folder; the run names it .* put it back there"),
    (replace_tokenizer, ("objective.code_dim=4",), "its weights have sha256 .* the codes of the run were made by a"),
])
def test_a_tokenizer_that_does_not_fit_is_one_line_before_the_model_is_built(before, options, message, run_file, tiny,
                                                                              tmp_path, monkeypatch):
    config = load_config(GeneratorConfig, run_file, [*OPTIONS, *options])
    if before:
        before(tmp_path)
    monkeypatch.setattr("mutor_img.pretraining.task.Transformer", None)
    with pytest.raises(UserError, match=message) as caught:
        GeneratorTask(config, Runtime.start())
    assert "\n" not in str(caught.value)
