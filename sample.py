"""Sample images from a trained generator; see ``python sample.py --help`` and docs/sampling.md."""

from mutor_img.common import cli
from mutor_img.sampling import main

if __name__ == "__main__":
    cli.run(main)
