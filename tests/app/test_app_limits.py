"""What is too large or too much is refused before it is read, and what is refused comes through again later."""

import asyncio
import json

import pytest

from mutor_img.app import limits
from mutor_img.app.limits import AT_ONCE, LARGEST, PER_SECOND, Limits


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: ``clock[0]`` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def ask(clock):
    """Ask a page behind the limits, as a server would; returns the status and the words of a refusal."""
    async def page(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = Limits(page)

    def request(length: int | None = 2, method: str = "POST"):
        sent, read = [], []

        async def receive():
            read.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        headers = [] if length is None else [(b"content-length", str(length).encode())]
        asyncio.run(app({"type": "http", "method": method, "headers": headers}, receive, send))
        status, body = sent[0]["status"], sent[1]["body"]
        assert bool(read) == (status == 200)  # of what is refused, nothing is read
        return status, json.loads(body)["detail"] if body else ""

    return request


def test_a_request_of_the_usual_size_comes_through(ask):
    assert ask(LARGEST) == (200, "") and ask(None, "GET") == (200, "")


@pytest.mark.parametrize(("length", "status", "words"), [
    (LARGEST + 1, 413, "16,777,217 bytes; the page takes at most 16,777,216"), (10**19, 413, "at most"),
    (None, 411, "must say its length"), (-1, 411, "must say its length"), (10**4000, 411, "must say its length")],
    ids=lambda value: str(value)[:20])
def test_a_request_that_is_too_large_or_endless_is_refused(ask, length, status, words):
    found, detail = ask(length)
    assert found == status and words in detail


def test_too_many_requests_are_refused_until_time_has_passed(ask, clock):
    assert all(ask()[0] == 200 for _ in range(int(AT_ONCE)))
    assert ask() == (429, "too many requests at a time; try again in a few seconds") and ask(None, "GET")[0] == 200
    clock[0] += 1
    assert [ask()[0] for _ in range(int(PER_SECOND) + 1)] == [200] * int(PER_SECOND) + [429]
    clock[0] += 3600
    assert [ask()[0] for _ in range(int(AT_ONCE) + 1)] == [200] * int(AT_ONCE) + [429]


def test_what_is_no_request_is_passed_on(clock):
    seen = []

    async def page(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Limits(page)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
