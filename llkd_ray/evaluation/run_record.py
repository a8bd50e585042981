"""The record of a run, read from the files of its directory, for report and model card.

Values that the run has not produced yet, or that cannot be known, are None or empty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml

from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    BATCH,
    CONFIG,
    ENGINES_DIR,
    ESTIMATE,
    EXAMPLES_INDEX,
    MANIFEST,
    QUARANTINE_DIR,
    ROUNDS_DIR,
    SELECTED,
    SUMMARY,
    TEACHER_CHECK,
    RunStore,
    round_file,
)

PHASES = ("start", "teach", "select", "train", "refresh", "evaluate", "idle")
SAMPLES_PER_CLASS = 3
TEACHER_KEYS = ("accuracy", "macro_f1", "ece", "off_label", "quality")
STUDENT_KEYS = (
    "accuracy",
    "macro_f1",
    "ece",
    "accuracy_interval",
    "macro_f1_interval",
    "teacher_agreement",
)
TOTAL_KEYS = ("labelled", "trained", "teacher_tokens", "seconds")


class Sample(NamedTuple):
    """A text that was trained on."""

    text: str
    weight: float
    confidence: float


class Selected(NamedTuple):
    """The selected texts of one class, over all rounds."""

    label: str
    texts: int
    mean_weight: float | None
    samples: list[Sample]


class PartRows(NamedTuple):
    """Row counts of the pool or of the test set."""

    read: int
    kept: int
    quarantined: dict[str, int]
    """Rejected rows, by reason."""


class Spent(NamedTuple):
    """Teacher usage and cost of a run; empty if unknown."""

    usage: dict[str, dict[str, Any]]
    """By teacher (``answers.Usage``), with its cost."""
    currency: str | None
    """None if no price is set."""
    cap: dict[str, Any] | None
    """Limits of the budget, and whether one was reached."""
    unasked: int
    """Texts that were not sent to the teacher because the cap was reached."""
    lost: list[dict[str, str]]
    """Teacher replicas that were lost, with the reason."""


@dataclass(frozen=True)
class RunRecord:
    """The data shown in report and card. Shares are in [0, 1]; None means unknown."""

    name: str
    config_text: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    rounds: list[dict[str, Any]]
    finished: bool
    teacher: dict[str, Any]
    student: dict[str, Any]
    totals: dict[str, Any]
    selected: list[Selected]
    prior: dict[str, float]
    """The class shares the student is trained for; empty if they equal those of its training texts."""
    rows: dict[str, PartRows]
    """For "pool" and "test"; empty before the corpus has been read."""
    unanswered: dict[str, int]
    """Accepted rows that the teacher did not answer, by reason."""
    spent: Spent
    calibration: dict[str, Any] = field(default_factory=dict)
    """The student's temperature (``student_calibration``); empty before the end of the run."""
    warnings: tuple[str, ...] = ()
    """About the teacher's first labels (``teacher_check``)."""
    audit: dict[str, Any] = field(default_factory=dict)
    """The results of a human audit (``audit.job.estimate``); empty without one."""

    @property
    def labels(self) -> list[str]:
        return list(self.config["labels"]["names"])

    @property
    def has_weights(self) -> bool:
        """Whether the weights of the selected texts differ; the samples hold the extremes of each class."""
        weights = [sample.weight for one in self.selected for sample in one.samples]
        return not np.allclose(weights, weights[:1]) if weights else False

    @property
    def refusals(self) -> list[str]:
        """All reasons for which rows were quarantined, most frequent first."""
        totals = sum((Counter(part.quarantined) for part in self.rows.values()), Counter[str]())
        return [reason for reason, _ in totals.most_common()]

    @property
    def teacher_name(self) -> str:
        """The teacher's name, or the names of the small and the large teacher of a cascade."""
        return " and ".join(_model_name(member) for member in self.teachers.values())

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """The settings of each teacher, by its name in ``spent.usage``."""
        return _members(self.config["teacher"])

    @property
    def prompts(self) -> list[str]:
        """Hashes of the teachers' prompts; teachers without a prompt are left out."""
        teacher = self.manifest.get("teacher") or {}
        return [one["prompt_hash"] for one in (teacher, *teacher.values()) if "prompt_hash" in _mapping(one)]

    @property
    def sources(self) -> list[str]:
        """URIs of the pool; local paths are reduced to folder and file name, for readers elsewhere."""
        return _uris(self.config["corpus"])

    @property
    def tested_on(self) -> list[str]:
        """URIs of the test set, in the same form."""
        return _uris(self.config["test"]) if self.config.get("test") else []

    @property
    def methods(self) -> dict[str, str]:
        """The confidence method of each teacher."""
        return {name: member["confidence"]["method"] for name, member in self.teachers.items()}


