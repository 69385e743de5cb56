"""What is too large or too much is refused before it is read, and what is refused comes through again later."""

import asyncio
import json

import pytest

from mutor_img.app import limits
from mutor_img.app.limits import (
    AT_ONCE,
    KEPT,
    LARGEST,
    LARGEST_CLICK,
    PER_SECOND,
    SMALLEST_UPLOAD,
    UPLOADS,
    Limits,
    Readers,
)

PRESS = b'{"session_hash": "s"}'
CLICK, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: ``clock[0]`` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def uploads(tmp_path):
    """A folder with one uploaded file, and a link that leads out of it."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "photo.png").touch()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    return folder


@pytest.fixture
def ask(clock, uploads):
    """Ask a page behind the limits, as a server would; returns the status and the words of a refusal."""
    async def page(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = Limits(page, uploads, Readers())

    def request(length: int | None = 2, method: str = "POST", path: str = UPLOAD, body: bytes = PRESS,
                asks: bytes = b"same-origin"):
        sent = []
        messages = [{"type": "http.request", "body": body[:-1], "more_body": True},
                    {"type": "http.request", "body": body[-1:], "more_body": False}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"sec-fetch-site", asks)]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        asyncio.run(app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
        status, answer = sent[0]["status"], sent[1]["body"]
        assert len(messages) == 2 or status in (200, 400, 403)  # what is refused is not read, but for a click's files
        return status, json.loads(answer)["detail"] if answer else ""

    return request


def test_a_request_of_the_usual_size_comes_through(ask):
    assert ask(LARGEST) == (200, "") and ask(LARGEST_CLICK, path=CLICK) == (200, "")
    assert ask(None, "GET", "/") == (200, "")


@pytest.mark.parametrize(("length", "status", "words"), [
    (LARGEST + 1, 413, "16,777,217 bytes; the page takes at most 16,777,216 here"), (10**19, 413, "at most"),
    (None, 411, "must say its length"), (-1, 411, "must say its length"), (10**4000, 411, "must say its length")],
    ids=lambda value: str(value)[:20])
def test_a_request_that_is_too_large_or_endless_is_refused(ask, length, status, words):
    found, detail = ask(length)
    assert found == status and words in detail


@pytest.mark.parametrize("path", [UPLOAD, CLICK, "/gradio_api/reset"])
def test_another_website_cannot_click_or_upload_but_link_here(ask, path):
    for asks in (b"cross-site", b"same-site"):
        assert ask(path=path, asks=asks) == (403, "another website asks; the page takes clicks and uploads from itself "
                                                  "alone")
        assert ask(None, "GET", "/", asks=asks)[0] == 200
    assert ask(path=path, asks=b"none")[0] == 200


def test_too_many_requests_are_refused_until_time_has_passed(ask, clock):
    assert all(ask()[0] == 200 for _ in range(int(AT_ONCE)))
    assert ask() == (429, "too many requests at a time; try again in a few seconds") and ask(None, "GET", "/")[0] == 200
    clock[0] += 1
    assert [ask()[0] for _ in range(int(PER_SECOND) + 1)] == [200] * int(PER_SECOND) + [429]
    clock[0] += 3600
    assert [ask()[0] for _ in range(int(AT_ONCE) + 1)] == [200] * int(AT_ONCE) + [429]


def test_a_click_is_small(ask):
    assert ask(LARGEST_CLICK + 1, path=CLICK)[0] == 413


def test_uploads_are_bounded_in_the_time_that_they_are_kept(ask, clock):
    full = (429, "the page holds 1,073,741,824 bytes of uploads already; try again in an hour")
    assert [ask(LARGEST)[0] for _ in range(UPLOADS // LARGEST)] == [200] * (UPLOADS // LARGEST)
    assert ask(1) == full and ask(LARGEST_CLICK, path=CLICK)[0] == 200
    clock[0] += KEPT * LARGEST / UPLOADS
    assert [ask(1)[0] for _ in range(LARGEST // SMALLEST_UPLOAD)] == [200] * (LARGEST // SMALLEST_UPLOAD)
    assert ask(1) == full


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file=https://example.com/x", "/static/../secret",
    "/gradio_api/proxy=https://x.hf.space/", "/gradio_api/runs", "/monitoring", "/docs", "/openapi.json",
    "/gradio_api/deep_link", "/gradio_api/component_server", "/gradio_api/call/generate", "/gradio_api/queue/join",
    "/config/../x", "//etc/passwd", "", "/gradio_api/file=", "/gradio_api/file=photo.png"])
def test_only_the_addresses_that_a_browser_needs_are_there(ask, path):
    assert ask(None, "GET", path) == (404, "the page has no such address")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(ask, method):
    assert ask(2, method, "/config")[0] == 405 and ask(2, "POST", "/config")[0] == 404


def test_an_uploaded_file_is_shown_and_no_other(ask, uploads):
    assert ask(None, "GET", f"{FILE}{uploads}/photo.png")[0] == 200
    for other in (uploads / "link", uploads.parent / "secret", f"{uploads}/../secret", uploads, f"{uploads}2/x", "\0"):
        assert ask(None, "GET", f"{FILE}{other}")[0] == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "https://example.com/x.png", "photo.png", "", 3, None, ["x"], "\0"])
@pytest.mark.parametrize("door", [CLICK, "/gradio_api/run/predict"])
@pytest.mark.parametrize("wrap", [lambda file: [1, file], lambda file: {"keep": [{"deep": file}]}],
                         ids=["control", "deep"])
def test_a_click_names_no_file_but_an_uploaded_one(ask, uploads, path, wrap, door):
    def click(path):
        return ask(path=door, body=json.dumps({"session_hash": "s", "data": wrap(
            {"path": path, "meta": {}})}).encode())

    assert click(path) == (403, "a click may name files that were uploaded to the page, and no others")
    assert click(f"{uploads}/link")[0] == 403


def test_a_click_with_an_uploaded_file_comes_through_whole(clock, uploads):
    file = {"path": f"{uploads}/photo.png", "url": "http://x/photo.png"}
    body, seen = json.dumps({"session_hash": "s", "data": [file]}).encode(), []
    messages = [{"body": body[:9], "more_body": True}, {"body": body[9:]}, {"type": "http.disconnect"}]

    async def page(scope, receive, send):
        seen.extend([await receive() for _ in range(3)])

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": CLICK, "headers": [(b"content-length", b"%d" % len(body))]}
    asyncio.run(Limits(page, uploads, Readers())(scope, receive, None))
    assert b"".join(message.get("body", b"") for message in seen) == body and seen[2]["type"] == "http.disconnect"


@pytest.mark.parametrize("body", [b"{", b"\xff]", b"[" * 100_000 + b"]"], ids=lambda body: str(body[:8]))
def test_a_click_that_is_no_json_is_refused(ask, body):
    assert ask(path=CLICK, body=body) == (400, "a click must be JSON")


def test_a_request_at_which_gradio_fails_is_one_line(uploads, capsys):
    async def page(scope, receive, send):
        raise KeyError("two\nlines")

    scope = {"type": "http", "method": "GET", "path": "/config", "headers": []}
    asyncio.run(Limits(page, uploads, Readers())(scope, None, None))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("warning: '/config' failed: KeyError:")


@pytest.mark.parametrize("body", [[], {"data": []}, {"session_hash": 3}, {"session_hash": "s" * 65}], ids=str)
def test_a_click_names_its_session_in_few_characters(ask, body):
    assert ask(path=CLICK, body=json.dumps(body).encode())[0] == 400


def test_a_click_whose_answer_nobody_reads_is_given_up(uploads, clock, monkeypatch):
    monkeypatch.setattr(limits.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    clock[0] = 100.0
    readers, seen = Readers(), []
    readers.expect("other")
    assert not readers.wait_for("other") and clock[0] == pytest.approx(100 + limits.UNREAD, abs=0.1)
    for number in range(3 * limits.CONNECTIONS):
        readers.expect(str(number))
    assert len(readers._clicked) == limits.CONNECTIONS

    async def page(scope, receive, send):
        seen.append((readers.wait_for("mine"), readers.wait_for("other")))

    scope = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data", "headers": [],
             "query_string": b"session_hash=mine"}
    asyncio.run(Limits(page, uploads, readers)(scope, None, None))
    assert seen == [(True, False)] and not readers.wait_for("mine")
    assert clock[0] < 101 + limits.UNREAD  # who clicked long ago, or never, is not waited for


def test_a_websocket_is_refused(uploads):
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(Limits(None, uploads, Readers())({"type": "websocket", "path": "/"}, None, send))
    assert sent == ["websocket.close"]


def test_what_is_no_request_is_passed_on(clock, uploads):
    seen = []

    async def page(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Limits(page, uploads, Readers())({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
