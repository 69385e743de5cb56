"""What a generator's training will cost, from shapes alone: no data, no weights, no GPU."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from mutor_img.blocks import ModelConfig, block_weights
from mutor_img.objectives.objective import Objective
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.cost import H100_MEMORY, Cost, Device, attention_cells, update_cost
from mutor_img.pretraining.memory import FP32, Memory, Step, step_memory
from mutor_img.registers import RegisterLaw
from mutor_img.training.hardware import gpu_peak
from mutor_img.transformer import Transformer

GIB = 2.0**30


def plan_generator(config: GeneratorConfig) -> dict[str, dict[str, Any]]:
    """Return what ``--dry-run`` prints, by section.

    Raises:
        UserError: the batch does not divide over ``plan.devices``, or a device's share over ``train.micro_batch``.
    """
    model, objective = shapes(config)
    share, micro_batch = device_share(config)
    sampled, extra, passes = model.parameter_count(), objective.extra_parameters(), share // micro_batch
    return {
        "model": {"preset": config.model.preset, "parameters": sampled,
                  "of the objective, dropped after training": extra},
        **update_sections(config, model, objective),
        **memory_sections(config, model.config, sampled + extra, share),
        "a checkpoint, GiB": checkpoint_section(config, sampled + extra),
        "communication per update": communication_section(config, model.config, sampled + extra, passes),
    }


def shapes(config: GeneratorConfig) -> tuple[Transformer, Objective]:
    """Return the run's model and objective without memory."""
    with torch.device("meta"):
        return Transformer(config.model_config()), config.build_objective()


def device_share(config: GeneratorConfig) -> tuple[int, int]:
    """Return the sequences of an update on one of ``plan.devices``, and those of one forward pass."""
    return config.train.shares(config.plan.devices, f"plan.devices={config.plan.devices}")


def trunk_flops(model: Transformer, law: RegisterLaw, seed: int) -> float:
    """Return the FLOPs of the model's own forward pass over one sequence, registers included."""
    return model.forward_flops(law.length, law.registers, attended_pairs(law, seed))


def training_flops(trunk: float, objective: Objective, step: int) -> float:
    """Return the FLOPs of one sequence in an update: forward, and of what is trained twice as much backward.

    Args:
        trunk: what :func:`trunk_flops` gives.
        objective: the run's.
        step: number of the update.
    """
    trained, frozen = objective.extra_flops(step)
    return 3 * (trunk + trained) + frozen


def run_flops(config: GeneratorConfig, updates: int) -> float:
    """Return the FLOPs of the first ``updates`` updates of a run, over all devices."""
    model, objective = shapes(config)
    trunk = trunk_flops(model, config.law(), config.seed)
    return updates * config.train.global_batch * _mean_flops(trunk, objective, updates)


