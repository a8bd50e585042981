"""Signs that a teacher is of no use, from its first labels: usually the prompt does not fit the model.

Shapes in names: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from llkd_ray.display import percent
from llkd_ray.metrics.uncertainty import normalise
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    LABELS_DIR,
    NO_LABEL,
    TEACHER_CHECK,
    RunStore,
    teacher_quarantine_file,
    ticket_of,
)
from llkd_ray.storage.tables import Examples, matrix_of

ENOUGH = 200
"""Labelled texts that the check needs."""
MAX_OFF_LABEL = 0.2
MAX_SHARE = 0.95
MIN_GOLD = 50
"""Texts with gold that a comparison with the most frequent class needs."""
TEXT_CHARS = 80
ADVICE = "see teacher.prompt (instruction, answer, chat) with --dry-run, which prints a whole prompt"


def check_labels(store: RunStore, names: Sequence[str]) -> list[str]:
    """Write warnings about the run's first labels to TEACHER_CHECK, and return them."""
    labels, silent = tables.LABELS.empty_table(), []
    for name in store.names(LABELS_DIR, ".parquet"):
        labels = pa.concat_tables([labels, store.read_table(f"{LABELS_DIR}/{name}")])
        if store.exists(refused := teacher_quarantine_file(ticket_of(name))):
            refused = store.read_table(refused, ["reason", "start_of_text"]).to_pylist()
            silent += [one["start_of_text"] for one in refused if one["reason"] == NO_LABEL]
        if len(labels) + len(silent) >= ENOUGH:
            break
    else:
        return []
    texts = Examples.open(store).read(labels["row"].to_numpy(), ["text", "gold"])
    found = warnings_about(
        matrix_of(labels["probs"], len(names)),
        labels["off_label"].to_numpy(),
        texts["gold"].to_numpy(),
        texts["text"].to_pylist(),
        names,
        silent,
    )
    store.write_json(TEACHER_CHECK, {"texts": len(labels) + len(silent), "warnings": found})
    return found


def warnings_about(
    p_NC: np.ndarray,
    off_label_N: np.ndarray,
    gold_N: np.ndarray,
    texts: Sequence[str],
    names: Sequence[str],
    silent: Sequence[str] = (),
) -> list[str]:
    """What is wrong with these answers, in sentences with an example and a likely cause; usually nothing.

    ``silent``: the starts of further texts, which are in quarantine because their answers were no label.
    """
    answer_N, found = p_NC.argmax(axis=1), []
    n = len(answer_N)
    if (none := len(silent) / (n + len(silent))) > MAX_OFF_LABEL:
        found.append(
            f"{percent(none)} of {n + len(silent)} texts are in quarantine, because the teacher's answer is "
            f"none of the labels, for example to {_example(silent[0])}; {ADVICE}"
        )
    if not n:
        return found
    if (off := float(off_label_N.mean())) > MAX_OFF_LABEL:
        worst = int(off_label_N.argmax())
        found.append(
            f"{percent(off)} of the teacher's probability is on answers that are no label (mean of {n} "
            f"texts), for example {_example(texts[worst])}: {percent(float(off_label_N[worst]))}, and "
            f"{names[answer_N[worst]]!r} is its best label; {ADVICE}"
        )
    share_C = np.bincount(answer_N, minlength=len(names)) / n
    if (most := float(share_C.max())) > MAX_SHARE:
        label, other = int(share_C.argmax()), int(normalise(p_NC).max(axis=1).argmin())
        found.append(
            f"the teacher says {names[label]!r} for {percent(most)} of {n} texts, for example for "
            f"{_example(texts[other])}; if the corpus is not like that, {ADVICE}"
        )
    known_N = gold_N >= 0
    if known_N.sum() >= MIN_GOLD:
        right = float((answer_N == gold_N)[known_N].mean())
        majority = float(np.bincount(gold_N[known_N]).max() / known_N.sum())
        if right <= majority:
            wrong = int(np.flatnonzero(known_N & (answer_N != gold_N))[0])
            found.append(
                f"the teacher is right on {percent(right)} of {int(known_N.sum())} texts with gold, no more "
                f"than the most frequent class alone ({percent(majority)}); for example it says "
                f"{names[answer_N[wrong]]!r} for {_example(texts[wrong])}, gold is "
                f"{names[gold_N[wrong]]!r}; {ADVICE}"
            )
    return found


def _example(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= TEXT_CHARS else line[:TEXT_CHARS].rstrip() + "…")
