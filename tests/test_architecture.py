"""The plan of the house: which module may import which, and what may lie in the repository.

The table is DESIGN's; a new module or a new edge is added here on purpose, or not at all.
"""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llkd_ray"
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# module → the modules of ours that it may import
ROOMS: dict[str, set[str]] = {
    # settings
    "sections": set(),
    "teacher_config": {"sections"},
    "config": {"sections", "teacher_config"},
    "settings": {"config"},
    # files and numbers
    "schemas": set(),
    "signals": set(),
    "console": set(),
    "docstrings": set(),
    "store": {"config", "schemas"},
    # corpus
    "readers": {"config", "schemas", "store"},
    "sources": {"config", "readers", "store"},
    "cleaning": {"config", "readers"},
    "ranges": {"readers", "store"},
    "hashes": {"store"},
    "staging": {"cleaning", "hashes", "schemas", "store"},
    "duplicates": {"cleaning", "hashes", "room", "schemas", "staging", "store"},
    "corpus": {
        "cleaning",
        "config",
        "duplicates",
        "ranges",
        "readers",
        "room",
        "sources",
        "staging",
        "store",
    },
    # what a teacher is asked, and what becomes of its answers
    "prompt_template": {"config", "sections", "teacher_config"},
    "prompts": {"config", "prompt_template", "sections", "teacher_config"},
    "demonstrations": {"cleaning", "config", "readers", "sections", "sources", "teacher_config"},
    "together": set(),
    "label_trie": {"together"},
    "checkpoints": {"sections"},
    "answers": {"teacher_config"},
    "asking": {"answers", "together"},
    "calibration": {"signals"},
    "confidence": {"calibration", "signals", "teacher_config"},
    # the kinds of teachers
    "engine_requests": set(),
    "engine": {"answers", "engine_requests", "teacher_config"},
    "root_cause": set(),
    "vllm_settings": {"teacher_config"},
    "vllm_requests": {"engine_requests"},
    "vllm_async": {
        "answers",
        "engine_requests",
        "root_cause",
        "teacher_config",
        "vllm_requests",
        "vllm_settings",
    },
    "vllm_child": {"engine_requests", "teacher_config", "vllm_requests", "vllm_settings"},
    "child_engine": {"answers", "engine_requests", "root_cause", "teacher_config", "vllm_settings"},
    "vllm_start": {"child_engine", "engine_requests", "teacher_config", "vllm_async", "vllm_settings"},
    "vllm_teacher": {
        "answers",
        "asking",
        "checkpoints",
        "config",
        "engine",
        "engine_requests",
        "label_trie",
        "prompts",
        "teacher_config",
        "vllm_start",
    },
    "http_client": {"answers", "asking", "teacher_config"},
    "server_ways": {"answers", "http_client", "label_trie", "prompts", "sections", "teacher_config"},
    "server_teacher": {
        "answers",
        "asking",
        "checkpoints",
        "config",
        "http_client",
        "prompts",
        "sections",
        "server_ways",
        "teacher_config",
    },
    "recorded": {"answers", "asking", "sections", "sources", "store", "teacher_config"},
    "answer_cache": {"schemas", "store", "teacher_config"},
    "teachers": {
        "answer_cache",
        "answers",
        "config",
        "demonstrations",
        "prompt_template",
        "recorded",
        "server_teacher",
        "store",
        "teacher_config",
        "vllm_teacher",
    },
    # the stream of tickets
    "room": {"config", "teacher_config"},
    "cluster": {"config", "room"},
    "schedule": {"config"},
    "repair": {"schemas", "store"},
    "label_files": {"answers", "repair", "schemas", "store"},
    "ledger": {"answers", "config", "teacher_config"},
    "asker": {
        "answer_cache",
        "answers",
        "cleaning",
        "config",
        "label_files",
        "ledger",
        "schemas",
        "store",
        "teachers",
    },
    "teacher": {
        "answers",
        "asker",
        "cluster",
        "config",
        "label_files",
        "room",
        "schedule",
        "schemas",
        "signals",
        "store",
        "teacher_config",
        "teachers",
    },
    # selection
    "priors": {"signals"},
    "chunks": set(),
    "chance": {"signals"},
    "fixed_point": {"chunks", "signals"},
    "table": {"chunks", "fixed_point", "signals"},
    "scan": {"chance", "chunks", "fixed_point", "signals", "table"},
    "policies": {"chance", "chunks", "priors", "scan", "signals", "table"},
    "acquisition": {"chance", "chunks", "scan", "signals", "table"},
    "selection": {"acquisition", "chance", "chunks", "config", "policies", "signals", "table"},
    "intake": {
        "answers",
        "confidence",
        "config",
        "label_files",
        "schedule",
        "signals",
        "store",
        "table",
    },
    "leases": {"acquisition", "config", "intake", "schedule", "schemas", "signals", "store", "table"},
    "teacher_watch": {"config"},
    "batches": {"confidence", "policies", "schemas", "store", "table"},
    "snapshot": {"audit_answers", "table", "answers", "signals", "store"},
    "progress": {"schemas", "store", "table"},
    "audit_answers": {"schemas", "signals", "store", "table"},
    "glance": {"schemas", "signals", "table"},
    "selector": {
        "acquisition",
        "answers",
        "audit_answers",
        "batches",
        "config",
        "glance",
        "intake",
        "label_files",
        "leases",
        "ledger",
        "policies",
        "priors",
        "progress",
        "schedule",
        "selection",
        "session",
        "signals",
        "snapshot",
        "store",
        "table",
        "teacher_watch",
    },
    # student
    "losses": set(),
    "in_step": {"signals"},
    "tokenizing": set(),
    "student": {"config", "in_step", "losses", "priors", "signals", "tokenizing"},
    "training": {
        "audit_answers",
        "cluster",
        "config",
        "room",
        "schemas",
        "signals",
        "store",
        "student",
    },
    # predictions over a corpus
    "thresholds": {"signals"},
    "classifier": {"calibration", "checkpoints", "sections", "store", "student"},
    "pieces": {"cleaning", "config", "readers", "staging", "store"},
    "predict_config": {"config", "sections"},
    "predict_output": {
        "classifier",
        "config",
        "pieces",
        "predict_config",
        "readers",
        "signals",
        "store",
        "thresholds",
    },
    "predicting": {
        "classifier",
        "cluster",
        "config",
        "corpus",
        "pieces",
        "predict_config",
        "predict_output",
        "room",
        "sources",
        "store",
        "thresholds",
    },
    # results
    "evaluate": {"signals"},
    "teacher_quality": {"confidence", "evaluate", "signals"},
    "student_calibration": {
        "audit_answers",
        "calibration",
        "confidence",
        "config",
        "evaluate",
        "intake",
        "schedule",
        "signals",
        "store",
    },
    "metrics": {
        "confidence",
        "config",
        "evaluate",
        "intake",
        "schedule",
        "signals",
        "store",
        "teacher_quality",
    },
    "words": set(),
    "pace": set(),
    "standing": {"words"},
    "gauges": set(),
    "trackers": {"config", "store"},
    "drawing": set(),
    "facts": {"audit_answers", "schemas", "store"},
    "round_facts": {"facts", "glance", "signals", "store"},
    "figures": {"drawing", "facts", "reference", "words"},
    "round_figures": {"drawing", "facts", "figures", "round_facts", "signals", "words"},
    "insight": {"facts", "glance", "metrics", "signals", "store", "teacher_quality"},
    "reference": {"store"},
    "report": {
        "evaluate",
        "schemas",
        "facts",
        "figures",
        "reference",
        "round_facts",
        "round_figures",
        "store",
        "words",
    },
    # policies against each other
    "trial": {
        "acquisition",
        "config",
        "evaluate",
        "policies",
        "priors",
        "selection",
        "signals",
        "student",
        "table",
    },
    "tables": set(),
    "comparison": {"config", "recorded", "settings", "signals", "store", "tables", "trial"},
    "compare_figure": {"drawing", "tables", "words"},
    "compare_report": {"compare_figure", "config", "drawing", "report", "store", "tables", "words"},
    # the whole
    "session": {"config", "store"},
    "run": {
        "answers",
        "cluster",
        "config",
        "gauges",
        "pace",
        "schedule",
        "selector",
        "session",
        "snapshot",
        "standing",
        "store",
        "teacher",
        "training",
    },
    "quickstart": {"config", "docstrings", "prompts", "teacher_config"},
}
PREDICTING = {"thresholds", "classifier", "pieces", "predict_config", "predict_output", "predicting"}
ROOMS["loop"] = set(ROOMS) - {"docstrings", "quickstart"} - PREDICTING
# a plan, before anything starts
ROOMS["estimate"] = {"config", "label_trie", "teacher_config"}
ROOMS["pool_sample"] = {"cleaning", "config", "readers", "store"}
ROOMS["speed_guess"] = set()
ROOMS["prompt_sizes"] = {
    "config",
    "estimate",
    "prompts",
    "server_teacher",
    "server_ways",
    "teacher_config",
    "vllm_teacher",
}
ROOMS["plan_teacher"] = {
    "answer_cache",
    "config",
    "estimate",
    "pool_sample",
    "prompt_sizes",
    "speed_guess",
    "teacher_config",
    "teachers",
}
ROOMS["plan"] = {
    "config",
    "estimate",
    "loop",
    "plan_teacher",
    "pool_sample",
    "schedule",
    "sources",
    "teacher_config",
    "teachers",
}
ROOMS["runs"] = {"config", "facts", "loop", "settings", "store"}
ROOMS["ending"] = {"config"}
ROOMS["cli"] = {"answers", "config", "ending", "plan", "quickstart", "report", "runs", "settings", "store"}
ROOMS["labelling"] = {"config", "facts", "loop", "runs", "settings", "store"}
ROOMS["comparing"] = {
    "cluster",
    "compare_report",
    "comparison",
    "config",
    "corpus",
    "labelling",
    "loop",
    "report",
    "settings",
    "store",
    "tables",
    "trial",
    "words",
}
# from Python, and from the command line by the same functions
ROOMS["api"] = {
    "compare_report",
    "comparing",
    "comparison",
    "config",
    "pieces",
    "predict_config",
    "predict_output",
    "predicting",
    "report",
    "runs",
    "settings",
    "store",
}
ROOMS["compare_cli"] = {"api", "comparison", "ending"}
ROOMS["predict_cli"] = {"api", "config", "ending", "predict_config"}
# people look at labels
ROOMS["audit"] = {"chance", "signals"}
ROOMS["audit_files"] = {"sections"}
ROOMS["auditing"] = {
    "audit",
    "audit_answers",
    "audit_files",
    "chance",
    "classifier",
    "config",
    "facts",
    "intake",
    "report",
    "runs",
    "schedule",
    "schemas",
    "signals",
    "store",
}
ROOMS["audit_cli"] = {"audit", "auditing", "ending", "runs"}
# a model for use elsewhere
ROOMS["hub"] = {"sections"}
ROOMS["onnx_export"] = {"sections", "store", "student"}
ROOMS["exporting"] = {
    "classifier",
    "config",
    "facts",
    "hub",
    "onnx_export",
    "report",
    "runs",
    "store",
    "student_calibration",
}
ROOMS["export_cli"] = {"config", "ending", "exporting", "runs"}
# a look at the set-up, before anything starts
ROOMS["findings"] = {"config"}
ROOMS["doctor_machine"] = {"checkpoints", "config", "findings", "room", "student"}
ROOMS["doctor_cluster"] = {"config", "findings", "room", "teacher_config"}
ROOMS["cluster_view"] = {"doctor_cluster"}
ROOMS["doctor_models"] = {
    "answers",
    "checkpoints",
    "config",
    "findings",
    "http_client",
    "student",
    "teacher_config",
    "teachers",
}
ROOMS["doctor_data"] = {
    "config",
    "doctor_machine",
    "findings",
    "plan",
    "report",
    "session",
    "sources",
    "store",
}
ROOMS["doctor"] = {
    "config",
    "doctor_cluster",
    "doctor_data",
    "doctor_machine",
    "doctor_models",
    "findings",
    "loop",
    "quickstart",
    "runs",
    "settings",
}
FOR_EVERYONE = {"console"}  # how progress is printed

