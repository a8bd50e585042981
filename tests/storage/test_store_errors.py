"""An object store that fails now and then loses nothing and ends nothing."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from llkd_ray.storage import run_dir as module
from llkd_ray.storage.lock import Fence, Superseded
from llkd_ray.storage.run_dir import RunStore, retried, store_errors

ThreadedMotoServer = pytest.importorskip("moto.server", reason="no dev extra").ThreadedMotoServer

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


@pytest.fixture(scope="module")
def server() -> Iterator[FailingServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        patch.setattr(module, "FIRST_PAUSE_S", 0.01)
        s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        s3.start()
        host, port = s3.get_host_and_port()
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", "/bucket", headers={"host": f"{host}:{port}"})
        assert connection.getresponse().status == 200
        failing = FailingServer(host, port)
        thread = threading.Thread(target=failing.serve_forever, daemon=True)
        thread.start()
        yield failing
        failing.shutdown()
        s3.stop()


@pytest.fixture
def store(server: FailingServer) -> RunStore:
    where = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    return RunStore(f"s3://bucket/run?{where}")


def test_every_operation_succeeds(store, server, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/one").write_bytes(b"1" * 1000)
    (tmp_path / "weights/two").write_bytes(b"2" * 1000)
    for i in range(8):
        table = pa.table({"i": [i] * 100})
        store.write_json(f"json/{i}", {"i": i})
        store.write_table(f"tables/{i}", table)
        with pytest.raises(FileExistsError):
            store.write_bytes(f"json/{i}", b"other", replace=False)
        assert store.exists(f"json/{i}")
        assert not store.exists(f"json/{i}-")
        assert store.read_json(f"json/{i}") == {"i": i}
        assert store.read_at(f"json/{i}", 5, 1) == store.read_bytes(f"json/{i}")[1:6]
        assert store.read_table(f"tables/{i}") == table
        assert len(store.names("json")) == i + 1
        store.upload(tmp_path / "weights", f"weights/{i}")
        (tmp_path / f"back-{i}").mkdir()
        store.download(f"weights/{i}", tmp_path / f"back-{i}")
        assert Path(tmp_path, f"back-{i}", "two").read_bytes() == b"2" * 1000
        assert len(store.folders("weights")) == i + 1
    for i in range(8):
        store.delete(f"json/{i}")
        store.delete_folder(f"weights/{i}")
    assert store.names("json") == store.folders("weights") == []
    assert server.failed > 5, "it did fail"


def test_a_lock_has_one_holder(store):
    fences = [Fence.claim(store, "a") for _ in range(5)]
    fences[-1].check()
    for old in fences[:-1]:
        with pytest.raises(Superseded):
            old.check()


class TestRetried:
    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch):
        self.slept = []
        monkeypatch.setattr(module.time, "sleep", self.slept.append)
        monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.5)
        store_errors.clear()

    def test_errors_that_pass_are_counted_and_tried_again_for_a_while(self, caplog):
        errors = [OSError("AWS Error SLOW_DOWN during GetObject"), OSError(116, "Stale file handle")]
        assert retried(lambda: (_ for _ in ()).throw(errors.pop()) if errors else "done")() == "done"
        assert store_errors.total() == caplog.text.count("try ") == 2
        with pytest.raises(OSError, match="NETWORK"):
            retried(self.fail)(OSError("AWS Error NETWORK_CONNECTION during PutObject"))
        assert 15 < sum(self.slept) < 60

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError(2, "no file"),
            OSError(28, "No space left on device"),
            OSError("AWS Error ACCESS_DENIED during PutObject"),
        ],
    )
    def test_other_errors_are_raised_at_once(self, error):
        with pytest.raises(OSError, match=str(error)[-10:]):
            retried(self.fail)(error)
        assert not self.slept

    @staticmethod
    def fail(error):
        raise error
