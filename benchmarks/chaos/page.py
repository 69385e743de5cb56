"""The page under load and under attack: many clients for minutes, and requests that no browser would send.

The clients click, wait for their turn, upload, browse runs, leave in the middle, or never read what they asked for. The
page must answer each of them, tell those who wait their place, and stay as large as it was. What no browser sends must
be refused: it names files and addresses that are none of its business, or is no HTTP at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place
from mutor_img.app.limits import CONNECTIONS, SILENCE
from mutor_img.common.child import child_environment, die_with_parent, module_command

CLIENTS = 200
IMAGES = 8  # that a click asks for
GROWTH = 48 << 20  # bytes that the page may be larger in the last third of the time than in the second
PATIENCE = 180.0  # seconds that an answer may take: 200 clicks wait for one another
VERSION = "HTTP/1.0\r\nHost: localhost\r\n"  # ends the first line of a request, and says where it goes
SECRET = "a line that nobody may read"
HABITS = ("waits", "waits", "waits", "uploads", "browses", "leaves", "never reads")  # of the clients, in turn


@dataclass
class Server:
    """A page that runs.

    Attributes:
        port: where.
        process: it.
        log: what it printed on its standard error stream.
        folder: the one that it was started in, which holds a secret.
        doors: numbers of what a click asks for, by the button's ``elem_id``.
    """

    port: int
    process: subprocess.Popen
    log: Path
    folder: Path
    doors: dict[str, int] = field(default_factory=dict)

    async def ask(self, method: str, path: str, body: bytes = b"", *, kind: str = "application/json"
                  ) -> tuple[int, bytes]:
        """Return status and body of one request's answer."""
        head = f"{method} {path} {VERSION}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return _parse(await self.send(head.encode() + body))

    async def send(self, data: bytes) -> bytes:
        """Send bytes, and return all that comes back until the page closes the connection; b"" where it is reset."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            return await asyncio.wait_for(reader.read(-1), PATIENCE)
        except (ConnectionError, TimeoutError):
            return b""
        finally:
            writer.close()

    async def click(self, button: str, session: str, data: list[Any]) -> tuple[int, bytes]:
        """Press a button; the answer comes by :meth:`events`."""
        body = {"data": data, "fn_index": self.doors[button], "session_hash": session, "trigger_id": None,
                "event_data": None}
        return await self.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode())

    async def events(self, session: str):
        """Yield the messages that Gradio has for a session, until it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**26)
        try:
            writer.write(f"GET /gradio_api/queue/data?session_hash={session} {VERSION}\r\n".encode())
            async for line in reader:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        finally:
            writer.close()


