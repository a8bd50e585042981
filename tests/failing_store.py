"""An S3 server that fails now and then, as real ones do."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ONE_IN = 20
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"


class FailingServer(ThreadingHTTPServer):
    """Stands before an S3 server; refuses, closes or answers in part one request in ``ONE_IN``."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), FailingHandler)
        self.behind, self.rng, self.failed = (host, port), random.Random(1), 0

    def handle_error(self, request: object, client: object) -> None:
        pass  # connections that were closed on purpose


class FailingHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FailingServer

    def _pass_on(self) -> None:
        body = self._body()
        failure = ""
        if self.server.rng.random() < 1 / ONE_IN:
            self.server.failed += 1
            failure = self.server.rng.choice(["refused", "closed", "in part"])
        if failure == "refused":
            self._answer(503, {}, SLOW_DOWN)
            return
        if failure == "closed":
            self.close_connection = True
            return
        server = http.client.HTTPConnection(*self.server.behind)
        server.request(self.command, self.path, body, dict(self.headers))
        reply = server.getresponse()
        self._answer(reply.status, dict(reply.getheaders()), reply.read(), in_part=failure == "in part")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _body(self) -> bytes:
        if not self.headers.get("transfer-encoding"):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["transfer-encoding"]
        self.headers["content-length"] = str(len(body))
        return body

    def _answer(self, status: int, headers: dict[str, str], body: bytes, in_part: bool = False) -> None:
        self.send_response(status)
        size = {name.lower(): value for name, value in headers.items()}.get("content-length", str(len(body)))
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        self.send_header("content-length", size if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if in_part else body)
        self.close_connection = in_part

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def failing(host: str, port: int) -> Iterator[FailingServer]:
    """A server that passes on to the one at this address what it does not fail."""
    server = FailingServer(host, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
