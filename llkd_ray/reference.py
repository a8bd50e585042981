"""A run by random selection on the same data, to hold a run's learning curve against."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from llkd_ray.store import CONFIG, RunStore

BASELINE = "random"
SAME = ("corpus", "test", "labels", "teacher", "student", "budget", "evaluation")
"""Sections in which the two must agree."""
LOOK_AT = 200
"""Runs beside this one that are looked at, the last by name."""


class Reference(NamedTuple):
    """The other run."""

    name: str
    rounds: list[dict[str, Any]]
    """Its metrics."""


def find_reference(store: RunStore, config: dict[str, Any]) -> Reference | None:
    """The run by random selection in the folder of this one, with all else alike; one of the same seed first.

    None where there is none, where this run is one itself, and where the folder may not be listed.
    """
    if config["selection"]["policy"] == BASELINE:
        return None
    folder, _, own = store.uri().partition("?")[0].rpartition("/")
    options = store.uri()[len(folder) + 1 + len(own) :]
    try:
        names = RunStore(folder + options).folders("")[-LOOK_AT:]
    except OSError:  # a key may open its own folder only; the report is whole without the line
        return None
    found = []
    for name in names:
        other = RunStore(f"{folder}/{name}{options}")
        if name == own or not other.exists(CONFIG):
            continue
        content = other.read_bytes(CONFIG)
        if f"policy: {BASELINE}".encode() not in content:  # reading YAML takes its time
            continue
        settings = yaml.safe_load(content)
        if _is_alike(settings, config) and (rounds := other.read_metrics()):
            is_same_seed = settings["run"]["seed"] == config["run"]["seed"]
            found.append((is_same_seed, name, rounds))
    if not found:
        return None
    _, name, rounds = max(found, key=lambda one: one[:2])
    return Reference(name, rounds)


def _is_alike(other: dict[str, Any], config: dict[str, Any]) -> bool:
    return other["selection"]["policy"] == BASELINE and all(
        other.get(section) == config.get(section) for section in SAME
    )
