"""Clocks are set, and those of two machines differ: nothing may depend on what time it is."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llkd_ray"
READS_THE_CLOCK = {
    ("time", name) for name in ("time", "time_ns", "ctime", "gmtime", "localtime", "strftime")
} | {("datetime", name) for name in ("now", "today", "utcnow")}
"""Durations come from ``time.monotonic``, which no setting of the clock moves."""
ALLOWED = {
    "cli.py": "names the quickstart's run directories",
    "teacher/openai/client.py": "a server's Retry-After may be a date",
    "prediction/job.py": "from the first actor to the last, for a rate that is only said",
    "run/loop.py": "names a run directory",
}


def calls_of(module: Path) -> set[tuple[str, str]]:
    """Functions that a module mentions, as (object, name), by whatever name it imports them."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def test_only_these_modules_ask_what_time_it_is():
    asking = {
        module.relative_to(PACKAGE).as_posix()
        for module in PACKAGE.rglob("*.py")
        if calls_of(module) & READS_THE_CLOCK
    }
    assert asking == set(ALLOWED)


def test_the_search_finds_what_it_looks_for(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import time\nfrom datetime import datetime\nage = time.time() - datetime.now().timestamp()"
    )
    assert calls_of(module) >= {("time", "time"), ("datetime", "now")}
    module.write_text("from time import time")
    assert ("time", "time") in calls_of(module)
