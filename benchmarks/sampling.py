"""Images per second of :func:`mutor_img.generate` on random weights, and of a plain sampling loop.

    python -m benchmarks.sampling --against public                    # B, bf16, 49 codes, batches of 8 and 32
    python -m benchmarks.sampling --dtype fp32 --grid 16 --rounds 1   # all codes of an image of 256 pixels

Each measurement is a process of its own, and both keep freed memory. The first image of a shape is not timed. The plain
loop does what public samplers of such models do (benchmarks/public.py). On CPUs, the share of the peak that a step's
matrix products alone reach is a bound for ours.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.public import PublicTransformer
from benchmarks.turns import forward_flops, in_turn, median_of, per_second, processor, product_peak, wait_for
from mutor_img import generate
from mutor_img.blocks import ModelConfig, model_flops
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import check_choice, check_range
from mutor_img.decoding.cpu import PackedTransformer, pack
from mutor_img.training.hardware import keep_freed_memory
from mutor_img.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALE = 2.0
PRODUCTS = "share of products alone"


def measure(who: str, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Return images per second of ours or of the public loop, and its share of the product peak at so many rows.

    Ours on a CPU comes with the share that the matrix products of a step alone reach.
    """
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = ModelConfig.preset(args.preset, grid=(args.grid, args.grid), vocabulary=args.vocabulary)
    labels = torch.arange(batch, device=device) % config.classes
    if who == "ours":
        model = Transformer(config).to(device, dtype).eval()
        nn.init.normal_(model.output.weight, std=0.02)

        def sample() -> None:
            generate(model, labels, cfg_scale=SCALE)
            wait_for(device)
    else:
        plain = PublicTransformer(config.layers, config.heads, config.dim, config.hidden, args.grid, args.vocabulary,
                                  config.classes).to(device, dtype).eval()

        def sample() -> None:
            plain.generate(labels, SCALE)
            wait_for(device)

    peak = product_peak(dtype, 2 * batch, device)
    rate = batch * per_second(sample, args.seconds)
    flops = 2 * forward_flops(config)  # with guidance
    found = {"images per second": rate, "share of the peak": rate * flops / peak}
    if who == "ours" and device.type == "cpu":
        with torch.inference_mode():
            steps = per_second(products(pack(model), 2 * batch), 1.0)
        found[PRODUCTS] = steps * 2 * batch * model_flops(config, 1, 0) / peak
    return found


def products(weights: PackedTransformer, rows: int) -> Callable[[], None]:
    """Return a function that computes the matrix products of a decoding step of so many rows, and nothing else."""
    x, hidden = (torch.randn(rows, width).to(weights.codes) for width in (weights.config.dim, weights.config.hidden))

    def step() -> None:
        for layer in weights.layers:
            for product in (layer.qkv, layer.out, layer.gate, layer.up):
                product(x)
            layer.down(hidden)
        weights.output(x)

    return step


def machine(device: torch.device) -> str:
    """Return the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Images per second of the sampler, beside a plain sampling loop.",
                    example="python -m benchmarks.sampling --batch-sizes 8,32 --threads 2 --against public")
    parser.add_argument("--preset", default="B", help="model size")
    parser.add_argument("--grid", type=int, default=7, help="rows and columns of codes")
    parser.add_argument("--vocabulary", type=int, default=16384, help="number of codes")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp32")
    parser.add_argument("--batch-sizes", default="8,32", help="images at a time, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--against", metavar="public", help="measure a plain sampling loop, too")
    parser.add_argument("--measure", metavar="WHO", help="measure ours or public in this process; print JSON")
    args = parser.parse_args(argv)
    check_choice("--against", args.against or "public", ("public",))
    check_choice("--measure", args.measure or "ours", ("ours", "public"))
    check_range("--seconds", args.seconds, 0.1, 1000)
    check_choice("--dtype", args.dtype, tuple(DTYPES))
    check_choice("--device", args.device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    check_range("--vocabulary", args.vocabulary, 2, 1_000_000)
    batch_sizes = parse_numbers(args.batch_sizes, "--batch-sizes", int)
    for name, value in (("--grid", args.grid), ("--rounds", args.rounds), ("--threads", args.threads),
                        *(("--batch-sizes", batch) for batch in batch_sizes)):
        check_range(name, value, 1, 1000)
    if args.measure:
        print(json.dumps(measure(args.measure, batch_sizes[0], args)))
        return
    torch.set_num_threads(args.threads)
    print(f"{machine(torch.device(args.device))}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{args.preset}, {args.dtype}, {args.grid**2} codes, guidance {SCALE}; images per second, without decoding, "
          "and their part of the peak of matrix products")
    flags = ("preset", "grid", "vocabulary", "dtype", "threads", "device", "seconds")
    words = [word for flag in flags for word in (f"--{flag}", str(getattr(args, flag)))]
    for batch in batch_sizes:
        found = in_turn({who: ["benchmarks.sampling", *words, "--batch-sizes", str(batch), "--measure", who]
                         for who in ("ours", *["public"] * bool(args.against))}, args.rounds)
        rates = {who: median_of(rows, "images per second") for who, rows in found.items()}
        print(f"{batch} images: " + "; ".join(f"{who} {rates[who]:.3f} ({median_of(rows, 'share of the peak'):.0%})"
                                              for who, rows in found.items())
              + (f"; ratio {rates['ours'] / rates['public']:.2f}" if args.against else "")
              + (f"; products alone {median_of(found['ours'], PRODUCTS):.0%}" if PRODUCTS in found["ours"][0] else ""),
              flush=True)


if __name__ == "__main__":
    run(main)
