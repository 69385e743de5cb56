"""What holds for every objective: a run that goes on, weights that sampling never sees, costs, and refusals."""

import copy
from pathlib import Path

import pytest
import torch

from mutor_img import load_checkpoint
from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.convert import main as convert
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.plan import plan_generator
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer, sampled_weights

NEXT_TOKEN = ("registers.kind=none",)
HEADS = (*NEXT_TOKEN, "objective.kind=parallel-heads")
REAR = (*NEXT_TOKEN, "objective.kind=rear", "objective.code_dim=4")
MIRAI = (*NEXT_TOKEN, "objective.kind=mirai", "train.ema=0.5")
PATCHES = (*NEXT_TOKEN, "objective.kind=npp")
# On 4 x 4 codes: what switches an objective off, and its settings.
OFF = {
    "parallel heads": (("objective.weight=0",), (*HEADS, "objective.offsets=[2,6]")),
    "sequential heads": (("objective.weight=0",), (*NEXT_TOKEN, "objective.kind=sequential-heads",
                                                   "objective.depths=2")),
    "heads with an output": (("objective.weight=0",), (*HEADS, "objective.offsets=[5]", "objective.tap_from_end=0",
                                                       "objective.blocks=2", "objective.own_output=true")),
    "mirai": (("objective.weight=0",), MIRAI),
    "mirai, before its start": (("objective.starts_at=1",), (*MIRAI, "objective.offsets=[0,9]")),
    "npp": (("objective.patches=[1]", "objective.stage_ends=[]"), (*PATCHES, "objective.stage_ends=[1]")),
    "rear": (("objective.weight=0", "objective.noise_until=0"), (*REAR, "objective.noise_until=2")),
}
OBJECTIVES = {name: overrides for name, (_, overrides) in OFF.items()}


def build(run_file, *overrides):
    """Return the task of a small run, its output head drawn: from zeros no gradient passes."""
    config = load_config(GeneratorConfig, run_file, overrides)
    task = GeneratorTask(config, Runtime.start())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(task.model.output.weight)
    return task


def loss_of(task, samples, step=0):
    """Return the loss and its parts, with a copy of the model for its average."""
    return task.loss(task.model, step, samples, copy.deepcopy(task.model).eval())


def gradients(task, step=0):
    """Return the loss of the first four samples, and the gradients of what is sampled from, by name."""
    loss, _ = loss_of(task, torch.arange(4), step)
    weights = sampled_weights(dict(task.model.named_parameters()))
    return loss, dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


@pytest.mark.parametrize("name", OFF)
def test_switched_off_it_is_next_token_prediction_bit_for_bit(name, run_file, tiny):
    off, overrides = OFF[name]
    plain = gradients(build(run_file, *NEXT_TOKEN, "model.dropout=0.1"))
    found = gradients(build(run_file, *overrides, *off, "model.dropout=0.1"))
    assert found[0].item() == plain[0].item() and found[1].keys() == plain[1].keys()
    for weight, gradient in plain[1].items():
        assert torch.equal(found[1][weight], gradient), weight
    on = gradients(build(run_file, *overrides, "model.dropout=0.1"))
    assert on[0].item() != plain[0].item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_weight_has_a_gradient_at_the_first_update(name, run_file, tiny):
    config = load_config(GeneratorConfig, run_file, OBJECTIVES[name])
    task = GeneratorTask(config, Runtime.start())
    loss_of(task, torch.arange(4))[0].backward()
    assert not [name for name, weight in task.model.named_parameters() if weight.grad is None]


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_does_not_depend_on_the_cut_into_micro_batches(name, drop_path, run_file, tiny):
    task = build(run_file, *OBJECTIVES[name], "model.dropout=0.1", f"model.drop_path={drop_path}")
    whole, *parts = (loss_of(task, samples) for samples in (torch.arange(4), *torch.arange(4).split(1)))
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole[0].item(), rel=1e-5)
    for value in whole[1]:
        assert sum(values[value].item() for _, values in parts) == pytest.approx(whole[1][value].item(), rel=1e-5)
    assert set(whole[1]) <= set(task.headline)


