"""Train a generator: ``python train.py --config configs/mnist/mutor2d.yaml``; see ``--help``."""

from mutor_img.common.cli import run
from mutor_img.pretraining.command import main

if __name__ == "__main__":
    run(main)
