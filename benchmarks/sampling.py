"""Images per second of :func:`mutor_img.generate`, beside a plain Python sampling loop, on random weights.

    python -m benchmarks.sampling                                   # B, bf16, 49 codes, batches of 8 and 32
    python -m benchmarks.sampling --dtype fp32 --grid 16 --rounds 1 # all codes of an image of 256 pixels

Both make whole images in turn, in one process, and the medians are compared; the first image of a shape is not timed.
The plain loop does what public samplers of such models do: a cache of the full length in the weights' dtype with a
mask, whose keys and values are repeated for grouped heads (once each), attention without fused kernels, rotations in
fp32 step by step, guidance, softmax and multinomial at each step, whose probabilities are kept.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mutor_img import generate
from mutor_img.blocks import ModelConfig
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.config import check_choice
from mutor_img.common.errors import check_range
from mutor_img.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALE = 2.0


@torch.no_grad()
def plain_generate(model: Transformer, labels: Tensor) -> Tensor:
    """Sample codes (B, N) of labels (B,) int64 by the plain loop."""
    config, weight = model.config, model.output.weight
    rows, slots, device = 2 * len(labels), -(-(config.length + 1) // 8) * 8, weight.device
    shape = (rows, config.heads, slots, config.dim // config.heads)
    caches = [torch.zeros(2, *shape, dtype=weight.dtype, device=device) for _ in model.layers]
    visible = torch.ones(slots, slots, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)

    def step(x: Tensor, at: Tensor) -> Tensor:
        mask, rope = visible[:, None, at], model.rope(at)[None]  # (2 B, 1, 1, slots), (1, 1, 2, head dim / 2)
        for layer, (keys, values) in zip(model.layers, caches):
            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                keys[:, :, at], values[:, :, at] = k, v
                grouped = keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1)
                with sdpa_kernel(SDPBackend.MATH):
                    return F.scaled_dot_product_attention(q, *grouped, attn_mask=mask)

            x = layer(x, rope, attend)
        conditional, unconditional = model.output(model.norm(x))[:, -1].float().chunk(2)  # (B, V) each
        return (unconditional + (conditional - unconditional) * SCALE).softmax(-1)

    kept = [step(model.cls_embedding(torch.cat([labels, labels * 0 + config.classes]))[:, None],
                 torch.arange(1, device=device))]
    codes = [torch.multinomial(kept[-1], 1)]
    position = torch.ones(1, dtype=torch.int64, device=device)
    while len(codes) < config.length:
        kept.append(step(model.tok_embeddings(codes[-1].repeat(2, 1)), position))
        codes.append(torch.multinomial(kept[-1], 1))
        position += 1
    return torch.cat(codes, 1)


def seconds(sample: Callable[[], Tensor], device: torch.device) -> float:
    """Time one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    sample()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(model: Transformer, batch: int, rounds: int) -> tuple[float, float]:
    """Return the images per second of the plain loop and of :func:`generate`: medians of ``rounds``, taken in turn."""
    device = model.output.weight.device
    labels = torch.arange(batch, device=device) % model.config.classes
    samplers = (lambda: plain_generate(model, labels), lambda: generate(model, labels, cfg_scale=SCALE))
    times = [[seconds(sample, device) for sample in samplers] for _ in range(1 + rounds)][1:]
    plain, ours = (batch / statistics.median(column) for column in zip(*times))
    return plain, ours


def machine(device: torch.device) -> str:
    """Return the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    threads = torch.get_num_threads()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}"


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Images per second of the sampler, beside a plain sampling loop.",
                    example="python -m benchmarks.sampling --batch-sizes 8,32 --threads 2")
    parser.add_argument("--preset", default="B", help="model size")
    parser.add_argument("--grid", type=int, default=7, help="rows and columns of codes")
    parser.add_argument("--vocabulary", type=int, default=16384, help="number of codes")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp32")
    parser.add_argument("--batch-sizes", default="8,32", help="images at a time, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    check_choice("--dtype", args.dtype, tuple(DTYPES))
    check_choice("--device", args.device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    check_range("--vocabulary", args.vocabulary, 2, 1_000_000)
    batch_sizes = parse_numbers(args.batch_sizes, "--batch-sizes", int)
    for name, value in (("--grid", args.grid), ("--rounds", args.rounds), ("--threads", args.threads),
                        *(("--batch-sizes", batch) for batch in batch_sizes)):
        check_range(name, value, 1, 1000)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = ModelConfig.preset(args.preset, grid=(args.grid, args.grid), vocabulary=args.vocabulary)
    model = Transformer(config).to(device, DTYPES[args.dtype]).eval()
    nn.init.normal_(model.output.weight, std=0.02)
    print(f"{machine(device)}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{args.preset}, {args.dtype}, {config.length} codes, guidance {SCALE}; images per second, without decoding")
    print(f"{'batch':>6} {'plain loop':>11} {'ours':>9} {'ratio':>7}")
    for batch in batch_sizes:
        plain, ours = compare(model, batch, args.rounds)
        print(f"{batch:>6} {plain:>11.3f} {ours:>9.3f} {ours / plain:>6.1f}x", flush=True)


if __name__ == "__main__":
    run(main)
