"""The page itself, in Gradio: controls on the left, a grid for each checkpoint on the right.

The only module that needs Gradio. Nothing leaves the machine: no telemetry, no share link, no fonts from elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mutor_img.app import markup
from mutor_img.app.session import MAX_IMAGES, Controls, Side, answer
from mutor_img.sampling.labels import RULES

FIRST_COUNT = 20  # images of each checkpoint until the user says otherwise
WIDEST_SCALE = 10.0  # of the guidance slider


def build_page(sides: Sequence[Side]) -> gr.Blocks:
    """Return the page for one checkpoint, or for several of the same classes with the same seeds."""
    with gr.Blocks(title="mutor_img samples", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## Samples" + (", side by side from the same seeds" if len(sides) > 1 else ""))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = _controls(sides[0])
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    button = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                status = gr.HTML(markup.note("Ready."), elem_id="status")
            with gr.Column(scale=3, min_width=420):
                with gr.Row():
                    grids = [gr.HTML(markup.empty_grid(side.title), elem_id=f"grid-{place}", min_width=300)
                             for place, side in enumerate(sides)]
                commands = gr.Code("", language="shell", label="The same images from the command line", visible=False,
                                   elem_id="commands", lines=1, interactive=False, wrap_lines=True)

        def generate(*values: Any) -> Iterator[list[Any]]:
            for view in answer(sides, Controls(*values)):
                shown = gr.skip() if view.commands is None else gr.update(value=view.commands, visible=True)
                yield [view.status, shown, *(gr.skip() if grid is None else grid for grid in view.grids)]

        running = button.click(generate, controls, [status, commands, *grids], show_progress="minimal",
                               show_progress_on=status, concurrency_limit=1, api_visibility="private")
        stop.click(lambda: markup.note("Stopped."), None, status, cancels=[running], queue=False,
                   api_visibility="private")
    return page


def _controls(side: Side) -> list[gr.components.Component]:
    """Return the components in the order of :class:`Controls`' fields."""
    source, settings = side.source, side.source.settings
    classes = gr.Dropdown(
        markup.class_choices(source.names), value=list(source.classes or ()), multiselect=True, label="Classes",
        info=f"type a name or a number; none chosen: all {len(source.names)}", elem_id="classes")
    labels = gr.Radio(RULES, value=source.rule, label="Labels", elem_id="labels",
                      info="balanced: the same number of each class; random: one drawn for each image")
    with gr.Row():
        count = gr.Number(FIRST_COUNT, label="Images", info=f"1 to {MAX_IMAGES}", elem_id="count", min_width=100)
        seed = gr.Number(settings.seed, label="Seed", info="a whole number", elem_id="seed", min_width=100)
    cfg_scale = gr.Slider(1.0, max(WIDEST_SCALE, settings.cfg_scale), value=settings.cfg_scale, step=0.05,
                          label="Guidance scale", info="1: none", elem_id="cfg_scale")
    with gr.Row():
        temperature = gr.Number(settings.temperature, label="Temperature", info="above 0", step=0.05,
                                elem_id="temperature", min_width=90)
        top_k = gr.Number(settings.top_k, label="Top-k", info="0: all", elem_id="top_k", min_width=90)
        top_p = gr.Number(settings.top_p, label="Top-p", info="1: all", step=0.05, elem_id="top_p", min_width=90)
    return [classes, labels, count, cfg_scale, temperature, top_k, top_p, seed, *_editing(side)]


def _editing(side: Side) -> list[gr.components.Component]:
    """Return the components of editing, in the order of :class:`Controls`' last fields."""
    with gr.Accordion("Edit", open=False, elem_id="edit"):
        mix_with = gr.Dropdown(markup.class_choices(side.source.names), value=[], multiselect=True, max_choices=1,
                               label="Mix with", info="a class that every class is mixed with", elem_id="mix_with")
        mix_share = gr.Slider(0.0, 1.0, value=0.5, step=0.05, label="Its share", elem_id="mix_share")
        with gr.Row():
            keep, mask = (gr.Image(type="filepath", image_mode=None, sources=["upload"], label=label, height=140,
                                   elem_id=name)
                          for name, label in (("keep", "Image to keep"), ("mask", "Mask: white is made anew")))
    return [mix_with, mix_share, keep, mask]


def serve(page: gr.Blocks, listener: socket.socket) -> None:
    """Serve the page at a listening socket until the program is interrupted."""
    # Not Blocks.launch: it asks itself for the page over HTTP first, and gives up behind a proxy or on a busy machine.
    app = gr.mount_gradio_app(FastAPI(), page, "/", *listener.getsockname(), footer_links=[], run_history=False,
                              show_error=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
                              css=markup.STYLE)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    print("http://{}:{} (Ctrl-C ends it)".format(*listener.getsockname()), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
