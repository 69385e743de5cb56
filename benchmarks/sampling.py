"""Images a second of the sampler, beside a plain Python sampling loop, on random weights.

    python benchmarks/sampling.py                              # B, bf16, batches of 8 and 32, guidance 2.0
    python benchmarks/sampling.py --dtype fp32 --tokens 256    # every token of the images

A step's cost grows with its position, so that ``--tokens`` positions are spread evenly over the image and the rest is
taken to cost their mean. The plain loop is what public samplers of such models do: a cache of the full length with a
mask, attention over all of it by separate matrix products, rotations in fp32 step by step, nothing prepared ahead.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mutor_img.cli import Parser, run
from mutor_img.config import check_choice
from mutor_img.decoder import decode_one
from mutor_img.errors import check_range
from mutor_img.generation import Sampler, SamplingSettings, draw
from mutor_img.guidance import guide
from mutor_img.transformer import ModelConfig, Transformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALE = 2.0


def ours(model: Transformer, batch: int) -> Callable[[int], None]:
    """Return a function that samples the code at one position of ``batch`` images."""
    sampler = Sampler(model, SamplingSettings(cfg_scale=SCALE), batch)
    sampler.decoder.cache.store.normal_()
    codes = torch.zeros(sampler.decoder.rows, dtype=torch.int64, device=sampler.device)
    numbers = torch.rand(sampler.count, dtype=torch.float64, device=sampler.device)

    def step(position: int) -> None:
        for _ in range(-(-batch // sampler.count)):
            logits = (decode_one(sampler.decoder, codes, position) if sampler.graphed is None
                      else sampler.graphed(codes, position))
            draw(guide(logits.float(), SCALE), numbers, sampler.settings)

    return step


def plain(model: Transformer, batch: int) -> Callable[[int], None]:
    """Return the same as a plain loop would do it."""
    config, weight = model.config, model.output.weight
    rows, device = 2 * batch, weight.device
    shape = (rows, config.heads, config.length, config.dim // config.heads)
    caches = [torch.randn(2, *shape, dtype=weight.dtype, device=device) for _ in model.layers]
    visible = torch.ones(config.length, config.length, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
    codes = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def step(position: int) -> None:
        at = torch.tensor([position], device=device)
        mask, rope = visible[:, None, at], model.rope(at)[None]  # (2 B, 1, 1, N), (1, 1, 2, head dim / 2)
        x = model.tok_embeddings(codes)  # (2 B, 1, dim)
        for layer, (keys, values) in zip(model.layers, caches):
            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values, mask=mask) -> Tensor:
                keys[:, :, at], values[:, :, at] = k, v
                with sdpa_kernel(SDPBackend.MATH):
                    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

            x = layer(x, rope, attend)
        logits = guide(model.output(model.norm(x))[:, -1].float(), SCALE)  # (B, V)
        torch.multinomial(logits.softmax(-1), 1)

    return step


def seconds_an_image(step: Callable[[int], None], batch: int, length: int, tokens: int, device: torch.device) -> float:
    """Time ``tokens`` positions spread over 1 .. length - 1 after one for warming up."""
    step(1)
    times = []
    for index in range(tokens):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(1 + index * (length - 1) // tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.fmean(times) * length / batch


def machine(device: torch.device) -> str:
    """Return the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Images a second of the sampler, beside a plain sampling loop.",
                    example="python benchmarks/sampling.py --batch-sizes 8,32 --tokens 16")
    parser.add_argument("--preset", default="B", help="model size")
    parser.add_argument("--grid", type=int, default=16, help="rows and columns of codes")
    parser.add_argument("--vocabulary", type=int, default=16384, help="number of codes")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp32")
    parser.add_argument("--batch-sizes", default="8,32", help="images at a time, comma-separated")
    parser.add_argument("--tokens", type=int, default=16, help="positions timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    check_choice("--dtype", args.dtype, tuple(DTYPES))
    length, device = args.grid**2, torch.device(args.device)
    check_range("--tokens", args.tokens, 1, length)
    config = ModelConfig.preset(args.preset, grid=(args.grid, args.grid), vocabulary=args.vocabulary)
    model = Transformer(config).to(device, DTYPES[args.dtype]).eval()
    nn.init.normal_(model.output.weight, std=0.02)
    print(f"{machine(device)}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{args.preset}, {args.dtype}, {length} codes, guidance {SCALE}; images a second, pixels not decoded")
    print(f"{'batch':>6} {'plain loop':>11} {'ours':>9} {'ratio':>7}")
    with torch.inference_mode():
        for batch in map(int, args.batch_sizes.split(",")):
            rates = [1 / seconds_an_image(make(model, batch), batch, length, args.tokens, device)
                     for make in (plain, ours)]
            print(f"{batch:>6} {rates[0]:>11.3f} {rates[1]:>9.3f} {rates[1] / rates[0]:>6.1f}x", flush=True)


if __name__ == "__main__":
    run(main)
