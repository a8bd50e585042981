"""Make ``.venv`` and install llkd-ray into it, with the versions pinned in constraints.txt.

    python3 scripts/setup.py [--dev] [--plan]

Needs Python 3.11 to 3.14 and nothing else; ``make setup`` looks for one. What is installed depends on the
machine:

- ``gpu``: with vLLM for CUDA, where ``nvidia-smi -L`` lists a GPU;
- ``cpu``: with vLLM for CPUs, everywhere else;
- ``none``: without an engine; for the head of a cluster, and for runs from recorded answers.

``LLKD_EXTRA=cpu|gpu|none`` overrides the choice. A finished installation leaves a stamp in ``.venv``
whose name holds a hash of everything it depended on, so a second call returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vLLM for CPUs names them as requirements, we never use them, and a build of theirs that was made for
# CUDA breaks `import vllm` beside a torch without CUDA.
UNUSED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")

Extra = Literal["cpu", "gpu", "none"]
EXTRAS: tuple[Extra, ...] = ("cpu", "gpu", "none")


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


def choose_extra(environ: Mapping[str, str]) -> Extra:
    """``LLKD_EXTRA`` where it is set, otherwise ``gpu`` where ``nvidia-smi -L`` lists one, else ``cpu``."""
    if wish := environ.get("LLKD_EXTRA", ""):
        for extra in EXTRAS:
            if wish == extra:
                return extra
        raise SetupError(f"LLKD_EXTRA is {wish!r}: set it to one of {', '.join(EXTRAS)}, or leave it unset")
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if nvidia_smi is None:
        return "cpu"
    try:
        listing = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"  # a driver that does not answer serves no engine either
    has_gpu = any(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return "gpu" if listing.returncode == 0 and has_gpu else "cpu"


def platform_problem(extra: Extra, system: str, machine: str, libc: tuple[str, str]) -> str | None:
    """Why vLLM has no build for this machine, or None. ``libc`` is what ``platform.libc_ver`` gives."""
    if extra == "none":
        return None
    advice = (
        "Use such a machine (on Windows: WSL 2), or install without an engine, for runs from recorded "
        "answers: LLKD_EXTRA=none make setup"
    )
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        return f"vLLM 0.32 is built for Linux on x86-64 and ARM64, not for {system} on {machine}. {advice}"
    name, version = libc
    if name != "glibc" or _numbers(version) < (2, 28):
        return (
            f"vLLM 0.32 needs glibc 2.28 or later; this machine has {name or 'no glibc'} {version}. {advice}"
        )
    return None


def stamp_key(extra: Extra, root: Path, python: str) -> str:
    """A short hash of all that an installation depends on.

    Settings of linters and tests are left out: to change one of them is no reason to install anew. The
    path is part of it, for an editable installation does not survive a move of the folder.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    relevant = {
        "build-system": project.get("build-system"),
        "project": project.get("project"),
        "setuptools": project.get("tool", {}).get("setuptools"),
        "constraints": (root / "constraints.txt").read_text(encoding="utf-8"),
        "extra": extra,
        "root": str(root),
        "python": python,
    }
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def classify_pip_failure(stderr: str, package: str) -> Literal["no match", "network", "other"]:
    """Why pip failed: no such version of ``package`` on offer, no connection, or anything else.

    Without a connection pip, too, ends in "No matching distribution found"; the warnings before it and
    the empty list of versions tell the two apart.
    """
    missing = re.search(r"^ERROR: No matching distribution found for ([A-Za-z0-9._-]+)", stderr, re.M)
    if missing is None:
        return "other"
    warned = re.search(r"connection broken|NewConnectionError|ConnectTimeoutError|Max retries", stderr)
    if warned and "(from versions: none)" in stderr:
        return "network"
    return "no match" if missing.group(1) == package else "other"


def pinned(package: str, constraints: str) -> str:
    """The version that constraints.txt gives for ``package``."""
    match = re.search(rf"^{re.escape(package)}==(\S+)", constraints, re.M)
    if match is None:
        raise SetupError(f"constraints.txt has no line '{package}==VERSION': add one")
    return match.group(1)


