"""The cost model's FLOPs and bytes are those that torch counts; its times are near those that were measured."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_memory import FlexStandIn, flash, flex, plain_causal
from timm.utils import ModelEmaV3
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mutor_img.attention import FlexAttention
from mutor_img.blocks import Block, ModelConfig, RMSNorm, RotaryTable
from mutor_img.chunked_loss import read_out_losses
from mutor_img.common.config import OptimConfig, load_config
from mutor_img.common.dropout import mask_keys, row_keys
from mutor_img.pretraining import cost
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.cost import (
    Device,
    attention_cells,
    block_traffic,
    cell_flops,
    logit_traffic,
    update_cost,
    weight_traffic,
)
from mutor_img.pretraining.memory import Step
from mutor_img.pretraining.plan import planned_cost, shapes
from mutor_img.registers import RegisterLaw
from mutor_img.training.optimizer import build_optimizer, clip_gradients, take_step
from mutor_img.training.saved_bytes import autocast_as_trained
from mutor_img.training.trainer import Trainer
from mutor_img.transformer import Transformer

FOLDER = Path(__file__).parents[2] / "configs" / "imagenet256"
GRID, DEVICE = (16, 16), Device(989e12)
DENSE, SPARSE, PLAIN = RegisterLaw("2d", GRID), RegisterLaw("2d", GRID, 4, 80), RegisterLaw("none", GRID)


VIEWS = ("detach", "_unsafe_view", "empty_like")
AT_TARGETS = ("gather", "scatter_add_", "nll_loss_forward", "nll_loss_backward")  # of what they are given, one per row


class Traffic(TorchDispatchMode):
    """Counts the bytes that each operation reads and writes, views apart."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not views and name not in VIEWS:
            given = [(argument.alias_info, tensor) for argument, value in zip(func._schema.arguments, args)
                     for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor)]
            changed = [tensor for alias, tensor in given if alias and alias.is_write]
            made = [] if changed else [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            counted = made if name in AT_TARGETS else [x for _, x in given] + changed + made
            if changed or made:
                self.bytes[name] += sum(x.numel() * x.element_size() for x in counted)
        return out


def fused(found):
    """A backend that notes what each kernel that torch.compile writes reads and writes: {buffer: bytes}; none is made.

    A GPU's way to join tensors is asked for: on CPUs they go through memory.
    """
    def count(part, inputs, **options):
        record_original_output_strides(part)
        graph = GraphLowering(part, example_inputs=inputs, is_backward=options.get("is_backward", False))
        with (V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()),
              V.set_fake_mode(detect_fake_mode(inputs)), torch._inductor.config.patch(force_pointwise_cat=True)):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            found.extend(node.get_read_write_buffer_accesses(True, True) for node in graph.scheduler.nodes
                         if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode)))
        return part

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=count)


@pytest.mark.parametrize("precision, dropout, registers", [("bf16", 0.1, 0), ("fp32", 0.0, 0), ("bf16", 0.1, 8)])
def test_a_compiled_blocks_kernels_read_and_write_the_bytes_of_the_formula(precision, dropout, registers):
    torch.manual_seed(0)
    config, kernels, batch = ModelConfig(1, 2, 64, (4, 8), dropout=dropout), [], 400  # weights are few beside tokens
    block = Block(config, 0.0)
    block.compile(backend=fused(kernels), dynamic=False)
    x, rope = torch.randn(batch, 32, 64, requires_grad=True), RotaryTable((4, 8), 32)(torch.arange(32))[None]
    with autocast_as_trained("cpu", precision):
        keys = row_keys(mask_keys(0, 0, torch.arange(batch), 2), *x.shape[1:])
        attend = FlexStandIn() if registers else plain_causal
        block(x, rope.expand(batch, -1, -1, -1).contiguous(), attend, keys).sum().backward()
    counted = sum(sum(kernel.values()) for kernel in kernels) / x[..., 0].numel()
    assert counted == pytest.approx(block_traffic(config, Step(batch, registers, precision)), rel=0.05)
    if precision == "bf16":  # beside them 5 products, 10 for the gradients, and 3 kernels of attention
        assert len(kernels) + 18 == pytest.approx(41, abs=2)  # docs/gpu.md


