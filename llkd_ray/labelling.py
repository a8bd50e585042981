"""A comparison's teachers: recorded answers, or an LLM that labels all texts once, in a run of its own."""

from __future__ import annotations

from typing import Any

import yaml

from llkd_ray.config import Config, ConfigError, parse_config
from llkd_ray.console import Display
from llkd_ray.facts import SUMMARY
from llkd_ray.loop import distill
from llkd_ray.runs import with_absolute_paths
from llkd_ray.settings import dump_config
from llkd_ray.store import CONFIG, LABELS_DIR, RunStore, join_uri

LABELLING_DIR = "labelling"


def teacher_config(base: Config, changes: dict[str, Any]) -> Config:
    """The base with another teacher: section by section, what is not named stays."""
    tree = base.model_dump()
    tree["teacher"] = _merged(tree["teacher"], changes)
    return with_absolute_paths(parse_config(tree))


def _merged(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {key: _merged(under.get(key), value) for key, value in over.items()}


def label_once(name: str, config: Config, store: RunStore, display: Display) -> None:
    """Let an LLM label pool and test set in a run of its own, or go on with it; once done, nothing."""
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
    """A run that has every text labelled, none held out; what it trains is not looked at."""
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
