"""A run by its settings: where it lies, how it is begun, and how it is gone on with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llkd_ray.config import Config, ConfigError, parse_config
from llkd_ray.console import Display
from llkd_ray.facts import SUMMARY
from llkd_ray.loop import distill
from llkd_ray.settings import apply_overrides
from llkd_ray.store import CONFIG, RunStore, join_uri

MORE = ("budget.rounds", "budget.train")
"""What may be raised in a finished run."""


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


def resume(run_dir: str, display: Display, overrides: Sequence[str] = ()) -> Outcome:
    """Go on with a run that was stopped, by its own config; with a finished one, by more rounds.

    ``overrides`` may raise ``budget.rounds`` and ``budget.train`` of a run whose rounds are all done: until
    then they decide what the teacher reads for which round. Raises ConfigError for anything else.
    """
    store = open_run(run_dir)
    config = run_config(store)
    if overrides:
        config = _with_more_rounds(config, store, overrides)
    return Outcome(config, store.uri(), distill(config, store.uri(), display))


def _with_more_rounds(config: Config, store: RunStore, overrides: Sequence[str]) -> Config:
    for override in overrides:
        name = override.partition("=")[0]
        if name not in MORE:
            raise ConfigError(
                f"--set {override!r}: a run goes on by its own settings; with --resume only "
                f"{' and '.join(MORE)} may be raised"
            )
    done = len(store.read_metrics())
    if done < config.budget.rounds or not store.exists(SUMMARY):
        raise ConfigError(
            f"--set {overrides[0]!r}: {done} of {config.budget.rounds} rounds are done; finish them by "
            "--resume alone first"
        )
    new = parse_config(apply_overrides(config.model_dump(), overrides))
    if new.budget.rounds <= done:
        raise ConfigError(
            f"budget.rounds: {new.budget.rounds} rounds are asked for and {done} are done; ask for more"
        )
    return new


def open_run(run_dir: str, field: str = "--resume") -> RunStore:
    """The files of a run; raises ConfigError, which names ``field``, where there is none."""
    store = RunStore(absolute(run_dir))
    if not store.exists(CONFIG):
        raise ConfigError(f"{field}: {run_dir} has no {CONFIG}; give the directory of a run")
    return store


def run_config(store: RunStore) -> Config:
    """The settings of a run that was begun."""
    return parse_config(yaml.safe_load(store.read_bytes(CONFIG)))


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: the workers of a cluster run from another directory than the driver."""
    tree = config.model_dump()
    cascade = tree["teacher"]["cascade"] or {}
    teachers = [tree["teacher"], *(cascade[name] for name in ("small", "large") if cascade)]
    sources = [tree["corpus"], tree["test"]]
    for teacher in teachers:
        sources += [teacher["recorded"], teacher["prompt"]["draw"]]
        if teacher["cache"] not in (None, "auto"):
            teacher["cache"] = absolute(teacher["cache"])
        template = teacher["prompt"]["template"]
        if template and template.endswith(".j2"):
            teacher["prompt"]["template"] = absolute(template)
        if teacher["server"]:
            _make_folder_absolute(teacher["server"], "tokenizer")
    for source in filter(None, sources):
        uris = source["uri"]
        source["uri"] = absolute(uris) if isinstance(uris, str) else tuple(map(absolute, uris))
    for part in (*teachers, tree["student"]):
        _make_folder_absolute(part, "model")
    tree["run"]["dir"] = local_dir(tree["run"]["dir"])
    return parse_config(tree)


def _make_folder_absolute(section: dict[str, Any], field: str) -> None:
    """A checkpoint's folder; a hub's name stays."""
    if section[field]:
        section[field] = absolute_folder(section[field])


def absolute_folder(model: str) -> str:
    """A checkpoint's folder by its whole path; a hub's name stays as it is."""
    return absolute(model) if Path(model).expanduser().is_dir() else model


def absolute(uri: str) -> str:
    """A local path from the root on; a URI stays as it is."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def local_dir(folder: str) -> str:
    """Where a relative folder for results is.

    In a job that was submitted to a cluster the working directory is a copy that Ray deletes, so results
    go below the home directory there.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return absolute(folder)
    in_job = "working_dir_files" in Path.cwd().parts
    return str((Path.home() / "llkd-ray" if in_job else Path.cwd()) / folder)
