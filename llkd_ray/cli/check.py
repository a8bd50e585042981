"""``llkd check``: is this installation, and what a config names, ready for a run?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from llkd_ray.cli.main import USER_MISTAKE, add_settings
from llkd_ray.display import Display
from llkd_ray.doctor.doctor import all_checks, load
from llkd_ray.doctor.findings import Check, Finding, describe, run_checks


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check whether this installation, and what a config names, are ready for a run. Without a config: "
        "for the quickstart. The exit status is 2 if there is a problem, 0 if there are only warnings."
    )
    parser.add_argument("config", nargs="?", help="a YAML file; llkd init writes one")
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run_check(options: argparse.Namespace, display: Display) -> int:
    config, findings = load(options.config, options.set)
    checks = all_checks(config, inputs=options.config is not None)
    if options.json:
        findings += run_checks(checks)
        print(to_json(findings))
    else:
        findings = print_findings(findings, checks, display)
    return USER_MISTAKE if any(one.state == "problem" for one in findings) else 0


def to_json(findings: Iterable[Finding]) -> str:
    """The findings as JSON."""
    listed = [asdict(one) for one in findings]
    counts = {state: sum(one["state"] == state for one in listed) for state in ("ok", "warning", "problem")}
    return json.dumps({"findings": listed, "counts": counts}, indent=1)


def print_findings(first: Sequence[Finding], checks: Sequence[Check], display: Display) -> list[Finding]:
    """Print a table at the end on a terminal, else one line per finding; then the totals. Returns all."""
    findings = list(first)
    plain = not display.console.is_terminal
    for one in first if plain else ():
        display.result(f"{one.state:<7}  {describe(one)}")
    for check in checks:
        if not plain:
            display.update(f"checking: {check.name}")
        for one in run_checks([check]):
            findings.append(one)
            if plain:
                display.result(f"{one.state:<7}  {describe(one)}")
    if not plain:
        rows = [(one.state, one.check, one.found, one.remedy) for one in findings]
        display.table("Check", ("", "check", "found", "what to do"), rows)
    count = {state: sum(one.state == state for one in findings) for state in ("problem", "warning")}
    display.result(f"{count['problem']} problem(s), {count['warning']} warning(s)")
    return findings
