"""Up to how many images at a time drafts should pay on an H100: computed from its data sheet, not measured.

    python -m benchmarks.break_even                      # a window of 8, products at 40 % of the peak
    python -m benchmarks.break_even --window 4 --share 0.6

A pass in bf16 with guidance has two rows for each input of an image's window, and takes the sum of three parts:

=============  =========================================================================================
linear layers  reading the weights once, or the products of all rows, whichever takes longer
attention      reading the keys and values of all places once for each half: the rows of a window share them
each row       writing and reading activations, and from logits to a drawn code
=============  =========================================================================================

Memory runs at its peak, products at a share of theirs. Left out are attention's own products, a few per cent of the
linear layers', and the time between kernels, which is the same for few rows and for many: where it counts, drafts pay
more than this says. A window here has no registers; with them it is as costly as one of 2 W - 1 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mutor_img.blocks import LLAMAGEN_PRESETS, ModelConfig
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import check_range
from mutor_img.decoding.gpu import MOST_ROWS
from mutor_img.metrics.report import aligned
from mutor_img.pretraining.cost import H100_MEMORY
from mutor_img.training.hardware import gpu_peak
from mutor_img.transformer import Transformer

ACTIVATIONS = 70  # bytes per row, block and unit of dim, counted over a fused block: norms, products, residuals
LOGIT = 34  # bytes per row and code of the vocabulary, counted over guidance, softmax, sums in float64 and the draw
MOST = MOST_ROWS // 2  # images at a time, with guidance, that a sampler hands to a GPU


def seconds(model: Transformer, images: int, window: int, share: float) -> float:
    """Return how long a pass takes at least.

    Args:
        model: any device, meta too: only its sizes count.
        images: at a time.
        window: W, the inputs of an image per pass; 1: sequential decoding.
        share: of the peak, what products reach.
    """
    config, rows = model.config, 2 * images * window
    products = model.forward_flops(1, pairs=0)  # of a row: 2 FLOPs per weight, which has 2 bytes
    linear = max(products / H100_MEMORY, rows * products / (share * gpu_peak("H100", "bf16")))
    cache = 2 * images * config.layers * 2 * config.length * config.dim * 2  # halves, keys and values, bf16
    row = ACTIVATIONS * config.layers * config.dim + LOGIT * config.vocabulary
    return linear + (cache + rows * row) / H100_MEMORY


def break_even(model: Transformer, window: int, codes: float, share: float) -> int:
    """Return the most images at a time, up to ``MOST``, at which ``codes`` codes per pass pay; 0: at no number."""
    pays = (n for n in range(MOST, 0, -1) if codes * seconds(model, n, 1, share) >= seconds(model, n, window, share))
    return next(pays, 0)


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Up to how many images at a time drafts should pay on an H100: computed, not measured.",
                    example="python -m benchmarks.break_even --window 8 --codes 1.25,1.5,2,3")
    add = parser.add_argument
    add("--window", type=int, default=8, metavar="W", help="inputs of an image per pass")
    add("--codes", default="1.25,1.5,2,3", metavar="LIST", help="codes per pass, comma-separated")
    add("--share", type=float, default=0.4, help="of the GPU's peak, what products reach")
    args = parser.parse_args(argv)
    check_range("--window", args.window, 2, 256)
    check_range("--share", args.share, 0.0, 1.0, low_open=True)
    sizes = list(LLAMAGEN_PRESETS)
    with torch.device("meta"):
        models = [Transformer(ModelConfig.preset(name)) for name in sizes]
    lines = [["codes per pass", *sizes]]
    for codes in parse_numbers(args.codes, "--codes", float):
        check_range("--codes", codes, 1.0, args.window)
        lines.append([f"{codes:g}", *(str(break_even(model, args.window, codes, args.share)) for model in models)])
    print(f"computed for an H100, not measured: the most images at a time, of up to {MOST}, at which a window of "
          f"{args.window} pays", *aligned(lines), sep="\n")


if __name__ == "__main__":
    run(main)
