"""The Python API: run a distillation, a comparison or a prediction.

Each function takes settings as a validated object, a dictionary or the path of a YAML file, with overrides,
and returns a small typed result. Only files persist between two calls. Ray is started for a call and stopped
after it, unless it is already running.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from llkd_ray.comparison.job import compare as run_comparison
from llkd_ray.comparison.report import PAGE, SUMMARY
from llkd_ray.comparison.settings import Comparison, load_comparison
from llkd_ray.config.base import ConfigError, local_dir
from llkd_ray.config.loading import Overrides, resolve
from llkd_ray.config.schema import Config
from llkd_ray.display import Display
from llkd_ray.prediction import results as output
from llkd_ray.prediction.config import PredictConfig
from llkd_ray.prediction.job import predict as run_prediction
from llkd_ray.prediction.pieces import CORPUS, FOLDERS
from llkd_ray.run import loop
from llkd_ray.storage.run_dir import MODEL_DIR, REPORT, RunStore


@dataclass(frozen=True)
class Distilled:
    """A finished run."""

    run_dir: str
    config: Config = field(repr=False)
    """The resolved settings."""
    summary: dict[str, Any] = field(repr=False)
    """The content of summary.json: metrics of teacher and student, counts and costs."""
    metrics: list[dict[str, Any]] = field(repr=False)
    """One entry per round, as in metrics.jsonl."""
    model: str
    """Folder of the student, which transformers can load."""
    report: str
    """Path or URI of report.html."""

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the student on the test set; None without a test set."""
        return self.summary["student"]["accuracy"]

    @property
    def macro_f1(self) -> float | None:
        """Macro-F1 of the student on the test set; None without a test set."""
        return self.summary["student"]["macro_f1"]

    @property
    def teacher_agreement(self) -> float | None:
        """Share of hold-out texts where the student agrees with the teacher; None without a hold-out."""
        return self.summary["student"]["teacher_agreement"]


@dataclass(frozen=True)
class Compared:
    """The state of a comparison."""

    out: str
    summary: list[dict[str, str]] = field(repr=False)
    """The rows of summary.csv."""
    errors: dict[str, str]
    """Errors of failed trials, by trial name; repeating the call retries them."""
    report: str


@dataclass(frozen=True)
class Predicted:
    """A labelled corpus."""

    out: str
    summary: dict[str, Any]
    """Numbers of rows read, predicted, accepted and refused; by label, and by reason."""
    thresholds: dict[str, Any] | None = field(repr=False)
    """Thresholds fitted on gold; None if none were fitted."""
    predictions: str
    """Folder of the files with the predictions."""

    def table(self) -> pa.Table:
        """All predictions as one in-memory table."""
        store = RunStore(self.out)
        names = store.names(FOLDERS[CORPUS])
        return pa.concat_tables([output.read(store, f"{FOLDERS[CORPUS]}/{name}") for name in names])


def distill(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Overrides = (),
    *,
    display: Display | None = None,
) -> Distilled:
    """Distil a teacher into a student, in a new run directory below ``run.dir``.

    ``config`` is a validated config, a dictionary, or the path of a YAML file. Raises ConfigError for a
    mistake in it, and TeacherDown if the teacher fails permanently; :func:`resume` continues such a run.
    """
    settings = resolve(Config, config, overrides)
    with _shown(display) as there:
        return _distilled(loop.start_run(settings, there))


def resume(run_dir: str | Path, overrides: Overrides = (), *, display: Display | None = None) -> Distilled:
    """Resume a stopped run; for a finished run, write summary, model and report again.

    ``overrides`` may raise ``budget.rounds`` and ``budget.train`` of a finished run, which then continues.
    """
    with _shown(display) as there:
        return _distilled(loop.resume(str(run_dir), there, overrides))


def compare(
    config: Comparison | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    overrides: Overrides = (),
    *,
    only: Sequence[str] = (),
    add: Sequence[str] = (),
    report_only: bool = False,
    display: Display | None = None,
) -> Compared:
    """Compare policies on the same labels, resuming where an earlier call stopped.

    ``out`` is the folder for the results; for a YAML file it defaults to ``runs/`` and the file's name.
    ``only`` restricts training to the given teachers, lines and seeds; ``add`` lists results.csv files of
    other machines; ``report_only`` trains nothing. Raises ConfigError for mistakes that the user can correct.
    """
    if isinstance(config, str | Path):
        comparison = load_comparison(config, overrides)
        out = out or f"runs/{Path(config).stem.replace('_', '-')}"
    else:
        comparison = resolve(Comparison, config, overrides)
    if out is None:
        raise ConfigError("out: no folder is given for the results: name one")
    folder = local_dir(str(out))
    base = resolve(Config, comparison.base)
    with _shown(display) as there:
        errors = run_comparison(comparison, base, folder, there, only=only, add=add, report_only=report_only)
    store = RunStore(folder)
    rows = list(csv.DictReader(io.StringIO(store.read_bytes(SUMMARY).decode())))
    return Compared(folder, rows, errors, store.uri(PAGE))


def predict(
    config: PredictConfig | Mapping[str, Any] | str | Path,
    overrides: Overrides = (),
    *,
    display: Display | None = None,
) -> Predicted:
    """Label a corpus of any size with a classifier.

    Settings are those of :class:`~llkd_ray.prediction.config.PredictConfig`; a minimal example is
    ``{"model": run_dir, "corpus": {"uri": "reviews.csv", "text": "body"}, "out": "predicted"}``. Raises
    ConfigError for a mistake; its message names the setting or the flag of ``llkd predict`` that sets it.
    """
    settings = resolve(PredictConfig, config, overrides)
    with _shown(display) as there:
        summary = run_prediction(settings, there.say)
    store = RunStore(settings.out)
    fitted = store.read_json(output.THRESHOLDS) if store.exists(output.THRESHOLDS) else None
    return Predicted(settings.out, summary, fitted, store.uri(FOLDERS[CORPUS]))


def _distilled(outcome: loop.Outcome) -> Distilled:
    store = RunStore(outcome.run_dir)
    return Distilled(
        run_dir=store.uri(),
        config=outcome.config,
        summary=outcome.summary,
        metrics=store.read_metrics(),
        model=store.uri(MODEL_DIR),
        report=store.uri(REPORT),
    )


@contextmanager
def _shown(display: Display | None) -> Iterator[Display]:
    """The caller's display, which the caller opens and closes, or a new one for this call."""
    if display is not None:
        yield display
        return
    with Display() as own:
        yield own