def test_an_eager_block_reads_and_writes_about_five_times_as_much():
    config = ModelConfig.preset("B", dropout=0.1)
    with FakeTensorMode(), autocast_as_trained("cpu", "bf16"):
        block = Block(config, 0.0)
        x, rope = torch.empty(64, 256, 768, requires_grad=True), torch.empty(1, 256, 2, 64)
        with Traffic() as traffic:
            keys = row_keys(mask_keys(0, 0, torch.arange(64), 2), *x.shape[1:])
            block(x, rope, lambda q, k, v: flex(q, k, v)[0], keys).sum().backward()
    counted = sum(size for name, size in traffic.bytes.items() if name not in ("mm", "flex", "flex_backward"))
    assert counted / x[..., 0].numel() == pytest.approx(block_traffic(config, Step(64, compiled=False)), rel=0.15)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiled_logits_are_read_and_written_as_often_as_torch_compiles_it(precision):
    norm, head, kernels = RMSNorm(64), torch.nn.Linear(64, 2048, bias=False), []
    x, targets = torch.randn(5, 32, 64, requires_grad=True), torch.randint(2048, (5, 32))
    compiled = torch.compile(read_out_losses, backend=fused(kernels), dynamic=False, fullgraph=True)
    with autocast_as_trained("cpu", precision):
        compiled(x, norm, head, [targets])[0].backward()
    step = Step(5, precision=precision)
    logits = 160 * 2048 * step.width
    passes = sum(size == logits for kernel in kernels for size in kernel.values())
    assert passes == 4  # the largest and the sum, which a GPU finds in one pass; read and written on the way back
    assert logit_traffic(step) == (passes - 1 + 3) * step.width  # and the head's products: one writes, two read


@pytest.mark.parametrize("law", [
    DENSE, SPARSE, RegisterLaw("2d", GRID, 4, every=2), RegisterLaw("2d", (10, 10), 4, 60),
    RegisterLaw("1d", (10, 15), 3, every=3)], ids=str)
def test_attention_visits_the_blocks_of_the_mask_that_flex_attention_is_given(law):
    flex = FlexAttention(law.length, law.draw(0, 0, torch.arange(3))[0], fixed_anchors=law.count is None)
    mask = flex.block_mask
    blocks = mask.kv_num_blocks.sum() + (0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks.sum())
    assert attention_cells(law, seed=0) == blocks * 128**2


def test_without_registers_attention_visits_the_causal_blocks_and_a_mask_of_numbers_is_visited_whole():
    assert attention_cells(PLAIN, 0) == 3 * 128**2
    assert attention_cells(SPARSE, 0, flex=False) == 3 * 128**2 + 80 * 336


