"""What is checked: attention, training steps, decoding, collectives. Each check returns a detail or raises.

The bodies run on CPUs too, as far as torch goes there: FlexAttention has no backward, and decoding no CUDA graph.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.common.config import OptimConfig, TrainConfig
from mutor_img.decoding.drafting import SOURCES
from mutor_img.decoding.sampler import generate
from mutor_img.pretraining.examination import BATCH, HEADS, Subject, examine
from mutor_img.pretraining.parity import Difference, compare_attention, draw_at_scale_one, rms_difference
from mutor_img.registers import RegisterLaw, mutor_loss
from mutor_img.training.compiling import compile_blocks, compile_whole
from mutor_img.training.optimizer import build_optimizer
from mutor_img.training.parallel import distribute
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import PRESETS, ModelConfig, Transformer

GRID = (16, 16)
HEAD_DIMS = sorted({dim // heads for _, heads, dim in PRESETS.values()})
LAWS = {f"{kind} {name}": RegisterLaw(kind, GRID, 4, **switches) for kind in ("1d", "2d") for name, switches in {
    "dense": {}, "sparse": {"count": 80}, "every 2": {"every": 2}, "mixed": {"count": 80, "mixed": True}}.items()}
PLAIN = RegisterLaw("none", GRID)


class CheckFailed(Exception):
    """A check found something wrong; the message says what, a line each."""


@dataclass(frozen=True)
class Place:
    """Where checks run.

    Attributes:
        device: the GPU, or a CPU for as much of each check as runs there.
        backend: torch.compile's.
    """

    device: torch.device
    backend: str = "inductor"

    @property
    def flex(self) -> bool:
        """Whether FlexAttention can train here."""
        return self.device.type == "cuda"

    def compiled(self, function: Callable) -> Callable:
        """Return the function compiled as training compiles."""
        return compile_whole(function, self.backend)

    def autocast(self, precision: str) -> torch.autocast:
        """Return the autocast of a run of that precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of q, k and v in a run of that precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def expect(differences: list[Difference]) -> str:
    """Return the worst of the differences in words; raises :class:`CheckFailed` if rounding does not explain all."""
    failed = [str(d) for d in differences if not d.passed]
    if failed:
        raise CheckFailed("\n".join(failed))
    worst = max(d.error / d.allowed for d in differences)
    return f"{len(differences)} tensors, the worst at {worst:.2f} of what rounding allows"


def check_preflight(place: Place, law: RegisterLaw, head_dim: int, precision: str) -> str:
    """Compiled FlexAttention against exact attention, alone and in a compiled block, as before each run."""
    subject = Subject(law, head_dim, precision, 0, str(place.device), gradients=place.flex)
    found = examine(subject, FlexAttention, place.compiled)
    if found.error:
        raise CheckFailed(found.error)
    return expect([difference for _, difference in found.differences])


def check_sdpa(place: Place, law: RegisterLaw, head_dim: int, precision: str, compiled: bool) -> str:
    """The backend that runs fall back to, and that next-token prediction uses, against exact attention."""
    anchors = None if law.kind == "none" else law.draw(0, 0, torch.arange(BATCH))[0].to(place.device)
    attend = SdpaAttention(law.length, anchors)
    seen = torch.zeros(BATCH, 0, dtype=torch.int64, device=place.device) if anchors is None else anchors
    run = place.compiled(lambda q, k, v: attend(q, k, v)) if compiled else attend
    return expect(compare_attention(run, seen, law.length, heads=HEADS, head_dim=head_dim, dtype=dtype_of(precision),
                                    seed=0))


def check_one_mask(place: Place, law: RegisterLaw, head_dim: int = 64, draws: int = 10) -> str:
    """One BlockMask and one compilation for many draws of anchors."""
    differences, samples = [], torch.arange(BATCH)
    flex = FlexAttention(law.length, law.draw(0, 0, samples)[0].to(place.device), fixed_anchors=law.count is None)
    run = place.compiled(lambda q, k, v: flex(q, k, v))
    for step in range(draws):
        anchors = law.draw(0, step, samples)[0].to(place.device)
        flex.update(anchors)
        with torch.compiler.set_stance("fail_on_recompile") if step else nullcontext():
            differences += compare_attention(run, anchors, law.length, heads=HEADS, head_dim=head_dim,
                                             dtype=torch.bfloat16, seed=step, gradients=place.flex)
    return f"{draws} draws, compiled once; {expect(differences)}"


