"""The output folder of a prediction: settings, tables, and the check that a restart has the same settings.

        predict.json                settings that determine the results; versions
        predictions/  gold/         one file per piece; gold/ (parquet) only if thresholds are fitted
        quarantine/                 rejected rows, with a reason
        thresholds.json             fitted thresholds, with precision, interval and coverage
        summary.json                rows read, predicted and rejected
        tasks/                      how the corpus was cut, and what was read of it

An answer is a label and its confidence. With ``min_grade`` the labels are grades, in the model's order, and
there is a single question: is the text of this grade or higher? Its confidence is the summed probability of
those grades.

Legend: N texts, C classes, M texts of the current class (or question).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from scipy.stats import beta

from llkd_ray.config.base import ConfigError
from llkd_ray.corpus.readers import Unit
from llkd_ray.display import escape_formula, unescape_formula
from llkd_ray.metrics.quality import binomial_interval
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence
from llkd_ray.prediction.config import PredictConfig
from llkd_ray.prediction.pieces import CORPUS, FOLDERS, GOLD, KEPT
from llkd_ray.storage.checkpoints import Checkpoint
from llkd_ray.storage.run_dir import RunStore, open_filesystem
from llkd_ray.storage.tables import list_column, matrix_of

MANIFEST = "predict.json"
SUMMARY = "summary.json"
THRESHOLDS = "thresholds.json"
# ``probs`` are in the order of ``labels`` in the schema's metadata. ``p_min_grade`` (with ``min_grade``),
# ``text`` and further columns (if requested) are appended.
PREDICTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
    ]
)


def open_output(
    config: PredictConfig,
    checkpoint: Checkpoint,
    units: Mapping[str, Sequence[Unit]],
    versions: dict[str, str],
) -> RunStore:
    """Open the folder for writing or resuming. The first start records what determines the results.

    Raises :class:`ConfigError` if it has other content, or was started with other settings.
    """
    asked = decides(config, checkpoint, units)
    try:
        store = RunStore(config.out)
        if store.exists(MANIFEST):
            _require_same(config, asked, store.read_json(MANIFEST)["decides"])
        elif store.names(FOLDERS[CORPUS]):
            raise ConfigError(
                f"--out: {config.out!r} holds {FOLDERS[CORPUS]}/ of something else: give another folder"
            )
        else:
            store.write_json(MANIFEST, {"decides": asked, "versions": versions})
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--out: {config.out!r} cannot be used ({reason}): check the address and your rights"
        ) from None
    return store


def decides(
    config: PredictConfig, checkpoint: Checkpoint, units: Mapping[str, Sequence[Unit]]
) -> dict[str, Any]:
    """All settings that determine the results, by flag; batch sizes and workers affect only speed."""
    corpus, gold = config.corpus, config.gold
    asked: dict[str, Any] = {
        "MODEL (its files)": checkpoint.fingerprint,
        "CORPUS_URI": list(corpus.uris),
        "CORPUS_URI (its files)": _files_hash(units[CORPUS]),
        "--text": corpus.text,
        "--id": corpus.id,
        "--where": corpus.where,
        "--max-chars": corpus.max_chars,
        "--limit": corpus.limit,
        "--gold": list(gold.uris) if gold else None,
        "--gold (its files)": _files_hash(units[GOLD]) if gold else None,
        "--gold-text": gold.text if gold else None,
        "--label": gold.gold if gold else None,
        "--target-precision": config.target_precision,
        "--delta": config.delta,
        "--threshold": config.thresholds,
        "--min-grade": config.min_grade,
        "--max-tokens": checkpoint.max_tokens,
        "--dtype": config.dtype,
        "--piece-rows": config.piece_rows,
        "--with-text": config.with_text,
        "--keep-columns": list(corpus.keep_columns),
        "--format": config.format,
    }
    return json.loads(json.dumps(asked))  # the form in which it is read back


def _require_same(config: PredictConfig, asked: dict[str, Any], started: dict[str, Any]) -> None:
    for field, value in asked.items():
        if value != started.get(field):
            raise ConfigError(
                f"{field}: {value!r} now, but {config.out!r} was started with {started.get(field)!r}: "
                "give what it was started with, or another --out"
            )
    if not config.resume:
        raise ConfigError(
            f"--out: {config.out!r} holds predictions: resume with --resume, or give another folder"
        )


def _files_hash(units: Sequence[Unit]) -> str:
    """Hash of file names, sizes and modification times; a Hugging Face data set contributes only its name."""
    whole = hashlib.blake2b(digest_size=16)
    for base in dict.fromkeys(unit.base for unit in units):
        paths = sorted({unit.path for unit in units if unit.base == base})
        whole.update(json.dumps(paths).encode())
        if base:
            infos = open_filesystem(base)[0].get_file_info(paths)
            whole.update(json.dumps([(info.size, info.mtime_ns) for info in infos]).encode())
    return whole.hexdigest()


def predictions(texts: pa.Table, p_NC: np.ndarray, thresholds: Thresholds, with_text: bool) -> pa.Table:
    """PREDICTIONS for the given TEXTS, with gold if known, and with the kept columns.

    A kept column that is named like one of the results gets the prefix ``corpus_``.
    """
    names = np.array(thresholds.labels, dtype=object)
    columns: dict[str, Any] = {
        "id": texts["id"],
        "source": texts["source"],
        "position": texts["position"],
        "label": pa.array(names[p_NC.argmax(axis=1)], pa.string()),
        "confidence": pa.array(confidence(p_NC), pa.float32()),
        "accepted": pa.array(thresholds.accept(p_NC)),
        "probs": list_column(p_NC),
    }
    fields = list(PREDICTIONS)
    if thresholds.min_grade is not None:
        columns["p_min_grade"] = pa.array(grade_confidence(p_NC, thresholds.min_grade), pa.float32())
        fields.append(pa.field("p_min_grade", pa.float32(), nullable=False))
    for name, is_wanted in (("text", with_text), ("gold", bool((texts["gold"].to_numpy() >= 0).any()))):
        if is_wanted:
            columns[name] = texts[name]
            fields.append(texts.schema.field(name))
    taken = {*PREDICTIONS.names, "p_min_grade", "text", "gold"}
    for column in texts.column_names:
        if column.startswith(KEPT):
            name = column.removeprefix(KEPT)
            name = f"corpus_{name}" if name in taken else name
            columns[name] = texts[column]
            fields.append(pa.field(name, pa.string()))
    schema = pa.schema(fields, metadata={"labels": json.dumps(list(thresholds.labels), ensure_ascii=False)})
    return pa.table(columns, schema=schema)


def write(store: RunStore, file: str, table: pa.Table) -> None:
    """Write predictions in the format of the file's ending.

    csv has no lists: there, every label's probability has a column ``p_LABEL``. It is for spreadsheets: texts
    and names are those of :func:`~llkd_ray.display.escape_formula`.
    """
    if file.endswith(".parquet"):
        store.write_table(file, table)
        return
    if file.endswith(".jsonl"):
        lines = (json.dumps(row, ensure_ascii=False) for row in table.to_pylist())
        store.write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
        return
    labels = json.loads(table.schema.metadata[b"labels"])
    p_NC = matrix_of(table["probs"], len(labels))
    place = table.column_names.index("probs")
    table = table.remove_column(place)
    for number, label in enumerate(labels):
        table = table.add_column(place + number, f"p_{label}", pa.array(p_NC[:, number], pa.float32()))
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(_with_cells(table, escape_formula), sink)
    store.write_bytes(file, sink.getvalue().to_pybytes())


def read(store: RunStore, file: str, columns: list[str] | None = None) -> pa.Table:
    """A file that :func:`write` has written; ``columns``: only these."""
    if file.endswith(".parquet"):
        return store.read_table(file, columns)
    content = store.read_bytes(file)
    block = min(len(content) + 1, 2**31 - 1)  # a row, which may be long, must not lie in two blocks
    strings = pa.schema([field for field in PREDICTIONS if field.type == pa.string()])
    source = pa.BufferReader(content)
    if file.endswith(".jsonl"):
        parse = pa.json.ParseOptions(explicit_schema=strings)
        table = pa.json.read_json(source, pa.json.ReadOptions(block_size=block), parse)
        return table if columns is None else table.select(columns)
    convert = pa.csv.ConvertOptions(column_types=strings, include_columns=columns)
    table = pa.csv.read_csv(source, pa.csv.ReadOptions(block_size=block), convert_options=convert)
    return _with_cells(table, unescape_formula)


def _with_cells(table: pa.Table, change: Callable[[str], str]) -> pa.Table:
    """The table with ``change`` applied to all strings and to the columns' names."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            cells = [None if cell is None else change(cell) for cell in table[place].to_pylist()]
            table = table.set_column(place, field, pa.array(cells, pa.string()))
    return table.rename_columns([change(name) for name in table.column_names])


