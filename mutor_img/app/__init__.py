"""A page in the browser to look at samples and training runs: ``python -m mutor_img.app``.

Gradio, an optional extra, draws it.
"""
