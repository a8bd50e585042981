"""The house: imports go one way, Ray, vLLM and clocks stay where they belong, modules and folders small."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llkd_ray"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# A folder (or single module) may import what stands to its left.
ORDER = (
    *("config", "display", "resources", "cluster", "metrics", "storage", "corpus", "teacher", "selection"),
    *("student", "quickstart", "evaluation", "report", "prediction", "run", "export", "audit", "comparison"),
    *("doctor", "api", "cli", "__main__"),
)
# These stay apart although the order would allow them.
APART = {
    "student": {"teacher", "selection"},
    "evaluation": {"teacher"},
    "report": {"teacher"},
    "prediction": {"teacher", "selection", "report"},
}
WITH_RAY = {
    "cluster", "comparison/job", "corpus/ingest", "doctor/cluster", "prediction/job", "run/progress",
    "run/supervisor", "selection/selector", "student/ray_train", "teacher/stream",
}  # fmt: skip
WITH_VLLM = {"teacher/vllm/backends", "teacher/vllm/child_main", "teacher/vllm/requests"}
MAX_LINES, MAX_MODULES, MAX_BYTES = 450, 20, 400_000
CLOCK = {("time", name) for name in ("time", "time_ns", "ctime", "gmtime", "localtime", "strftime")} | {
    ("datetime", name) for name in ("now", "today", "utcnow")
}
"""Clocks are set, and those of two machines differ; durations come from ``time.monotonic``."""
ASKS_WHAT_TIME_IT_IS = {
    "cli/train": "names the quickstart's run directories",
    "display": "stamps the lines of a log file",
    "teacher/openai/client": "a server's Retry-After may be a date",
    "prediction/job": "from the first actor to the last, for a rate that is only said",
    "run/loop": "names a run directory",
}

# Folders where people and CI systems keep their checkouts, and Windows' form of the first two.
LOCAL_PATH = re.compile(
    r"(?<![\w$}~.])/(?:home|Users|root|work|workspace|builds|scratch)/\w|[A-Za-z]:\\Users\\"
)


def imports_of(source: str, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names of what is imported, in functions too unless ``top_level``."""
    queue: list[ast.AST] = [ast.parse(source)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            queue.extend(ast.iter_child_nodes(node))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def folder_of(path: Path) -> str:
    return name_of(path).split("/")[0]


def folders_imported_by(source: str) -> set[str]:
    parts = [name.split(".") for name in imports_of(source)]
    return {part[1] for part in parts if part[0] == "llkd_ray"}


def test_imports_go_one_way() -> None:
    for path in MODULES:
        here = folder_of(path)
        for there in folders_imported_by(path.read_text(encoding="utf-8")):
            assert ORDER.index(there) <= ORDER.index(here), f"{name_of(path)}: {there} stands above {here}"
            assert there not in APART.get(here, set()), f"{name_of(path)}: {here} must not know {there}"


def test_ray_and_vllm_stay_where_they_belong() -> None:
    for path in MODULES:
        name, source = name_of(path), path.read_text(encoding="utf-8")
        for library, places in (("ray", WITH_RAY), ("vllm", WITH_VLLM)):
            is_used = any(one.split(".")[0] == library for one in imports_of(source))
            assert is_used == (name in places), f"{name}: imports {library}: {is_used}"
        at_once = {one.split(".")[0] for one in imports_of(source, top_level=True)}
        assert "vllm" not in at_once, f"{name}: import vllm in a function; all else runs without it"


def test_modules_and_folders_are_small_enough_to_be_read() -> None:
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{name_of(path)}: {lines} lines, {MAX_LINES} at most"
    for folder in {path.parent for path in MODULES}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MAX_MODULES, f"{folder}: {len(modules)} modules, {MAX_MODULES} at most"


def calls_of(source: str) -> set[tuple[str, str]]:
    """Functions that a module mentions, as (object, name), by whatever name it imports them."""
    found = {tuple(name.rsplit(".", 1)) for name in imports_of(source) if "." in name}
    attributes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return found | {(node.value.id, node.attr) for node in attributes if isinstance(node.value, ast.Name)}


def test_only_these_modules_ask_what_time_it_is() -> None:
    modules = [PACKAGE / "__init__.py", *MODULES]
    asking = {name_of(path) for path in modules if calls_of(path.read_text(encoding="utf-8")) & CLOCK}
    assert asking == set(ASKS_WHAT_TIME_IT_IS)
    source = "import time\nfrom datetime import datetime\nage = time.time() - datetime.now().timestamp()"
    assert calls_of(source) >= {("time", "time"), ("datetime", "now")}
    assert ("time", "time") in calls_of("from time import time")


def test_nothing_that_is_read_can_run_code() -> None:
    """Checkpoints are safetensors and run no code of their own; only Ray's own batches hold pickles."""
    pickles = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("joblib", "load")}
    own = {"corpus/ingest", "prediction/job"}
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        assert not calls_of(source) & pickles or name_of(path) in own, f"{name_of(path)} reads a pickle"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert options["trust_remote_code"] == "False", f"{name_of(path)}: {ast.unparse(node)}"
                is_model = "AutoModel" in ast.unparse(node.func)
                assert options.get("use_safetensors") == ("True" if is_model else None), ast.unparse(node)
            assert not isinstance(node, ast.keyword) or node.arg != "allow_pickle", name_of(path)


def test_imports_are_seen_in_every_form() -> None:
    source = (
        "import llkd_ray.storage.run_dir\nfrom llkd_ray import display\nimport numpy\n"
        "def f():\n    import vllm.engine\n    from llkd_ray.config import base\nclass A:\n    import ray\n"
    )
    assert folders_imported_by(source) == {"storage", "display", "config"}
    at_once = {name.split(".")[0] for name in imports_of(source, top_level=True)}
    assert at_once == {"llkd_ray", "numpy", "ray"}


# --- what lies in the repository


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]  # one may be deleted and not yet committed


def test_no_large_file_is_tracked(tracked: list[Path]) -> None:
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked}
    assert {name: size for name, size in large.items() if size > MAX_BYTES} == {}


def local_paths(text: str) -> list[str]:
    """The lines of ``text`` that hold an absolute path which exists on one machine only."""
    here = [str(ROOT), str(Path.home())]
    here = [path + "/" for path in here if len(Path(path).parts) > 1]
    return [
        line.strip()
        for line in text.splitlines()
        if LOCAL_PATH.search(line) or any(path in line for path in here)
    ]


def test_no_path_of_one_machine_is_tracked(tracked: list[Path]) -> None:
    found = {}
    for path in tracked:
        content = path.read_bytes()
        if b"\0" not in content and (lines := local_paths(content.decode("utf-8", errors="replace"))):
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


@pytest.mark.parametrize(
    ("line", "is_local"),
    [
        ("cd " + "/".join(["", "home", "ann", "llkd-ray"]), True),
        ("root = '" + "/".join(["", "Users", "ann", "code"]) + "'", True),
        ("C:" + "\\Users\\ann", True),
        (f"see {ROOT}/runs", True),
        ("~/llkd-ray/scripts and $HOME/work/x, /usr/bin/env, s3://bucket/home/x", False),
    ],
)
def test_local_paths_are_told_from_others(line: str, is_local: bool) -> None:
    assert bool(local_paths(line)) == is_local