Counts = tuple[int, int]
"""Rows with a label, and those of them that are accepted."""


def count_labels(table: pa.Table) -> dict[str, Counts]:
    """The counts of every label that occurs."""
    both = table.select(["label", "accepted"])
    groups = both.group_by("label").aggregate([("accepted", "count"), ("accepted", "sum")])
    return {one["label"]: (one["accepted_count"], one["accepted_sum"]) for one in groups.to_pylist()}


def read_gold(store: RunStore, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """int[N] and float64[N, C]: true labels and the model's probabilities of all gold texts."""
    golds, probs = [np.empty(0, dtype=np.int64)], [np.empty((0, n_classes))]
    for name in store.names(FOLDERS[GOLD], ".parquet"):
        table = store.read_table(f"{FOLDERS[GOLD]}/{name}", ["gold", "probs"])
        golds.append(table["gold"].to_numpy())
        probs.append(matrix_of(table["probs"], n_classes))
    return np.concatenate(golds), np.concatenate(probs)


INTERVAL = 0.95  # confidence level
STARTS = 3
"""Where a search for a threshold starts. One start at the top would end at the first wrong answer."""
ALWAYS, NEVER = 0.0, np.inf


@dataclass(frozen=True)
class Measured:
    """One threshold, and its results on the gold texts for which the model predicts this label."""

    threshold: float | None
    """None: no threshold is certain to reach the target precision, so nothing is accepted."""
    given: bool
    """Whether the user set it; otherwise it was fitted."""
    gold_texts: int
    """Gold texts with this label."""
    answered: int
    """Texts for which the model predicts this label; all texts with ``min_grade``."""
    answered_right: int
    accepted: int
    right: int
    """Correct among the accepted texts."""
    precision: float | None
    """right / accepted; None if nothing is accepted."""
    precision_low: float | None
    precision_high: float | None
    """Ends of the ``INTERVAL`` interval. The fit used the same texts, so both are slightly too high."""
    coverage: float
    """accepted / answered."""
    recall: float
    """right / gold_texts."""
    needed: int | None
    """Texts that must be accepted, all of them right, for the target precision to be certain enough."""


@dataclass(frozen=True)
class Thresholds:
    """Which answers are accepted. Without any threshold, all are."""

    labels: tuple[str, ...]
    threshold_C: tuple[float, ...]
    """By label; may be ALWAYS or NEVER. With ``min_grade`` only that grade's threshold applies."""
    min_grade: int | None = None
    """Index of the lowest accepted grade."""

    @classmethod
    def given(
        cls, labels: Sequence[str], by_label: Mapping[str, float], min_grade: str | None = None
    ) -> Thresholds:
        """From thresholds by label; labels without one are always accepted."""
        grade = None if min_grade is None else list(labels).index(min_grade)
        return cls(tuple(labels), tuple(by_label.get(name, ALWAYS) for name in labels), grade)

    def accept(self, p_NC: Floats) -> np.ndarray:
        """bool[N]: whether each answer is accepted."""
        if self.min_grade is not None:
            return grade_confidence(p_NC, self.min_grade) >= self.threshold_C[self.min_grade]
        return confidence(p_NC) >= np.array(self.threshold_C)[p_NC.argmax(axis=1)]


def grade_confidence(p_NC: Floats, grade: int) -> Floats:
    """float64[N]: probability that a text is of this grade or higher."""
    return np.asarray(p_NC, dtype=np.float64)[:, grade:].sum(axis=1)


def fit(
    thresholds: Thresholds,
    p_NC: Floats,
    gold_N: Ints,
    wanted: float | None,
    given: Sequence[str],
    delta: float = 0.05,
) -> tuple[Thresholds, dict[str, Measured]]:
    """The lowest thresholds whose precision is ``wanted``, with their results on gold, by label.

    The probability that any label's precision on new texts like those of gold is lower is at most ``delta``,
    which the fitted labels share equally (Bonferroni). Labels in ``given`` keep their threshold and are only
    measured, as are all labels if ``wanted`` is None. Raises ValueError if gold has no texts.
    """
    gold_N, p_NC = np.asarray(gold_N), np.asarray(p_NC)
    if not gold_N.size:
        raise ValueError("gold holds no text: there is nothing to fit thresholds to")
    labels, found_C, measured = thresholds.labels, list(thresholds.threshold_C), {}
    grade = thresholds.min_grade
    questions = range(len(labels)) if grade is None else [grade]
    fitted = [c for c in questions if wanted is not None and labels[c] not in given]
    share = delta / max(1, len(fitted))
    for c in questions:
        answered_N = p_NC.argmax(axis=1) == c if grade is None else np.ones(gold_N.size, dtype=bool)
        is_gold_N = gold_N == c if grade is None else gold_N >= c
        confidence_N = confidence(p_NC) if grade is None else grade_confidence(p_NC, c)
        confidence_M, is_right_M = confidence_N[answered_N], is_gold_N[answered_N]
        n_gold = int(is_gold_N.sum())
        needed = None
        if c in fitted:
            assert wanted is not None
            needed = fewest_texts(wanted, share)
            found_C[c] = lowest_threshold(confidence_M, is_right_M, wanted, share)
        measured[labels[c]] = measure(found_C[c], confidence_M, is_right_M, n_gold, needed)
    return Thresholds(labels, tuple(found_C), thresholds.min_grade), measured


def fewest_texts(wanted: float, delta: float) -> int:
    """Texts that are enough for :func:`lowest_threshold` if all of them are right."""
    return math.ceil(math.log(delta / STARTS) / math.log(wanted))


def lowest_threshold(confidence_M: Floats, is_right_M: np.ndarray, wanted: float, delta: float) -> float:
    """A low threshold whose precision is ``wanted`` or more except with probability ``delta``; else NEVER.

    Fixed sequence testing with several starts (A. N. Angelopoulos et al., "Learn then Test", arXiv
    2110.01052): from each start, thresholds are lowered while the one-sided lower bound of the precision
    (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934) at ``delta / STARTS`` is ``wanted`` or more. So
    nothing is chosen for looking best, which would break the promise in half of all cases.
    """
    order = np.argsort(-confidence_M, kind="stable")
    # T: the distinct thresholds, highest first, each with the texts that it accepts and the right ones.
    threshold_T, first_T = np.unique(-confidence_M[order], return_index=True)
    accepted_T = np.append(first_T[1:], len(order))[: len(threshold_T)]
    right_T = np.cumsum(is_right_M[order])[accepted_T - 1]
    fewest = fewest_texts(wanted, delta)
    starts = np.searchsorted(accepted_T, np.linspace(fewest, max(fewest, len(order)), STARTS, endpoint=False))
    lower_T = beta.ppf(delta / STARTS, np.maximum(right_T, 1), accepted_T - right_T + 1)
    failed = np.flatnonzero((lower_T < wanted) | (right_T == 0))
    # For each start, the first failure from there on; the threshold before it is the lowest of its walk.
    ends = np.append(failed, len(threshold_T))[np.searchsorted(failed, starts)]
    lowest = max((end - 1 for start, end in zip(starts, ends, strict=True) if end > start), default=None)
    return NEVER if lowest is None else float(-threshold_T[lowest])


def measure(
    threshold: float, confidence_M: Floats, is_right_M: np.ndarray, n_gold: int, needed: int | None
) -> Measured:
    """The results of a threshold; ``needed``: None if the user set it. See :class:`Measured`."""
    accepted_M = np.asarray(confidence_M) >= threshold
    accepted, right = int(accepted_M.sum()), int(np.asarray(is_right_M)[accepted_M].sum())
    low, high = binomial_interval(right, accepted, INTERVAL)
    return Measured(
        threshold=None if threshold == NEVER else threshold,
        given=needed is None,
        gold_texts=n_gold,
        answered=accepted_M.size,
        answered_right=int(np.sum(is_right_M)),
        accepted=accepted,
        right=right,
        precision=right / accepted if accepted else None,
        precision_low=low,
        precision_high=high,
        coverage=accepted / accepted_M.size if accepted_M.size else 0.0,
        recall=right / n_gold if n_gold else 0.0,
        needed=needed,
    )


def as_dict(
    thresholds: Thresholds, measured: Mapping[str, Measured], wanted: float | None, delta: float, n_gold: int
) -> dict[str, Any]:
    """The content of thresholds.json."""
    min_grade = None if thresholds.min_grade is None else thresholds.labels[thresholds.min_grade]
    return {
        "wanted_precision": wanted,
        "delta": None if wanted is None else delta,
        "min_grade": min_grade,
        "gold_texts": n_gold,
        "interval": INTERVAL,
        "labels": {label: asdict(one) for label, one in measured.items()},
    }


def describe(label: str, one: Measured, wanted: float | None) -> str:
    """The result as one line of text."""
    known = f"{one.answered:,} gold texts answered so, {one.gold_texts:,} are"
    if one.threshold is None:
        return (
            f"{label}: precision {wanted:g} is not certain enough, so nothing is accepted ({known}, "
            f"{one.answered_right:,} are both; at least {one.needed:,} of both are needed)"
        )
    if one.precision is None:
        return f"{label}: from {one.threshold:.4f} on nothing in gold is accepted ({known})"
    return (
        f"{label}: from {one.threshold:.4f} on precision {one.precision:.3f} "
        f"[{one.precision_low:.3f}, {one.precision_high:.3f}], coverage {one.coverage:.1%} ({known})"
    )
