"""The part of the page that browses runs, in Gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mutor_img.app import markup
from mutor_img.app.runs import MOST_PICTURES, list_runs, overview, show_pictures, view
from mutor_img.common.errors import UserError


def build_runs_tab(page: gr.Blocks, root: Path) -> None:
    """Put the browser of the runs below ``root`` where the caller is in ``page``.

    Every request lists the runs anew, so that it sees what is there now.
    """
    with gr.Row():
        # A name that is not in the list is refused by the list made anew, in a line on the page.
        run = gr.Dropdown([], value=None, allow_custom_value=True, label="Run", scale=4, elem_id="run")
        refresh = gr.Button("Refresh", min_width=80, elem_id="refresh")
    table = gr.HTML(elem_id="runs", max_height=280)
    head = gr.HTML(markup.note("Choose a run."), elem_id="run-head")
    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            curves = gr.HTML(elem_id="run-curves")
            scores = gr.HTML(elem_id="run-scores")
            config = gr.HTML(elem_id="run-config")
        with gr.Column(scale=2, min_width=300):
            pictures = gr.Dropdown([], value=[], allow_custom_value=True, multiselect=True, max_choices=MOST_PICTURES,
                                   label="Pictures", elem_id="pictures")
            shown = gr.HTML(elem_id="run-pictures")
    parts = [head, curves, scores, config, pictures, shown]

    def choose(name: str | None) -> list[Any]:
        """Return what each part shows of a run, or in the first one why it shows nothing; no name: all stays."""
        if not name:
            return [gr.skip()] * len(parts)
        try:
            listing = list_runs(root)
            found = view(listing, name)
            images = show_pictures(listing, name, found.first)
        except UserError as error:
            return [markup.error(str(error)), "", "", "", gr.update(choices=[], value=[]), ""]
        return [found.head, found.curves, found.scores, found.config,
                gr.update(choices=found.pictures, value=found.first), images]

    def look(name: str | None) -> list[Any]:
        listing = list_runs(root)
        return [overview(listing), gr.update(choices=list(listing.folders),
                                             value=name if name in list(listing.folders) else None), *choose(name)]

    def draw(name: str | None, labels: list[str]) -> str:
        try:
            return show_pictures(list_runs(root), name, labels)
        except UserError as error:
            return markup.error(str(error))

    options = {"concurrency_limit": 1, "concurrency_id": "runs", "api_visibility": "private"}
    page.load(look, run, [table, run, *parts], **options)
    refresh.click(look, run, [table, run, *parts], **options)
    run.change(choose, run, parts, **options)  # not input: leaving the field sends that again
    pictures.input(draw, [run, pictures], shown, **options)
