"""Sample images from a trained generator; see ``python sample.py --help`` and docs/sampling.md."""

from mutor_img.common.doors import sample

if __name__ == "__main__":
    sample()