def read_run_record(store: RunStore) -> RunRecord:
    """Read config, manifest, metrics, summary, the index of the examples and the rounds' batches."""
    if not store.exists(CONFIG):
        raise ValueError(f"{store.root!r} has no {CONFIG}: give the directory of a run")
    config_text = store.read_bytes(CONFIG).decode()
    config = yaml.safe_load(config_text)
    rounds = _with_start(store, [_without_nan(line) for line in store.read_metrics()])
    summary = _without_nan(store.read_json(SUMMARY)) if store.exists(SUMMARY) else {}
    last = rounds[-1] if rounds else {}
    total_seconds = sum(sum(phase_seconds(line).values()) for line in rounds) if rounds else None
    return RunRecord(
        name=store.root.rpartition("/")[2],
        config_text=config_text,
        config=config,
        manifest=store.read_json(MANIFEST) if store.exists(MANIFEST) else {},
        rounds=rounds,
        finished=bool(summary),
        teacher=_pick(TEACHER_KEYS, summary.get("teacher")),
        # An unfinished run is described by its last round.
        student=_pick(STUDENT_KEYS, last, summary.get("student")),
        totals=_pick(TOTAL_KEYS, last | {"seconds": total_seconds}, summary),
        selected=_read_selected(store, config["labels"]["names"]),
        prior=_read_prior(store, config["labels"]["names"]),
        rows=_read_rows(store),
        unanswered=_read_unanswered(store),
        spent=_read_spent(summary, config["teacher"]),
        calibration=summary.get("calibration") or {},
        audit=store.read_json(ESTIMATE) if store.exists(ESTIMATE) else {},
        warnings=read_warnings(store),
    )


