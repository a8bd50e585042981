"""The command line of jobs/distill.py: flags to config to one call; mistakes in one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llkd_ray.answers import TeacherDown
from llkd_ray.config import Config, ConfigError, parse_config
from llkd_ray.console import Display
from llkd_ray.ending import TEACHER_DOWN, status_of
from llkd_ray.plan import plan
from llkd_ray.report import REPORT, write_report
from llkd_ray.runs import Outcome, local_dir, resume, start, with_absolute_paths
from llkd_ray.settings import apply_overrides, load_config
from llkd_ray.store import MODEL_DIR, RunStore, join_uri


def distill_main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = distill_parser().parse_args(arguments)
    try:
        return status_of(partial(_dispatch, options))
    except TeacherDown as error:
        print(f"error: {error}; what is labelled is kept: go on with --resume RUN_DIR", file=sys.stderr)
        return TEACHER_DOWN


def distill_parser() -> argparse.ArgumentParser:
    """What jobs/distill.py takes."""
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description="Distil an LLM into a small text classifier. Without a config: the quickstart.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped")
    return parser


def _dispatch(options: argparse.Namespace, display: Display) -> None:
    if options.resume:
        if options.config:
            raise ConfigError("--resume goes on with the run's own config; leave out CONFIG")
        _finish([resume(options.resume, display, options.set)], display)
    elif options.config:
        config = with_absolute_paths(load_config(options.config, options.set))
        if options.plan:
            plan(config, display)
        else:
            _finish([start(config, display)], display)
    else:
        from llkd_ray.quickstart import prepare  # it trains a teacher: seconds to import, for this run alone

        settings = apply_overrides(
            prepare(Path(local_dir("runs")) / "quickstart-data", say=display.say), options.set
        )
        config = with_absolute_paths(parse_config(settings))
        if options.plan:
            plan(config, display)
        else:
            _finish(quickstart(config, display), display)


def quickstart(config: Config, display: Display) -> list[Outcome]:
    """The configured policy, then ``random`` on the same labels with the same budget."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"quickstart-{stamp}-{policy}" for policy in (config.selection.policy, "random")]
    first = start(_changed(config, run={"name": names[0]}), display)
    display.say("once more with the policy 'random', on the labels that are there")
    baseline = _changed(config, run={"name": names[1]}, selection={"policy": "random"})
    second = start(baseline, display)
    write_report(RunStore(first.run_dir))  # once more, with the baseline as its reference
    return [first, second]


def _finish(outcomes: Sequence[Outcome], display: Display) -> None:
    """The short table, and where the results are."""
    header = ("", "accuracy", "macro-F1", "agrees", "labelled", "trained on", "teacher tokens", "seconds")
    first = outcomes[0].summary
    rows = []
    if first["teacher"]:
        rows.append(
            [
                "teacher",
                *_figures(first["teacher"]),
                str(first["labelled"]),
                "",
                str(first["teacher_tokens"]),
                "",
            ]
        )
    for outcome in outcomes:
        summary = outcome.summary
        counts = [str(summary[key]) for key in ("labelled", "trained", "teacher_tokens")]
        name = f"student by {outcome.config.selection.policy}"
        rows.append([name, *_figures(summary["student"]), *counts, f"{summary['seconds']:.0f}"])
    display.table("Result", header, rows)
    for outcome in outcomes:
        reused = [one for one in outcome.summary["usage"].values() if one["reused_texts"]]
        for one in reused:
            display.say(
                f"{outcome.config.selection.policy}: {one['reused_texts']} of its labels were there from "
                f"earlier runs, which saved {one['reused_tokens']} teacher tokens"
            )
        if outcome.summary["student"]["accuracy"] is None:
            display.say("accuracy is unknown without a test set (test.uri, test.gold)")
        display.console.print(
            f"report: {join_uri(outcome.run_dir, REPORT)}\nmodel:  {join_uri(outcome.run_dir, MODEL_DIR)}"
        )


def _figures(scores: dict[str, Any]) -> list[str]:
    values = (scores.get(key) for key in ("accuracy", "macro_f1", "teacher_agreement"))
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with some fields of some sections replaced, checked anew."""
    tree = config.model_dump()
    for section, changes in sections.items():
        tree[section] |= changes
    return parse_config(tree)
