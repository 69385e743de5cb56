"""Memory by formula is what torch keeps: bytes saved for the backward pass, and a whole step's peak (fake tensors)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from mutor_img.attention import flex_width
from mutor_img.blocks import Block, ModelConfig, RMSNorm
from mutor_img.chunked_loss import read_out_losses
from mutor_img.common.dropout import dropout, mask_keys, row_keys
from mutor_img.objectives.mutor import Mutor
from mutor_img.objectives.objective import Batch
from mutor_img.pretraining.memory import Step, block_bytes, logit_bytes, outer_bytes, read_out_bytes, step_memory
from mutor_img.registers import IGNORE, RegisterLaw, register_ids
from mutor_img.training.saved_bytes import SavedBytes, autocast_as_trained, fake_gpu
from mutor_img.transformer import Transformer


def saved_bytes(saved, model):
    """What was saved but for bf16 copies of weights, which are known by their shapes."""
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    return sum(x.untyped_storage().nbytes() for x in saved.tensors if tuple(x.shape) not in shapes)


@torch.library.custom_op("memory_test::flex", mutates_args=())
def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """A kernel that nothing looks into, with the shapes of FlexAttention's results: attention, log-sum-exp."""
    return [torch.zeros_like(q), torch.zeros(q.shape[:3], device=q.device)]


@torch.library.custom_op("memory_test::flex_backward", mutates_args=())
def flex_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor,
                  grad: torch.Tensor) -> list[torch.Tensor]:
    return [torch.zeros_like(q) for _ in range(3)]


flex.register_fake(lambda q, k, v: [torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)])
flex_backward.register_fake(lambda q, *others: [torch.empty_like(q) for _ in range(3)])
flex.register_autograd(lambda ctx, grads: tuple(flex_backward(*ctx.saved_tensors, grads[0])),
                       setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


class FlexStandIn:
    """For the model's own: pads and copies as it does."""

    def update(self, anchors):
        pass

    def __call__(self, q, k, v):
        width = q.shape[-1]
        padded = (torch.nn.functional.pad(x, (0, flex_width(width) - width)) for x in (q, k, v))
        return flex(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in padded))[0][..., :width]


def flash(q, k, v):
    """What scaled_dot_product_attention runs for plain causal rows on a GPU."""
    width = q.shape[-1]
    q, k, v = (torch.nn.functional.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0][..., :width]


def masked(length, registers):
    """The two calls that SDPA makes with registers, on the GPU's kernels."""

    def attend(q, k, v):
        regular = flash(q[:, :, :length], k[:, :, :length], v[:, :, :length])
        bias = torch.zeros(len(q), 1, registers, length + registers, dtype=q.dtype, device=q.device)
        bias = bias.expand(-1, q.shape[1], -1, -1)
        register = torch.ops.aten._scaled_dot_product_efficient_attention(q[:, :, length:], k, v, bias, True)[0]
        return torch.cat([regular, register], dim=2)

    return attend


CASES = [  # precision, dropout, registers, attention, preset, QK-norm
    ("bf16", 0.1, 0, "flash", "B", False), ("bf16", 0.0, 256, "flex", "B", False),
    ("bf16", 0.1, 80, "flex", "3B", False), ("bf16", 0.1, 0, "flash", "3B", False),
    ("bf16", 0.1, 80, "masked", "L", False), ("fp32", 0.1, 256, "flex", "B", False),
    ("bf16", 0.0, 0, "flash", "B", True), ("bf16", 0.0, 80, "flex", "B", True), ("fp32", 0.0, 0, "flash", "B", True),
    ("fp32", 0.0, 80, "flex", "B", True), ("fp32", 0.0, 0, "flash", "3B", True)]


