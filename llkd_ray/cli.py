"""The command line of jobs/distill.py: flags to config to one call; mistakes in one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llkd_ray.answers import TeacherDown
from llkd_ray.config import Config, ConfigError, parse_config
from llkd_ray.console import Display
from llkd_ray.loop import distill
from llkd_ray.plan import plan
from llkd_ray.quickstart import prepare
from llkd_ray.report import REPORT
from llkd_ray.settings import apply_overrides, load_config
from llkd_ray.store import CONFIG, MODEL_DIR, RunStore, join_uri

USER_MISTAKE, TEACHER_DOWN = 2, 3


def distill_main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = distill_parser().parse_args(arguments)
    try:
        with Display() as display:
            _dispatch(options, display)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except TeacherDown as error:
        print(f"error: {error}; what is labelled is kept: go on with --resume RUN_DIR", file=sys.stderr)
        return TEACHER_DOWN
    return 0


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
        if options.config or options.set:
            raise ConfigError("--resume goes on with the run's own config; leave out CONFIG and --set")
        _finish([resume(options.resume, display)], display)
    elif options.config:
        config = with_absolute_paths(load_config(options.config, options.set))
        if options.plan:
            plan(config, display)
        else:
            _finish([start(config, display)], display)
    else:
        settings = apply_overrides(
            prepare(Path(local_dir("runs")) / "quickstart-data", say=display.say), options.set
        )
        config = with_absolute_paths(parse_config(settings))
        if options.plan:
            plan(config, display)
        else:
            _finish(quickstart(config, display), display)


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    config: Config
    run_dir: str
    summary: dict[str, Any]


def start(config: Config, display: Display) -> Outcome:
    """A new run, in a directory of its own."""
    name = config.run.name or f"{config.selection.policy}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = join_uri(config.run.dir, name)
    if RunStore(run_dir).exists(CONFIG):
        raise ConfigError(f"run.name: {run_dir} holds a run already; go on with it by --resume, or rename")
    display.say(f"run directory: {run_dir}")
    return Outcome(config, run_dir, distill(config, run_dir, display))


def resume(run_dir: str, display: Display) -> Outcome:
    """Go on with a run that was stopped, by its own config."""
    if "://" not in run_dir:
        run_dir = str(Path(run_dir).resolve())
    store = RunStore(run_dir)
    if not store.exists(CONFIG):
        raise ConfigError(f"--resume: {run_dir} has no {CONFIG}; give the directory of a run")
    config = parse_config(yaml.safe_load(store.read_bytes(CONFIG)))
    return Outcome(config, run_dir, distill(config, run_dir, display))


def quickstart(config: Config, display: Display) -> list[Outcome]:
    """The configured policy, then ``random`` on the same labels with the same budget."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"quickstart-{stamp}-{policy}" for policy in (config.selection.policy, "random")]
    first = start(_changed(config, run={"name": names[0]}), display)
    display.say("once more with the policy 'random', on the labels that are there")
    baseline = _changed(config, run={"name": names[1]}, selection={"policy": "random"})
    return [first, start(baseline, display)]


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


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: the workers of a cluster run from another directory than the driver."""
    tree = config.model_dump()
    cascade = tree["teacher"]["cascade"] or {}
    teachers = [tree["teacher"], *(cascade[name] for name in ("small", "large") if cascade)]
    sources = [tree["corpus"], tree["test"]]
    for teacher in teachers:
        sources += [teacher["recorded"], teacher["prompt"]["draw"]]
        if teacher["cache"] not in (None, "auto"):
            teacher["cache"] = _absolute(teacher["cache"])
        template = teacher["prompt"]["template"]
        if template and template.endswith(".j2"):
            teacher["prompt"]["template"] = _absolute(template)
        if teacher["server"]:
            _make_folder_absolute(teacher["server"], "tokenizer")
    for source in filter(None, sources):
        uris = source["uri"]
        source["uri"] = _absolute(uris) if isinstance(uris, str) else tuple(map(_absolute, uris))
    for part in (*teachers, tree["student"]):
        _make_folder_absolute(part, "model")
    tree["run"]["dir"] = local_dir(tree["run"]["dir"])
    return parse_config(tree)


def _make_folder_absolute(section: dict[str, Any], field: str) -> None:
    """A checkpoint's folder; a hub's name stays."""
    if section[field] and Path(section[field]).is_dir():
        section[field] = _absolute(section[field])


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def local_dir(folder: str) -> str:
    """Where a relative folder for results is.

    In a job that was submitted to a cluster the working directory is a copy that Ray deletes, so results
    go below the home directory there.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return _absolute(folder)
    in_job = "working_dir_files" in Path.cwd().parts
    return str((Path.home() / "llkd-ray" if in_job else Path.cwd()) / folder)