def _members(teacher: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if teacher["kind"] != "cascade":
        return {"teacher": teacher}
    return {name: teacher["cascade"][name] for name in ("small", "large")}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _uris(source: dict[str, Any]) -> list[str]:
    uris = [source["uri"]] if isinstance(source["uri"], str) else source["uri"]
    return [uri.partition("?")[0] if "://" in uri else "/".join(uri.split("/")[-2:]) for uri in uris]


def _model_name(teacher: dict[str, Any]) -> str:
    recorded = teacher["recorded"]["uri"] if teacher["kind"] == "recorded" else ""
    return teacher["model"] or f"recorded answers ({recorded.rstrip('/').rpartition('/')[2]})"


def _read_spent(summary: dict[str, Any], teacher: dict[str, Any]) -> Spent:
    prices = [member.get("price") or {} for member in _members(teacher).values()]
    has_price = any(price.get(kind) for price in prices for kind in ("input", "cached", "output"))
    return Spent(
        usage=summary.get("usage") or {},
        currency=summary.get("currency") if has_price else None,
        cap=summary.get("cap"),
        unasked=summary.get("unasked") or 0,
        lost=summary.get("lost") or [],
    )


def _pick(keys: Sequence[str], *sources: dict[str, Any] | None) -> dict[str, Any]:
    """The value of each key from the last source that has it, else None."""
    known = {k: v for source in sources if source for k, v in source.items() if v is not None}
    return {key: known.get(key) for key in keys}


def _without_nan(value: Any) -> Any:
    """Replaces NaN, which Python's JSON may contain, by None: here it means the same as null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_warnings(store: RunStore) -> tuple[str, ...]:
    """Warnings about the teacher's first labels; see ``teacher_check``."""
    return tuple(store.read_json(TEACHER_CHECK)["warnings"]) if store.exists(TEACHER_CHECK) else ()


def phase_seconds(line: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase from one line of the metrics; zero if a phase did not run."""
    spent = line["seconds"]
    return {phase: spent.get(phase) or 0.0 for phase in PHASES}


def _with_start(store: RunStore, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds, with the engines' start as a phase of the first, which its metrics count as "teach".

    The files of the engines do not say when each was started, so the longest start counts, but nothing
    after the first labels: before them the round waits for the first engine, later ones start meanwhile.
    """
    files = [store.read_json(f"{ENGINES_DIR}/{name}") for name in store.names(ENGINES_DIR, ".json")]
    if not files or not rounds:
        return rounds
    first, *later = rounds
    waited, pace = phase_seconds(first)["teach"], first["pace"]
    first_labels = next((seconds for seconds, labelled in pace if labelled > pace[0][1]), waited)
    start = min(waited, first_labels, max(one["seconds_to_start"] for one in files))
    return [first | {"seconds": first["seconds"] | {"start": start, "teach": waited - start}}, *later]


def _read_rows(store: RunStore) -> dict[str, PartRows]:
    if not store.exists(EXAMPLES_INDEX):
        return {}
    index = store.read_json(EXAMPLES_INDEX)
    return {
        part: PartRows(
            read=index["rows_in"].get(part, 0),
            kept=sum(shard["rows"] for shard in index[part]),
            quarantined=index["quarantined"].get(part, {}),
        )
        for part in ("pool", "test")
    }


def _read_unanswered(store: RunStore) -> dict[str, int]:
    files = [name for name in store.names(QUARANTINE_DIR, ".parquet") if name.startswith("teacher-")]
    columns = (store.read_table(f"{QUARANTINE_DIR}/{name}", columns=["reason"]) for name in files)
    reasons = (reason for column in columns for reason in column["reason"].to_pylist())
    return dict(Counter(reasons).most_common())


def _round_files(store: RunStore, name: str) -> list[str]:
    """The files of this name from all rounds that have one, in round order."""
    rounds = sorted(int(folder) for folder in store.folders(ROUNDS_DIR) if folder.isdigit())
    return [file for k in rounds if store.exists(file := round_file(k, name))]


def _read_prior(store: RunStore, labels: Sequence[str]) -> dict[str, float]:
    """The prior of the last selected round."""
    files = _round_files(store, SELECTED)
    prior = store.read_json(files[-1])["prior"] if files else None
    return dict(zip(labels, prior, strict=True)) if prior else {}


def _read_selected(store: RunStore, labels: Sequence[str]) -> list[Selected]:
    """Counts for each class, and its texts with the largest, median and smallest weight."""
    files = _round_files(store, BATCH)
    slim = pa.schema([tables.ROUND.field(name) for name in ("row", "label", "weight")])
    batches = [store.read_table(file, columns=slim.names) for file in files]
    table = pa.concat_tables(batches) if batches else slim.empty_table()
    file_N = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])
    row_N, label_N, weight_N = (table[name].to_numpy() for name in slim.names)
    # A text that is selected again in a later round counts once.
    first_N = np.unique(row_N, return_index=True)[1]
    file_N, row_N, label_N, weight_N = (x[first_N] for x in (file_N, row_N, label_N, weight_N))

    chosen_of_class: list[np.ndarray] = []
    for label in range(len(labels)):
        of_class = np.flatnonzero(label_N == label)
        heaviest_first = of_class[np.argsort(-weight_N[of_class], kind="stable")]
        spread = np.linspace(0, of_class.size - 1, min(SAMPLES_PER_CLASS, of_class.size))
        chosen_of_class.append(heaviest_first[spread.round().astype(int)])
    samples: dict[int, Sample] = {}
    all_chosen = np.concatenate(chosen_of_class) if chosen_of_class else np.array([], dtype=int)
    for number, file in enumerate(files):
        wanted = row_N[all_chosen[file_N[all_chosen] == number]]
        if wanted.size:
            batch = store.read_table(file)
            keep = batch.filter(pa.array(np.isin(batch["row"].to_numpy(), wanted)))
            for entry in keep.to_pylist():
                samples[entry["row"]] = Sample(entry["text"], entry["weight"], max(entry["probs"]))
    return [
        Selected(
            label,
            texts=int((label_N == number).sum()),
            mean_weight=float(weight_N[label_N == number].mean()) if (label_N == number).any() else None,
            samples=[samples[int(row_N[i])] for i in chosen_of_class[number]],
        )
        for number, label in enumerate(labels)
    ]
