"""What drafts save on a checkpoint: how good registers' drafts are, codes per pass, images per second, the best window.

    python -m benchmarks.drafting --checkpoint runs/mnist/mutor2d
    python -m benchmarks.drafting --preset B --vocabulary 256 --entropy 4 --images 4     # drawn weights
    python -m benchmarks.drafting --preset B --entropy 7.3 --images 2 --batch-sizes 1    # LlamaGen's losses

All samplers make the same images in turn, in one process, and every code is compared with sequential decoding. A model
of drawn weights stands in for one that is not at hand: its head is scaled until a code's entropy is the given one.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sampling import machine
from benchmarks.turns import seconds
from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.loading import load_run
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding.drafting import AUTO, SOURCES, TRIES, Draft
from mutor_img.decoding.guidance import SCHEDULES, guidance_scales, guide, parse_schedule
from mutor_img.decoding.sampler import Sampler, SamplingSettings, draw, filtered
from mutor_img.metrics.report import aligned
from mutor_img.transformer import Transformer


def drawn_model(preset: str, vocabulary: int, entropy: float, grid: tuple[int, int]) -> Transformer:
    """Return a model of drawn weights whose codes have about that entropy in nats.

    Raises:
        UserError: an entropy that so many codes cannot have.
    """
    model = Transformer(ModelConfig.preset(preset, grid=grid, vocabulary=vocabulary, register_offsets=())).eval()
    check_range("--entropy", entropy, 0.01, round(math.log(vocabulary) - 0.01, 2))
    nn.init.normal_(model.output.weight, std=0.02)
    codes = torch.randint(vocabulary, (1, min(31, model.config.length - 1)))
    with torch.no_grad():
        logits = model(torch.zeros(1, dtype=torch.int64), codes)[0]  # (S, V)
        low, high = 1e-3, 1e4
        for _ in range(40):
            middle = (low * high) ** 0.5
            found = torch.distributions.Categorical(logits=logits * middle).entropy().mean().item()
            low, high = (middle, high) if found > entropy else (low, middle)
        model.output.weight.mul_(low)
    return model


def overlaps(model: Transformer, labels: Tensor, codes: Tensor, settings: SamplingSettings,
             offsets: Sequence[int]) -> list[dict[str, float]]:
    """Return how well registers draft, a row per offset, along codes (B, N) that the model has sampled itself.

    ``overlap`` is the mass that the register's distribution and the true one share, sum min(p, q), both as they are
    drawn from; ``right`` how often the register's draw with the code's own random number is the code.
    """
    length, rows = codes.shape[1], []
    halves = torch.cat([labels, torch.full_like(labels, model.config.classes)])
    numbers = uniform(settings.seed, Stream.TOKEN, torch.arange(len(codes))[:, None], torch.arange(length))  # (B, N)
    scales = torch.tensor(guidance_scales(settings.cfg_schedule, settings.cfg_scale, settings.cfg_parameter, length))
    for offset in offsets:
        anchors = torch.arange(length - offset + 1).expand(2 * len(codes), -1)  # all that have a target
        with torch.inference_mode():
            both = model(halves, codes[:, :-1].repeat(2, 1), anchors, torch.full_like(anchors, offset))
        true, register = (guide(logits.float(), scales[offset - 1 :, None]).flatten(0, 1)  # (B (N - d + 1), V)
                          for logits in (both[0][:, offset - 1 :], both[1]))
        shared = torch.minimum(*(filtered(logits, settings).softmax(-1) for logits in (true, register))).sum(-1)
        right = draw(register, numbers[:, offset - 1 :].flatten(), settings) == codes[:, offset - 1 :].flatten()
        rows.append({"offset": offset, "overlap": shared.mean().item(), "right": right.double().mean().item()})
    return rows


def passes(model: Transformer, labels: Tensor, codes: Tensor, settings: SamplingSettings, windows: Sequence[int],
           sources: Sequence[str]) -> list[dict[str, Any]]:
    """Return the passes that images take, a row per source and window, and how many codes are not ``codes`` (B, N)."""
    rows = []
    for source in sources:
        for window in windows:
            draft = Draft(window, source)
            sampler = Sampler(model, settings, len(labels), draft=draft)
            made = sampler.generate(labels, torch.arange(len(labels)))
            mean = sampler.drafter.passes.double().mean().item()
            rows.append({"source": source, "window": window, "rows": draft.rows(window), "passes": mean,
                         "codes": codes.shape[1] / mean, "differ": (made != codes).sum().item()})
    return rows


def speeds(model: Transformer, settings: SamplingSettings, drafts: Sequence[Draft], batch: int,
           rounds: int) -> list[float]:
    """Return images per second of each way to draft at ``batch`` images at a time: medians of rounds taken in turn.

    The first call of each is not timed, nor are those in which ``auto`` makes up its mind.
    """
    samplers = [Sampler(model, settings, batch, draft=draft) for draft in drafts]
    times: list[list[float]] = [[] for _ in samplers]
    for number in range(-2 * TRIES, rounds):
        samples = (number + 2 * TRIES) * batch + torch.arange(batch)
        for sampler, taken in zip(samplers, times):
            if number < -1 and sampler.draft.window != AUTO:
                continue
            taken.append(seconds(partial(sampler.generate, samples % model.config.classes, samples)))
    return [batch / statistics.median(taken[-rounds:]) for taken in times]


def _parser() -> Parser:
    parser = Parser(description="What drafts save on a checkpoint: codes per pass, images per second, the best window.",
                    example="python -m benchmarks.drafting --checkpoint runs/mnist/mutor2d")
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="run folder, checkpoint folder, or LlamaGen .pt")
    add("--preset", metavar="NAME", help="in place of it, a model of drawn weights of this size")
    add("--vocabulary", type=int, default=16384, help="codes of a model of drawn weights")
    add("--entropy", type=float, default=4.0, help="of its codes, in nats")
    add("--grid", type=int, default=16, help="rows and columns of its codes")
    add("--images", type=int, default=200, help="images whose passes are counted")
    add("--windows", default="2,4,8,16", metavar="LIST", help="windows to compare, comma-separated")
    add("--batch-sizes", default="1,8", metavar="LIST", help="images at a time that are timed, comma-separated")
    add("--rounds", type=int, default=5, help="timed calls of each; 0: nothing is timed")
    add("--cfg-scale", type=float, default=2.0, help="guidance scale; 1: none")
    add("--cfg-schedule", default="constant", metavar="NAME", help=f"{', '.join(SCHEDULES)}, as in power-cosine:2")
    add("--top-p", type=float, default=1.0, help="sample only from the most likely codes with this total probability")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return parser


def _numbers(text: str, flag: str, high: int) -> list[int]:
    numbers = sorted(parse_numbers(text, flag, int))
    for number in numbers:
        check_range(flag, number, 1, high)
    return numbers


def _open(parser: Parser, argv: Sequence[str]) -> tuple[Any, SamplingSettings, Transformer]:
    """Return the flags, checked, what they say of sampling, and the model."""
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.preset is None):
        raise UserError("give --checkpoint or --preset, one of them")
    for flag, low in (("images", 1), ("rounds", 0), ("threads", 1), ("grid", 2), ("vocabulary", 2)):
        check_range(f"--{flag}", getattr(args, flag), low, 100_000)
    args.batch_sizes = _numbers(args.batch_sizes, "--batch-sizes", 4096)
    settings = SamplingSettings(args.cfg_scale, *parse_schedule(args.cfg_schedule), top_p=args.top_p)
    torch.set_num_threads(args.threads)
    if args.preset:
        torch.manual_seed(0)
        model = drawn_model(args.preset, args.vocabulary, args.entropy, (args.grid, args.grid))
    else:
        model = load_run(args.checkpoint).model
    args.windows = _numbers(args.windows, "--windows", model.config.length)
    settings.validate(model.config)
    return args, settings, model


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    args, settings, model = _open(_parser(), argv)
    labels = torch.arange(args.images) % model.config.classes
    registers = model.config.register_offsets is not None
    sources = [source for source in SOURCES if registers or source != "registers"]
    name = args.checkpoint or f"{args.preset} of drawn weights"
    print(f"{machine(model.output.weight.device)}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{name}: {model.config.length} codes of {model.config.vocabulary}, guidance {args.cfg_scale} "
          f"{args.cfg_schedule}, top-p {args.top_p}, {args.images} images", flush=True)
    codes = Sampler(model, settings, args.images).generate(labels, torch.arange(args.images))
    good = overlaps(model, labels, codes, settings, range(1, max(args.windows) + 1)) if registers else []
    if good:
        lines = [["offset", "overlap", "right"],
                 *([str(row["offset"]), f"{row['overlap']:.3f}", f"{row['right']:.3f}"] for row in good)]
        print("registers:", *aligned(lines), sep="\n", flush=True)
    drafted = passes(model, labels, codes, settings, args.windows, sources)
    lines = [["source", "window", "rows", "passes", "codes per pass", "codes that differ"]]
    lines += [[row["source"], str(row["window"]), str(row["rows"]), f"{row['passes']:.2f}", f"{row['codes']:.2f}",
               str(row["differ"])] for row in drafted]
    print(*aligned(lines), sep="\n", flush=True)
    _time(model, settings, drafted, args.batch_sizes if args.rounds else [], args.rounds)


def _time(model: Transformer, settings: SamplingSettings, drafted: Sequence[dict], batches: Sequence[int],
          rounds: int) -> None:
    """Print images per second by batch size, and the best window of each."""
    for batch in batches:
        drafts = [Draft(), Draft(AUTO), *(Draft(row["window"], row["source"]) for row in drafted)]
        found = speeds(model, settings, drafts, batch, rounds)
        lines = [["draft", "source", "images/s", "ratio"]]
        lines += [[str(draft.window or "off"), draft.source if draft.window else "", f"{speed:.3f}",
                   f"{speed / found[0]:.2f}x"] for draft, speed in zip(drafts, found)]
        best = drafts[max(range(len(drafts)), key=found.__getitem__)]
        print(f"{batch} images at a time:", *aligned(lines), sep="\n")
        print("best: " + (f"--draft {best.window} --draft-source {best.source}" if best.window else "no drafts"),
              flush=True)


if __name__ == "__main__":
    run(main)
