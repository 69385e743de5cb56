"""Train a generator: ``python train.py --config configs/mnist/mutor2d.yaml``; see ``--help``."""

from mutor_img.common.doors import train

if __name__ == "__main__":
    train()
