"""What stands in the pages: their code blocks, and the commands among them, held to the programs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from llkd_ray.cli.main import program_parser
from llkd_ray.cli.train import distill_parser
from llkd_ray.prediction.config import settings_of

ROOT = Path(__file__).parents[1]
BEGINNINGS = ("llkd ", "make ", "python ", ".venv/bin/", "ray ")
JOBS = {"doctor": "check"} | {name: name for name in ("audit", "compare", "export", "predict")}
"""The subcommand of a job that is named after it; jobs/distill.py has a parser of its own."""


def blocks(page: str, language: str) -> list[str]:
    """A page's code blocks in a language ("" for plain ones)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def commands(page: str) -> list[list[str]]:
    """Words of every command line in a page's plain code blocks; that of ``llkd`` begins with its name."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines if line.startswith(BEGINNINGS) for part in line.split(" && ")]
    found = [shlex.split(part.removeprefix(".venv/bin/"), comments=True) for part in parts]
    return [words for words in found if words != ["llkd", "--version"]]


def arguments_of(words: list[str]) -> list[str] | None:
    """The arguments of ``llkd`` for a command that runs it or one of the jobs; None for other programs.

    Those of jobs/distill.py begin with ``distill``.
    """
    if words[0] == "llkd":
        return words[1:]
    job = next((word for word in words if word.startswith("jobs/")), None)
    if job is None:
        return None
    name = Path(job).stem
    return [JOBS.get(name, name), *words[words.index(job) + 1 :]]


def parsed(arguments: list[str]) -> argparse.Namespace:
    """What the program makes of its arguments; ends the test where it takes them for a mistake."""
    name, *rest = arguments
    if name == "distill":
        return distill_parser().parse_args(rest)
    options = program_parser(arguments).parse_args(arguments)
    if name == "predict":
        settings_of(options)
    return options
