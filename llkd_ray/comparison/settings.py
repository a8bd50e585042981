"""The settings of a comparison, and the trials, texts and labels derived from them.

A comparison trains several lines (a policy, or any other change of settings) for every teacher and seed, on
recorded labels. Three reference lines are always included: *gold* (the student's upper bound), *all
pseudo-labels*, and *random*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, model_validator

from llkd_ray.comparison.tables import ALL, GOLD, RANDOM
from llkd_ray.comparison.trial import Trial
from llkd_ray.config.base import ConfigError, Section, anchored, parse, with_absolute_paths
from llkd_ray.config.loading import Overrides, apply_overrides, dump_config, load_tree, parse_config
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.display import Display
from llkd_ray.run.loop import distill
from llkd_ray.storage.run_dir import CONFIG, LABELS_DIR, SUMMARY, RunStore, join_uri

REFERENCES: dict[str, dict[str, dict[str, Any]]] = {
    GOLD: {"selection": {"policy": "all", "options": {}, "quota": "off", "prior": "off"}},
    ALL: {"selection": {"policy": "all", "options": {}, "quota": "off", "prior": "off"}},
    RANDOM: {"selection": {"policy": "random", "options": {}, "quota": "off", "prior": "off"}},
}
"""Lines included in every comparison; *gold* is trained on the true labels and needs no teacher."""


class Comparison(Section):
    """A comparison's settings, from a YAML file."""

    whole: ClassVar[str] = "comparison"
    base: str = Field(description="A run's YAML file; a relative path is relative to this file.")
    teachers: dict[str, dict[str, Any]] = Field(
        description="For each teacher's name, what differs in the section teacher of the base."
    )
    lines: dict[str, dict[str, dict[str, Any]]] = Field(
        description="For each line's name, what differs in the sections selection, acquisition, student "
        "and budget of the base."
    )
    sizes: tuple[float, ...] = Field(
        min_length=1, description="Texts trained on after each round, as ascending shares of the pool."
    )
    report: tuple[float, ...] = Field((), description="Those of sizes that are reported; default: all.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        if not self.teachers or not self.lines:
            raise ValueError("teachers and lines need one entry each at least")
        if list(self.sizes) != sorted(set(self.sizes)) or not all(0 < size <= 1 for size in self.sizes):
            raise ValueError(f"sizes is {list(self.sizes)}: give ascending shares of the pool, up to 1.0")
        if strangers := sorted(set(self.report) - set(self.sizes)):
            raise ValueError(f"report holds {strangers[0]}, which is not one of sizes")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}: a seed twice is no second measurement")
        if clash := sorted(set(self.lines) & {GOLD, ALL}):
            raise ValueError(f"lines holds {clash[0]!r}, which every comparison has: choose another name")
        for name, changes in self.lines.items():
            if others := sorted(set(changes) - {"selection", "acquisition", "student", "budget"}):
                raise ValueError(f"lines.{name} changes {others[0]}, which is the same for all lines")
        return self

    @property
    def reported(self) -> tuple[float, ...]:
        return self.report or self.sizes


def load_comparison(path: str | Path, overrides: Overrides = ()) -> Comparison:
    """Read a comparison's YAML file and apply ``a.b=c``; raises ConfigError with one line per mistake."""
    tree, folder = load_tree(path, Comparison), Path(path).parent
    if isinstance(teachers := tree.get("teachers"), dict):
        tree["teachers"] = {
            name: anchored(TeacherConfig, changes, folder) if isinstance(changes, dict) else changes
            for name, changes in teachers.items()
        }
    comparison = parse(Comparison, apply_overrides(tree, overrides))
    return comparison.model_copy(update={"base": str(folder / comparison.base)})


@dataclass(frozen=True)
class Entry:
    """One trial of the comparison, by name."""

    teacher: str
    """Empty for *gold*, which has no teacher."""
    line: str
    trial: Trial

    @property
    def seed(self) -> int:
        return self.trial.config.run.seed


