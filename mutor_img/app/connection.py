"""A connection that ends when its client leaves the page waiting: uvicorn would wait for ever."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from mutor_img.app.limits import SILENCE


class Connection(H11Protocol):
    """uvicorn's, with an end for clients that send no request, stop within one, or never read what they asked for."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to look every ``SILENCE`` seconds at what the client does."""
        super().connection_made(transport)
        self._received = 0
        self._timer = self.loop.call_later(SILENCE, self._look, None)

    def data_received(self, data: bytes) -> None:
        """Count what comes."""
        self._received += len(data)
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        """Look no more."""
        self._timer.cancel()
        super().connection_lost(error)

    def _look(self, before: tuple | None) -> None:
        """End the connection if all that the client owed at the last look, ``before``, is owed still.

        A request's first lines must come whole; of its body and of the answer a part is enough.
        """
        unread = self.transport.get_write_buffer_size()
        if self.cycle is None or self.cycle.response_complete:
            owed = (self.cycle, unread)
        elif self.cycle.more_body:
            owed = (self.cycle, unread, self._received)
        else:
            owed = (self.cycle, unread) if unread else None
        if owed is not None and owed == before:
            self.transport.abort()  # close() would wait until all is read
        else:
            self._timer = self.loop.call_later(SILENCE, self._look, owed)
