"""What stands in the pages: their code blocks, and the commands among them, held to the programs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llkd_ray.cli import audit_parser, compare_parser, distill_parser, export_parser
from llkd_ray.doctor.doctor import doctor_parser
from llkd_ray.prediction.config import predict_parser, settings_of

ROOT = Path(__file__).parents[1]
BEGINNINGS = ("make ", "python ", ".venv/bin/python ", "ray ")

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "jobs/audit.py": lambda words: audit_parser().parse_args(words),
    "jobs/compare.py": lambda words: compare_parser().parse_args(words),
    "jobs/distill.py": lambda words: distill_parser().parse_args(words),
    "jobs/doctor.py": lambda words: doctor_parser().parse_args(words),
    "jobs/export.py": lambda words: export_parser().parse_args(words),
    "jobs/predict.py": lambda words: settings_of(predict_parser().parse_args(words)),
}
"""What a job makes of its flags; each ends the test where it takes them for a mistake."""


def blocks(page: str, language: str) -> list[str]:
    """A page's code blocks in a language ("" for plain ones)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def commands(page: str) -> list[list[str]]:
    """Words of every command line in a page's plain code blocks."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines if line.startswith(BEGINNINGS) for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in parts]


def job_of(words: list[str]) -> str | None:
    """The job that a command runs, by itself or by ``ray job submit``."""
    return next((word for word in words if word.startswith("jobs/")), None)


def flags_of(words: list[str]) -> list[str]:
    job = job_of(words)
    assert job is not None
    return words[words.index(job) + 1 :]