@pytest.mark.parametrize("precision, dropout, registers, attention, preset, qk_norm", CASES)
def test_an_eager_block_keeps_the_bytes_of_the_formula(precision, dropout, registers, attention, preset, qk_norm):
    config = ModelConfig.preset(preset, dropout=dropout, register_offsets=(), qk_norm=qk_norm)
    with fake_gpu(precision):
        block = Block(config, 0.0)
        tokens = 256 + registers
        x = torch.empty(2, tokens, config.dim, requires_grad=True)
        rope = torch.empty(2, tokens, 2, config.dim // config.heads)
        attend = {"flash": flash, "flex": FlexStandIn(), "masked": masked(256, registers)}[attention]
        with SavedBytes([*block.parameters(), rope]) as saved:
            block(x, rope, attend, row_keys(mask_keys(0, 0, torch.arange(2, device=x.device), 2), *x.shape[1:]))
    step = Step(2, registers, precision, compiled=False, flex=attention == "flex")
    assert saved_bytes(saved, block) == pytest.approx(2 * tokens * block_bytes(config, step), rel=0.02)


def partitioned(graph, inputs):
    """What torch.compile's default backend does up to the cut into forward and backward, without making kernels."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, inner_compile=lambda part, example_inputs, **options: part)


@pytest.mark.parametrize("precision, dropout, attention, qk_norm", [
    ("bf16", 0.1, "flex", False), ("fp32", 0.0, "flash", False), ("bf16", 0.0, "flash", True)])
def test_a_compiled_block_keeps_the_bytes_of_the_formula(precision, dropout, attention, qk_norm):
    torch.manual_seed(0)
    config = ModelConfig(1, 8, 64, grid=(4, 8), vocabulary=96, classes=5, dropout=dropout, register_offsets=(),
                         qk_norm=qk_norm)
    model, registers = Transformer(config), 24 if attention == "flex" else 0
    block = model.layers[0]
    block.compile(backend=partitioned, dynamic=False)
    x = torch.randn(5, 32 + registers, 64, requires_grad=True)
    anchors = torch.arange(registers).expand(5, registers)
    ids = torch.cat([torch.arange(32).expand(5, -1), register_ids(anchors, torch.ones_like(anchors), 32)], dim=1)
    rope = model.rope(ids)
    attend = FlexStandIn() if registers else plain_causal
    with autocast_as_trained("cpu", precision), SavedBytes([*model.parameters(), rope]) as saved:
        block(x, rope, attend, row_keys(mask_keys(0, 0, torch.arange(5), 2), *x.shape[1:])).sum().backward()
    step = Step(5, registers, precision, compiled=True)
    assert saved_bytes(saved, model) == pytest.approx(5 * (32 + registers) * block_bytes(config, step), rel=0.05)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_dropout_keeps_its_keys_if_compiled_and_else_its_mask(compiled):
    config = ModelConfig(2, 2, 64, grid=(4, 8), vocabulary=96, classes=5, dropout=0.1)
    x = torch.randn(5, 32, 64, requires_grad=True)
    first, *_ = row_keys(mask_keys(0, 0, torch.arange(5), Transformer(config).places), *x.shape[1:])
    drop = torch.compile(dropout, backend=partitioned, dynamic=False, fullgraph=True) if compiled else dropout
    with SavedBytes([]) as saved:
        drop(x, first, config.dropout)
    turns = 2 * 4 * 32 / 5  # per token, of one sequence
    assert saved.bytes == pytest.approx(160 * (outer_bytes(config, Step(5, compiled=compiled)) - turns))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_compiled_read_out_keeps_the_bytes_of_the_formula_and_of_each_logit_the_logit_alone(precision):
    config = ModelConfig(1, 2, 64, grid=(4, 8), vocabulary=2048, classes=5)
    norm, head = RMSNorm(64), torch.nn.Linear(64, 2048, bias=False)
    x = torch.randn(5, 32, 64, requires_grad=True)
    targets = torch.randint(2048, (5, 32))
    compiled = torch.compile(read_out_losses, backend=partitioned, dynamic=False, fullgraph=True)
    step = Step(5, 0, precision)
    with autocast_as_trained("cpu", precision), SavedBytes([norm.weight, head.weight, targets]) as saved:
        [loss] = compiled(x, norm, head, [targets])
    logits = 160 * 2048 * step.width
    kept = sum(x.untyped_storage().nbytes() for x in saved.tensors if tuple(x.shape) not in ((2048, 64), (64, 2048)))
    assert loss.dtype == torch.float32
    assert kept - logits == pytest.approx(160 * read_out_bytes(config, step), rel=0.01)
    assert logit_bytes(config, step) == 2 * logits  # and in the backward pass as much again, for their gradient


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_compiled_read_out_has_the_loss_and_the_gradients_of_the_eager_one(precision):
    torch.manual_seed(0)
    norm, head = RMSNorm(64), torch.nn.Linear(64, 300, bias=False)
    x, targets = torch.randn(4, 9, 64), torch.randint(300, (4, 9))
    targets[1, 3] = IGNORE
    compiled, found = torch.compile(read_out_losses, backend=partitioned, dynamic=False, fullgraph=True), []
    for function in (read_out_losses, compiled):
        leaves = [x.clone().requires_grad_(), *norm.parameters(), *head.parameters()]
        with autocast_as_trained("cpu", precision):
            losses = function(leaves[0], norm, head, list(targets.split([5, 4], dim=1)))
        found.append((*losses, *torch.autograd.grad(sum(losses), leaves)))
    for mine, its in zip(*found):
        assert (mine - its).norm() <= {"bf16": 2e-2, "fp32": 1e-6}[precision] * its.norm()


def plain_causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def peak_of_an_update(config, step):
    """The most bytes that an update of two forward and backward passes holds, by category, by torch's own tracker."""
    with FakeTensorMode():
        model = Transformer(config)
        model.flex, model.objective = FlexStandIn(), Mutor(config, RegisterLaw("2d", config.grid), 0.5)
        if step.checkpointing:
            for block in model.layers:
                block.forward = checkpointed(block.forward)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        labels = torch.zeros(step.sequences, dtype=torch.int64)
        codes = torch.zeros(step.sequences, config.length, dtype=torch.int64)
        anchors = torch.zeros(step.sequences, step.registers, dtype=torch.int64)
        batch = Batch(labels, codes[:, :-1], codes, anchors, anchors + 1)
        for _ in range(2):  # the moments are there from the second update on
            with tracker:
                for _ in range(2):  # gradients of the first pass are there in the second
                    tracker.reset_mod_stats()
                    with autocast_as_trained("cpu", step.precision):
                        sums = model(within=lambda whole: whole.objective(whole, batch, step.loss_chunk))
                    sum(sums.values()).backward()
                optimizer.step()
                optimizer.zero_grad()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(name).rsplit(".", 1)[-1]: size for name, size in snapshot.items()}


