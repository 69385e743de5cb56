"""The recipe on 1 to 256 GPUs, B to 3B: time and memory per update, computed for H100s. Nothing here was measured.

    python -m benchmarks.scaling_model
    python -m benchmarks.scaling_model --presets 3B --registers 80 --network 50

Each device works as the cost model says (``mutor_img/pretraining/cost.py``), on its share of the global batch, in as
many forward passes as its memory asks for. On top comes what is left of the communication:

- Rings. Of n devices each sends (n - 1) / n of what is gathered or scattered, and twice that of what is all-reduced. A
  ring through several nodes enters and leaves each node once, so that a node's network, all its adapters together,
  carries what one device sends.
- ``hybrid`` shards within a node, as ``fsdp`` does, and all-reduces the gradients of a shard between the nodes.
- Each step of a ring takes a latency on top. All-reduces take a tree where there are many devices, of log2 n steps.
- Weights are gathered while the device computes or waits for the CPU to launch blocks, gradients travel during the last
  backward pass, which is two thirds of a pass. What takes longer than that shows. Kernels are taken to run no slower
  meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu_step import law_of
from mutor_img.blocks import LLAMAGEN_PRESETS, ModelConfig
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.config import TrainConfig
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.metrics.report import aligned
from mutor_img.pretraining.config import GeneratorConfig, ModelSection, PlanConfig, RegistersConfig
from mutor_img.pretraining.cost import REST
from mutor_img.pretraining.memory import FP32, step_memory
from mutor_img.pretraining.plan import (
    GIB,
    gathered_bytes,
    gpu_step,
    largest_divisor,
    largest_micro_batch,
    planned_cost,
    shapes,
)

WAYS = ("ddp", "fsdp", "hybrid")
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time
SHOWS = 0.05  # of an update: from here on communication counts as showing


@dataclass(frozen=True)
class Cluster:
    """What connects the devices; the defaults are those of nodes with eight H100 SXM and eight adapters of 400 Gb/s.

    Attributes:
        node: devices of a node.
        link: bytes per second that a device sends to the others of its node.
        network: bytes per second that a node sends to others, all adapters together.
        latency: seconds of a step of a ring, assumed.
        share: of these rates that a collective reaches, assumed.
    """

    node: int = 8
    link: float = 450e9
    network: float = 400e9
    latency: float = 5e-6
    share: float = 0.8

    def rate(self, members: int, apart: bool = False) -> float:
        """Return the bytes per second that a device of a ring sends; ``apart``: each member is on another node."""
        if apart:
            return self.share * self.network / self.node
        return self.share * (self.link if members <= self.node else min(self.link, self.network))


@dataclass(frozen=True)
class Point:
    """An update on so many devices, computed.

    Attributes:
        sequences: of a device.
        passes: forward passes in which it takes them.
        work: seconds that the cost model says.
        shown: seconds of communication that nothing hides.
        gib: of a device's memory, at the worst moment.
    """

    sequences: int
    passes: int
    work: float
    shown: float
    gib: float

    @property
    def seconds(self) -> float:
        """Seconds of the update."""
        return self.work + self.shown


def recipe(preset: str, registers: int, devices: int, way: str) -> GeneratorConfig:
    """Return the shipped recipe's config at another size: 1024 sequences of 256 codes per update, in bf16."""
    law = law_of(registers)
    return GeneratorConfig(model=ModelSection(preset=preset), registers=RegistersConfig(kind=law.kind, count=law.count),
                           train=TrainConfig(parallel="ddp" if way == "ddp" else "fsdp"), plan=PlanConfig(devices))


def wire_bytes(config: GeneratorConfig, model: ModelConfig, parameters: int, passes: int, shards: int
               ) -> tuple[float, float, float]:
    """Return the bytes that a device sends in an update, to gather weights, scatter gradients and all-reduce them.

    Args:
        config: the run's; ``plan.devices`` counts.
        model: the model's sizes.
        parameters: that are trained.
        passes: forward passes of an update.
        shards: devices that share the weights; 1: DDP. Fewer than all: groups of so many all-reduce what each holds.
    """
    gradients, groups = FP32 * parameters, config.plan.devices // shards
    between = 2 * gradients / shards * (groups - 1) / groups
    if shards == 1:
        return 0.0, 0.0, between
    ring = (shards - 1) / shards
    gathered = gathered_bytes(model, parameters, gpu_step(config), passes)
    return gathered * ring, gradients * ring, between


