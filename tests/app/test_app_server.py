"""Who is served: browsers that call this machine by its name, and clients that don't leave the page waiting."""

import socket
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mutor_img.app.command import listen
from mutor_img.app.limits import Readers

pytestmark = [pytest.mark.app, pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")]
SILENCE = 0.5  # seconds
START = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
ANSWER = 2**25  # bytes: more than the system keeps for a client that doesn't read


@pytest.fixture
def client(monkeypatch, free_port, tmp_path):
    """Make a client of the page, as it is with a public address, that calls its host by a name."""
    from starlette.testclient import TestClient

    from mutor_img.app import page

    served = []
    monkeypatch.setattr(page.uvicorn, "Server", lambda config: SimpleNamespace(
        run=lambda sockets: served.append(config.app)))
    monkeypatch.setattr(page, "_public_address", lambda *where: "https://a1.gradio.live")
    readers = Readers()
    with listen(free_port) as listener:
        page.serve(page.build_page([], tmp_path, readers), listener, tmp_path, readers, share=True)
    return lambda host: TestClient(served[0], base_url=f"http://{host}")


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "127.0.0.1", "LOCALHOST", "a1.gradio.live"])
def test_the_page_answers_to_its_own_names(client, host):
    assert client(host).get("/config").status_code == 200


@pytest.mark.parametrize("host", ["example.com", "localhost.", "localhost.example.com:7860", "[::1]:7860",
                                  "b2.gradio.live", "0.0.0.0:7860"])
def test_a_website_whose_name_leads_here_is_refused(client, host):
    for path in ("/config", "/gradio_api/queue/join"):
        assert client(host).request("POST" if "join" in path else "GET", path).status_code == 400


@pytest.fixture
def server(monkeypatch):
    """A server with short patience, whose application takes a while after it has read a request."""
    import uvicorn

    from mutor_img.app import connection

    async def application(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await connection.asyncio.sleep(3 * SILENCE if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (ANSWER if scope["path"] == "/large" else 1)})

    monkeypatch.setattr(connection, "SILENCE", SILENCE)
    server = uvicorn.Server(uvicorn.Config(application, http=connection.Connection, lifespan="off",
                                           log_level="warning", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield SimpleNamespace(address=listener.getsockname(), connections=server.server_state.connections)
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHo", START, START + b"x",
                                  b"GET / HTTP/1.1\r\nHost: x\r\n\r\n|GET / HT",
                                  b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"],
                         ids=["nothing", "half of the first lines", "no body", "half of a body",
                              "half of a second request", "an answer that it does not read"])
def test_who_leaves_the_page_waiting_is_cut_off(server, sent):
    with socket.create_connection(server.address) as client:
        for part in sent.split(b"|"):
            client.sendall(part)
            time.sleep(0.1)
        end = time.monotonic() + 20
        while not server.connections and time.monotonic() < end:
            time.sleep(0.01)
        while server.connections and time.monotonic() < end:
            time.sleep(0.01)
    assert not server.connections and time.monotonic() < end


def read(client):
    """Return how many bytes come until the server closes the connection."""
    count = 0
    while part := client.recv(2**22):
        count += len(part)
        time.sleep(0.1)
    return count


def test_a_slow_client_and_a_slow_page_are_waited_for(server):
    with socket.create_connection(server.address) as client:
        client.sendall(START)
        for _ in range(10):
            client.sendall(b"x")
            time.sleep(SILENCE / 3)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    for path, least in ((b"/slow", 1), (b"/large", ANSWER)):
        with socket.create_connection(server.address) as client:
            client.sendall(b"GET " + path + b" HTTP/1.0\r\nHost: x\r\n\r\n")
            assert read(client) > least
