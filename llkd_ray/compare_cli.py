"""The command line of jobs/compare.py: flags to settings to one call; mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llkd_ray.api import compare
from llkd_ray.comparison import load_comparison
from llkd_ray.console import Display
from llkd_ray.ending import status_of

FAILED, STOPPED = 1, 130


def compare_main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = compare_parser().parse_args(arguments)
    try:
        return status_of(partial(_compare, options))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED


def _compare(options: argparse.Namespace, display: Display) -> int:
    result = compare(
        load_comparison(options.config, options.set),
        options.out or f"runs/{Path(options.config).stem.replace('_', '-')}",
        only=options.only,
        add=options.add,
        report_only=options.report_only,
        display=display,
    )
    return FAILED if result.errors else 0


def compare_parser() -> argparse.ArgumentParser:
    """What jobs/compare.py takes."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Set policies, or any other change of settings, against each other on the same labels. "
        "Stopped or killed, the same command goes on; what is finished is not done again.",
    )
    parser.add_argument("config", help="a comparison's YAML file; see configs/compare_*.yaml")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results; on a cluster one that all nodes share, such as NFS "
        "(default: runs/ and the config file's name)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A=B", help="override one setting: sizes=[0.04,0.1]"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="train only for these teachers, lines and seeds; the report has whatever is finished",
    )
    parser.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="CSV",
        help="results.csv of the same comparison from elsewhere: the report has them, too, where there is no "
        "trial of its own",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report anew")
    return parser
