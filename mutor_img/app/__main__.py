"""``python -m mutor_img.app``: a page to look at samples of one or two checkpoints, and at training runs."""

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

from mutor_img.app.command import main
from mutor_img.common.cli import run

if __name__ == "__main__":
    run(main)