WITH_RAY = {
    "cluster",
    "cluster_view",
    "comparing",
    "corpus",
    "duplicates",
    "gauges",
    "predicting",
    "run",
    "selector",
    "teacher",
    "training",
}
WITH_VLLM = {"vllm_async", "vllm_child", "vllm_requests"}
MAX_LINES = 450
MAX_BYTES = 400_000

# Folders where people and CI systems keep their checkouts, and Windows' form of the first two.
LOCAL_PATH = re.compile(
    r"(?<![\w$}~.])/(?:home|Users|root|work|workspace|builds|scratch)/\w|[A-Za-z]:\\Users\\"
)


def parse(source: str) -> ast.Module:
    return ast.parse(source)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in ``tree``; relative ones from llkd_ray."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["llkd_ray" if node.level else "", node.module]))
            if base == "llkd_ray":  # from llkd_ray import store
                yield from (f"llkd_ray.{alias.name}" for alias in node.names)
            else:
                yield base


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of ours that ``tree`` imports, without what __init__ itself defines."""
    parts = [name.split(".") for name in imports(tree)]
    names = {part[1] for part in parts if part[0] == "llkd_ray" and len(part) > 1}
    return names - defined_in_init()


def defined_in_init() -> set[str]:
    tree = parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}


def top_level_imports(tree: ast.AST) -> set[str]:
    """First names of what is imported when the module is, that is, outside of functions and methods."""
    outside = ast.Module(body=[], type_ignores=[])
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            outside.body.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue.extend(ast.iter_child_nodes(node))
    return {name.split(".")[0] for name in imports(outside)}


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_module_is_in_the_plan_and_keeps_to_it(path: Path) -> None:
    name = path.stem
    assert name in ROOMS, (
        f"{name}.py is not in the plan: add it to ROOMS deliberately, with what it may import"
    )
    strangers = own_imports(parse(path.read_text(encoding="utf-8"))) - ROOMS[name] - FOR_EVERYONE
    assert not strangers, (
        f"{name}.py imports {', '.join(sorted(strangers))}; it may import "
        f"{', '.join(sorted(ROOMS[name])) or 'none of ours'}: move the code, or change the plan deliberately"
    )


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_ray_and_vllm_stay_where_they_belong(path: Path) -> None:
    tree = parse(path.read_text(encoding="utf-8"))
    everywhere = {name.split(".")[0] for name in imports(tree)}
    if path.stem not in WITH_RAY:
        assert "ray" not in everywhere, f"{path.stem}.py imports ray; only {sorted(WITH_RAY)} may"
    if path.stem not in WITH_VLLM:
        assert "vllm" not in everywhere, f"{path.stem}.py imports vllm; only {sorted(WITH_VLLM)} may"
    assert "vllm" not in top_level_imports(tree), (
        f"{path.stem}.py imports vllm at module level: import it where the engine starts, so that all "
        "else runs without it"
    )


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_module_is_short_enough_to_be_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, (
        f"{path.stem}.py has {lines} lines, {MAX_LINES} at most: give a part its own room"
    )


def test_the_plan_has_no_circles() -> None:
    graphlib.TopologicalSorter(ROOMS).prepare()  # raises CycleError


def test_imports_are_seen_in_every_form() -> None:
    tree = parse(
        "import llkd_ray.store\nfrom llkd_ray import __version__, table\nfrom llkd_ray.config import Config\n"
        "from . import signals\nfrom .prompts import x\nimport numpy\n"
        "def f():\n    import vllm.engine\n    from llkd_ray import policies\n"
        "class A:\n    import ray\n"
    )
    assert own_imports(tree) == {"store", "table", "config", "signals", "prompts", "policies"}
    assert top_level_imports(tree) == {"llkd_ray", "numpy", "ray"}


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


def test_test_files_have_names_of_their_own():
    """pytest imports them by their names alone, and refuses the second of two."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert sorted(names) == sorted(set(names))
