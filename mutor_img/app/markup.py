"""The page's own HTML: images grouped by class, progress, tables, messages. Text that comes from files is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

PIXELS = 64  # smaller images are magnified by a whole number to about this

# Colours and spacing are Gradio's variables, so that the page follows the browser's light or dark mode.
STYLE = """
.mutor-grid { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: flex-start; }
.mutor-grid figure { margin: 0; }
.mutor-grid figcaption { font-size: 13px; color: var(--body-text-color-subdued); margin-bottom: 2px; }
.mutor-grid figcaption b { color: var(--body-text-color); font-weight: 600; }
.mutor-grid .row { display: flex; flex-wrap: wrap; gap: 3px; }
.mutor-grid img, .mutor-grid .pending { display: block; margin: 0; border-radius: 3px; }
.mutor-grid img.magnified { image-rendering: pixelated; }
.mutor-grid .pending { background: var(--border-color-primary); opacity: 0.45; }
.mutor-title { font-weight: 600; overflow-wrap: anywhere; margin-bottom: 8px; }
.mutor-note { color: var(--body-text-color-subdued); font-size: 14px; }
.mutor-note progress { width: 100%; height: 8px; accent-color: var(--color-accent); }
.mutor-runs { border-collapse: collapse; width: 100%; border: 0 !important; }
.mutor-runs th, .mutor-runs td { text-align: left; padding: 3px 14px 3px 0; overflow-wrap: break-word;
                                 border-width: 0 0 1px !important; border-color: var(--border-color-primary); }
.mutor-text { overflow-x: auto; font-size: 12.5px; line-height: 1.4; white-space: pre; margin: 4px 0 14px; }
.mutor-picture { margin: 0 0 14px; }
.mutor-picture img { max-width: 100%; height: auto; border-radius: 3px; background: white; }
.mutor-error { border-left: 4px solid #dc2626; background: rgba(220, 38, 38, 0.1); padding: 8px 12px;
               border-radius: 4px; overflow-wrap: anywhere; }
"""


class Grid:
    """The images of one checkpoint on the page, grouped by class, filled as they come."""

    def __init__(self, title: str, labels: Sequence[int], names: Sequence[str]):
        """Begin without an image.

        Args:
            title: above the grid.
            labels: of all images, in the order they will come.
            names: a readable name for each class.
        """
        self.title, self.labels, self.names = title, list(labels), names
        self.images: list[str] = []  # a tag each, for the first of the labels
        self.side = PIXELS  # of a place whose image is yet to come

    def add(self, images: np.ndarray) -> None:
        """Take the next images, (b, H, W, 3) uint8."""
        for image in images:
            height, width, _ = image.shape
            scale = max(1, PIXELS // height)
            self.side = height * scale
            place = len(self.images)
            name = f"sample {place}: {self.names[self.labels[place]]}"
            self.images.append(
                f'<img src="{png_url(image)}" data-sample="{place}" alt="{escape(name)}" title="{escape(name)}" '
                f'width="{width * scale}" height="{height * scale}"{" class=magnified" if scale > 1 else ""}>')

    def html(self) -> str:
        """Return the grid as it is now: one figure per class, the classes in ascending order."""
        pending = f'<span class="pending" style="width:{self.side}px;height:{self.side}px"></span>'
        groups: dict[int, list[str]] = {label: [] for label in sorted(set(self.labels))}
        for place, label in enumerate(self.labels):
            groups[label].append(self.images[place] if place < len(self.images) else pending)
        figures = "".join(
            f'<figure><figcaption>{self._caption(label)}</figcaption><div class="row">{"".join(row)}</div></figure>'
            for label, row in groups.items())
        return title(self.title) + f'<div class="mutor-grid">{figures}</div>'

    def _caption(self, label: int) -> str:
        return f"<b>{escape(self.names[label])}</b>" + ("" if self.names[label] == str(label) else f" {label}")


def png_url(image: np.ndarray) -> str:
    """Return an (H, W, 3) uint8 image as a data URL that holds its exact pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return data_url(buffer.getvalue())


def data_url(png: bytes) -> str:
    """Return the bytes of a PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def printable(text: str) -> str:
    """Return text that can be sent: what is no UTF-8 in a file's name stands there as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a line of names above its rows."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="mutor-runs"><tr>{head}</tr>{body}</table>'


def title(words: str) -> str:
    """Return a line that stands above others."""
    return f'<div class="mutor-title">{escape(words)}</div>'


def text(name: str, content: str) -> str:
    """Return lines of text as they are, below their name."""
    return title(name) + f'<pre class="mutor-text">{escape(content)}</pre>'


def folded(name: str, content: str) -> str:
    """Return lines of text that a click on their name shows."""
    return f'<details><summary>{escape(name)}</summary><pre class="mutor-text">{escape(content)}</pre></details>'


def picture(name: str, png: bytes) -> str:
    """Return the picture of a PNG file below its name."""
    return (f'<figure class="mutor-picture"><figcaption class="mutor-title">{escape(name)}</figcaption>'
            f'<img src="{data_url(png)}" alt="{escape(name)}"></figure>')


def class_choices(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return (what the class picker shows, label) for each class; its number too, to tell namesakes apart."""
    return [(name if name == str(label) else f"{name} ({label})", label) for label, name in enumerate(names)]


def empty_grid(name: str) -> str:
    """Return what stands in a grid's place before the first image."""
    return title(name) + note("Choose classes and press Generate.")


def note(text: str) -> str:
    """Return a quiet line."""
    return f'<div class="mutor-note" role="status">{escape(text)}</div>'


def progress(done: int, total: int, seconds: float) -> str:
    """Return a bar with ``done`` of ``total`` images after ``seconds``, and how long the rest may take."""
    left = f", about {seconds / done * (total - done):.0f} s left" if done else ""
    return (f'<div class="mutor-note" role="status"><progress value="{done}" max="{total}"></progress>'
            f"{done} of {total} images, {seconds:.0f} s{left}</div>")


def error(message: str) -> str:
    """Return a message of what is wrong and how to fix it."""
    return f'<div class="mutor-error" role="alert">{escape(message)}</div>'
