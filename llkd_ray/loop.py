"""The algorithm on one page: label, select, train, refresh, until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from llkd_ray.acquisition import ACQUISITION
from llkd_ray.answers import Usage
from llkd_ray.cluster import check_fit, connect, library_versions
from llkd_ray.config import Config, ConfigError
from llkd_ray.console import Display
from llkd_ray.corpus import ingest
from llkd_ray.evaluate import has_flattened
from llkd_ray.facts import SUMMARY
from llkd_ray.insight import write_insight
from llkd_ray.intake import draw_holdout
from llkd_ray.label_files import count_unanswered
from llkd_ray.metrics import Measure
from llkd_ray.policies import SELECTION
from llkd_ray.report import write_pages
from llkd_ray.run import Run
from llkd_ray.schedule import Schedule
from llkd_ray.session import at_work
from llkd_ray.settings import dump_config
from llkd_ray.store import CONFIG, ENGINES_DIR, LOST_DIR, MANIFEST, MODEL_DIR, ONNX_DIR, Examples, RunStore
from llkd_ray.student import check_student
from llkd_ray.student_calibration import fit_student, write_calibration
from llkd_ray.student_calibration import in_words as calibration_in_words
from llkd_ray.teachers import check_teacher, self_contained
from llkd_ray.trackers import Trackers, check_trackers


def distill(config: Config, store_uri: str, display: Display) -> dict[str, Any]:
    """Run the distillation whose files are at ``store_uri``, from where they say; returns its summary.

    Raises ConfigError for what the user can mend, and whatever broke otherwise.
    """
    began = time.monotonic()
    store = RunStore(store_uri)
    config = self_contained(config)
    teacher_facts = check(config)
    trackers = Trackers(config, store, display.say)
    with at_work(store, display.say) as session, connect(config.run.address), trackers:
        store.write_bytes(CONFIG, dump_config(config).encode())
        check_fit(config)
        examples = ingest(config, store, display.say)
        schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
        store.write_json(MANIFEST, manifest(config, examples, schedule, teacher_facts))
        draw_holdout(config, examples, schedule)  # refuses a hold-out that nothing can be fitted on
        measure = Measure(store, schedule, config)
        lines = store.read_metrics()
        over = is_over(config, lines)
        with Run(config, store, session, schedule, display, over, lines) as run:
            while not is_over(config, lines):
                line = run_round(run, measure, len(lines))
                store.append_metrics(line)
                lines.append(line)
                trackers.log_round(line)
                display.say(in_words(line))
            if len(lines) < schedule.rounds:
                display.say(f"agreement has flattened: {len(lines)} of {schedule.rounds} rounds were enough")
            run.finish()
            totals = run.call("stats")
        display.update("measuring the result and writing the report")
        summary = conclude(config, store, measure, len(lines) - 1, totals, time.monotonic() - began)
        trackers.log_summary(summary, len(lines) - 1)
        display.say(calibration_in_words(summary["calibration"]))
        return summary


def is_over(config: Config, lines: Sequence[dict[str, Any]]) -> bool:
    """Whether the rounds are done, or the student has stopped to come closer to the teacher."""
    budget = config.budget
    if len(lines) == budget.rounds:
        return True
    agreement = [line["teacher_agreement"] for line in lines]
    return budget.patience is not None and has_flattened(agreement, budget.patience, budget.min_gain)


def run_round(run: Run, measure: Measure, k: int) -> dict[str, Any]:
    """Wait for labels, let the student look at them, select, train; returns the line of metrics.

    Raises ConfigError where the first round finds nothing to learn from.
    """
    began = time.monotonic()
    run.pace.begin_round(began)
    run.call("wait_labels", k)
    labels_there = time.monotonic()
    run.call("wait_refreshed", k)
    selected = run.call("select", k)
    if k == 0 and not selected["selected"]:
        if run.call("stats")["cap_reached"]:
            raise ConfigError(
                "budget.cap is reached before there is a labelled text to train on; raise it, or lower "
                f"evaluation.holdout: the {run.schedule.holdout} texts of the hold-out are read first"
            )
        raise ConfigError(
            f"round 0 has nothing to train on: {run.call('stats')['labelled']} texts are labelled, "
            f"{selected['candidates']} of them may be selected; look into quarantine/ for why the teacher "
            "gave no answer (teacher.recorded.id and corpus.id must hold the same ids)"
        )
    trained = run.call("wait_trained", k)
    figures = measure.round(k)
    seconds = {"teach": labels_there - began, "select": selected["seconds"], **trained["seconds"]}
    seconds["idle"] = max(0.0, time.monotonic() - began - sum(seconds.values()))
    totals = run.call("stats")
    counts = {key: totals[key] for key in ("labelled", "trained", "teacher_tokens")}
    return {
        "round": k,
        **counts,
        **figures,
        "loss": trained.get("loss"),
        "staleness": selected.get("staleness"),  # none in a run begun by an older version
        "seconds": seconds,
        "pace": run.pace.points(),
    }


def conclude(
    config: Config, store: RunStore, measure: Measure, last: int, totals: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write what a run leaves behind that is finished after round ``last``: summary, model and report."""
    counts = {key: totals[key] for key in ("labelled", "trained", "teacher_tokens")}
    summary = {
        "teacher": measure.teacher(np.random.default_rng(0)),
        "student": measure.student(last, np.random.default_rng(0)),
        "calibration": fit_student(store, config, last),
        **counts,
        **spending(config, totals),
        "engines_started": len(store.names(ENGINES_DIR)),
        "texts_sent_but_not_answered": count_unanswered(store),
        "lost": lost_teachers(store),
        "seconds": seconds,
    }
    store.write_json(SUMMARY, summary)
    store.fs.create_dir(store.path(MODEL_DIR), recursive=True)
    pafs.copy_files(
        store.path(measure.checkpoint(last)),
        store.path(MODEL_DIR),
        source_filesystem=store.fs,
        destination_filesystem=store.fs,
    )
    write_calibration(store, summary["calibration"])
    if ONNX_DIR in store.folders(MODEL_DIR):  # of the weights before these
        store.fs.delete_dir(store.path(f"{MODEL_DIR}/{ONNX_DIR}"))
    write_insight(store, measure, last)
    write_pages(store)
    return summary


