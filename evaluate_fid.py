"""Score generated images; see ``python evaluate_fid.py --help`` and docs/evaluation.md."""

from mutor_img.common.doors import evaluate_fid

if __name__ == "__main__":
    evaluate_fid()
