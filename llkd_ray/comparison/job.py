"""Runs the trials of a comparison as Ray tasks, and writes its report.

Each trial is one task. It writes a file after every round, so a task that is repeated, by Ray or by the user,
resumes from the last file. Texts and labels are put into the object store once, not sent with every task.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray.exceptions import RayError, RayTaskError

from llkd_ray.cluster import connect
from llkd_ray.comparison.report import PAGE, read_results, write_comparison
from llkd_ray.comparison.settings import (
    REFERENCES,
    Comparison,
    Entry,
    answers_of,
    changed,
    dump,
    entries,
    run_labelling,
    teacher_config,
)
from llkd_ray.comparison.tables import ALL, GOLD, Row, Tables, result_row, scores_of, tabulate
from llkd_ray.comparison.trial import (
    Labels,
    Texts,
    Trial,
    against_gold,
    finished,
    gold_labels,
    read_teacher,
    read_texts,
    run_trial,
)
from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import dump_config
from llkd_ray.config.schema import Config
from llkd_ray.corpus.ingest import ingest
from llkd_ray.display import Display, duration
from llkd_ray.run.loop import check
from llkd_ray.storage.run_dir import CONFIG, EXAMPLES_INDEX, RunStore
from llkd_ray.storage.tables import Examples

SETTINGS = "comparison.yaml"
TRIALS_DIR = "trials"
RETRIES = 3
POLL_S = 1.0


@dataclass(frozen=True)
class Job:
    """One trial, with the name of its labels (the teacher's; empty for *gold*) and its known results."""

    entry: Entry
    digest: str
    is_selected: bool
    """Whether --only includes it."""
    n_pool: int
    names: tuple[str, ...]
    added: tuple[Row, ...] = ()
    """Its results from other machines."""

    @property
    def name(self) -> str:
        parts = (self.entry.teacher, self.entry.line, f"seed {self.entry.seed}")
        return " ".join(part for part in parts if part)

    def results(self) -> list[Row]:
        """The results of the finished sizes; the trial's own take precedence over those from elsewhere."""
        entry = self.entry
        found = {row["size"]: row for row in self.added if row["size"] in entry.trial.reported}
        for facts in finished(entry.trial, self.digest):
            found[facts["size"]] = result_row(
                entry.teacher, entry.line, entry.seed, facts, self.n_pool, self.names
            )
        return [found[size] for size in sorted(found)]

    @property
    def is_finished(self) -> bool:
        return len(self.results()) == len(self.entry.trial.reported)


@dataclass(frozen=True)
class Inputs:
    """The data shared by the trials and the report of a comparison."""

    comparison: Comparison
    store: RunStore
    texts: Texts
    labels: dict[str, Labels]
    """By teacher; *gold* has the empty name."""
    scores: dict[str, Row]
    jobs: list[Job]


def compare(
    comparison: Comparison,
    base: Config,
    out: str,
    display: Display,
    *,
    only: Sequence[str] = (),
    add: Sequence[str] = (),
    report_only: bool = False,
) -> dict[str, str]:
    """Run all unfinished trials, and write the report into ``out``.

    ``base`` is the config that ``comparison.base`` refers to. ``only`` limits the trials to the teachers,
    lines and seeds it names; ``add`` lists results.csv files from elsewhere. Returns the errors of failed
    trials, by name. Raises ConfigError for user errors.
    """
    if "://" in out:
        raise ConfigError(f"--out: {out!r} is no folder; give one that all nodes of the cluster can write to")
    teachers = {name: teacher_config(base, changes) for name, changes in comparison.teachers.items()}
    _check(comparison, base, teachers)
    _check_only(comparison, only)
    added = [one for file in add for one in read_results(file, base.labels.names)]
    store = RunStore(out)
    _write_settings(store, comparison, base)
    display.say(f"results: {out}")
    if report_only:
        if not store.exists(EXAMPLES_INDEX):
            raise ConfigError(f"--report-only: {out} holds no comparison yet; run it without")
        inputs = _prepare(comparison, base, teachers, store, only, added)
        _report(inputs, display)
        return {}
    with connect(base.run.address):
        ingest(base, store, display.say)
        for name, teacher in teachers.items():
            if teacher.teacher.kind != "recorded":
                run_labelling(name, teacher, store, display)
        inputs = _prepare(comparison, base, teachers, store, only, added)
        errors = _run(inputs, display)
    _report(inputs, display)
    for job, error in errors.items():
        display.say(f"failed: {job}: {error}")
    if errors:
        display.say(f"{len(errors)} trial(s) failed; the same command tries them again")
    return errors


# --- Settings --------------------------------------------------------------------------------------


def _check(comparison: Comparison, base: Config, teachers: dict[str, Config]) -> None:
    """Find all mistakes that can be found before anything starts."""
    any_teacher = next(iter(teachers.values()))
    for name, teacher in teachers.items():
        _with_field(f"teachers.{name}", check, teacher)
    for name, changes in comparison.lines.items():
        config = _with_field(f"lines.{name}", changed, any_teacher, changes, comparison.seeds[0])
        _with_field(f"lines.{name}", check, config)
    if base.test is None or base.corpus.gold is None:
        raise ConfigError(
            f"base: {comparison.base!r} needs test and corpus.gold: a comparison is about true labels"
        )


def _with_field(field: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; the field is prepended to the message of a ConfigError."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None


def _check_only(comparison: Comparison, only: Sequence[str]) -> None:
    known = [*comparison.teachers, *_lines(comparison), *map(str, comparison.seeds)]
    if strangers := [name for name in only if name not in known]:
        raise ConfigError(f"--only: there is no {strangers[0]!r}; there are {', '.join(known)}")


def _lines(comparison: Comparison) -> list[str]:
    """Names of all lines, references first."""
    return list({**REFERENCES, **comparison.lines})


def _is_selected(entry: Entry, comparison: Comparison, only: Sequence[str]) -> bool:
    """For each kind (teacher, line, seed), all are selected if none is named; *gold* has no teacher."""
    teachers = [name for name in only if name in comparison.teachers]
    lines = [name for name in only if name in _lines(comparison)]
    seeds = [name for name in only if name in map(str, comparison.seeds)]
    return (
        (not teachers or not entry.teacher or entry.teacher in teachers)
        and (not lines or entry.line in lines)
        and (not seeds or str(entry.seed) in seeds)
    )


def _write_settings(store: RunStore, comparison: Comparison, base: Config) -> None:
    """Write the settings; refuses a folder with other texts, whose results would be mistaken for these."""
    if store.exists(CONFIG):
        there = yaml.safe_load(store.read_bytes(CONFIG))
        now = yaml.safe_load(dump_config(base))
        for section in ("corpus", "test", "labels"):
            if there[section] != now[section]:
                raise ConfigError(
                    f"--out: {store.root} holds a comparison with another {section}; choose another folder"
                )
    store.write_bytes(CONFIG, dump_config(base).encode())
    store.write_bytes(SETTINGS, dump(comparison).encode())


# --- Trials ----------------------------------------------------------------------------------------


def _prepare(
    comparison: Comparison,
    base: Config,
    teachers: dict[str, Config],
    store: RunStore,
    only: Sequence[str],
    added: Sequence[Row],
) -> Inputs:
    """Read texts and labels, and list the trials with their known results from elsewhere."""
    examples = Examples.open(store)
    texts = read_texts(examples, base.labels.names)
    labels = {"": gold_labels(examples, texts)}
    scores = {}
    for name, config in teachers.items():
        labels[name], p_TC = _with_field(
            f"teachers.{name}", read_teacher, answers_of(name, config, store), examples
        )
        scores[name] = scores_of(against_gold(texts, p_TC), texts.names)
    folder = Path(store.path(TRIALS_DIR))
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere: dict[tuple[str, str, int], list[Row]] = {}
    for one in added:
        elsewhere.setdefault((one["teacher"], one["line"], one["seed"]), []).append(one)
    jobs = []
    for entry in entries(comparison, base, examples.n_pool, folder):
        is_selected = _is_selected(entry, comparison, only)
        known = tuple(elsewhere.get((entry.teacher, entry.line, entry.seed), ()))
        digest = labels[entry.teacher].digest
        jobs.append(Job(entry, digest, is_selected, examples.n_pool, texts.names, known))
    return Inputs(comparison, store, texts, labels, scores, jobs)


@ray.remote
def _trial_task(trial: Trial, texts: Texts, labels: Labels) -> list[dict[str, Any]]:
    """One trial, on the task's GPU or on one thread, because parallel tasks use the other cores."""
    gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
    if not gpu:
        torch.set_num_threads(1)
    return run_trial(trial, texts, labels, device=torch.device("cuda" if gpu else "cpu"))


@dataclass
class Progress:
    """Number of finished trials."""

    total: int
    done: int
    failed: int = 0
    began: float = field(default_factory=time.monotonic)
    new: int = 0

    def describe(self) -> str:
        said = f"{self.done} of {self.total} trials" + (f", {self.failed} failed" if self.failed else "")
        left = self.total - self.done - self.failed
        if self.new and left:
            seconds = (time.monotonic() - self.began) / self.new * left
            said += f"; about {duration(round(seconds))} left"
        return said


def _run(inputs: Inputs, display: Display) -> dict[str, str]:
    """Run all unfinished trials; returns the errors of those that failed, by name."""
    selected = [job for job in inputs.jobs if job.is_selected]
    todo = [job for job in selected if not job.is_finished]
    progress = Progress(len(selected), len(selected) - len(todo))
    display.say(f"{progress.describe()} are finished already")
    errors: dict[str, str] = {}
    with _submitted(todo, inputs) as running:
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_S)
            for task in ready:
                job = running.pop(task)
                try:
                    figures = ray.get(task)
                except RayError as error:
                    errors[job.name] = _reason(error)
                    progress.failed += 1
                    display.say(f"[{progress.describe()}] {job.name} failed: {errors[job.name]}")
                else:
                    progress.done, progress.new = progress.done + 1, progress.new + 1
                    display.say(f"[{progress.done}/{progress.total}] {job.name}: {_describe(figures)}")
                if running and all(other.entry.seed != job.entry.seed for other in running.values()):
                    display.say(f"all trials of seed {job.entry.seed} are finished: writing the report")
                    _report(inputs, display)
            display.update(progress.describe())
    return errors


@contextmanager
def _submitted(jobs: Sequence[Job], inputs: Inputs) -> Iterator[dict[Any, Job]]:
    """Submits the jobs in order and yields their tasks; cancels those left at the end, e.g. after Ctrl-C."""
    for job in jobs:
        _check_gpus(job.entry.trial.config.student.n_gpus)
    texts = ray.put(inputs.texts)
    labels = {name: ray.put(inputs.labels[name]) for name in {job.entry.teacher for job in jobs}}
    running = {}
    for job in jobs:
        gpus = job.entry.trial.config.student.n_gpus
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": RETRIES, "name": f"trial {job.name}"}
        task = _trial_task.options(**options).remote(job.entry.trial, texts, labels[job.entry.teacher])
        running[task] = job
    try:
        yield running
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _check_gpus(share: float) -> None:
    """Reject trials that would never get a GPU."""
    there = ray.cluster_resources().get("GPU", 0)
    if share > there and os.environ.get("LLKD_AUTOSCALING") != "1":
        raise ConfigError(
            f"student.gpus: a trial asks for {share:g} GPUs, but the cluster has {there:g}: lower it"
        )


def _reason(error: RayError) -> str:
    """The reason in one line: the error of the trial's own code, or what happened to its process."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = str(cause).strip().split("\n")[0]
    return f"{type(cause).__name__}: {text}"


def _describe(figures: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        f"{one['trained']:,} texts: accuracy {one['accuracy']:.3f}, macro-F1 {one['macro_f1']:.3f}"
        for one in figures
    )


# --- Report ----------------------------------------------------------------------------------------


def _report(inputs: Inputs, display: Display) -> None:
    """Write the report from the files of the finished trials."""
    tables, results, missing = tables_of(inputs)
    write_comparison(
        inputs.store,
        tables,
        results,
        settings=dump(inputs.comparison),
        missing=missing,
        trials=len(inputs.jobs),
    )
    display.result(f"report: {inputs.store.path(PAGE)}")


def tables_of(inputs: Inputs) -> tuple[Tables, list[Row], int]:
    """Tables and results of the finished trials, and the number of unfinished ones."""
    n_pool = len(inputs.texts.pool)
    results, missing = [], 0
    for job in inputs.jobs:
        of_job = job.results()
        missing += len(of_job) < len(job.entry.trial.reported)
        results += of_job
    lines = _lines(inputs.comparison)
    sizes = next(job.entry.trial.reported for job in inputs.jobs if job.entry.line not in (GOLD, ALL))
    tables = tabulate(
        results,
        inputs.scores,
        lines=lines,
        sizes=sizes,
        n_pool=n_pool,
        names=inputs.texts.names,
        n_seeds=len(inputs.comparison.seeds),
    )
    return tables, results, missing