def install_steps(
    extra: Extra, dev: bool, base_done: bool, project: Mapping[str, Any], torch: str, system: str
) -> list[list[str]]:
    """The pip commands, in order, each without ``python -m pip``.

    ``base_done`` says that only the development tools are missing; ``torch`` is torch's version. The
    first step on a CPU machine is torch alone, so that pip takes no CUDA build for it: `main` knows what
    to do where that one is not on offer.
    """
    optional = project["optional-dependencies"]
    if base_done:
        return [["install", "-c", "constraints.txt", *optional["dev"]]] if dev else []
    extras = [*([] if extra == "none" else [extra]), "quickstart", *(["dev"] if dev else [])]
    steps = [["install", "-c", "constraints.txt", "-e", f".[{','.join(extras)}]"]]
    if extra != "gpu" and system == "Linux":
        steps.insert(0, ["install", "-c", "constraints.txt", f"torch=={torch}+cpu"])
        steps.append(["uninstall", "--yes", *UNUSED_ON_CPU])
    return steps


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def _run_pip(python: Path, step: Sequence[str]) -> tuple[int, str]:
    """Run one pip command, show all it says, and return its exit code and what it wrote to stderr."""
    command = [str(python), "-m", "pip", *step]
    if step[0] == "install":
        command[4:4] = ["--disable-pip-version-check", "--no-input"]
    _say(" ".join(["pip", *step]))
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            sys.stderr.write(line)
            lines.append(line)
    return process.returncode, "".join(lines)


def _install(python: Path, steps: Sequence[list[str]]) -> None:
    for step in steps:
        code, stderr = _run_pip(python, step)
        failure = classify_pip_failure(stderr, "torch") if code else None
        if failure == "no match" and step[-1].startswith("torch=="):
            # Only torch, only without its requirements: those come pinned from the ordinary index in the
            # next step, and a second index would slow the look-up of every other package.
            _say("no such build in pip's own sources: taking it from PyTorch's index for CPUs")
            code, stderr = _run_pip(
                python, ["install", "--no-deps", "--index-url", TORCH_CPU_INDEX, step[-1]]
            )
            failure = classify_pip_failure(stderr, "torch") if code else None
        if code:
            reason = "pip could not reach a package index" if failure == "network" else "pip failed"
            raise SetupError(f"{reason} (exit code {code}); its own message stands above")


def _ensure_venv(venv: Path, extra: Extra) -> Path:
    """Make ``venv`` where it is missing, broken or holds the other engine; return its Python."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    other_engine = {"cpu": "gpu", "gpu": "cpu"}.get(extra)
    if python.exists():
        probe = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        works = subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
        # Both engines install a package called vllm: in one environment each would overwrite the other.
        if works and not any(venv.glob(f".installed-{other_engine}-*")):
            return python
    _say(f"making {venv} with Python {platform.python_version()}")
    # In a process of its own, as venv finds the interpreter to link by how that was started.
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)])
    if made.returncode:
        raise SetupError(f"could not make {venv}; the message stands above")
    return python


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="install the development tools, too")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    options = parser.parse_args(arguments)

    venv = ROOT / ".venv"
    extra = choose_extra(os.environ)
    if problem := platform_problem(extra, platform.system(), platform.machine(), platform.libc_ver()):
        raise SetupError(problem)
    key = stamp_key(extra, ROOT, ".".join(platform.python_version_tuple()[:2]))
    stamps = {extra: venv / f".installed-{extra}-{key}", "dev": venv / f".installed-dev-{key}"}
    wanted = [extra, "dev"] if options.dev else [extra]
    if all(stamps[name].exists() for name in wanted):
        return

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = pinned("torch", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    base_done = stamps[extra].exists()
    steps = install_steps(extra, options.dev, base_done, project, torch, platform.system())
    if options.plan:
        for step in steps:
            _say(" ".join(["pip", *step]))
        return

    start = time.monotonic()
    reason = "LLKD_EXTRA" if os.environ.get("LLKD_EXTRA") else "this machine"
    _say(f"installing for {reason}: {extra}" + (" + development tools" if options.dev else ""))
    python = _ensure_venv(venv, extra)
    if not base_done:
        for old in venv.glob(".installed-*"):
            old.unlink()
    _install(python, steps)
    if extra == "gpu":
        probe = "from importlib.metadata import version; print(version('torch'))"
        found = subprocess.run(
            [python, "-c", probe], capture_output=True, text=True, check=True
        ).stdout.strip()
        if found.endswith("+cpu"):
            raise SetupError(
                f"pip's own sources offered torch {found}, a build without CUDA, and vLLM needs CUDA: "
                "take that build out of them (see `pip config list`), or set LLKD_EXTRA=cpu"
            )
    for name in wanted:
        stamps[name].touch()
    _say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
