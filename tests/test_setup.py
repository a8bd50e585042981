"""The set-up script: what it installs where, when it works again, and how it reads pip's failures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_script("setup")
pin = load_script("pin")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fake_program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


# --- which extra


GPU = "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'"


@pytest.mark.parametrize(
    ("body", "wish", "expected"),
    [
        (GPU, "", "gpu"),
        ("echo 'No devices found.'", "", "cpu"),
        (f"{GPU}; exit 9", "", "cpu"),
        (None, "", "cpu"),
        *((GPU, wish, wish) for wish in ("cpu", "gpu", "none")),
    ],
)
def test_extra_is_as_wished_or_follows_nvidia_smi(
    tmp_path: Path, body: str | None, wish: str, expected: str
) -> None:
    if body:
        fake_program(tmp_path, "nvidia-smi", body)
    assert setup.choose_extra({"PATH": str(tmp_path), "LLKD_EXTRA": wish}) == expected


def test_unknown_extra_is_refused_with_the_remedy() -> None:
    with pytest.raises(setup.SetupError, match=r"LLKD_EXTRA is 'tpu'.*cpu, gpu, none"):
        setup.choose_extra({"LLKD_EXTRA": "tpu"})


# --- which machine

GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("system", "machine", "libc", "says"),
    [
        ("Darwin", "arm64", ("", ""), "not for Darwin on arm64"),
        ("Windows", "AMD64", ("", ""), "not for Windows on AMD64"),
        ("Linux", "riscv64", GLIBC, "not for Linux on riscv64"),
        ("Linux", "x86_64", ("glibc", "2.27"), "glibc 2.27"),
        ("Linux", "x86_64", ("", ""), "no glibc"),
    ],
)
def test_other_machines_get_a_reason_and_a_way_out(
    system: str, machine: str, libc: tuple[str, str], says: str
) -> None:
    for good in ("x86_64", "aarch64"):
        assert setup.platform_problem("cpu", "Linux", good, GLIBC) is None
    problem = setup.platform_problem("cpu", system, machine, libc)
    assert says in problem
    assert "LLKD_EXTRA=none" in problem
    assert setup.platform_problem("none", system, machine, libc) is None


# --- when there is work to do


@pytest.fixture
def project_copy(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_stamp_key_changes_with_all_that_is_installed_and_nothing_else(
    project_copy: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def key(extra: str = "cpu", folder: Path = project_copy, python: str = "3.11") -> str:
        return setup.stamp_key(extra, folder, python)

    def edit(name: str, old: str, new: str) -> None:
        text = (project_copy / name).read_text(encoding="utf-8")
        assert old in text
        (project_copy / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    keys = [key()]
    edit("pyproject.toml", "line-length = 110", "line-length = 99")
    assert key() == keys[0]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(project_copy, elsewhere, dirs_exist_ok=True)
    keys += [key("gpu"), key(python="3.12"), key(folder=elsewhere)]
    edit("constraints.txt", "==", "==0.")
    keys.append(key())
    edit("pyproject.toml", "dependencies = [", 'dependencies = ["one-more",')
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_stamped_environment_is_left_alone(
    project_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "ROOT", project_copy)
    monkeypatch.setenv("LLKD_EXTRA", "none")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    venv = project_copy / ".venv"
    venv.mkdir()
    (venv / f".installed-none-{setup.stamp_key('none', project_copy, python)}").touch()

    setup.main([])  # would run pip in an empty folder, and fail
    assert capsys.readouterr().out == ""

    setup.main(["--dev", "--plan"])  # the tools are still missing: they alone are planned
    planned = capsys.readouterr().out
    assert "pytest" in planned
    assert "-e" not in planned.split()


# --- what pip is told


def test_cpu_installs_torch_alone_first_and_drops_what_breaks_vllm() -> None:
    steps = setup.install_steps("cpu", False, False, PROJECT, "2.13.0", "Linux")
    assert [step[0] for step in steps] == ["install", "install", "uninstall"]
    assert steps[0][-1] == "torch==2.13.0+cpu"
    assert steps[1][-2:] == ["-e", ".[cpu,quickstart]"]
    assert set(steps[2][2:]) == {"torchvision", "torchaudio", "torchcodec"}
    assert all("constraints.txt" in step for step in steps[:2])


def test_gpu_is_one_step_and_without_an_engine_no_vllm_is_asked_for() -> None:
    (step,) = setup.install_steps("gpu", True, False, PROJECT, "2.13.0", "Linux")
    assert step == ["install", "-c", "constraints.txt", "-e", ".[gpu,quickstart,dev]"]
    assert setup.install_steps("none", False, False, PROJECT, "2.13.0", "Linux")[1][-1] == ".[quickstart]"
    (on_mac,) = setup.install_steps("none", False, False, PROJECT, "2.13.0", "Darwin")
    assert on_mac[-1] == ".[quickstart]"  # torch has no separate CPU build there


def test_torch_version_comes_from_the_constraints() -> None:
    assert setup.pinned("torch", "six==1.17.0\ntorch==2.13.0\n") == "2.13.0"
    with pytest.raises(setup.SetupError, match="torch==VERSION"):
        setup.pinned("torch", "torchvision==0.28.0\n")


# --- how pip fails (the lines are pip's own, shortened)

NO_SUCH_BUILD = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu \
(from versions: 2.12.1, 2.13.0, 2.14.0)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
NO_CONNECTION = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection \
broken by 'NewConnectionError(...: Failed to establish a new connection: [Errno -2] Name or service not \
known')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: none)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
ONE_OF_TWO_INDEXES_AWAY = NO_CONNECTION.replace("none", "2.13.0")
REQUIREMENT_MISSING = """\
ERROR: Could not find a version that satisfies the requirement sympy>=1.13.3 (from torch) \
(from versions: none)
ERROR: No matching distribution found for sympy>=1.13.3
"""
DISK_FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (NO_SUCH_BUILD, "no match"),
        (ONE_OF_TWO_INDEXES_AWAY, "no match"),
        (NO_CONNECTION, "network"),
        (REQUIREMENT_MISSING, "other"),
        (DISK_FULL, "other"),
        ("", "other"),
    ],
)
def test_pip_failures_are_told_apart(stderr: str, expected: str) -> None:
    assert setup.classify_pip_failure(stderr, "torch") == expected


def install(tmp_path: Path, stderr: str, calls: list[str]) -> None:
    """Install by a Python whose pip notes its calls and fails with ``stderr`` unless an index is named."""
    log, message = tmp_path / "calls", tmp_path / "message"
    message.write_text(stderr, encoding="utf-8")
    body = (
        f'echo "$*" >> {log}\ncase "$*" in\n'
        f"  *--index-url*) exit 0 ;;\n  *torch==*) cat {message} >&2; exit 1 ;;\nesac"
    )
    python = fake_program(tmp_path, "python", body)
    try:
        setup._install(python, setup.install_steps("cpu", False, False, PROJECT, "2.13.0", "Linux"))
    finally:
        calls[:] = log.read_text(encoding="utf-8").splitlines()


def test_missing_build_comes_from_the_second_index_for_torch_alone(tmp_path: Path) -> None:
    calls: list[str] = []
    install(tmp_path, NO_SUCH_BUILD, calls)
    assert len(calls) == 4
    assert [call for call in calls if "--index-url" in call] == [calls[1]]
    assert "--no-deps" in calls[1]
    assert calls[1].endswith("torch==2.13.0+cpu")


@pytest.mark.parametrize(("stderr", "says"), [(NO_CONNECTION, "could not reach"), (DISK_FULL, "pip failed")])
def test_other_failures_stop_at_once_and_show_pips_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stderr: str, says: str
) -> None:
    calls: list[str] = []
    with pytest.raises(setup.SetupError, match=says):
        install(tmp_path, stderr, calls)
    assert len(calls) == 1
    assert stderr in capsys.readouterr().err


# --- which Python


def find_python(path: Path, **environ: str) -> tuple[int, str, str]:
    """Status, output and errors of the script; the shell's own tools are in a folder that holds no Python."""
    tools = path.parent / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "head"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        ["sh", str(ROOT / "scripts" / "find_python.sh")],
        env={"PATH": f"{path}{os.pathsep}{tools}", **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout.strip(), done.stderr


def test_a_newer_python_is_found_behind_an_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    fake_program(folder, "python3", "echo 'is Python 3.9' >&2; exit 1")
    status, _, said = find_python(folder)
    assert status == 1
    tried = ("3.11 to 3.14", "python3: is Python 3.9", "python3.13: not found")
    assert all(words in said for words in tried)
    good = folder / "python3.12"
    good.symlink_to(sys.executable)
    assert find_python(folder)[:2] == (0, str(good))
    assert find_python(folder, PYTHON=sys.executable)[:2] == (0, sys.executable), "a named one alone"
    assert find_python(folder, PYTHON="no-such-python")[0] == 1


# --- the pins


def report(**versions: str) -> dict:
    return {"install": [{"metadata": {"name": name, "version": v}} for name, v in versions.items()]}


def test_pins_of_two_machines_are_merged_by_public_version() -> None:
    pins = pin.merge([report(torch="2.13.0", nvtx="0.2"), report(torch="2.13.0+cpu", Ray_X="1")])
    assert pins == {"nvtx": "0.2", "ray-x": "1", "torch": "2.13.0"}
    with pytest.raises(ValueError, match=r"triton.*3\.9\.0.*3\.7\.1"):
        pin.merge([report(triton="3.9.0"), report(triton="3.7.1")])


def test_every_requirement_of_the_project_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    optional = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    requirements = [Requirement(text) for text in [*PROJECT["dependencies"], *optional]]
    unpinned = [one.name for one in requirements if canonicalize_name(one.name) not in pins]
    assert unpinned == []
    outside = [str(one) for one in requirements if pins[canonicalize_name(one.name)] not in one.specifier]
    assert outside == []