def point(preset: str, registers: int, devices: int, way: str, cluster: Cluster) -> Point:
    """Return an update of the recipe on ``devices`` GPUs, in the largest micro-batches that fit."""
    config = recipe(preset, registers, devices, way)
    shards = {"ddp": 1, "fsdp": devices, "hybrid": min(devices, cluster.node)}[way]
    model, objective = shapes(config)
    parameters, share = model.parameter_count() + objective.extra_parameters(), config.train.global_batch // devices
    step = replace(gpu_step(config), shards=shards)
    room = config.plan.device_gib * config.plan.usable * GIB
    # Even 3B fits 80 GB whole, a few sequences at a time.
    micro_batch = largest_divisor(share, largest_micro_batch(model.config, parameters, step, room, share))
    config.train.micro_batch, passes = micro_batch, share // micro_batch
    cost = planned_cost(config, model, objective, shards=shards)
    memory = step_memory(model.config, parameters, replace(step, sequences=micro_batch, accumulate=passes > 1))
    gathered, scattered, reduced = wire_bytes(config, model.config, parameters, passes, shards)
    units, groups = model.config.layers + 1, devices // shards
    hops = (shards - 1) * cluster.latency
    gather = gathered / cluster.rate(shards) + 2 * passes * units * hops
    scatter = scattered / cluster.rate(shards) + units * hops
    reductions = units if shards > 1 else math.ceil(FP32 * parameters / BUCKET)
    reduce = reduced / cluster.rate(groups, apart=shards > 1) + reductions * 2 * math.log2(groups) * cluster.latency
    compute = cost.seconds - cost.optimiser - REST
    shown = max(0.0, gather + scatter + reduce - compute, scatter + reduce - 2 / 3 * compute / passes)
    return Point(share, passes, cost.seconds, shown, memory.total / GIB)


def table(preset: str, registers: int, counts: Sequence[int], cluster: Cluster) -> list[str]:
    """Return the lines of one model: for each number of GPUs and each way, time, what shows of it, and memory."""
    rows = [["GPUs", "sequences of each", *(f"{way}: {what}" for way in WAYS for what in (
        "ms per update", "shows", "times one GPU", "GiB"))]]
    points = {(count, way): point(preset, registers, count, way, cluster) for count in counts for way in WAYS}
    alone = point(preset, registers, 1, "ddp", cluster).seconds
    for count in counts:
        row = [str(count), str(points[count, "ddp"].sequences)]
        for way in WAYS:
            at = points[count, way]
            row += [f"{1000 * at.seconds:.1f}", f"{at.shown / at.seconds:.0%}",
                    f"{alone / at.seconds:.1f}", f"{at.gib:.1f}"]
        rows.append(row)
    lines = aligned(rows)
    for way in WAYS:
        first = next((count for count in counts if points[count, way].shown > SHOWS * points[count, way].seconds), None)
        lines.append(f"{way}: communication takes more than {SHOWS:.0%} of an update "
                     + (f"from {first} GPUs on" if first else f"at no number up to {counts[-1]}"))
    return lines


def main(argv: Sequence[str]) -> None:
    """Print a table for each model."""
    parser = Parser(description="Time and memory of the recipe on many GPUs: computed for H100s, not measured.",
                    example="python -m benchmarks.scaling_model --presets XL,3B --network 50")
    add = parser.add_argument
    add("--presets", default=",".join(LLAMAGEN_PRESETS), metavar="LIST", help="sizes, comma-separated")
    add("--registers", type=int, default=0, help="registers per sequence: 0, 256, or some at random places")
    add("--gpus", default="1,2,4,8,16,32,64,128,256", metavar="LIST", help="numbers of GPUs, rising powers of two")
    add("--network", type=float, default=400.0, help="GB/s that a node sends to others, all its adapters together")
    args = parser.parse_args(argv)
    check_range("--network", args.network, 0.0, 1e5, low_open=True)
    counts = parse_numbers(args.gpus, "--gpus", int)
    for count in counts:
        check_range("--gpus", count, 1, 1024)
        if count & (count - 1):
            raise UserError(f"--gpus is {args.gpus!r}: {count} is no power of two, and 1024 sequences do not divide "
                            "over it; give 1,2,4, .. up to 1024")
    cluster = Cluster(network=args.network * 1e9)
    for preset in args.presets.split(","):
        check_choice("--presets", preset, LLAMAGEN_PRESETS)
        print(f"{preset}, {args.registers} registers: computed for H100s, not measured",
              *table(preset, args.registers, sorted(counts), cluster), "", sep="\n")


if __name__ == "__main__":
    run(main)
