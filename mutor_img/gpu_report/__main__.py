"""``python -m mutor_img.gpu_report``: run every GPU check on this machine's GPU and print the report."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import sys
from collections.abc import Sequence

from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import check_range
from mutor_img.common.files import write_atomic
from mutor_img.common.locks import claim, file_lock
from mutor_img.common.threads import share
from mutor_img.gpu_report.checks import all_checks, measurements
from mutor_img.gpu_report.report import Outcome, Worker, run_checks, to_markdown
from mutor_img.pretraining.speed import require_gpu


def main(argv: Sequence[str]) -> None:
    """Check this GPU; exit status 1 if a check failed.

    Raises:
        UserError: there is no CUDA device.
    """
    parser = Parser(description="Check everything that only a GPU can check, and print a report to paste into a bug "
                                "report: versions, each check's result and errors, tokens per second and peak memory.",
                    example="python -m mutor_img.gpu_report --jobs 8 --out report.md")
    parser.add_argument("--quick", action="store_true", help="fewer masks: those of the paper's image rows")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a measured update of B")
    parser.add_argument("--jobs", type=int, default=1,
                        help="checks at a time; most of the time is compiling, so as many as there are processor cores "
                             "is fastest. Updates of B are measured alone")
    parser.add_argument("--out", metavar="FILE", help="file to write the report to; it is printed as well")
    args = parser.parse_args(argv)
    check_range("--batch", args.batch, 1, 4096)
    check_range("--jobs", args.jobs, 1, 256)
    require_gpu("these checks need")
    names, measured = list(all_checks(args.quick)), measurements(args.batch)  # the table ends with what is measured
    # This process leaves the GPU alone: one in exclusive mode has room for the checks' process only.
    question = {"device": "cuda:0", "backend": "inductor", "batch": args.batch}
    with claim(file_lock(args.out)):
        with Worker(question) as worker:
            facts = worker.environment()

        def write(outcomes: list[Outcome]) -> None:
            if args.out:  # after each check: whatever ends this process, the report is there
                report = to_markdown(facts, outcomes, len(names))
                write_atomic(args.out, lambda path: path.write_text(report))

        write([])
        threads = share(args.jobs)
        workers = [Worker(question, environment=threads) for _ in range(args.jobs)]
        outcomes = run_checks([name for name in names if name not in measured], workers, write)
        outcomes += run_checks([name for name in names if name in measured], [Worker(question)],
                               lambda more: write(outcomes + more))
    print(to_markdown(facts, outcomes, len(names)))
    if not all(outcome.passed for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
