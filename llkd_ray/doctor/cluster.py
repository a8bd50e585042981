"""Doctor's checks of Ray: the token, the configured cluster, and whether a run's actors fit on it.

``python -m llkd_ray.doctor.cluster [ADDRESS]`` prints Ray's view as one line of JSON. It is a separate
program because Ray terminates a process that cannot connect, and only after two minutes: the caller sets a
time limit. With an address it joins that cluster as a run would; without one it starts nothing, and prints
the resources that Ray would detect on this machine.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llkd_ray.config.base import ConfigError, member_field
from llkd_ray.config.schema import Config
from llkd_ray.doctor.findings import Check, Finding, ok, problem, warning
from llkd_ray.resources import check_resources, with_gpus

CONNECT_S = 5.0
"""For a connection to the head's port: it is answered immediately or never."""
JOIN_S = 45.0
"""For joining the cluster; Ray itself takes 20 s to reject a wrong token, two minutes for other errors."""
AUTH_MODES = ("token", "disabled")
MARK = "cluster view: "
"""Marks the line that this program prints for its caller, because Ray also prints lines."""


@dataclass(frozen=True)
class View:
    """Ray's view of the resources; see :func:`view`."""

    version: str = ""
    nodes: tuple[dict[str, float], ...] = ()
    problem: Finding | None = None


def cluster_checks(
    config: Config | None, query: Callable[[], View], environ: Mapping[str, str] = os.environ
) -> list[Check]:
    """Without a config: checks of this machine, or of the cluster that RAY_ADDRESS names."""
    address, setting = cluster_address(config, environ)
    checks = [
        Check("ray token", partial(check_token, environ, joins=address is not None)),
        Check("ray", partial(check_ray, address, setting, query)),
    ]
    if config is not None:
        checks.append(Check("room", partial(check_cluster_resources, config, environ, query)))
        checks.append(Check("shared folders", partial(check_shared_folders, config, query)))
    return checks


