"""The page itself, in Gradio: samples, training runs, or a tab for each.

Only this module and that of the runs need Gradio. Nothing leaves the machine unless ``--share`` is given: no
telemetry, no share link, no fonts from elsewhere.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio import networking
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mutor_img.app import limits, markup
from mutor_img.app.connection import Connection
from mutor_img.app.runs_tab import build_runs_tab
from mutor_img.app.session import MAX_IMAGES, Controls, Side, answer
from mutor_img.common.errors import UserError
from mutor_img.sampling.labels import RULES

FIRST_COUNT = 20  # images of each checkpoint until the user says otherwise
WIDEST_SCALE = 10.0  # of the guidance slider
HEADERS = [  # of every answer: the page loads nothing from elsewhere, and no other website shows it as its own
    ("content-security-policy", "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
                                "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"),  # Gradio needs eval
    ("x-content-type-options", "nosniff"), ("x-frame-options", "SAMEORIGIN")]
HOSTS = ("localhost", "127.0.0.1")  # what a browser may call this machine; Gradio lets any website read [::1]


def build_page(sides: Sequence[Side], runs: Path | None, readers: limits.Readers) -> gr.Blocks:
    """Return the page.

    Args:
        sides: one checkpoint, or several of the same classes, which get the same seeds; none: no samples.
        runs: the folder whose runs can be browsed; None: no runs.
        readers: knows whose answers are read; samples are made for them alone.
    """
    alone = not sides or runs is None
    with gr.Blocks(title="mutor_img", analytics_enabled=False, fill_width=True,
                   delete_cache=(60, limits.KEPT)) as page:  # looks each minute for uploads that are too old
        if sides:
            with contextlib.nullcontext() if alone else gr.Tab("Samples"):
                _samples(sides, readers)
        if runs is not None:
            with contextlib.nullcontext() if alone else gr.Tab("Runs"):
                build_runs_tab(page, runs)
    page.state_session_capacity = limits.SESSIONS
    return page.queue(max_size=limits.WAITING, api_open=False)


def _samples(sides: Sequence[Side], readers: limits.Readers) -> None:
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

    def generate(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        for view in answer(sides, Controls(*values)):
            if not readers.wait_for(request.session_hash):
                return
            shown = gr.skip() if view.commands is None else gr.update(value=view.commands, visible=True)
            yield [view.status, shown, *(gr.skip() if grid is None else grid for grid in view.grids)]

    running = button.click(generate, controls, [status, commands, *grids], show_progress="minimal",
                           show_progress_on=status, concurrency_limit=1, api_visibility="private")
    stop.click(lambda: markup.note("Stopped."), None, status, cancels=[running], queue=False,
               api_visibility="private")


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
                          for name, label in (("keep", "Image to keep"), ("mask", "Mask: white is sampled")))
    return [mix_with, mix_share, keep, mask]


def serve(page: gr.Blocks, listener: socket.socket, uploads: Path, readers: limits.Readers, share: bool = False
          ) -> None:
    """Serve the page at a listening socket until the program is interrupted.

    Args:
        page: what is served.
        listener: where.
        uploads: the folder that Gradio was told to keep uploaded files in.
        readers: those of :func:`build_page`.
        share: open a public address, too, which leads here through Gradio's servers.

    Raises:
        UserError: the public address could not be had.
    """
    # Not Blocks.launch: it asks itself for the page over HTTP first, and gives up behind a proxy or on a busy machine.
    app = gr.mount_gradio_app(FastAPI(), page, "/", *listener.getsockname(), footer_links=[], run_history=False,
                              show_error=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
                              css=markup.STYLE)
    hosts = list(HOSTS)
    if share:
        address = _public_address(*listener.getsockname())
        hosts.append(urlsplit(address).hostname)
        print(f"{address} (whoever has this address can use the page; what it shows passes through Gradio's servers)")
    # Any website can have its own name lead to this machine; a browser that is there would let it read the page.
    guarded = TrustedHostMiddleware(limits.Limits(app, uploads, readers), hosts, www_redirect=False)
    server = uvicorn.Server(uvicorn.Config(guarded, http=Connection, headers=HEADERS, log_level="warning",
                                           limit_concurrency=limits.CONNECTIONS, timeout_graceful_shutdown=1))
    print("http://{}:{} (Ctrl-C ends it)".format(*listener.getsockname()), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _public_address(host: str, port: int) -> str:
    """Open Gradio's tunnel to this machine, which ends with the program; returns its public address."""
    try:
        return networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # downloads, files, another program's words: Gradio names no class for them
        raise UserError(f"--share: no public address ({' '.join(str(error).split())}); it needs the internet; leave "
                        "the flag out to serve this machine alone") from None
