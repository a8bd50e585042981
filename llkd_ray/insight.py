"""What a finished run shows of classes and texts: where the student errs, where it and the teacher differ.

Kept in a file of its own, small however large the run, so that the report need not go through the texts.

Legend: N texts, C classes, B blocks of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.facts import INSIGHT
from llkd_ray.glance import GLANCE
from llkd_ray.metrics import Measure
from llkd_ray.signals import Floats, Ints, confidence
from llkd_ray.store import RunStore, round_file
from llkd_ray.teacher_quality import reliability

SAMPLES = 8
"""Texts of a kind that are kept."""
SAMPLE_CHARS = 500
POOL_LOOK = 200_000
"""Pool texts whose gold is counted at most."""
BLOCK = 10_000
PAIRS = 5_000
"""Pairs of true and answered class that are kept at most, the most frequent."""


def write_insight(store: RunStore, measure: Measure, last: int) -> None:
    """Write INSIGHT of a run that is finished after round ``last``."""
    row_N, p_NC = measure.predictions(last)
    store.write_json(
        INSIGHT,
        {
            **_against_gold(measure, row_N, p_NC),
            "pool_gold": _pool_gold(measure),
            "disagreements": _disagreements(measure, row_N, p_NC),
            **_looked_at(store, measure, last),
        },
    )


def _against_gold(measure: Measure, row_N: Ints, p_NC: Floats) -> dict[str, Any]:
    """The student on the test set: pairs of classes with their count, and bins of confidence."""
    known_N, gold_N = measure.gold(row_N)
    if not known_N.any():
        return {"confusion": None, "reliability": None}
    gold_N, p_NC = gold_N[known_N], p_NC[known_N]
    answer_N = p_NC.argmax(axis=1)
    pairs, times = np.unique(np.stack([gold_N, answer_N], axis=1), axis=0, return_counts=True)
    kept = np.sort(np.argsort(-times, kind="stable")[:PAIRS])
    return {
        "confusion": [[*pair, n] for pair, n in zip(pairs[kept].tolist(), times[kept].tolist(), strict=True)],
        "reliability": reliability(confidence(p_NC), answer_N == gold_N),
    }


def _pool_gold(measure: Measure) -> list[int] | None:
    """int[C]: pool texts of each true class, as far as that is known; of blocks all over a large pool."""
    examples = measure.examples
    n_blocks = -(-min(examples.n_pool, POOL_LOOK) // BLOCK)
    start_B = np.linspace(0, max(0, examples.n_pool - BLOCK), n_blocks).astype(np.int64)
    row_N = np.unique(np.concatenate([np.arange(start, start + BLOCK) for start in start_B]))
    gold_N = examples.read(row_N[row_N < examples.n_pool], ["gold"])["gold"].to_numpy()
    known_N = gold_N[gold_N >= 0]
    return np.bincount(known_N, minlength=measure.n_classes).tolist() if known_N.size else None


def _disagreements(measure: Measure, row_N: Ints, p_NC: Floats) -> list[dict[str, Any]]:
    """Of texts that nobody was trained on, those where student and teacher are surest of different labels."""
    tickets = [*measure.schedule.holdout_tickets, *measure.schedule.test_tickets]
    teacher_row, p_teacher = measure.teacher_opinion(tickets)
    both_N, mine, theirs = np.intersect1d(row_N, teacher_row, return_indices=True)
    p_student_NC, p_teacher_NC = p_NC[mine], p_teacher[theirs]
    student_N, teacher_N = p_student_NC.argmax(axis=1), p_teacher_NC.argmax(axis=1)
    sure_N = np.minimum(confidence(p_student_NC), confidence(p_teacher_NC))
    differ = np.flatnonzero(student_N != teacher_N)
    chosen = differ[np.argsort(-sure_N[differ], kind="stable")[:SAMPLES]]
    return [
        text
        | {
            "student": int(student_N[i]),
            "student_confidence": float(p_student_NC[i].max()),
            "teacher": int(teacher_N[i]),
            "teacher_confidence": float(p_teacher_NC[i].max()),
        }
        for i, text in zip(chosen, _texts(measure, both_N[chosen]), strict=True)
    ]


def _looked_at(store: RunStore, measure: Measure, last: int) -> dict[str, list[dict[str, Any]]]:
    """Of what rounds chose from, at a glance: where both signals were high, and where both sides doubted."""
    files = [file for k in range(last + 1) if store.exists(file := round_file(k, GLANCE))]
    glances = [store.read_table(file) for file in files]
    if not glances:  # a run of an older version
        return {"useful": [], "doubtful": []}
    table = pa.concat_tables(glances)
    confidence_N, uncertainty_N = (table[name].to_numpy() for name in ("confidence", "uncertainty"))
    is_useful_N = table["selected"].to_numpy() & ~np.isnan(uncertainty_N)
    doubt_N = (1.0 - confidence_N) * np.where(np.isnan(uncertainty_N), 1.0, uncertainty_N)
    return {
        "useful": _top(measure, table, np.where(is_useful_N, confidence_N * uncertainty_N, -np.inf)),
        "doubtful": _top(measure, table, doubt_N),
    }


def _top(measure: Measure, table: pa.Table, value_N: Floats) -> list[dict[str, Any]]:
    """The texts of largest value, each once; minus infinity keeps one out."""
    by_value = np.argsort(-value_N, kind="stable")
    by_value = by_value[np.isfinite(value_N[by_value])]
    first = np.sort(np.unique(table["row"].to_numpy()[by_value], return_index=True)[1])[:SAMPLES]
    chosen = table.take(pa.array(by_value[first])).to_pylist()
    texts = _texts(measure, np.array([one["row"] for one in chosen], dtype=np.int64))
    return [
        text
        | {
            "teacher": one["label"],
            "teacher_confidence": one["confidence"],
            "uncertainty": None if np.isnan(one["uncertainty"]) else one["uncertainty"],
        }
        for one, text in zip(chosen, texts, strict=True)
    ]


def _texts(measure: Measure, row_N: Ints) -> list[dict[str, Any]]:
    """The beginning of each text, and its gold where that is known."""
    table = measure.examples.read(row_N, ["text", "gold"])
    return [
        {"text": one["text"][:SAMPLE_CHARS], "gold": one["gold"] if one["gold"] >= 0 else None}
        for one in table.to_pylist()
    ]