def _mean_flops(trunk: float, objective: Objective, updates: int) -> float:
    """Return what :func:`training_flops` gives on average over the first ``updates`` updates.

    A thousand of them, spread evenly, are enough for what grows or falls on its way.
    """
    return fmean(training_flops(trunk, objective, step) for step in range(0, updates, max(1, updates // 1000)))


def run_parameters(config: GeneratorConfig) -> tuple[int, int]:
    """Return how many numbers sampling uses, and how many a run trains: with those of registers and the objective."""
    model, objective = shapes(config)
    whole = model.parameter_count()
    registers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("register_embedding."))
    return whole - registers, whole + objective.extra_parameters()


def run_summary(config: GeneratorConfig) -> dict[str, float]:
    """Return what a run costs in a few lines, by the names that they are printed under."""
    law, updates, (sampled, trained) = config.law(), config.train.steps, run_parameters(config)
    flops, memory = run_flops(config, updates), step_memory(config.model_config(), trained, planned_step(config))
    return {"updates": updates, "sampled parameters": sampled, "trained parameters": trained,
            "tokens through the network per update": config.train.global_batch * (law.length + law.registers),
            "FLOPs per update": flops / updates, "FLOPs of the run": flops,
            "memory per device, GiB (computed)": memory.total / GIB}


def planned_device(config: GeneratorConfig) -> Device:
    """Return the peaks of one of ``plan.devices``: an H100's, where the plan does not say otherwise."""
    plan, precision = config.plan, "fp32" if config.train.precision == "fp32" else "bf16"
    flops = plan.peak_tflops * 1e12 if plan.peak_tflops else gpu_peak("H100", precision)
    return Device(flops, plan.memory_tbs * 1e12 if plan.memory_tbs else H100_MEMORY)


def planned_cost(config: GeneratorConfig, model: Transformer, objective: Objective, **switches: Any) -> Cost:
    """Return what the cost model says of an update on one of ``plan.devices``; communication is not in it.

    Args:
        config: the run's.
        model, objective: the run's, on any device; only their sizes count.
        switches: fields of :class:`Step` that are to be others than the config's.
    """
    law = config.law()
    share, micro_batch = device_share(config)
    trunk = trunk_flops(model, law, config.seed)
    attended = trunk - model.forward_flops(law.length, law.registers, 0.0)
    step = replace(gpu_step(config), sequences=micro_batch, **switches)
    return update_cost(
        model.config, model.parameter_count() + objective.extra_parameters(), step, share // micro_batch,
        flops=_mean_flops(trunk, objective, config.train.steps), attended=3 * attended,
        cells=attention_cells(law, config.seed, step.flex), device=planned_device(config))


def update_sections(config: GeneratorConfig, model: Transformer, objective: Objective) -> dict[str, Any]:
    """Return the sections of tokens and FLOPs, and of time. MFU counts the model's FLOPs, not recomputed ones."""
    law, plan, batch = config.law(), config.plan, config.train.global_batch
    share, micro_batch = device_share(config)
    trunk, cost = trunk_flops(model, law, config.seed), planned_cost(config, model, objective)
    flops, mfu, peak = plan.devices * cost.flops, plan.mfu or cost.mfu, cost.device.flops
    attention = trunk - model.forward_flops(law.length, law.registers, 0.0)
    seconds = flops / (plan.devices * peak * mfu)
    hours = seconds * config.train.steps / 3600
    how = "assumed" if plan.mfu else "computed from these terms"
    return {
        "per update": {
            "sequences": batch,
            "sequences per device": share,
            "sequences per forward pass": micro_batch,
            "code tokens": batch * law.length,
            "registers": batch * law.registers,
            "tokens through the network": batch * (law.length + law.registers),
            "FLOPs per update, forward and backward": flops,
            "times the FLOPs of next-token prediction": flops / batch / (3 * model.forward_flops(law.length)),
            "FLOPs in attention, %": 100 * attention / trunk,
            # The rest grows with the length, attention with its square.
            "codes per image at which attention takes half": round(law.length * (trunk - attention) / attention),
        },
        "time of an update on one device, ms (computed, not measured)": cost_rows(cost),
        f"time at {mfu:.0%} of {plan.devices} x {peak / 1e12:g} TFLOP/s ({how})": {
            "updates": config.train.steps,
            "FLOPs in all": flops * config.train.steps,
            "seconds per update": seconds,
            "images per second per device": batch / plan.devices / seconds,
            "hours": hours,
            "GPU-hours": hours * plan.devices,
        },
    }


def cost_rows(cost: Cost) -> dict[str, float]:
    """Return the terms of a cost and their sum by the names they are printed under, in milliseconds."""
    rows = {"matrix products": cost.products, "attention": cost.attention,
            "memory traffic of the blocks' other kernels": cost.blocks, "read-out and cross-entropy": cost.read_out,
            "optimiser, EMA and copies of weights": cost.optimiser, "small kernels, waits for the CPU": cost.rest,
            "in all": cost.seconds}
    return {name: 1000 * value for name, value in rows.items()}


def memory_sections(config: GeneratorConfig, model: ModelConfig, parameters: int, share: int) -> dict[str, Any]:
    """Return the sections of memory by category and of what fits the device."""
    room = config.plan.device_gib * config.plan.usable * GIB
    step = planned_step(config)
    memory = step_memory(model, parameters, step)
    largest = largest_micro_batch(model, parameters, step, room, share)
    fitting = largest_divisor(share, largest)
    fits = memory.total <= room
    advice = "yes" if fits else f"no: train.micro_batch={fitting}" if fitting else "no, not even one sequence at a time"
    how = ("compiled blocks" if step.compiled else "eager") + (", checkpointed" if step.checkpointing else "")
    return {
        f"memory per device, GiB (computed; {how})": memory_rows(memory),
        f"what fits {config.plan.device_gib:g} GiB ({config.plan.usable:.0%} of it for tensors)": {
            "this run": advice,
            "to spare, GiB": (room - memory.total) / GIB,
            "sequences per forward pass, at most": largest,
        },
    }


def memory_rows(memory: Memory) -> dict[str, float]:
    """Return a memory's categories and total by the names they are printed under, in GiB."""
    rows = {"weights": memory.weights, "gradients": memory.gradients, "optimiser": memory.optimiser, "EMA": memory.ema,
            "second copies of weights": memory.copies, "activations": memory.activations,
            "logits and loss": memory.logits, "or, later: a block's gradients": memory.working, "in all": memory.total}
    return {name: value / GIB for name, value in rows.items()}


def gpu_step(config: GeneratorConfig) -> Step:
    """Return how a step of one sequence runs on ``plan.devices`` GPUs."""
    train, law = config.train, config.law()
    with torch.device("meta"):
        objective = config.build_objective()
    return Step(
        sequences=1, registers=law.registers, precision="fp32" if train.precision == "fp32" else "bf16",
        compiled=train.compile, checkpointing=train.activation_checkpointing,
        flex=config.model.attention == "auto" and train.compile,
        loss_chunk=config.model.loss_chunk, ema=train.ema > 0, blocks=len(objective.blocks()),
        read_outs=objective.read_outs, kept_numbers=objective.kept_numbers,
        shards=config.plan.devices if train.parallel == "fsdp" else 1)


def planned_step(config: GeneratorConfig) -> Step:
    """Return how a forward pass of an update runs on one of ``plan.devices``."""
    share, micro_batch = device_share(config)
    return replace(gpu_step(config), sequences=micro_batch, accumulate=micro_batch < share)


def largest_micro_batch(model: ModelConfig, parameters: int, step: Step, room: float, share: int) -> int:
    """Return the most sequences of a forward pass whose memory is within ``room`` bytes; 0: not even one."""
    def fits(sequences: int) -> bool:
        trial = replace(step, sequences=sequences, accumulate=sequences < share)
        return step_memory(model, parameters, trial).total <= room

    # Fewer than the share can take more: gradients that accumulate are held a second time where they are sharded.
    low, high = (share, 2**20) if fits(share) else (0, share - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def largest_divisor(share: int, most: int) -> int:
    """Return the largest divisor of ``share`` that is no more than ``most``; 0: there is none."""
    return max((n for n in range(1, min(share, most) + 1) if share % n == 0), default=0)


def checkpoint_section(config: GeneratorConfig, parameters: int) -> dict[str, float]:
    """Return the sizes of what is written: all in fp32, AdamW's two moments beside the weights."""
    copies = {"weights": 1, "optimiser": 2, "EMA": 1 if config.train.ema else 0}
    rows = {name: count * FP32 * parameters / GIB for name, count in copies.items()}
    whole = sum(rows.values())
    return {**rows, "in all": whole, f"the {config.train.keep} newest": config.train.keep * whole}


def communication_section(config: GeneratorConfig, model: ModelConfig, parameters: int,
                          passes: int) -> dict[str, float]:
    """Return the GiB that a device sends in an update, over rings: of n devices each sends (n - 1) / n of a tensor.

    DDP reduces fp32 gradients once: a reduce-scatter and an all-gather. FSDP2 scatters fp32 gradients once.
    """
    ring = (config.plan.devices - 1) / config.plan.devices / GIB
    if config.train.parallel == "ddp":
        return {"all-reduce of gradients, GiB sent": 2 * FP32 * parameters * ring}
    return {"all-gather of weights, GiB sent": gathered_bytes(model, parameters, gpu_step(config), passes) * ring,
            "reduce-scatter of gradients, GiB sent": FP32 * parameters * ring}


def gathered_bytes(model: ModelConfig, parameters: int, step: Step, passes: int) -> float:
    """Return the bytes of the weights that FSDP2 gathers in an update of so many passes.

    Blocks twice in each (in bf16 in a bf16 run), embeddings and head once, in fp32.
    """
    blocks = (model.layers + step.blocks) * block_weights(model)
    return passes * (2 * step.width * blocks + FP32 * (parameters - blocks))


def attended_pairs(law: RegisterLaw, seed: int) -> float:
    """Return the query-key pairs of one sequence that the rule allows; over drawn anchors, a mean of 256 draws."""
    regular = law.length * (law.length + 1) / 2
    if law.kind == "none":
        return regular
    anchors, _ = law.draw(seed, 0, torch.arange(256 if law.count is not None else 1))
    return regular + (anchors + 2).sum(dim=1).double().mean().item()  # t + 1 regular inputs, and itself
