"""An object store that fails now and then loses nothing and ends nothing."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from failing_store import FailingServer, failing

from llkd_ray.storage import run_dir as module
from llkd_ray.storage.lock import Fence, Superseded
from llkd_ray.storage.run_dir import RunStore, retried, store_errors

ThreadedMotoServer = pytest.importorskip("moto.server", reason="no dev extra").ThreadedMotoServer


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
        with failing(host, port) as server:
            yield server
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
