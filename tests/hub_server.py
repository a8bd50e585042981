"""Servers of this machine; one speaks as much of the hub's protocol as an upload of small files takes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, TypeVar

Reply = tuple[int, dict[str, str], Any]


class FakeHub:
    """What was made and uploaded; ``token`` is the only one that it takes."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, bool] = {}
        """Whether each is private."""
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        path = path.partition("?")[0]
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if headers.get("authorization") != f"Bearer {self.token}":
            return 401, {}, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            there = name in self.repos
            self.repos.setdefault(
                name, "private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            return (409 if there else 200), {}, {"url": f"{self.url}/{name}", "name": name, "id": name}
        name = next((one for one in self.repos if path.startswith(f"/api/models/{one}")), None)
        if name is None:
            return 404, {}, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return (
                200,
                {},
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                },
            )
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                elif line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return (
                200,
                {},
                {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "pullRequestUrl": None},
            )
        return 200, {}, {"id": name, "sha": "0", "siblings": [], "private": self.repos[name], "tags": []}


class Server(Protocol):
    """What answers a request with a status, headers and JSON; headers of a request are in lower case."""

    url: str

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply: ...


S = TypeVar("S", bound=Server)


@contextmanager
def serving(hub: S) -> Iterator[S]:
    """The hub under its ``url``."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = {name.lower(): value for name, value in self.headers.items()}
            status, headers, answer = hub.answer(self.command, self.path, body, asked)
            content = json.dumps(answer).encode()
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _do

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