@pytest.mark.parametrize("name", ["parallel heads", "sequential heads", "heads with an output"])
def test_each_block_drops_by_keys_of_its_own(name, run_file, tiny):
    task, seen = build(run_file, *OBJECTIVES[name], "model.dropout=0.1"), []
    blocks = task.blocks(task.model)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[3]))
    loss_of(task, torch.arange(4))
    assert len(blocks) > len(task.model.layers) and len(seen) == len(blocks)
    assert len({keys.numpy().tobytes() for keys in seen}) == len(blocks)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(name, run_training, tmp_path):
    options = (*OBJECTIVES[name], "model.dropout=0.1", "train.ema=0.9")
    whole = run_training(f"run_dir={tmp_path / 'whole'}", *options)
    run_training(f"run_dir={tmp_path / 'parts'}", *options, "train.steps=1")
    parts = run_training(f"run_dir={tmp_path / 'parts'}", *options)
    for group in ("model", "ema", "optimizer"):
        files = [find_checkpoint(trainer.run_dir) / f"{group}.safetensors" for trainer in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert set(whole.task.model.objective.weights(0, 3)) <= set(read_metrics(whole.run_dir)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loaders_drop_what_only_training_used_and_nothing_else(name, run_training, run_file, tmp_path):
    trainer = run_training(*OBJECTIVES[name])
    model = load_checkpoint(trainer.run_dir)
    plain = Transformer(model.config)
    plain.load_state_dict(sampled_weights(trainer.best_model.state_dict()))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(weight, plain.state_dict()[key]) for key, weight in model.state_dict().items())
    saved = read_tensors(find_checkpoint(trainer.run_dir), "model")
    beside = sum(weight.numel() for key, weight in saved.items() if key.startswith("objective."))
    assert beside == trainer.task.model.objective.extra_parameters()

    convert(["--source", str(trainer.run_dir), "--out", str(tmp_path / "sampled.pt")])
    assert not [key for key in torch.load(tmp_path / "sampled.pt")["model"] if key.startswith("objective.")]
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "trained.pt")
    load_checkpoint(tmp_path / "trained.pt", grid=(4, 4), heads=2)
    torch.save({"model": {**plain.state_dict(), "objectives.weight": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"unknown weight 'objectives\.weight'"):
        load_checkpoint(tmp_path / "other.pt", grid=(4, 4), heads=2)

    for objective in (OBJECTIVES[name], NEXT_TOKEN):
        config = load_config(GeneratorConfig, run_file, [f"init_from={trainer.run_dir}", f"run_dir={tmp_path}/new",
                                                         *objective])
        started = GeneratorTask(config, Runtime.start()).model
        assert torch.equal(started.output.weight, model.output.weight)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective_is_another_run(name, run_training):
    run_training(*NEXT_TOKEN)
    with pytest.raises(UserError, match=r"objective\.kind mutor, now it is .* which is another run"):
        run_training(*OBJECTIVES[name], "train.steps=5")


@pytest.mark.parametrize("override, message", [
    (("objective.kind=parallel",), r"objective.kind is 'parallel'; did you mean 'parallel-heads'"),
    (("objective.kind=parallel-heads", "registers.kind=2d"), "parallel-heads has no registers; give registers.ki"),
    (("objective.kind=sequential-heads", "registers.kind=none", "objective.late_weight=0.2"),
     "objective.late_weight is 0.2, but no update is given from which it holds"),
    (("objective.weight=0.5",), "objective.weight is no setting of objective.kind=mutor; its settings are under"),
    ((*HEADS, "objective.offsets=[2,2]"), r"objective.offsets is \[2, 2\]; give different offsets between 1 and 16"),
    ((*HEADS, "objective.offsets=[17]"), r"objective.offsets is \[17\]"),
    ((*HEADS, "objective.tap_from_end=7"), r"objective.tap_from_end is 7; give a value in \[0, 2\]"),
    ((*HEADS, "objective.blocks=0"), r"objective.blocks is 0"),
    ((*HEADS, "objective.weight=1.5"), r"objective.weight is 1.5"),
    ((*HEADS, "objective.depths=2"), "objective.depths is no setting of objective.kind=parallel-heads; it has offsets"),
    (REAR, "objective.noise_until is not given; objective.kind=rear needs it"),
    ((*REAR, "objective.noise_until=-1"), "objective.noise_until is -1"),
    ((*REAR, "objective.noise_until=1", "objective.mlp_layers=4"), r"objective.mlp_layers is 4; .* \[2, 3\]"),
    ((*REAR, "objective.noise_until=1", "registers.kind=1d"), "objective.kind=rear has no registers"),
    (MIRAI[:2], "objective.kind=mirai learns from averaged weights, but train.ema is 0.0; give a decay"),
    ((*MIRAI, "objective.offsets=[16]"), r"objective.offsets is \[16\]; give different offsets between 0 and 15"),
    ((*MIRAI, "objective.tap=3"), r"objective.tap is 3; give a value in \[1, 2\]"),
    ((*MIRAI, "registers.kind=1d"), "objective.kind=mirai has no registers"),
    (PATCHES, r"objective.stage_ends is \[\]; for objective.patches=\[2, 1\] give 1 rising update"),
    ((*PATCHES, "objective.patches=[4,2,1]", "objective.stage_ends=[5,5]"), r"is \[5, 5\]; .* give 2 rising"),
    ((*PATCHES, "objective.stage_ends=[0]"), r"stage_ends is \[0\]"),
    ((*PATCHES, "objective.patches=[1,2]", "objective.stage_ends=[5]"), r"objective.patches is \[1, 2\]; give .* fall"),
    ((*PATCHES, "objective.patches=[4,2]", "objective.stage_ends=[5]"), r"objective.patches is \[4, 2\]; give .* to 1"),
    ((*PATCHES, "objective.stage_ends=[5]", "model.grid=[4,5]"), "patches of 2 x 2 do not fill 4 x 5 codes"),
    ((*PATCHES, "objective.stage_ends=[5]", "registers.kind=2d"), "npp has no registers; give registers.ki"),
    ((*NEXT_TOKEN, "objective.kind=sequential-heads", "objective.depths=16"), r"objective.depths is 16; .* \[1, 15\]"),
])
def test_what_cannot_be_is_one_line_before_anything_is_built(override, message, run_file, tiny):
    with pytest.raises(UserError, match=message) as caught:
        load_config(GeneratorConfig, run_file, override)
    assert "\n" not in str(caught.value)


B = Path(__file__).parents[2] / "configs" / "imagenet256" / "ntp_b.yaml"


@pytest.mark.parametrize("overrides, parameters, ratio", [
    ((), 0, 1.0), (("registers.kind=2d",), 0, 2.0), (("registers.kind=2d", "registers.count=80"), 0, 1.31),
    (("registers.kind=set", "registers.offsets=[3,5,7]"), 0, 2.0),
    (("objective.kind=parallel-heads", "objective.offsets=[2]"), 7_079_424, 1.198),
    (("objective.kind=parallel-heads", "objective.offsets=[2,17]"), 2 * 7_079_424, 1.384),
    (("objective.kind=parallel-heads", "objective.offsets=[2,3,4]"), 3 * 7_079_424, 1.592),
    (("objective.kind=parallel-heads", "objective.offsets=[16]", "objective.tap_from_end=0", "objective.blocks=2",
      "objective.own_output=true"), 26_741_760, 1.27),
    (("objective.kind=sequential-heads",), 8_261_376, 1.210),
    (("objective.kind=rear", "objective.noise_until=9"), 3_182_608, 1.032),
    (("objective.kind=rear", "objective.noise_until=9", "objective.mlp_layers=3"), 11_575_312, 1.116),
    (("objective.kind=rear", "objective.noise_until=9", "objective.weight=0"), 0, 1.000),
    (("objective.kind=mirai", "train.ema=0.9999"), 22_034_688, 1.415),
    (("objective.kind=npp", "objective.stage_ends=[180000]"), 0, 0.623),
    (("objective.kind=npp", "objective.patches=[4,2,1]", "objective.stage_ends=[90000,180000]"), 0, 0.577)])
def test_the_plan_names_what_is_trained_and_computed_beside_next_token_prediction(overrides, parameters, ratio):
    sections = plan_generator(load_config(GeneratorConfig, B, overrides))
    assert sections["model"]["of the objective, dropped after training"] == parameters
    found = sections["per update"]["times the FLOPs of next-token prediction"]
    assert found == pytest.approx(ratio, rel=0.01)