def cluster_address(config: Config | None, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The cluster that a run would join (None if it starts one), and the setting that names it."""
    if config is not None and config.run.address:
        address, setting = config.run.address, "run.address"
    else:
        address, setting = environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    return (None if address in ("", "local") else address), setting


def query_once(config: Config | None, environ: Mapping[str, str] = os.environ) -> Callable[[], View]:
    """Ray's view of the cluster that a run would join, or of this machine; only the first call asks."""
    return functools.cache(partial(query_cluster, *cluster_address(config, environ), environ))


# --- token


def check_token(environ: Mapping[str, str], *, joins: bool) -> Finding:
    """Whether the token that Ray would use exists, and is readable by its owner only.

    Ray's order of precedence: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
    """
    name = "ray token"
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    if mode and mode not in AUTH_MODES:
        return problem(
            name,
            f"RAY_AUTH_MODE is {mode!r}, which Ray silently takes for 'disabled'",
            "set it to 'token', or to 'disabled' if that is meant",
        )
    if mode == "disabled":
        return ok(name, "RAY_AUTH_MODE is 'disabled': no token is sent")
    if environ.get("RAY_AUTH_TOKEN", "").strip():
        return ok(name, "the token of RAY_AUTH_TOKEN is used")
    given = environ.get("RAY_AUTH_TOKEN_PATH", "")
    file = Path(given) if given else Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    content = _read_token(file)
    if content:
        others = stat.S_IMODE(file.stat().st_mode) & 0o077
        if others:
            return warning(
                name,
                f"the token in {file} may be read by other users of this machine "
                f"(mode {stat.S_IMODE(file.stat().st_mode):04o}), and with it anybody can run code with Ray",
                f"chmod 600 {file}",
            )
        return ok(name, f"the token of {file} is used")
    if given:
        return problem(
            name,
            f"RAY_AUTH_TOKEN_PATH is {given!r}, which is empty or cannot be read; Ray reads no other",
            "copy the cluster's token there, or unset RAY_AUTH_TOKEN_PATH",
        )
    if mode == "token" and joins:
        return problem(
            name,
            f"RAY_AUTH_MODE is 'token', but there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or {file}",
            "copy the token of the cluster's head there; for a cluster that you start yourself: "
            "ray get-auth-token --generate, before ray start",
        )
    if joins:
        return ok(name, "there is none, which does for a cluster that asks for none")
    return ok(name, "there is none; Ray makes one for a cluster that it starts on this machine")


def _read_token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


# --- cluster


def check_ray(address: str | None, setting: str, query: Callable[[], View]) -> Finding:
    """Whether the cluster answers and accepts the connection, or what a run would start on this machine."""
    view = query()
    if view.problem is not None:
        return view.problem
    where = "no cluster is named, so a run starts Ray on this machine, with"
    if address is not None:
        where = f"{setting} {address!r} answers:"
    return ok("ray", f"{where} {describe(view)} (Ray {view.version})")


def describe(view: View) -> str:
    """The number of nodes, and their total resources."""
    names = sorted({name for node in view.nodes for name in node if _is_bookable(name)})
    sums = (f"{sum(node.get(name, 0) for node in view.nodes):g} {name}" for name in ("CPU", *names))
    return f"{len(view.nodes)} node(s), {', '.join(dict.fromkeys(sums))}"


def _is_bookable(name: str) -> bool:
    """Whether a run can request it; not Ray's per-node resource names, nor memory, which nothing reserves."""
    return not name.startswith(("node:", "accelerator_type:")) and "memory" not in name


def query_cluster(
    address: str | None, setting: str, environ: Mapping[str, str], join_s: float = JOIN_S
) -> View:
    """Ray's view of the cluster, with a time limit."""
    if address is not None and (address_problem := _address_problem(address, setting)):
        return View(problem=address_problem)
    command = [sys.executable, "-m", "llkd_ray.doctor.cluster", *([address] if address else [])]
    root = str(Path(__file__).resolve().parents[2])  # needed if the package is not installed
    path = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH", "")]))
    named = f"{setting} {address!r}" if address else "Ray"
    try:
        done = subprocess.run(
            command,
            env={**environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=join_s,
        )
    except subprocess.TimeoutExpired:
        return View(
            problem=problem(
                "ray",
                f"{named} accepts connections, but does not answer as a Ray cluster in {join_s:g} s",
                "give the address of the head, HOST:PORT as `ray start --head` prints it (the port is mostly "
                "6379), and see on the head whether `ray status` answers",
            )
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        return View(
            problem=problem("ray", f"Ray cannot be used (status {done.returncode}): {said}", "make setup")
        )
    seen = json.loads(lines[-1].removeprefix(MARK))
    if "error" in seen:
        return View(problem=_join_problem(named, seen["error"], seen["said"], done.stderr))
    return View(seen["version"], tuple(seen["nodes"]))


def _address_problem(address: str, setting: str) -> Finding | None:
    """Why nothing listens at the address. Ray itself reports this only after two minutes."""
    if address == "auto":
        return None  # this machine's cluster, which Ray finds by itself
    if address.startswith(("http://", "https://")):
        return problem(
            "ray",
            f"{setting} {address!r} is a dashboard's address, for `ray job submit`",
            "unset it, or name the head as HOST:PORT",
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return problem(
            "ray", f"{setting} {address!r} is no address", "write HOST:PORT, auto, or nothing for a local one"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = " ".join(str(error).split())
        return problem(
            "ray",
            f"{setting} {address!r} does not answer ({reason})",
            "start the cluster, correct the address, or unset it for a cluster on this machine",
        )
    return None


def _join_problem(named: str, kind: str, said: str, stderr: str) -> Finding:
    """Why a cluster that answers does not accept the connection."""
    if "InvalidAuthToken" in stderr or kind == "AuthenticationError":
        return problem(
            "ray",
            f"{named} asks for a token, and ours is missing or wrong",
            "export RAY_AUTH_MODE=token, and put the head's token (`ray get-auth-token` there) into "
            "~/.ray/auth_token or RAY_AUTH_TOKEN",
        )
    if "Version mismatch" in said:
        return problem(
            "ray", f"{named}: {said}", "run with the cluster's versions, or install these on its nodes"
        )
    return problem("ray", f"{named} cannot be joined ({kind}: {said[:300]})", "see the log of its head")


# --- resources


def check_cluster_resources(
    config: Config, environ: Mapping[str, str], query: Callable[[], View]
) -> Finding | None:
    """Whether the run's actors fit on the cluster, by the same calculation as at the start of a run."""
    view = query()
    if view.problem is not None:
        return None  # check_ray reports it
    if environ.get("LLKD_AUTOSCALING") == "1":
        return ok("room", "LLKD_AUTOSCALING is 1: nodes may still come, so resources are not checked")
    try:
        check_resources(with_gpus(config, view.nodes), view.nodes)
    except ConfigError as error:
        return problem("room", str(error))
    return ok("room", f"teachers at their smallest and student ranks fit on {describe(view)}")


def check_shared_folders(config: Config, query: Callable[[], View]) -> Finding | None:
    """Folders that several nodes need but that may exist only here; this machine cannot check that."""
    if len(query().nodes) < 2:
        return None
    local = dict(_local_paths(config))
    if not local:
        return ok("shared folders", "no setting names a folder of one machine")
    return warning(
        "shared folders",
        f"the cluster has {len(query().nodes)} nodes, and all of them read or write "
        f"{', '.join(f'{field} {path!r}' for field, path in local.items())}",
        "have the same there on every node, by a shared file system, or use s3:// or the hub",
    )


def _local_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that name a file system path, which the nodes might not share."""
    yield from ([] if "://" in config.run.dir else [("run.dir", config.run.dir)])
    for field, source in (("corpus.uri", config.corpus), ("test.uri", config.test)):
        for uri in () if source is None else source.uris:
            if "://" not in uri:
                yield field, uri
    models = [("student.model", config.student.model)]
    models += [(f"{member_field(name)}.model", one.model or "") for name, one in config.teacher.members()]
    yield from ((field, model) for field, model in models if model and Path(model).is_dir())


def view(address: str) -> dict[str, Any]:
    """The cluster's version and the resources of its live nodes, or the error that prevented joining."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **options)
    except Exception as error:
        return {"error": type(error).__name__, "said": " ".join(str(error).split())}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {"version": ray.__version__, "nodes": nodes}


def local_view() -> dict[str, Any]:
    """The resources that Ray would detect if it were started on this machine."""
    import ray
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia
    from ray._private.utils import get_num_cpus

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    gpus = Nvidia.get_current_node_num_accelerators()
    gpus = gpus if visible is None else min(gpus, len(visible))
    node = {"CPU": float(get_num_cpus(override_docker_cpu_warning=True)), "GPU": float(gpus)}
    return {"version": ray.__version__, "nodes": [{name: n for name, n in node.items() if n}]}


if __name__ == "__main__":
    seen = view(sys.argv[1]) if sys.argv[1:] else local_view()
    print(MARK + json.dumps(seen), flush=True)
    os._exit(0)  # an ordinary driver exit takes seconds, and there is nothing to clean up
