"""Score generated images; see ``python evaluate_fid.py --help`` and docs/evaluation.md."""

from mutor_img.common import cli
from mutor_img.evaluation.command import main

if __name__ == "__main__":
    cli.run(main)