def entries(comparison: Comparison, base: Config, n_pool: int, folder: Path) -> list[Entry]:
    """All trials, the smallest seeds first, so that complete tables are available early.

    Raises ConfigError if a line's changes are invalid, or if the pool is too small for the sizes.
    """
    small = tuple(math.floor(share * n_pool + 0.5) for share in comparison.sizes)
    reported = tuple(math.floor(share * n_pool + 0.5) for share in comparison.reported)
    if len({0, *small}) <= len(small):
        raise ConfigError(
            f"sizes: {list(comparison.sizes)} of a pool of {n_pool} texts makes {list(small)}; every round "
            "needs a text at least: take larger shares, further apart"
        )
    # A comparison may redefine *random*; the names *gold* and *all* are reserved.
    lines = {**REFERENCES, **comparison.lines}
    found = []
    for seed in comparison.seeds:
        for line, changes in lines.items():
            whole = line in (GOLD, ALL)
            sizes = ((n_pool,), (n_pool,)) if whole else (small, reported)
            config = changed(base, changes, seed)
            for teacher in [""] if line == GOLD else comparison.teachers:
                found.append(Entry(teacher, line, Trial(config, *sizes, folder)))
    return found


def changed(base: Config, changes: Mapping[str, Any], seed: int) -> Config:
    """The base config with a line's changes; all labels exist from the start unless the line changes that.

    Raises ConfigError if the changes are invalid, or require what a trial cannot do.
    """
    tree = base.model_dump()
    tree["run"]["seed"] = seed
    tree["budget"] |= {"first_labels": 1.0, "labels": None}
    for section, fields in changes.items():
        tree[section] |= fields
    config = parse_config(tree)
    for field, value, only in (
        ("start", config.student.start, "fresh"),
        ("replay", config.student.replay, "all"),
    ):
        if value != only:
            raise ConfigError(f"student.{field}: {value!r} cannot be compared: a trial knows only {only!r}")
    return config


def dump(comparison: Comparison) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


LABELLING_DIR = "labelling"


def teacher_config(base: Config, changes: dict[str, Any]) -> Config:
    """The base with another teacher, merged section by section; settings not named are kept."""
    tree = base.model_dump()
    tree["teacher"] = _merged(tree["teacher"], changes)
    return with_absolute_paths(parse_config(tree))


def _merged(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {key: _merged(under.get(key), value) for key, value in over.items()}


def run_labelling(name: str, config: Config, store: RunStore, display: Display) -> None:
    """Label pool and test set with an LLM in a separate run, which is resumed or, if finished, reused."""
    run_dir = labelling_dir(store, name)
    run = RunStore(run_dir)
    settings = labelling_config(config)
    if run.exists(CONFIG):
        there, now = yaml.safe_load(run.read_bytes(CONFIG)), yaml.safe_load(dump_config(settings))
        decisive = ("kind", "model", "revision", "prompt", "max_model_len", "dtype", "server", "cascade")
        if any(there["teacher"][key] != now["teacher"][key] for key in decisive):
            raise ConfigError(
                f"teachers.{name}: {run_dir} holds the labels of another model or prompt; give the teacher "
                "another name, or delete the folder"
            )
    if not run.exists(SUMMARY):
        display.say(f"{name} labels the pool and the test set, once: {run_dir}")
        distill(settings, run_dir, display)


def labelling_dir(store: RunStore, name: str) -> str:
    return store.uri(f"{LABELLING_DIR}/{name}")


def labelling_config(config: Config) -> Config:
    """A config that labels every text, with no hold-out; the run's student is not used."""
    tree = config.model_dump()
    tree["selection"] = {"policy": "all"}
    tree["acquisition"] = {"policy": "sequential", "explore": 0.0}
    cap = tree["budget"]["cap"]
    tree["budget"] = {"rounds": 1, "labels": None, "train": 1, "first_labels": 1.0, "cap": cap}
    tree["student"] |= {"epochs": 1, "min_steps": 1}
    tree["evaluation"] = {"holdout": 0, "teacher_on_test": True}
    return parse_config(tree)


def answers_of(name: str, config: Config, store: RunStore) -> Config:
    """The teacher with recorded answers: its own, or those of its labelling run."""
    if config.teacher.kind == "recorded":
        return config
    tree = config.model_dump()
    tree["teacher"]["kind"] = "recorded"
    tree["teacher"]["recorded"] = {
        "uri": join_uri(labelling_dir(store, name), LABELS_DIR),
        "id": "id",
        "probs": "probs",
        "prompt_tokens": "prompt_tokens",
    }
    return parse_config(tree)