def _parse(answer: bytes) -> tuple[int, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, body


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Start the command in a new folder with a run, images and a secret; it is killed afterwards.

    Raises:
        Fault: it did not start.
    """
    inputs.write_images(folder / "images")
    inputs.write_generator(folder / "runs" / "generator", inputs.write_tokenizer(folder / "tokenizer"))
    (folder / "secret.txt").write_text(SECRET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [*module_command("mutor_img.app"), "--checkpoint", "runs/generator", "--runs", "runs", "--port", str(port)],
            cwd=folder, stdout=subprocess.PIPE, stderr=errors, preexec_fn=die_with_parent,
            env={**child_environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}), "TMPDIR": str(folder)})
    try:
        if b"127.0.0.1" not in process.stdout.readline():
            raise Fault(f"the page did not start: {log.read_text()[-500:]}")
        server = Server(port, process, log, folder)
        server.doors = _doors(json.loads(asyncio.run(server.ask("GET", "/config"))[1]))
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _end(server: Server) -> str:
    """End the page with Ctrl-C.

    Raises:
        Fault: it does not end as it should, has printed a traceback, or leaves uploads behind.
    """
    server.process.send_signal(signal.SIGINT)
    try:
        status = server.process.wait(60)
    except subprocess.TimeoutExpired:
        raise Fault("it does not end") from None
    if status or "Traceback" in server.log.read_text():
        raise Fault(f"status {status}: {server.log.read_text()[-500:]}")
    if left := [path.name for path in server.folder.glob("mutor_img_page_*")]:
        raise Fault(f"uploads stay behind: {left}")
    return "ended"


def _doors(config: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of what clicks ask for, from the page's own description of itself."""
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    return {names[target]: door["id"] for door in config["dependencies"] for target, event in door["targets"]
            if event == "click" and names.get(target)}


# ---- load ----


def _values(count: int, keep: dict[str, Any] | None = None) -> list[Any]:
    """Return the controls' values of a click on Generate."""
    return [[], "balanced", count, 1.0, 1.0, 0, 1.0, 0, [], 0.5, keep, None]


async def _client(server: Server, habit: str, end: float, seen: Counter) -> None:
    """Use the page until the time is over, and count what came of it."""
    while time.monotonic() < end:
        session = secrets.token_hex(5)
        if (await server.ask("GET", "/"))[0] == 200:
            seen["pages"] += 1
        keep = await _upload(server, seen) if habit == "uploads" else None
        button, data = ("refresh", [None]) if habit == "browses" else ("generate", _values(IMAGES, keep))
        status, body = await server.click(button, session, data)
        if status in (429, 503) and json.loads(body)["detail"]:
            seen["told to come later"] += 1
            await asyncio.sleep(1)
        elif status != 200:
            seen[f"a click was answered {status}"] += 1
        elif habit == "never reads":
            seen["not read"] += 1
            await asyncio.sleep(1)
        else:
            seen[await _outcome(server, session, habit, seen)] += 1


async def _outcome(server: Server, session: str, habit: str, seen: Counter) -> str:
    """Read what a click brings; returns what came of it."""
    async for message in server.events(session):
        if message["msg"] == "estimation" and message["rank"] is not None:
            seen["told their place"] += 1
        if message["msg"] == "process_generating" and habit == "leaves":
            return "left"
        if message["msg"] == "process_completed":
            return "answered" if message["success"] else f"failed: {message['output']}"
    return "no answer"


async def _upload(server: Server, seen: Counter) -> dict[str, Any] | None:
    """Upload an image of 8 pixels; returns what a click then names."""
    picture = next(path for path in (server.folder / "images").rglob("*.png"))
    status, body = await server.ask("POST", "/gradio_api/upload", _form(picture.read_bytes(), "p.png"),
                                    kind="multipart/form-data; boundary=x")
    if status != 200:
        seen["told to come later" if status == 429 else f"an upload was answered {status}"] += 1
        return None
    seen["uploads"] += 1
    return {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}}


def _form(content: bytes, name: str) -> bytes:
    return (b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode("utf-8", "surrogateescape")
            + b'"\r\n\r\n' + content + b"\r\n--x--\r\n")


async def _crowd(server: Server, seconds: float) -> tuple[Counter, list[int]]:
    """Let all clients at the page; returns what came of it, and the page's bytes in memory every half second."""
    seen, sizes, end = Counter(), [], time.monotonic() + seconds
    clients = [asyncio.create_task(_client(server, HABITS[number % len(HABITS)], end, seen))
               for number in range(CLIENTS)]
    page = psutil.Process(server.process.pid)
    while time.monotonic() < end:
        sizes.append(page.memory_info().rss)
        await asyncio.sleep(0.5)
    await asyncio.gather(*clients)
    return seen, sizes


def _load(server: Server, seconds: float) -> str:
    seen, sizes = asyncio.run(_crowd(server, seconds))
    third = len(sizes) // 3
    grown = max(sizes[2 * third:]) - max(sizes[third:2 * third])
    wrong = [what for what in seen if what.startswith(("failed", "a click", "an upload", "no answer"))]
    if wrong:
        raise Fault(f"{dict(seen)}")
    if not seen["answered"] or not seen["told their place"]:
        raise Fault(f"nobody was answered, or told to wait: {dict(seen)}")
    if grown > GROWTH:
        raise Fault(f"{grown >> 20} MiB more in the last third than in the second: {[n >> 20 for n in sizes[::10]]}")
    counts = " ".join(f"{count} {what}" for what, count in seen.most_common())
    return f"served, {counts}; {max(sizes) >> 20} MiB, {grown >> 20} more at the end"