def lost_teachers(store: RunStore) -> list[dict[str, str]]:
    """Teachers' actors that gave up, with the reason, each once."""
    files = (store.read_json(f"{LOST_DIR}/{name}") for name in store.names(LOST_DIR))
    of_actor = {facts["actor"]: {"teacher": facts["teacher"], "reason": facts["reason"]} for facts in files}
    return list(of_actor.values())


def spending(config: Config, totals: dict[str, Any]) -> dict[str, Any]:
    """What each teacher has used and what that cost, and how it stands to the cap."""
    members = dict(config.teacher.members())
    usage = {
        name: one | {"cost": float(Usage(**one).cost(members[name].price))}
        for name, one in totals["usage"].items()
    }
    cap = config.budget.cap
    return {
        "usage": usage,
        "currency": next(iter(members.values())).price.currency,
        "cap": None if cap.is_off else cap.model_dump() | {"reached": totals["cap_reached"]},
        "unasked": totals["unasked"],
    }


def check(config: Config) -> dict[str, Any]:
    """Find every mistake that can be found before anything starts; returns facts about the teacher."""
    check_policies(config)
    check_student(config.student)
    check_trackers(config)
    return check_teacher(config)


def check_policies(config: Config) -> None:
    """Refuse policies that there are not, and options that they do not have."""
    for field, name, known in (
        ("selection.policy", config.selection.policy, SELECTION),
        ("acquisition.policy", config.acquisition.policy, ACQUISITION),
    ):
        if name not in known:
            raise ConfigError(f"{field}: {name!r} is unknown; there are {', '.join(sorted(known))}")
    try:
        SELECTION[config.selection.policy].check_options(config.selection.options)
    except ValueError as error:
        raise ConfigError(f"selection.options: {error}") from None


def manifest(
    config: Config, examples: Examples, schedule: Schedule, teacher_facts: dict[str, Any]
) -> dict[str, Any]:
    """What decides the results, next to the config."""
    return {
        "llkd_ray": version("llkd-ray"),
        "versions": library_versions(),
        "seed": config.run.seed,
        "teacher": teacher_facts,
        "student": config.student.model,
        "rows": {"pool": examples.n_pool, "test": examples.n_test, "holdout": schedule.holdout},
        "budget": {"labels": schedule.labels + schedule.holdout, "train": schedule.train},
        "tickets": schedule.n_tickets,
    }


def in_words(line: dict[str, Any]) -> str:
    """A round's line of metrics as a person reads it."""
    seconds = sum(line["seconds"].values())
    parts = [f"round {line['round']}: {line['labelled']} labelled, {line['trained']} trained on"]
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("teacher_agreement", "agreement")):
        if line[key] is not None:
            parts.append(f"{name} {line[key]:.3f}")
    return ", ".join(parts) + f" ({seconds:.0f} s)"
