"""``llkd quickstart``, ``llkd train`` and ``llkd resume``; and the command line of jobs/distill.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llkd_ray.cli.main import add_output_options, add_settings, run
from llkd_ray.config.base import ConfigError, local_dir
from llkd_ray.config.loading import resolve
from llkd_ray.config.schema import Config
from llkd_ray.display import Display, count, decimals, percent
from llkd_ray.storage.run_dir import MODEL_DIR, REPORT, RunStore, open_run

if TYPE_CHECKING:
    from llkd_ray.run.loop import Outcome

MANY_FULL = 0.1
"""Share of texts as long as student.max_tokens that is worth a warning."""


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        dest="set",
        action="append_const",
        const="run.strict=true",
        help="stop, instead of warning, where the teacher's first labels look useless",
    )


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check all, estimate time and cost, and stop")


def add_quickstart(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    _add_strict(parser)
    _add_dry_run(parser)


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file; llkd init writes one")
    add_settings(parser)
    _add_strict(parser)
    _add_dry_run(parser)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="a run directory")
    add_settings(parser)


def run_train(options: argparse.Namespace, display: Display) -> None:
    config = resolve(Config, options.config, options.set)
    if options.dry_run:
        _dry_run(config, display)
    else:
        from llkd_ray.run.loop import start_run

        _show_results([start_run(config, display)], display)


def _dry_run(config: Config, display: Display) -> None:
    """Print the plan, then what ``llkd check`` finds; raises ConfigError for its problems."""
    from llkd_ray.doctor.cluster import query_once
    from llkd_ray.doctor.doctor import all_checks
    from llkd_ray.doctor.findings import describe, run_checks
    from llkd_ray.resources import describe_gpus, with_gpus
    from llkd_ray.run.plan import plan

    query = query_once(config)
    config = with_gpus(config, query().nodes)
    if gpus := describe_gpus(config, query().nodes):
        display.say(gpus)
    plan(config, display)
    # The plan has looked at data and models; what is left is the machine, Ray, and the place for runs.
    checks = all_checks(config, inputs=False, query=query)
    found = [one for one in run_checks(checks) if one.state != "ok"]
    for one in found:
        if one.state == "warning":
            display.warn(describe(one))
    if problems := [describe(one) for one in found if one.state == "problem"]:
        raise ConfigError("\n".join(problems))


def run_resume(options: argparse.Namespace, display: Display) -> None:
    open_run(options.run_dir)  # before the imports, which take seconds
    from llkd_ray.run.loop import resume

    _show_results([resume(options.run_dir, display, options.set)], display)


def run_quickstart(options: argparse.Namespace, display: Display) -> None:
    from llkd_ray.quickstart.teacher import prepare

    settings = prepare(Path(local_dir("runs")) / "quickstart-data", say=display.say)
    config = resolve(Config, settings, options.set)
    if options.dry_run:
        _dry_run(config, display)
    else:
        _show_results(run_and_baseline(config, display), display)


def run_and_baseline(config: Config, display: Display) -> list[Outcome]:
    """Run the configured policy, then ``random`` on the same labels with the same budget."""
    from llkd_ray.report.pages import write_pages
    from llkd_ray.run.loop import start_run

    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"quickstart-{stamp}-{policy}" for policy in (config.selection.policy, "random")]
    first = start_run(resolve(Config, config, {"run.name": names[0]}), display)
    display.say("once more with the policy 'random', on the labels that are there")
    second = start_run(resolve(Config, config, {"run.name": names[1], "selection.policy": "random"}), display)
    write_pages(RunStore(first.run_dir), RunStore(second.run_dir))
    return [first, second]


def _show_results(outcomes: Sequence[Outcome], display: Display) -> None:
    """Print a short table, a verdict if there are two students, and the paths of the results."""
    from llkd_ray.evaluation.run_record import read_warnings
    from llkd_ray.report.pages import against_baseline

    first = outcomes[0].summary
    rows = []
    if first["teacher"]:
        counts = [count(first["labelled"]), "", count(first["teacher_tokens"]), ""]
        rows.append(["teacher", *_figures(first["teacher"]), *counts])
    for outcome in outcomes:
        summary = outcome.summary
        counts = [count(summary[key]) for key in ("labelled", "trained", "teacher_tokens")]
        figures = _figures(summary["student"])
        rows.append(
            [outcome.config.selection.policy, *figures, *counts, decimals(summary["seconds"] / 60, 1)]
        )
    header = ("", "accuracy", "macro-F1", "agrees", "labelled", "trained", "tokens", "minutes")
    display.table("Teacher, and students by their selection policy", header, rows)
    if len(outcomes) > 1:
        display.result(against_baseline(*(RunStore(outcome.run_dir) for outcome in outcomes)))
    for outcome in outcomes:
        store = RunStore(outcome.run_dir)
        for reused in (one for one in outcome.summary["usage"].values() if one["reused_texts"]):
            display.say(
                f"{outcome.config.selection.policy}: {count(reused['reused_texts'])} labels were there from "
                f"earlier runs, which saved {count(reused['reused_tokens'])} teacher tokens"
            )
        if outcome.summary["student"]["accuracy"] is None:
            display.say("accuracy is unknown without a test set (test.uri, test.gold)")
        if (full := store.read_metrics()[-1].get("full_texts") or 0.0) > MANY_FULL:
            display.warn(
                f"{percent(full)} of the texts trained on fill student.max_tokens "
                f"({outcome.config.student.max_tokens}); what comes after is cut off: raise it if it matters"
            )
        for line in read_warnings(store):
            display.warn(line)
        display.result(f"report: {store.uri(REPORT)}")
        display.result(f"model:  {store.uri(MODEL_DIR)}")


def _figures(scores: dict[str, Any]) -> list[str]:
    return [decimals(scores.get(key)) for key in ("accuracy", "macro_f1", "teacher_agreement")]


def distill_parser() -> argparse.ArgumentParser:
    """The parser of jobs/distill.py."""
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description="Distil an LLM into a small text classifier. Without a config: the quickstart.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file; see configs/")
    parser.add_argument("--resume", dest="run_dir", metavar="RUN", help="resume a run that was stopped")
    add_settings(parser)
    _add_strict(parser)
    _add_dry_run(parser)
    add_output_options(parser)
    return parser


def distill_job(arguments: Sequence[str]) -> int:
    """Run jobs/distill.py: a config, ``--resume RUN``, or nothing for the quickstart."""
    parser = distill_parser()
    options = parser.parse_args(arguments)
    if options.run_dir and options.config:
        parser.error("--resume uses the run's own config: leave out CONFIG")
    by_resume, by_config = bool(options.run_dir), bool(options.config)
    return run(options, run_resume if by_resume else run_train if by_config else run_quickstart)