def test_a_pair_of_query_and_key_costs_the_flops_that_torch_counts_of_a_fused_kernel():
    config = ModelConfig(1, 3, 3 * 64, (8, 16))
    q, k, v = (torch.empty(2, 3, 128, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        flash(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * 128**2 * cell_flops(config, Step(2))
    padded = ModelConfig(1, 2, 2 * 100, (8, 16))
    assert cell_flops(padded, Step(2, 80)) == 128 / 104 * cell_flops(padded, Step(2))


def test_checkpointing_computes_all_products_of_a_block_again_but_the_last():
    config, flops = ModelConfig(1, 2, 64, (4, 8), dropout=0.0), []
    block = Block(config, 0.0)
    x, rope = torch.randn(2, 32, 64, requires_grad=True), RotaryTable((4, 8), 32)(torch.arange(32))[None]
    for run in (block, lambda *given: checkpoint(block, *given, use_reentrant=False)):
        with FlopCounterMode(display=False) as counter:
            run(x, rope, lambda q, k, v: v).sum().backward()
        flops.append(counter.get_total_flops())
    given = {"passes": 1, "flops": 1.0, "attended": 0.0, "cells": 0.0, "device": DEVICE}
    once, again = (update_cost(config, 1, Step(2, checkpointing=on), **given).products for on in (False, True))
    assert (again - once) * cost.PRODUCTS * DEVICE.flops == pytest.approx(flops[1] - flops[0])


@pytest.mark.parametrize("precision, rows", [("bf16", 0), ("fp32", 0), ("bf16", 128), ("fp32", 128)])
def test_eager_and_chunked_logits_are_read_and_written_as_often_as_torch_does(precision, rows):
    norm, head = RMSNorm(8), torch.nn.Linear(8, 2048, bias=False)
    x, targets = torch.randn(4, 64, 8, requires_grad=True), torch.randint(2048, (4, 64))
    with autocast_as_trained("cpu", precision), Traffic() as traffic:
        read_out_losses(x, norm, head, [targets], rows)[0].backward()
    step = Step(4, precision=precision, compiled=False, loss_chunk=rows)
    assert sum(traffic.bytes.values()) / (256 * 2048) == pytest.approx(logit_traffic(step), rel=0.1)


@pytest.mark.parametrize("ema", [False, True])
def test_an_update_reads_and_writes_each_parameter_as_often_as_counted(ema):
    config = ModelConfig(1, 2, 64, (4, 8), vocabulary=32, classes=3)
    model = Transformer(config)
    optimizer, no = build_optimizer(model, OptimConfig()), torch.tensor(False)
    trainer = SimpleNamespace(model=model, ema=ModelEmaV3(model, 0.9), step=3)
    for _ in range(2):  # the first update also makes the moments
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        with Traffic() as traffic:
            clip_gradients(model.parameters(), 1.0)  # which are longer
            take_step(optimizer, 1e-3, no)
            if ema:
                Trainer._average(trainer, no)
    parameters = model.parameter_count()
    expected = weight_traffic(config, parameters, Step(4, precision="fp32", ema=ema), 1)
    expected += 4 * parameters  # by its schema AdamW writes gradients, too: scaled ones, which there are none of
    assert sum(traffic.bytes.values()) == pytest.approx(expected, rel=0.01)


def test_bf16_copies_a_matrix_and_widens_its_gradient_in_each_pass():
    config = ModelConfig(1, 2, 64, (4, 8), vocabulary=32, classes=3)
    linear, x = torch.nn.Linear(64, 256, bias=False), torch.randn(1, 64)
    with Traffic() as traffic:
        for _ in range(2):
            with autocast_as_trained("cpu", "bf16"):
                linear(x).sum().backward()
    matrices = 4 * 64**2 + 3 * 64 * 256 + 32 * 64
    bytes_of = [weight_traffic(config, matrices, Step(1, precision=name), 2) for name in ("bf16", "fp32")]
    copies = traffic.bytes["_to_copy"] / linear.weight.numel()
    sums = (traffic.bytes["add_"] + traffic.bytes["add"]) / linear.weight.numel()
    assert (bytes_of[0] - bytes_of[1]) / matrices == pytest.approx(copies, rel=0.02)
    assert bytes_of[1] / matrices - 40 == pytest.approx(sums, rel=0.02)


# ---- properties


def at(sequences=128, passes=1, device=None, preset="B", law=DENSE, **switches):
    config = ModelConfig.preset(preset, register_offsets=())
    return update_cost(config, 10**8, Step(sequences, law.registers, **switches), passes, flops=3e11, attended=4e9,
                       cells=attention_cells(law, 0), device=device or DEVICE)


def test_twice_the_batch_is_twice_each_term_but_the_optimisers():
    one, two = at(), at(256)
    for term in ("products", "attention", "blocks", "read_out", "flops"):
        assert getattr(two, term) == pytest.approx(2 * getattr(one, term))
    assert two.optimiser == one.optimiser and two.mfu > one.mfu


def test_two_passes_work_as_one_of_twice_the_size_and_copy_the_weights_twice():
    one, two = at(), at(64, 2)
    for term in ("products", "attention", "blocks", "read_out", "flops"):
        assert getattr(two, term) == pytest.approx(getattr(one, term))
    assert two.optimiser > one.optimiser and at(shards=8).optimiser < one.optimiser


def test_a_faster_memory_speeds_up_bytes_and_a_higher_peak_flops():
    slow, wide, quick = at(), at(device=Device(DEVICE.flops, 2 * DEVICE.memory)), at(
        device=Device(2 * DEVICE.flops, DEVICE.memory))
    for term, device in (("products", quick), ("attention", quick), ("blocks", wide), ("read_out", wide),
                         ("optimiser", wide)):
        assert getattr(device, term) == pytest.approx(getattr(slow, term) / 2)
        assert sum(getattr(other, term) == getattr(slow, term) for other in (wide, quick)) == 1


def test_the_model_never_reaches_more_than_its_products_do():
    assert 0 < at(1).mfu < at(8).mfu < at(128).mfu < at(10**6).mfu < cost.PRODUCTS


def test_with_few_tokens_the_cpu_sets_the_pace():
    launches = cost.LAUNCH * 12
    assert at(1).seconds == pytest.approx(launches) == pytest.approx(at(2).seconds) and at(128).rest == cost.REST
    assert at(1, passes=4).seconds == pytest.approx(4 * launches)


# ---- seven updates of B on one H100 (docs/gpu.md)

MEASURED = {  # config, sequences, checkpointing: ms per update, idle share
    ("ntp_b", 128, False): (58.4, 0.096),
    ("mutor2d_b_80", 128, False): (85.4, 0.088),
    ("mutor2d_b", 128, False): (118.4, 0.052),
    ("ntp_b", 32, False): (26.5, 0.387),
    ("mutor2d_b_80", 32, False): (33.9, 0.320),
    ("mutor2d_b", 32, False): (38.0, 0.180),
    ("mutor2d_b", 32, True): (47.9, 0.211),
}


def computed(name, sequences, checkpointing):
    config = load_config(GeneratorConfig, FOLDER / f"{name}.yaml", [
        f"plan.devices={1024 // sequences}", f"train.activation_checkpointing={checkpointing}"])
    return planned_cost(config, *shapes(config))


@pytest.fixture(scope="module")
def rows():
    """Per row ms measured, ms busy, and ms by the model: of products at the peak, and of other work."""
    found = []
    for row, (ms, idle) in MEASURED.items():
        says = computed(*row)
        found.append((ms, ms * (1 - idle), 1000 * cost.PRODUCTS * says.products, 1000 * (says.work - says.products)))
    return np.array(found)


def fitted(rows):
    """Return 1 / PRODUCTS and the parts of REST in ms by least squares of relative errors, busy time first."""
    ms, busy, products, others = rows.T
    terms = np.stack([products, np.ones_like(busy)], 1)
    slope, small = np.linalg.lstsq(terms / busy[:, None], 1 - others / busy, rcond=None)[0]
    return slope, small, np.average(ms - busy, weights=ms**-2)


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_an_update_that_was_measured_takes_what_the_model_says(row):
    assert 1000 * computed(*row).seconds == pytest.approx(MEASURED[row][0], rel=0.08)


@pytest.mark.parametrize("name", ["ntp_b", "mutor2d_b_80", "mutor2d_b"])
def test_with_more_sequences_the_device_is_busy_for_longer_by_what_the_shares_say(name):
    many, few = ((name, count, False) for count in (128, 32))
    busy = [ms * (1 - idle) for ms, idle in (MEASURED[many], MEASURED[few])]
    assert 1000 * (computed(*many).work - computed(*few).work) == pytest.approx(busy[0] - busy[1], rel=0.01)


def test_the_fitted_constants_are_those_of_least_squares(rows):
    slope, small, idle = fitted(rows)
    assert 1 / slope == pytest.approx(cost.PRODUCTS, abs=0.005)
    assert small == pytest.approx(2.1, abs=0.05) and small + idle == pytest.approx(1000 * cost.REST, abs=0.05)


def test_a_row_that_is_left_out_of_the_fit_is_predicted_within_nine_percent(rows):
    errors = []
    for number, (ms, busy, products, others) in enumerate(rows):
        slope, small, idle = fitted(np.delete(rows, number, 0))
        work = slope * products + others + small
        errors.append((work / busy - 1, (work + idle) / ms - 1))
    of_busy, of_all = np.abs(errors).T
    assert of_busy.max() < 0.035 and of_all.max() < 0.09
