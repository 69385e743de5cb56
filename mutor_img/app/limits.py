"""What the page takes on, whoever asks: which addresses there are, how large a request may be, and how many at a time.

Gradio has many more addresses than the page needs: some read files, some fetch what a request names from the network.
Only those that a browser with the page needs are open here. All clients together are limited, not each of them: through
a tunnel or a proxy all come from one address. What is refused costs next to nothing, since little of it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from mutor_img.common.cli import one_line

LARGEST = 16 << 20  # bytes of one request; an image that is uploaded
LARGEST_CLICK = 1 << 18  # bytes of a request that names the values of all controls
PER_SECOND, AT_ONCE = 100.0, 400.0  # requests that ask for work: in the long run, and after a pause
CONNECTIONS = 1000  # at a time; an open page holds two
WAITING = 250  # clicks that wait for their turn; the page shows each its place
SESSIONS = 32  # whose last values Gradio keeps, all images among them; a page that it has forgotten works on
UPLOADS, KEPT = 1 << 30, 3600  # bytes of uploads within as many seconds; after that time they are removed
SILENCE = 10.0  # seconds for which a client may leave the page waiting for a request, or its rest, or to be read
UNREAD = 5.0  # seconds after which a click is given up if nobody reads its answer: Gradio would keep all of it
LONGEST_SESSION = 64  # characters of a session's name
SMALLEST_UPLOAD = 1 << 20  # bytes that an upload counts for at least: small files fill a disk, too

_CLICKS = ("/gradio_api/queue/join", "/gradio_api/run/predict")  # the latter: Stop, which does not wait for its turn
_ANSWERS = "/gradio_api/queue/data"
_UPLOAD, _FILE = "/gradio_api/upload", "/gradio_api/file="
_SHOWN = re.compile(r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.+|"
                    r"/gradio_api/(info|app_id|startup-events|theme\.css|queue/(data|status)|upload_progress|"
                    r"heartbeat/\w+)/?")
_ASKED = re.compile(rf"({'|'.join(_CLICKS)}|{_UPLOAD}|/gradio_api/(cancel|reset))/?")
_OPEN = {"GET": _SHOWN, "HEAD": _SHOWN, "POST": _ASKED}

Refusal = tuple[int, str]  # the HTTP status, and why


class Limits:
    """An ASGI application that passes on to another one what is within the limits.

    Source: the ASGI specification 3.0, "HTTP connection scope".
    """

    def __init__(self, app: Any, uploads: Path, readers: Readers):
        """Stand before ``app``, an ASGI application that keeps what is uploaded in the folder ``uploads``.

        ``readers`` is told who reads the answers to clicks.
        """
        self.app, self.uploads, self._readers = app, os.path.realpath(uploads), readers
        self._requests, self._bytes = Bucket(PER_SECOND, AT_ONCE), Bucket(UPLOADS / KEPT, UPLOADS)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or have ``app`` do so."""
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":  # the server's own start and end
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["path"].startswith(_CLICKS):
            body, receive = await _read(receive)
            refusal = self._read_click(body)
        if refusal is None:
            await self._pass_on(scope, receive, send)
            return
        status, detail = refusal
        await send({"type": "http.response.start", "status": status,
                    "headers": [(b"content-type", b"application/json"), (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})

    async def _pass_on(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            with self._readers.while_reading(scope):
                await self.app(scope, receive, send)
        except Exception as error:  # of Gradio, at a request that its page doesn't make; it has answered with 500
            print(f"warning: {scope['path']!r} failed: {one_line(f'{type(error).__name__}: {error}')}",
                  file=sys.stderr)

    def _refusal(self, scope: dict[str, Any]) -> Refusal | None:
        """Return why a request is refused by its first lines; None: it is within the limits."""
        method, path = scope["method"], scope["path"]
        if method not in _OPEN:
            return 405, "the page takes GET, HEAD and POST"
        mine = path.startswith(_FILE) and method != "POST" and self._holds(path.removeprefix(_FILE))
        if not mine and (".." in path or not _OPEN[method].fullmatch(path)):
            return 404, "the page has no such address"
        return self._unasked(scope) if method == "POST" else None

    def _unasked(self, scope: dict[str, Any]) -> Refusal | None:
        """Return why a request that asks for work is refused: another website sends it, or it is too much."""
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):  # a browser tells who asks
            return 403, "another website asks; the page takes clicks and uploads from itself alone"
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 20:  # sent in pieces, it may never end
            return 411, "a request must say its length"
        upload = scope["path"].startswith(_UPLOAD)
        most = LARGEST if upload else LARGEST_CLICK
        if int(length) > most:
            return 413, f"a request of {int(length):,} bytes; the page takes at most {most:,} here"
        if not self._requests.take(1):
            return 429, "too many requests at a time; try again in a few seconds"
        if upload and not self._bytes.take(max(int(length), SMALLEST_UPLOAD)):
            return 429, f"the page holds {UPLOADS:,} bytes of uploads already; try again in an hour"
        return None

    def _read_click(self, body: bytes) -> Refusal | None:
        """Refuse a click that names a file which was not uploaded: Gradio would read it, or fetch it if it is a URL."""
        try:
            click = json.loads(body)
        except (ValueError, RecursionError):
            return 400, "a click must be JSON"
        session = click.get("session_hash") if isinstance(click, dict) else None
        if not isinstance(session, str) or len(session) > LONGEST_SESSION:  # Gradio keeps the names of all sessions
            return 400, f"a click must name its session, in at most {LONGEST_SESSION} characters"
        self._readers.expect(session)
        waiting = [click]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict) and "path" in value and not self._holds(value["path"]):
                return 403, "a click may name files that were uploaded to the page, and no others"
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
        return None

    def _holds(self, path: Any) -> bool:
        """Tell whether a path lies in the folder of uploads, wherever its links lead."""
        try:
            return os.path.isabs(path) and os.path.realpath(path).startswith(self.uploads + os.sep)
        except (TypeError, ValueError):  # no text, or text that can be no path
            return False


class Readers:
    """Who reads the answers to clicks just now, by session of the page."""

    def __init__(self):
        self._reading: Counter[str] = Counter()
        self._clicked: OrderedDict[str, float] = OrderedDict()  # when each last clicked; of the newest sessions

    def expect(self, session: str) -> None:
        """Note that a session has clicked: it may take a moment until it reads the answer."""
        self._clicked[session] = time.monotonic()
        self._clicked.move_to_end(session)
        if len(self._clicked) > CONNECTIONS:
            self._clicked.popitem(last=False)

    @contextlib.contextmanager
    def while_reading(self, scope: dict[str, Any]) -> Iterator[None]:
        """Count a request, if it reads answers, while it is answered."""
        if not scope["path"].startswith(_ANSWERS):
            yield
            return
        session = parse_qs(scope["query_string"].decode(errors="replace")).get("session_hash", [""])[0]
        self._reading[session] += 1
        try:
            yield
        finally:
            self._reading[session] -= 1
            if not self._reading[session]:
                del self._reading[session]

    def wait_for(self, session: str) -> bool:
        """Return whether somebody reads a session's answers, now or until ``UNREAD`` seconds after its click."""
        end = self._clicked.get(session, 0.0) + UNREAD
        while session not in self._reading and time.monotonic() < end:
            time.sleep(0.05)
        return session in self._reading


class Bucket:
    """What may be taken: so much per second in the long run, and more at once after a pause."""

    def __init__(self, per_second: float, most: float):
        """Begin with ``most``, which it never holds more of."""
        self._per_second, self._most = per_second, most
        self._left, self._seen = most, time.monotonic()

    def take(self, amount: float) -> bool:
        """Take an amount, if it is there; returns whether it was."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._seen) * self._per_second)
        self._seen = now
        if self._left < amount:
            return False
        self._left -= amount
        return True


async def _read(receive: Any) -> tuple[bytes, Any]:
    """Return the body of a request, and a function that gives all its messages once more."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)

    async def again() -> dict[str, Any]:
        return messages.pop(0) if messages else await receive()

    return body, again
