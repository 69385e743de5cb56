"""A server in this process that speaks the Hugging Face Hub's endpoints, as far as downloads and one commit need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: files by path, by repository and commit.
        refs: commit by repository and branch or tag.
        asked: method and path of every request.
        writable: whether commits are taken; else the answer is 401.
        gated: repositories that this user may not read.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []
        self.writable = True
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of these files alone; returns its name."""
        commit = hashlib.sha1(repr((repo, branch, len(self.commits))).encode()).hexdigest()
        self.commits[repo, commit], self.refs[repo, branch] = dict(files), commit
        return commit

    def add_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Make a commit of a folder's files."""
        return self.add(repo, {str(path.relative_to(folder)): path.read_bytes()
                               for path in folder.rglob("*") if path.is_file()}, branch)

    def find(self, repo: str, revision: str) -> str | None:
        """Return the commit that a branch, tag or commit means."""
        return revision if (repo, revision) in self.commits else self.refs.get((repo, revision))


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not about and not file:  # of a list that the library keeps for itself
            return self._send(404, {})
        repo, revision = (about[1], about[3]) if about else (file[1], file[2])
        commit = self.server.find(repo, revision)
        if all(known != repo for known, _ in self.server.commits):
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if repo in self.server.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if commit is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.server.commits[repo, commit]
        if about and about[2] == "revision":
            return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if about:
            return self._json([{"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                               for name, content in files.items()])
        content = files[file[3]]
        return self._send(200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}, content)

    do_HEAD = do_GET

    def do_POST(self):
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.writable:
            return self._send(401, {})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            return self._json({"url": f"{self.server.url}/{made['organization']}/{made['name']}"})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo, action = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if action == "preupload":
            return self._json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                         for file in json.loads(body)["files"]]})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                 if line["key"] == "file"}
        commit = self.server.add(repo, files)
        return self._json({"success": True, "commitOid": commit,
                           "commitUrl": f"{self.server.url}/{repo}/commit/{commit}"})

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words):
        """Keep quiet."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve():
    """Serve a :class:`FakeHub` from a thread inside this context."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