# ---- attacks ----


def _addresses(secret: Path) -> dict[str, bytes]:
    """Return requests for what the page does not show, by name."""
    up = "../" * 12
    paths = [f"/{start}{name}" for start in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/",
                                             "svelte/", "custom_component/", "")
             for name in (str(secret), "secret.txt", up + str(secret), (up + str(secret)).replace("/", "%2f"),
                          (up + str(secret)).replace(".", "%2e"), str(secret) + "%00.png", "file://" + str(secret))]
    paths += ["/gradio_api/file=http://127.0.0.1/", "/gradio_api/file=https://example.com/", "/gradio_api/proxy=https://"
              "x.hf.space/", "/gradio_api/stream/a/b/c/playlist.m3u8", "/gradio_api/deep_link?session_hash=a",
              "/gradio_api/runs", "/monitoring", "/monitoring/summary", "/docs", "/openapi.json", "/login", "/logout",
              "/gradio_api/vibe-code", "/gradio_api/custom_component/0/client/component/index.js"]
    return {f"GET {path}": f"GET {path} {VERSION}\r\n".encode() for path in paths}


def _clicks(secret: Path, doors: dict[str, int]) -> dict[str, bytes]:
    """Return clicks and uploads that name files and addresses, by name."""
    def post(path: str, body: bytes, kind: str = "application/json") -> bytes:
        return f"POST {path} {VERSION}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    found = {}
    for name in (str(secret), "secret.txt", "../secret.txt", "https://example.com/x.png", "http://127.0.0.1:1/x.png"):
        file = {"path": name, "meta": {"_type": "gradio.FileData"}}
        for where, data in (("keep", _values(1, file)), ("classes", [[file], *_values(1)[1:]])):
            body = {"data": data, "fn_index": doors["generate"], "session_hash": "stranger"}
            for door in ("queue/join", "run/predict"):
                found[f"{door}, {where} is {name}"] = post(f"/gradio_api/{door}", json.dumps(body).encode())
    for path in ("run/predict", "api/predict", "call/generate", "call/v2/generate", "component_server", "vibe-edit",
                 "process_recording", "stream/a", "run-history/connect", "profiling/clear"):
        found[f"POST {path}"] = post(f"/gradio_api/{path}", b"{}")
    deep = b'{"data": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    for name, body in (("deep", deep), ("not JSON", b"\xff{"), ("no object", b"3"), ("no session", b'{"data": []}'),
                       ("no such door", b'{"data": [], "fn_index": 999, "session_hash": "a"}')):
        found[f"click, {name}"] = post("/gradio_api/queue/join", body)
    found["upload, no form"] = post("/gradio_api/upload", b"x", "text/plain")
    found["upload, no boundary"] = post("/gradio_api/upload", _form(b"x", "x.png"), "multipart/form-data")
    return found


def _absurd() -> dict[str, bytes]:
    """Return what is no request, or one that no page of ours sends, by name."""
    post = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\n"
    found = {"no HTTP": "\x16\x03\x01\x00\xff" * 40 + "\r\n\r\n", "an unknown method": f"BREW / {VERSION}\r\n",
             "TRACE": f"TRACE / {VERSION}\r\n", "OPTIONS": f"OPTIONS / {VERSION}\r\n",
             "CONNECT": f"CONNECT example.com:443 {VERSION}\r\n",
             "a header of 1 MB": f"GET / {VERSION}X: {'x' * 10**6}\r\n\r\n",
             "100 000 headers": f"GET / {VERSION}" + "X: x\r\n" * 10**5 + "\r\n",
             "two lengths": post + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
             "a length below 0": post + "Content-Length: -1\r\n\r\n{}",
             "pieces without end": post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
             "2^60 bytes": post + "Content-Length: 1152921504606846976\r\n\r\n{}",
             "a line feed in the address": f"GET /\nX: y\r\n\r\n {VERSION}\r\n", "no host": "GET / HTTP/1.0\r\n\r\n",
             **{f"the host {name}": f"GET / HTTP/1.0\r\nHost: {name}\r\n\r\n"
                for name in ("example.com", "localhost.", "[::1]", "localhost@example.com", "127.0.0.1.example.com")},
             "another website's upload": f"POST /gradio_api/upload {VERSION}Sec-Fetch-Site: cross-site\r\n\r\n"}
    return {name: data.encode("latin-1") for name, data in found.items()}


