"""What the page takes on at most, whoever asks: a request's size, requests in a second, and how many wait.

All clients together are limited, not each of them: through a tunnel or a proxy all come from one address. What is
refused costs next to nothing, since nothing of it is read.
"""

from __future__ import annotations

import json
import time
from typing import Any

LARGEST = 16 << 20  # bytes of one request; an image that is uploaded
PER_SECOND, AT_ONCE = 100.0, 400.0  # requests that ask for work: in the long run, and after a pause
CONNECTIONS = 1000  # at a time; an open page holds two
WAITING = 250  # clicks that wait for their turn; the page shows each its place

_WORK = {"POST", "PUT", "PATCH"}


class Limits:
    """An ASGI application that passes on to another one what is within the limits.

    Source: the ASGI specification 3.0, "HTTP connection scope".
    """

    def __init__(self, app: Any):
        """Stand before ``app``, an ASGI application."""
        self.app = app
        self._left, self._seen = AT_ONCE, time.monotonic()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or have ``app`` do so."""
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["method"] in _WORK else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, detail = refusal
        await send({"type": "http.response.start", "status": status,
                    "headers": [(b"content-type", b"application/json"), (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Return the HTTP status and the words of a refusal; None: the request is within the limits."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or len(length) > 20:  # sent in pieces, it may never end
            return 411, "a request must say its length"
        if int(length) > LARGEST:
            return 413, f"a request of {int(length):,} bytes; the page takes at most {LARGEST:,}"
        now = time.monotonic()
        self._left = min(AT_ONCE, self._left + (now - self._seen) * PER_SECOND)
        self._seen = now
        if self._left < 1:
            return 429, "too many requests at a time; try again in a few seconds"
        self._left -= 1
        return None