class Step:
    """Training steps of a model on random codes: the loss and its gradients."""

    def __init__(self, place: Place, law: RegisterLaw, model: Transformer, batch: int):
        self.place, self.law, self.model = place, law, model.to(place.device).train()
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(model.config.vocabulary, (batch, law.length), generator=generator).to(place.device)
        self.samples = torch.arange(batch, device=place.device)

    def registers(self, number: int) -> tuple[Tensor, ...]:
        """Return anchors and offsets of update ``number``, or nothing."""
        return () if self.law.kind == "none" else self.law.draw(0, number, self.samples)

    def compile(self, flex: bool) -> Step:
        """Compile the blocks in place, with FlexAttention for registers if so asked."""
        compile_blocks(self.model.layers, self.place.backend)
        if flex and self.law.kind != "none":
            self.model.use_flex(self.registers(0)[0], fixed=self.law.count is None)
        return self

    def backward(self, number: int, precision: str, wrapped: nn.Module | None = None) -> Tensor:
        """Run update ``number`` forward and backward; returns the loss."""
        registers = self.registers(number)
        with self.place.autocast(precision):
            out = (wrapped or self.model)(self.samples % self.model.config.classes, self.codes[:, :-1], *registers)
            loss = mutor_loss(*(out if registers else (out, None)), self.codes, *registers)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def tensors(self, number: int, precision: str, wrapped: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the loss and every gradient of update ``number`` by name."""
        loss = self.backward(number, precision, wrapped)
        return {"loss": loss, **{f"gradient of {name}": weight.grad.clone()
                                 for name, weight in self.model.named_parameters()}}


def small_model(law: RegisterLaw, head_dim: int) -> Transformer:
    """Return two layers and two heads whose logits have scale 1."""
    config = ModelConfig(2, HEADS, HEADS * head_dim, law.grid, vocabulary=64, classes=10, dropout=0.0,
                         register_offsets=None if law.kind == "none" else ())
    return draw_at_scale_one(Transformer(config), seed=0)


def check_training_step(place: Place, law: RegisterLaw, head_dim: int, precision: str) -> str:
    """The loss and every gradient of compiled updates against uncompiled fp32 SDPA; compiled once for all draws."""
    with torch.random.fork_rng():
        model = small_model(law, head_dim)
        exact, plain = Step(place, law, model, 2), Step(place, law, copy.deepcopy(model), 2)
        fast = Step(place, law, copy.deepcopy(model), 2).compile(flex=place.flex)
        differences = []
        for number in range(3):
            with torch.compiler.set_stance("fail_on_recompile") if number else nullcontext():
                found = fast.tensors(number, precision)
            one, two = plain.tensors(number, precision), exact.tensors(number, "fp32")
            differences += [rms_difference(name, found[name], one[name], two[name], precision) for name in found]
    torch.compiler.reset()
    return expect(differences)


def check_decoding(place: Place, cfg_scale: float) -> str:
    """Cached decoding (on GPUs one CUDA graph a token) gives the codes of the uncached argmax loop."""
    law = RegisterLaw("none", (8, 8))
    model = small_model(law, 64).to(place.device).eval()
    labels = torch.arange(4, device=place.device)
    nulls = torch.full_like(labels, model.config.classes)
    codes = torch.zeros(len(labels), 0, dtype=torch.int64, device=place.device)
    with torch.no_grad():
        for _ in range(law.length):
            logits = model(labels, codes)[:, -1]
            if cfg_scale > 1:
                unconditional = model(nulls, codes)[:, -1]
                logits = unconditional + cfg_scale * (logits - unconditional)
            codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    found = generate(model, labels.cpu(), cfg_scale=cfg_scale, top_k=1)
    wrong = (found != codes).any(dim=1).sum().item()
    if wrong:
        raise CheckFailed(f"{wrong} of {len(labels)} sequences differ from the uncached loop")
    return f"{len(labels)} sequences of {law.length} codes are the same"


def check_drafts(place: Place, source: str, precision: str) -> str:
    """Codes from a window of drafts against those of sequential decoding: the same, up to draws near ties."""
    law = RegisterLaw("2d", (8, 8), 4)
    model = small_model(law, 64).to(place.device, dtype_of(precision)).eval()
    labels = torch.arange(64) % model.config.classes
    plain, drafted = (generate(model, labels, draft=window, draft_source=source) for window in (0, 4))
    wrong = plain != drafted  # (B, N)
    flips = wrong.any(dim=1).sum().item()
    codes = (wrong.cumsum(1) == 0).sum().item() + flips  # a flip changes all of its image that follows
    if flips > codes / 50:
        raise CheckFailed(f"{flips} of {codes} codes differ from sequential decoding: more than rounding explains")
    return f"{flips} of {codes} codes flipped in {len(labels)} images"


@contextmanager
def process_group(device: torch.device) -> Iterator[str]:
    """Join a group of this process alone, NCCL on a GPU and gloo on a CPU; gives the backend's name."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def check_collectives(place: Place) -> str:
    """An all-reduce, and a compiled step under DDP with the gradients of the same step without it."""
    law, device = RegisterLaw("2d", (8, 8), 4, 20), place.device
    model = small_model(law, 64)
    plain = Step(place, law, copy.deepcopy(model), 2)
    with process_group(device) as backend, torch._dynamo.config.patch(optimize_ddp=False):
        ones = torch.ones(1000, device=device)
        dist.all_reduce(ones)
        if not torch.equal(ones, torch.ones_like(ones)):
            raise CheckFailed("an all-reduce over one process changed its values")
        step = Step(place, law, model, 2).compile(flex=place.flex)
        # As a run of several processes is wrapped; the group has one, which DDP treats no differently.
        wrapped = distribute(model, list(model.layers), TrainConfig(), Runtime(device, rank=0, world=2))
        one, two = plain.tensors(0, "fp32"), step.tensors(0, "fp32", wrapped)
    torch.compiler.reset()
    return f"{backend}: {expect([rms_difference(name, two[name], one[name], one[name], 'fp32') for name in one])}"


def measure_step(place: Place, law: RegisterLaw, preset: str = "B", batch: int = 32, rounds: int = 10,
                 vocabulary: int = 16384) -> str:
    """Time of a whole compiled bf16 update: tokens a second, peak memory. Not a check of anything but that it runs."""
    with torch.random.fork_rng():
        config = ModelConfig.preset(preset, grid=law.grid, vocabulary=vocabulary,
                                    register_offsets=None if law.kind == "none" else ())
        step = Step(place, law, Transformer(config), batch).compile(flex=place.flex)
    optimizer = build_optimizer(step.model, OptimConfig())
    gpu, times = place.device.type == "cuda", []
    if gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    for number in range(rounds + 3):  # the first ones compile and allocate
        begun = time.perf_counter()
        step.backward(number, "bf16")
        nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
        optimizer.step()
        if gpu:
            torch.cuda.synchronize(place.device)
        times.append(time.perf_counter() - begun)
    torch.compiler.reset()
    median = statistics.median(times[3:])
    peak = f", peak memory {torch.cuda.max_memory_allocated(place.device) / 2**30:.1f} GiB" if gpu else ""
    return (f"{batch} sequences: {1000 * median:.1f} ms an update, {batch * law.length / median:,.0f} tokens/s"
            f"{peak}")


def all_checks(quick: bool = False) -> dict[str, Callable[[Place], str]]:
    """Return every check by name; ``quick``: the laws of the paper's two image rows and 3B's head dimension only."""
    laws = {name: law for name, law in LAWS.items() if not quick or name in ("2d dense", "2d sparse")}
    checks: dict[str, Callable[[Place], str]] = {}
    for precision in ("bf16", "fp32"):
        for head_dim in HEAD_DIMS:
            for name, law in laws.items():
                checks[f"flex, {name}, head {head_dim}, {precision}"] = partial(
                    check_preflight, law=law, head_dim=head_dim, precision=precision)
            for name, law in {"no registers": PLAIN, **laws}.items():
                for how in ("eager", "compiled"):
                    checks[f"sdpa, {name}, head {head_dim}, {precision}, {how}"] = partial(
                        check_sdpa, law=law, head_dim=head_dim, precision=precision, compiled=how == "compiled")
    for name in ("2d dense", "2d sparse"):
        checks[f"one mask for ten draws, {name}"] = partial(check_one_mask, law=LAWS[name])
    for precision in ("bf16", "fp32"):
        for name, head_dim in (("none", 64), ("2d dense", 64), ("2d sparse", 64), ("2d sparse", 100)):
            checks[f"training step, {name}, head {head_dim}, {precision}"] = partial(
                check_training_step, law=LAWS.get(name, PLAIN), head_dim=head_dim, precision=precision)
    checks["decoding, no guidance"] = partial(check_decoding, cfg_scale=1.0)
    checks["decoding, guidance 2"] = partial(check_decoding, cfg_scale=2.0)
    for precision in ("bf16", "fp32"):
        for source in SOURCES:
            checks[f"drafts, {source}, {precision}"] = partial(check_drafts, source=source, precision=precision)
    checks["collectives and DDP"] = check_collectives
    return checks