def checkpointed(forward):
    return lambda *inputs: torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False)


@pytest.mark.parametrize("step", [
    Step(16, 256, compiled=False),
    Step(16, 256, compiled=False, loss_chunk=1024),
    Step(16, 80, compiled=False, checkpointing=True, loss_chunk=1024)], ids=["whole", "chunked", "checkpointed"])
def test_the_peak_of_an_update_is_the_plans_total(step):
    config = ModelConfig(2, 12, 768, dropout=0.0, register_offsets=())  # B, of two blocks: all twelve take a minute
    with torch.device("meta"):
        parameters = Transformer(config).parameter_count()
    peak = peak_of_an_update(config, step)
    assert step_memory(config, parameters, step).total == pytest.approx(peak["Total"], rel=0.06)


def test_dropout_and_registers_and_precision_each_change_the_plan():
    config = ModelConfig.preset("B", register_offsets=())
    base = step_memory(config, 10**8, Step(4, 80))
    assert step_memory(config, 10**8, Step(4, 256)).activations > 1.5 * base.activations
    assert step_memory(config, 10**8, Step(4, 80, "fp32")).activations > 1.5 * base.activations
    assert step_memory(config, 10**8, Step(4, 80, shards=8)).optimiser == base.optimiser / 8
    assert step_memory(config, 10**8, Step(4, 80, ema=True)).ema == base.weights
    undropped = step_memory(ModelConfig.preset("B", dropout=0.0, register_offsets=()), 10**8, Step(4, 80))
    masks, keys = 768 * 12, 8 * (1 + 2 * 12)  # a byte of each number after a feed-forward; 8 of each place's keys
    assert base.activations - undropped.activations == 4 * 336 * (masks + keys)
