"""Score generated images; see ``python evaluate_fid.py --help`` and docs/evaluation.md."""

from mutor_img import cli
from mutor_img.metrics.command import main

if __name__ == "__main__":
    cli.run(main)
