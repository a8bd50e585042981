"""The main algorithm: label, select, train, refresh, until the budget is spent."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from llkd_ray.cluster import check_fit, connect, library_versions, live_nodes
from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import Overrides, apply_overrides, dotted, dump_config, parse_config, resolve
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.corpus.ingest import ingest
from llkd_ray.display import Display
from llkd_ray.evaluation.measure import Measure, write_insight
from llkd_ray.evaluation.student_calibration import TEST_GOLD, fit_student, write_model
from llkd_ray.evaluation.student_calibration import describe as describe_calibration
from llkd_ray.metrics.quality import has_plateaued
from llkd_ray.report.pages import write_pages
from llkd_ray.resources import describe_gpus, with_gpus
from llkd_ray.run.supervisor import Run
from llkd_ray.run.trackers import Trackers, check_trackers
from llkd_ray.selection.acquisition import find_acquisition
from llkd_ray.selection.policies import find_selection
from llkd_ray.selection.tickets import draw_holdout
from llkd_ray.storage.lock import hold_lock
from llkd_ray.storage.run_dir import (
    CONFIG,
    ENGINES_DIR,
    EPOCHS_DIR,
    LABELS_DIR,
    LOST_DIR,
    MANIFEST,
    MODEL_DIR,
    ONNX_DIR,
    SENT_DIR,
    SESSIONS_DIR,
    SMALL_DIR,
    SUMMARY,
    RunStore,
    join_uri,
    open_run,
    run_config,
)
from llkd_ray.storage.tables import Examples
from llkd_ray.student.model import check_student
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.factory import check_teacher, self_contained
from llkd_ray.teacher.labels import count_unanswered


def distill(config: Config, store_uri: str, display: Display) -> dict[str, Any]:
    """Run the distillation at ``store_uri``, resuming from existing files; returns its summary.

    Raises ConfigError for mistakes that the user can correct, and the original error otherwise.
    """
    began = time.monotonic()
    store = RunStore(store_uri)
    config = self_contained(config)
    teacher_facts = check(config, display.say)
    trackers = Trackers(config, store, display.say)
    with hold_lock(store, display.say) as session, connect(config.run.address), trackers:
        nodes = live_nodes()
        given, config = config, with_gpus(config, nodes)
        if gpus := describe_gpus(config, nodes):
            display.say(gpus)
        check_fit(config)
        _write_config(store, given)  # a resume may be on a cluster with other GPUs
        display.resume_with = f"llkd resume {shlex.quote(store.uri())}"
        examples = ingest(config, store, display.say)
        schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
        store.write_json(MANIFEST, manifest(config, examples, schedule, teacher_facts))
        draw_holdout(config, examples, schedule)  # refuses a hold-out too small for calibration
        measure = Measure(store, schedule, config)
        if absent := measure.labels_without_gold():
            display.warn(
                f"test: no text has the true label {', '.join(absent)}: its recall stays unknown, and every "
                "prediction of it counts as wrong"
            )
        lines = store.read_metrics()
        earlier_s = sum(sum(line["seconds"].values()) for line in lines)
        over = is_over(config, lines)
        with Run(config, store, session, schedule, display, over, lines) as run:
            while not is_over(config, lines):
                line = run_round(run, measure, len(lines))
                store.append_metrics(line)
                lines.append(line)
                trackers.log_round(line)
                display.say(describe(line))
            if len(lines) < schedule.rounds:
                display.say(f"agreement has flattened: {len(lines)} of {schedule.rounds} rounds were enough")
            run.finish()
            totals = run.call("stats")
        display.update("measuring the result and writing the report")
        seconds = earlier_s + time.monotonic() - began
        summary = conclude(config, store, measure, len(lines) - 1, totals, seconds)
        trackers.log_summary(summary, len(lines) - 1)
        display.say(describe_calibration(summary["calibration"]))
        return summary


def _write_config(store: RunStore, config: Config) -> None:
    """Write the settings. Until the teacher is asked, they may differ from those of an earlier attempt.

    What that attempt has left, such as a corpus read with other settings, is then deleted.
    """
    content = dump_config(config).encode()
    if store.exists(CONFIG) and store.read_bytes(CONFIG) != content and not _has_asked(store):
        for folder in set(store.folders("")) - {EPOCHS_DIR, SESSIONS_DIR}:
            store.delete_folder(folder)
    store.write_bytes(CONFIG, content)


def _has_asked(store: RunStore) -> bool:
    """Whether the teacher has been sent a text."""
    return any(store.names(folder) for folder in (LABELS_DIR, SMALL_DIR, SENT_DIR))


def is_over(config: Config, lines: Sequence[dict[str, Any]]) -> bool:
    """Whether all rounds are done, or agreement with the teacher has plateaued."""
    budget = config.budget
    if len(lines) == budget.rounds:
        return True
    agreement = [line["teacher_agreement"] for line in lines]
    return budget.patience is not None and has_plateaued(agreement, budget.patience, budget.min_gain)


def run_round(run: Run, measure: Measure, k: int) -> dict[str, Any]:
    """Wait for labels and the student's scores, select a batch, train; returns the round's metrics.

    Raises ConfigError if the first round has nothing to train on.
    """
    began = time.monotonic()
    run.throughput.begin_round(began)
    run.call("wait_labels", k)
    labelled_at = time.monotonic()
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
            "gave no answer (no_label: its answers are none of the labels, see teacher.prompt; "
            "no_recorded_answer: teacher.recorded.id and corpus.id must hold the same ids)"
        )
    trained = run.call("wait_trained", k)
    figures = measure.round(k)
    seconds = {"teach": labelled_at - began, "select": selected["seconds"], **trained["seconds"]}
    seconds["idle"] = max(0.0, time.monotonic() - began - sum(seconds.values()))
    totals = run.call("stats")
    counts = {key: totals[key] for key in ("labelled", "trained", "teacher_tokens")}
    return {
        "round": k,
        **counts,
        **figures,
        "loss": trained.get("loss"),  # missing if the first batch after a restart is empty
        "full_texts": trained.get("full"),
        "staleness": selected["staleness"],
        "seconds": seconds,
        "pace": run.throughput.points(),
    }


def conclude(
    config: Config, store: RunStore, measure: Measure, last: int, totals: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write the summary, model and report of a run; ``last`` is its last round."""
    counts = {key: totals[key] for key in ("labelled", "trained", "teacher_tokens")}
    student, calibration = measure.student(last, np.random.default_rng(0)), fit_student(store, config, last)
    if calibration.get("measured_on", "").startswith(TEST_GOLD):
        student["ece"] = calibration["ece_after"]  # of the model that is shipped
    summary = {
        "teacher": measure.teacher(np.random.default_rng(0)),
        "student": student,
        "calibration": calibration,
        **counts,
        **spending(config, totals),
        "engines_started": len(store.names(ENGINES_DIR)),
        "texts_sent_but_not_answered": count_unanswered(store),
        "lost": failed_teachers(store),
        "seconds": seconds,
    }
    store.write_json(SUMMARY, summary)
    write_model(store, measure.checkpoint(last), calibration)
    store.delete_folder(f"{MODEL_DIR}/{ONNX_DIR}")  # exported from earlier weights
    write_insight(store, measure, last, calibration["temperature"])
    write_pages(store)
    return summary


