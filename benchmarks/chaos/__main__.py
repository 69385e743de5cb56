"""Try out what the project survives, and print how often it did.

    python -m benchmarks.chaos --only rot --cases 1000
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from benchmarks.chaos.case import Fault, Place
from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import check_choice, check_range
from mutor_img.common.files import append_line
from mutor_img.common.locks import claim, file_lock

PARTS = ("hostile", "rot", "fuzz", "disks", "changes", "numbers", "kills", "processes", "network", "page")


def main(argv: Sequence[str]) -> int:
    """Try the parts out, print a table, and write a JSON line for each case; returns how many faults were found."""
    parser = Parser(description="Try out what the project survives: hostile and rotten files, failing disks, numbers "
                    "that are none, kills, processes that fail, no network, a crowd at the page. Prints a table, and "
                    "each fault in a line.",
                    example="python -m benchmarks.chaos --only rot --cases 1000 --out chaos.jsonl")
    parser.add_argument("--only", metavar="NAME", help=f"one part: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--cases", type=int, default=1000, help="cases of a part that draws them")
    parser.add_argument("--seconds", type=float, default=1e6, help="seconds after which a part ends")
    parser.add_argument("--crowd", type=float, default=60.0, metavar="SECONDS", help="how long the page's many clients "
                        "stay")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    parser.add_argument("--out", default="runs/chaos.jsonl", metavar="FILE", help="file that a line is added to for "
                        "each case")
    args = parser.parse_args(argv)
    if args.only is not None:
        check_choice("--only", args.only, PARTS)
    check_range("--cases", args.cases, 1, 10**7)
    check_range("--seconds", args.seconds, 0, 1e6)
    check_range("--crowd", args.crowd, 1, 1e6)
    with claim(file_lock(args.out, keeps=True)):
        found = [line for part in PARTS if args.only in (None, part) for line in _try(part, args)]
    print(f"{'part':<10}{'outcome':<32}{'cases':>7}")
    for (part, outcome), count in sorted(Counter((line["part"], line["outcome"]) for line in found).items()):
        print(f"{part:<10}{outcome:<32}{count:>7}")
    return sum(line["outcome"] == "FAULT" for line in found)


def _try(part: str, args) -> Iterator[dict]:
    """Yield a line for each case of a part, and write it down."""
    with tempfile.TemporaryDirectory() as folder:
        place, begun = Place(Path(folder), args.cases, args.seed, args.crowd), time.monotonic()
        try:
            bar = tqdm(import_module(f"benchmarks.chaos.{part}").cases(place), desc=part, unit="case", mininterval=1.0)
            for case in bar:
                if time.monotonic() - begun > args.seconds:
                    break
                line = {"part": part, "case": case.name, "seed": args.seed}
                try:
                    line["outcome"], _, line["figures"] = case.run().partition(", ")  # outcomes alone are counted
                except Fault as fault:
                    line |= {"outcome": "FAULT", "fault": str(fault)}
                    bar.write(f"FAULT in {part}: {case.name}: {fault}")
                append_line(args.out, json.dumps(line))
                yield line
        finally:
            place.close()


if __name__ == "__main__":
    run(lambda argv: sys.exit(min(1, main(argv))))
