"""``python -m mutor_img.gpu_report``: everything that only a GPU can check, and a report to paste into a bug report."""