def failed_teachers(store: RunStore) -> list[dict[str, str]]:
    """Teacher actors that stopped permanently, each once, with the reason."""
    files = (store.read_json(f"{LOST_DIR}/{name}") for name in store.names(LOST_DIR))
    of_actor = {facts["actor"]: {"teacher": facts["teacher"], "reason": facts["reason"]} for facts in files}
    return list(of_actor.values())


def spending(config: Config, totals: dict[str, Any]) -> dict[str, Any]:
    """Usage and cost of each teacher, and whether the cap was reached."""
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


def check(config: Config, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run all checks that are possible before anything starts; returns facts about the teacher.

    ``say`` gets warnings; mistakes raise ConfigError.
    """
    check_policies(config)
    check_student(config.student, say)
    check_trackers(config)
    return check_teacher(config)


def check_policies(config: Config) -> None:
    """Raise ConfigError for an unknown policy or an unknown option of a policy."""
    find_selection(config.selection)
    find_acquisition(config.acquisition)


def manifest(
    config: Config, examples: Examples, schedule: Schedule, teacher_facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything besides the config that affects the results."""
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


def describe(line: dict[str, Any]) -> str:
    """A round's metrics as a line of text."""
    seconds = sum(line["seconds"].values())
    parts = [f"round {line['round']}: {line['labelled']} labelled, {line['trained']} trained on"]
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("teacher_agreement", "agreement")):
        if line[key] is not None:
            parts.append(f"{name} {line[key]:.3f}")
    return ", ".join(parts) + f" ({seconds:.0f} s)"


MORE = ("budget.rounds", "budget.train")
"""Settings that may be raised when a finished run is extended."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    config: Config
    run_dir: str
    summary: dict[str, Any]


def start_run(config: Config, display: Display) -> Outcome:
    """Start a new run in its own directory."""
    name = config.run.name or f"{config.selection.policy}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = join_uri(config.run.dir, name)
    if _has_asked(RunStore(run_dir)):
        raise ConfigError(f"run.name: {run_dir} holds a run already; resume it, or choose another name")
    display.say(f"run directory: {run_dir}")
    return Outcome(config, run_dir, distill(config, run_dir, display))


def resume(run_dir: str, display: Display, overrides: Overrides = ()) -> Outcome:
    """Resume a stopped run with its own config, or extend a finished run by more rounds.

    ``overrides`` may change anything until the teacher is asked. After that they may only raise
    ``budget.rounds`` and ``budget.train``, and only after all rounds are done, because before that they
    determine which texts the teacher labels for each round. Raises ConfigError for anything else.
    """
    store = open_run(run_dir)
    config = run_config(store)
    if overrides:
        config = _changed(config, store, dotted(overrides))
    return Outcome(config, store.uri(), distill(config, store.uri(), display))


def _changed(config: Config, store: RunStore, overrides: Sequence[str]) -> Config:
    if not _has_asked(store):
        return resolve(Config, config, overrides)
    for override in overrides:
        name = override.partition("=")[0]
        if name not in MORE:
            raise ConfigError(
                f"--set {override!r}: a run whose teacher was asked keeps its settings; only "
                f"{' and '.join(MORE)} may be raised, after its last round"
            )
    done = len(store.read_metrics())
    if done < config.budget.rounds or not store.exists(SUMMARY):
        raise ConfigError(
            f"--set {overrides[0]!r}: {done} of {config.budget.rounds} rounds are done; resume without it "
            "first, until all are done"
        )
    new = parse_config(apply_overrides(config.model_dump(), overrides))
    if new.budget.rounds <= done:
        raise ConfigError(
            f"budget.rounds: {new.budget.rounds} rounds are asked for and {done} are done; ask for more"
        )
    return new