def _attack(server: Server, data: bytes) -> str:
    """Send what no browser sends; returns how it was answered.

    Raises:
        Fault: it was served, something was told or written, or the page no longer works.
    """
    said = len(server.log.read_text())
    status, body = _parse(asyncio.run(server.send(data)))
    if SECRET.encode() in body or (status and status < 400):
        raise Fault(f"answered {status}: {body[:200]!r}")
    if asyncio.run(server.ask("GET", "/config"))[0] != 200:
        raise Fault("the page no longer works")
    if "Traceback" in (log := server.log.read_text()[said:]):
        raise Fault(f"a traceback: {log[-300:]}")
    return "refused" if status else "hung up"


async def _occupy(server: Server) -> str:
    """Take all connections, and send nothing or a part of a request; others must be answered again."""
    taken = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CONNECTIONS)]
    begun = time.monotonic()
    try:
        for _, writer in taken[::2]:
            writer.write(b"GET / HTTP/1.1\r\nHost: local")
        while (await server.ask("GET", "/config"))[0] != 200:
            if time.monotonic() > begun + 3 * SILENCE:
                raise Fault(f"no answer to others within {3 * SILENCE:g} s")
            await asyncio.sleep(0.5)
    finally:
        for _, writer in taken:
            writer.close()
    return f"free again, after {time.monotonic() - begun:.0f} s"


def _uploaded(server: Server, name: str) -> str:
    """Upload a file under a name; it may be stored below the folder of uploads alone."""
    status, body = asyncio.run(server.ask("POST", "/gradio_api/upload", _form(b"x", name),
                                          kind="multipart/form-data; boundary=x"))
    uploads = next(server.folder.glob("mutor_img_page_*"))
    if status == 200 and not all(Path(path).resolve().is_relative_to(uploads) for path in json.loads(body)):
        raise Fault(f"stored as {body!r}")
    return "stored among the uploads" if status == 200 else "refused"


def cases(place: Place) -> Iterator[Case]:
    """Yield a case for the crowd, one for each request that no browser sends, and one for the end; none without Gradio.
    """
    if find_spec("gradio") is None:
        tqdm.write("page: skipped, Gradio is not installed; pip install 'mutor_img[app]'")
        return
    folder = place.folder / "page"
    with serving(folder) as server:
        yield Case(f"{CLIENTS} clients for {place.crowd:g} s", lambda: _load(server, place.crowd))
        before = sorted(os.listdir(folder))
        for name, data in {**_addresses(folder / "secret.txt"), **_clicks(folder / "secret.txt", server.doors),
                           **_absurd()}.items():
            yield Case(name, lambda data=data: _attack(server, data))
        for name in ("../../secret.txt", str(folder / "secret.txt"), "..", "", "a" * 5000, "x\0y", "<img src=x>.png"):
            yield Case(f"upload as {name[:30]!r}", lambda name=name: _uploaded(server, name))
        yield Case(f"{CONNECTIONS} silent connections", lambda: asyncio.run(_occupy(server)))
        yield Case("what was there is there, and no more", lambda: _same(folder, before))
        yield Case("Ctrl-C", lambda: _end(server))


def _same(folder: Path, before: list[str]) -> str:
    if sorted(os.listdir(folder)) != before or (folder / "secret.txt").read_text() != SECRET:
        raise Fault(f"{sorted(os.listdir(folder))} in place of {before}")
    return "as before"
