"""What a comparison is made of: its settings, its trials, and the texts and labels that they share.

A comparison sets lines (a policy, or any other change of settings) against each other, for every teacher
and seed, on labels that are there already. Three lines always come with it: *gold*, the student's upper
bound, *all pseudo-labels*, and *random*.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llkd_ray.config import Config, ConfigError, parse_config
from llkd_ray.recorded import read_recorded
from llkd_ray.settings import apply_overrides, load_tree
from llkd_ray.signals import Floats, Ints, normalise
from llkd_ray.store import Examples
from llkd_ray.tables import ALL, GOLD, RANDOM
from llkd_ray.trial import Labels, Texts, Trial

REFERENCES: dict[str, dict[str, dict[str, Any]]] = {
    GOLD: {"selection": {"policy": "all", "options": {}, "quota": "off", "prior": "off"}},
    ALL: {"selection": {"policy": "all", "options": {}, "quota": "off", "prior": "off"}},
    RANDOM: {"selection": {"policy": "random", "options": {}, "quota": "off", "prior": "off"}},
}
"""Lines that every comparison has; *gold* learns the true labels, whoever the teacher is."""


class Comparison(BaseModel):
    """A comparison's settings, from a YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(
        description="A run's YAML file, from here; its own folder is where relative paths start."
    )
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


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison's YAML file and apply ``a.b=c``; raises ConfigError with one line per mistake."""
    comparison = parse_comparison(apply_overrides(load_tree(path), overrides))
    return comparison.model_copy(update={"base": str(Path(path).parent / comparison.base)})


def parse_comparison(tree: Mapping[str, Any]) -> Comparison:
    """Settings that were read or written in Python; raises ConfigError with one line per mistake."""
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        lines = (
            f"{'.'.join(map(str, problem['loc'])) or 'comparison'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise ConfigError("\n".join(lines)) from None


@dataclass(frozen=True)
class Entry:
    """One trial of the comparison, by name."""

    teacher: str
    """The empty name for *gold*, which has none."""
    line: str
    trial: Trial

    @property
    def seed(self) -> int:
        return self.trial.config.run.seed


def entries(comparison: Comparison, base: Config, n_pool: int, folder: Path) -> list[Entry]:
    """All trials: those of the smallest seeds first, so that a table is whole early.

    Raises ConfigError where a line's changes do not fit, or the pool is too small for the sizes.
    """
    small = tuple(math.floor(share * n_pool + 0.5) for share in comparison.sizes)
    reported = tuple(math.floor(share * n_pool + 0.5) for share in comparison.reported)
    if len({0, *small}) <= len(small):
        raise ConfigError(
            f"sizes: {list(comparison.sizes)} of a pool of {n_pool} texts makes {list(small)}; every round "
            "needs a text at least: take larger shares, further apart"
        )
    # Lines of the comparison may say otherwise, the references by the names above never.
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
    """The base config with a line's changes; all labels are there from the start unless it says otherwise.

    Raises ConfigError where the changes do not fit, or ask for what a trial cannot do.
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


def read_texts(examples: Examples, names: Sequence[str]) -> Texts:
    """All texts, into memory; raises ConfigError where gold is missing: a comparison cannot do without."""
    table = examples.read(np.arange(examples.n_rows), ["text", "gold"])
    text, gold_N = table["text"].to_pylist(), table["gold"].to_numpy().astype(np.int64)
    if not examples.n_test or (gold_N < 0).any():
        raise ConfigError(
            "corpus.gold, test: a comparison needs a test set, and gold for it and for the pool"
        )
    n = examples.n_pool
    return Texts(text[:n], gold_N[:n], text[n:], gold_N[n:], tuple(names))


def read_teacher(config: Config, examples: Examples) -> tuple[Labels, Floats]:
    """A recorded teacher's labels of the pool, and its answers on the test set, float[T, C].

    Raises ConfigError where a text has no answer.
    """
    if config.teacher.recorded is None:
        raise ConfigError("teacher.kind: a comparison needs recorded answers, such as the labels/ of a run")
    recorded = read_recorded(config.teacher.recorded, len(config.labels.names))
    ids = examples.read(np.arange(examples.n_rows), ["id"])["id"].to_pylist()
    place_R = np.array([recorded.place.get(text_id, -1) for text_id in ids])
    if (place_R < 0).any():
        raise ConfigError(
            f"teacher.recorded.uri: no answer to {np.count_nonzero(place_R < 0)} of {len(ids)} texts, "
            f"{ids[int(np.argmax(place_R < 0))]!r} for one; a comparison needs all of them"
        )
    p_RC, n = normalise(recorded.probs_RC[place_R]), examples.n_pool
    labels = labels_of(ids[:n], p_RC[:n], recorded.prompt_tokens_R[place_R[:n]])
    return replace(labels, test_label_T=p_RC[n:].argmax(axis=1)), p_RC[n:]


def gold_labels(examples: Examples, texts: Texts) -> Labels:
    """The truth as if a teacher had said it."""
    ids = examples.read(np.arange(examples.n_pool), ["id"])["id"].to_pylist()
    return labels_of(ids, np.eye(len(texts.names))[texts.gold_N], np.zeros(len(ids), dtype=np.int64))


def labels_of(ids: Sequence[str], p_NC: Floats, tokens_N: Ints) -> Labels:
    """Labels of the texts with these ids; the digest is of ids and distributions."""
    digest = hashlib.blake2b("\n".join(ids).encode(), digest_size=8)
    digest.update(np.round(p_NC, 6).astype(np.float32).tobytes())
    return Labels(p_NC, tokens_N, digest.hexdigest())


def dump(comparison: Comparison) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
