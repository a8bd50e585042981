"""``llkd compare``: policies, or any other change of settings, on the same labels."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from llkd_ray.cli.main import FAILED
from llkd_ray.display import Display


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare policies, or any other change of settings, on the same labels. If it is stopped or killed, "
        "the same command continues; what is finished is not done again."
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
        help="train only for these teachers, lines and seeds; the report shows whatever is finished",
    )
    parser.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="CSV",
        help="results.csv of the same comparison from elsewhere: the report includes it where there is no "
        "trial of its own",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report again")


def run_compare(options: argparse.Namespace, display: Display) -> int:
    from llkd_ray.api import compare
    from llkd_ray.comparison.settings import load_comparison

    settings = load_comparison(options.config, options.set)
    display.resume_with = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    result = compare(
        settings,
        options.out or f"runs/{Path(options.config).stem.replace('_', '-')}",
        only=options.only,
        add=options.add,
        report_only=options.report_only,
        display=display,
    )
    return FAILED if result.errors else 0
