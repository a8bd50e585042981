"""cluster.yaml: what Ray's own checks say, and what they cannot know of this project."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
RAW: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
WORKER_TYPES = sorted(set(RAW["available_node_types"]) - {RAW["head_node_type"]})


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return prepare_config(copy.deepcopy(RAW))


def setup_commands_of(cluster: dict[str, Any], node_type: str) -> list[str]:
    """What runs on a node of this type: its own list, where it has one, replaces the common ones."""
    if node_type == cluster["head_node_type"]:
        return cluster["head_setup_commands"]
    own = cluster["available_node_types"][node_type].get("worker_setup_commands")
    return own or cluster["worker_setup_commands"]


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def teacher(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"]["teacher"]


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda raw: raw.update(idle_timeout_minute=raw.pop("idle_timeout_minutes")), ValidationError),
        (lambda raw: teacher(raw).update(max_worker=4), ValidationError),
        (lambda raw: teacher(raw)["resources"].update(GPU="4"), ValidationError),
        (lambda raw: raw.update(head_node_type="haed"), ValueError),
    ],
    ids=["misspelt", "misspelt of a node", "text for a number", "no such head"],
)
def test_a_slip_is_caught(break_it: Any, error: type[Exception]) -> None:
    raw = copy.deepcopy(RAW)
    break_it(raw)
    with pytest.raises(error):
        validate_config(prepare_config(raw))


@pytest.mark.parametrize("which", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_token_is_demanded_where_ray_starts(cluster: dict[str, Any], which: str) -> None:
    (start,) = [command for command in cluster[which] if "ray start" in command]
    before = start.partition("ray start")[0]
    assert re.search(r"\bRAY_AUTH_MODE=token\b", before)
    token = re.search(r"\bRAY_AUTH_TOKEN_PATH=(\S+)", before)
    assert token is not None
    assert token.group(1).replace("$HOME", "~") in cluster["file_mounts"]


def test_mounts_are_the_token_and_files_of_the_repository(cluster: dict[str, Any]) -> None:
    mounts = dict(cluster["file_mounts"])
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token", "where `ray get-auth-token` writes it"
    assert [path for path in mounts.values() if not (ROOT / path).exists()] == []
    assert {"Makefile", "pyproject.toml", "constraints.txt", "scripts", "llkd_ray"} <= set(mounts.values())
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert mounts["~/llkd-ray/README.md"] == "README.md", "which the build reads"


@pytest.mark.parametrize("node_type", [RAW["head_node_type"], *WORKER_TYPES])
def test_every_node_installs_what_its_hardware_needs(cluster: dict[str, Any], node_type: str) -> None:
    commands = " ".join(setup_commands_of(cluster, node_type))
    gpus = cluster["available_node_types"][node_type]["resources"].get("GPU", 0)
    assert f"LLKD_EXTRA={'gpu' if gpus else 'none'} make setup" in commands
    assert "python3-venv" in commands
    assert "RAY_AUTH_MODE=token" in commands  # for `ray status` and the like in a shell on the node
    # Workers may reach the bucket: Ray gives a profile to the head only.
    own = cluster["available_node_types"][node_type]["node_config"]
    assert node_type == "head" or own["IamInstanceProfile"]


def test_only_the_teacher_is_on_spot_and_all_can_go_to_nothing(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    spot = [name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]]
    assert spot == ["teacher"]
    assert all(types[name]["min_workers"] == 0 for name in WORKER_TYPES)
    assert types["head"]["resources"]["CPU"] == 0
    assert sum(types[name]["max_workers"] for name in WORKER_TYPES) <= cluster["max_workers"]


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ([{"CPU": 1, "GPU": 4}], {"teacher": 1}),
        ([{"CPU": 1, "GPU": 4}] * 2, {"teacher": 2}),
        ([{"CPU": 4, "GPU": 1}] * 2, {"student": 2}),
        ([{"CPU": 2, "GPU": 1, "teacher": 1}] * 4, {"teacher": 1}),
        ([{"CPU": 2, "GPU": 1, "student": 1}] * 2, {"student": 2}),
        ([{"CPU": 1}] * 20, {"cpu": 2}),
        ([{"CPU": 0.1}], {"cpu": 1}),
    ],
)
def test_autoscaler_starts_the_type_that_is_meant(
    cluster: dict[str, Any], demand: Any, expected: dict[str, int]
) -> None:
    score = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    started, left = get_nodes_for(
        cluster["available_node_types"], {"head": 1}, "head", cluster["max_workers"], demand, score
    )
    assert (dict(started), left) == (expected, [])


def test_health_settings_are_ones_that_ray_knows(cluster: dict[str, Any]) -> None:
    # Ray passes over what it does not know, so a misspelt name would change nothing.
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    given = dict(re.findall(r"\bRAY_(health_check_\w+)=(\d+)", start.partition("ray start")[0]))
    names = [f"health_check_{one}" for one in ("period_ms", "timeout_ms", "failure_threshold")]
    assert set(given) == set(names)
    server = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    assert [name for name in given if name.encode() not in server] == []
    period_ms, timeout_ms, threshold = (int(given[name]) for name in names)
    patience_s = (period_ms + timeout_ms) * threshold / 1000
    assert 30 <= patience_s <= 120, "too short for a busy node, or too long for one that is gone"


def test_every_command_is_a_whole_shell_command(cluster: dict[str, Any]) -> None:
    commands = [one for name, value in cluster.items() if name.endswith("_commands") for one in value]
    for node in cluster["available_node_types"].values():
        commands += node.get("worker_setup_commands", [])
    assert commands
    for command in commands:
        assert shlex.split(command)
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, (command, checked.stderr)


def test_shell_environment_is_written_once(cluster: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret", encoding="utf-8")
    (tmp_path / ".bashrc").touch()
    (command,) = [one for one in cluster["setup_commands"] if ".bashrc" in one]
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env=environ, check=True)
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8").count("export") == 1
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    probe = 'source ~/.bashrc; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH ${PATH%%:*}"'
    seen = subprocess.run(["bash", "-c", probe], env=environ, check=True, capture_output=True, text=True)
    venv_bin = tmp_path / "llkd-ray" / ".venv" / "bin"
    assert seen.stdout.split() == ["token", str(tmp_path / ".ray" / "auth_token"), str(venv_bin)]
