"""Doctor: checks whether the set-up is ready for a run, and says how to fix each problem.

Nothing expensive starts: no engine, no weights, no Ray instance of our own. Each check imports its own
dependencies, so that a broken installation can still be checked.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.text import Text

from llkd_ray.config.base import ConfigError, local_dir, with_absolute_paths
from llkd_ray.config.loading import apply_overrides, load_tree, parse_config
from llkd_ray.config.schema import Config
from llkd_ray.display import Display
from llkd_ray.doctor.cluster import cluster_address, cluster_checks
from llkd_ray.doctor.findings import Check, Finding, describe_error, ok, problem, run_checks
from llkd_ray.doctor.inputs import data_checks, storage_checks, student_check, teacher_checks
from llkd_ray.doctor.machine import machine_checks

PROBLEM = 2
"""Exit status if there is a problem; 0 if there are only warnings or none."""


def doctor_main(arguments: Sequence[str] | None = None) -> int:
    """Check the set-up given on the command line; returns the exit status."""
    options = doctor_parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config, findings = load(options.config, options.set)
    checks = all_checks(config, is_quickstart=options.config is None)
    if options.json:
        findings += run_checks(checks)
        print(to_json(findings))
    else:
        findings = print_findings(findings, checks)
    return PROBLEM if any(one.state == "problem" for one in findings) else 0


def doctor_parser() -> argparse.ArgumentParser:
    """The command-line options of jobs/doctor.py."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description="Check whether this installation, and what a config names, are fit for a run. Without a "
        "config: for the quickstart.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def load(path: str | None, overrides: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The config as a run would resolve it, and findings about it; None if it is invalid."""
    try:
        if path is None:
            config = parse_config(apply_overrides(_quickstart_settings(), overrides))
            said = "none is given: the set-up is checked for the quickstart"
        else:
            config = parse_config(apply_overrides(load_tree(path), overrides))
            said = f"{path} is sound"
        return with_absolute_paths(config), [ok("config", said)]
    except ConfigError as error:
        return None, [problem("config", line) for line in str(error).splitlines()]
    except Exception as error:  # a failed import; the package check names the cause
        return None, [problem("config", f"cannot be read ({describe_error(error)})", "make setup")]


def _quickstart_settings() -> dict[str, object]:
    from llkd_ray.quickstart.teacher import settings

    return settings(Path(local_dir("runs")) / "quickstart-data", seed=0)


def all_checks(config: Config | None, *, is_quickstart: bool) -> list[Check]:
    """All checks, in order. The quickstart creates its corpus and its teacher itself, later."""
    joins = cluster_address(config, os.environ)[0] is not None
    needs_vllm = config is not None and any(one.kind == "vllm" for _, one in config.teacher.members())
    checks = machine_checks(config, needs_vllm=needs_vllm, joins=joins) + cluster_checks(config)
    if config is None:
        return checks
    policies = Check("policies", partial(check_policy_names, config))
    checks += [*storage_checks(config), policies, student_check(config)]
    return checks if is_quickstart else checks + data_checks(config) + teacher_checks(config)


def check_policy_names(config: Config) -> Finding:
    from llkd_ray.run.loop import check_policies

    check_policies(config)
    return ok("policies", f"{config.selection.policy} selects, {config.acquisition.policy} acquires")


# --- output


def to_json(findings: Iterable[Finding]) -> str:
    """The findings as JSON."""
    listed = [asdict(one) for one in findings]
    counts = {state: sum(one["state"] == state for one in listed) for state in ("ok", "warning", "problem")}
    return json.dumps({"findings": listed, "counts": counts}, indent=1, ensure_ascii=False)


def print_findings(first: Sequence[Finding], checks: Sequence[Check]) -> list[Finding]:
    """Print a table at the end on a terminal, else one line per finding; then the totals. Returns all."""
    findings = list(first)
    with Display() as display:
        plain = not display.console.is_terminal
        for one in first if plain else ():
            display.console.print(Text(describe(one)))
        for check in checks:
            if not plain:
                display.update(f"checking: {check.name}")
            for one in run_checks([check]):
                findings.append(one)
                if plain:
                    display.console.print(Text(describe(one)))
    if not plain:
        rows = [(one.state, one.check, one.found, one.remedy) for one in findings]
        display.table("Doctor", ("", "check", "found", "what to do"), rows)
    count = {state: sum(one.state == state for one in findings) for state in ("problem", "warning")}
    display.console.print(Text(f"{count['problem']} problem(s), {count['warning']} warning(s)"))
    return findings


def describe(finding: Finding) -> str:
    """The finding as one line of text."""
    remedy = f"; to do: {finding.remedy}" if finding.remedy else ""
    return f"{finding.state:<7}  {finding.check}: {finding.found}{remedy}"
