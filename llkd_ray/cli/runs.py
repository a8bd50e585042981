"""``llkd status``, ``llkd runs`` and ``llkd report``: what is known about runs, from their files alone."""

from __future__ import annotations

import argparse
import shlex
import webbrowser
from pathlib import Path
from typing import Any, NamedTuple

from llkd_ray.config.base import ConfigError, local_dir
from llkd_ray.display import MISSING, Display, count, percent
from llkd_ray.storage.lock import driver_is_alive
from llkd_ray.storage.run_dir import (
    CONFIG,
    LABELS_DIR,
    MODEL_DIR,
    REPORT,
    SUMMARY,
    RunStore,
    join_uri,
    open_run,
    run_config,
)


class RunInfo(NamedTuple):
    """A run's progress, from its files."""

    state: str
    """finished, running or stopped."""
    rounds: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    wanted_rounds: int

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[-1] if self.rounds else {}


def read_info(store: RunStore) -> RunInfo:
    rounds, budget = store.read_metrics(), run_config(store).budget
    # A finished run that is given more rounds keeps its summary; with patience, fewer rounds may be enough.
    all_done = len(rounds) >= budget.rounds or budget.patience is not None
    state = "running" if driver_is_alive(store) else "stopped"
    if state == "stopped" and all_done and store.exists(SUMMARY):
        state = "finished"
    return RunInfo(state, rounds, budget.rounds)


def add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="a run directory")


def run_status(options: argparse.Namespace, display: Display) -> None:
    store = open_run(options.run_dir)
    info = read_info(store)
    lines = [
        f"run:     {store.uri()}",
        f"state:   {info.state}, {len(info.rounds)} of {info.wanted_rounds} rounds done",
        f"tickets: {count(len(store.names(LABELS_DIR, '.parquet')))} labelled",
    ]
    if info.last:
        lines.append(
            f"texts:   {count(info.last['labelled'])} labelled, {count(info.last['trained'])} trained on, "
            f"{count(info.last['teacher_tokens'])} teacher tokens"
        )
        scores = (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("teacher_agreement", "agreement"))
        known = [
            f"{name} {percent(info.last[key])}" for key, name in scores if info.last.get(key) is not None
        ]
        lines.append(f"student: {', '.join(known) or 'no figures'} after round {info.last['round']}")
    if store.exists(REPORT):
        lines.append(f"report:  {store.uri(REPORT)}")
    if info.state == "finished":
        lines.append(f"model:   {store.uri(MODEL_DIR)}")
    elif info.state == "stopped":
        lines.append(f"next:    llkd resume {shlex.quote(store.uri())}")
    for line in lines:
        display.result(line)


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="the folder (runs)")


def run_runs(options: argparse.Namespace, display: Display) -> None:
    folder = local_dir(options.folder)
    rows = []
    for name in RunStore(folder).folders(""):
        store = RunStore(join_uri(folder, name))
        if not store.exists(CONFIG):
            continue
        try:
            info = read_info(store)
        except ConfigError as error:
            rows.append([name, str(error).partition("\n")[0], "", "", ""])
            continue
        last = info.last
        rows.append(
            [
                name,
                info.state,
                f"{len(info.rounds)}/{info.wanted_rounds}",
                count(last["trained"]) if last else MISSING,
                percent(last.get("macro_f1")),
            ]
        )
    if not rows:
        display.result(f"no runs in {folder}")
        return
    display.table(folder, ("run", "state", "rounds", "trained", "macro-F1"), rows)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a run's report again, from its files; possible at any stage of a run."
    parser.add_argument("run_dir", metavar="RUN", help="a run directory")
    parser.add_argument("--baseline", metavar="RUN", help="draw the curves of this run, too")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")


def run_report(options: argparse.Namespace, display: Display) -> None:
    from llkd_ray.report.pages import write_report

    baseline = open_run(options.baseline, "--baseline") if options.baseline else None
    page = write_report(open_run(options.run_dir), baseline)
    display.result(f"report: {page}")
    if options.open:
        if "://" in page:
            raise ConfigError(f"--open: {page} is not on this machine: copy it here first")
        webbrowser.open(Path(page).as_uri())
