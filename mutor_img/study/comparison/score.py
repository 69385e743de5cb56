"""``python -m mutor_img.study.comparison.score``: the scores of one run of a study, on one process or several."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

from collections.abc import Sequence

from mutor_img.common.cli import Parser, run
from mutor_img.common.config import load_config
from mutor_img.common.locks import folder_lock
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import find_job
from mutor_img.study.comparison.scoring import score_job
from mutor_img.training.runtime import DEVICES, Runtime


def main(argv: Sequence[str]) -> None:
    """Score one trained run of a study; what is scored already is left alone.

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    parser = Parser(
        description="Score the checkpoints of one run of a study, after it is trained. python -m mutor_img.study "
                    "starts this itself, or prints it with --print-commands.",
        example="torchrun --nproc-per-node 8 -m mutor_img.study.comparison.score --config "
                "configs/imagenet256/study.yaml --row mutor2d --seed 0")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the study")
    parser.add_argument("--row", required=True, metavar="NAME", help="name of the row")
    parser.add_argument("--seed", required=True, type=int, help="seed of the run")
    parser.add_argument("--device", default="auto", metavar="NAME", help=DEVICES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[],
                        help="values that replace those of the study, such as samples=10000")
    args = parser.parse_intermixed_args(argv)
    study = load_config(ComparisonConfig, args.config, args.overrides)
    job = find_job(study, args.row, args.seed)
    runtime = Runtime.on(args.device)
    with runtime.one_voice(), runtime.claim(folder_lock(job.run_dir)):
        score_job(study, job, runtime)


if __name__ == "__main__":
    run(main)
