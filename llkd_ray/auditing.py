"""An audit of a run: rows to look at go out as a file, and people's answers come back as gold.

Shapes in names: N texts that were labelled and looked at, M texts of the audit, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llkd_ray import audit, audit_files, schemas
from llkd_ray.audit import Wanted
from llkd_ray.audit_answers import ASKED, ESTIMATE, AuditAnswers
from llkd_ray.audit_files import Answer, Question
from llkd_ray.chance import hash_uniform
from llkd_ray.classifier import inspect, load, score
from llkd_ray.config import Config, ConfigError
from llkd_ray.facts import SUMMARY
from llkd_ray.intake import read_calibrator
from llkd_ray.report import CARD, write_pages
from llkd_ray.runs import open_run, run_config
from llkd_ray.schedule import Schedule
from llkd_ray.signals import Floats, Ints, confidence
from llkd_ray.store import (
    MODEL_DIR,
    ROUNDS_DIR,
    TRAINED,
    Examples,
    RunStore,
    matrix_of,
    read_labels,
    round_file,
    trained_rows,
)

LOOK_AT = 20_000
"""Labelled texts that the student is asked about, at most: a random draw where there are more."""
_LOOK_KEY = 0x4C4F4F4B

Say = Callable[[str], None]


@dataclass(frozen=True)
class Labelled:
    """The texts of a run that its teacher has labelled, by row."""

    row_N: Ints
    p_NC: Floats
    """As the run works with them."""

    @property
    def label_N(self) -> Ints:
        return self.p_NC.argmax(axis=1)


def export(
    run_dir: str,
    out: str,
    wanted: Wanted,
    *,
    blind: bool = False,
    look_at: int = LOOK_AT,
    say: Say = print,
) -> int:
    """Write the rows that a person should look at into the new file ``out``; returns how many.

    Raises ConfigError where the run has no student yet, where nothing is left to ask, or where the file is
    there already.
    """
    kind = audit_files.kind_of(out, "--out")
    folder, _, name = out.rpartition("/")
    target = RunStore(folder or ".")
    if target.exists(name):
        raise ConfigError(f"--out: {out!r} is there already, and may hold answers: give another name")
    store = open_run(run_dir, "RUN")
    config = run_config(store)
    examples, labelled = Examples.open(store), _labelled(store, config)
    number = len(labelled.row_N)
    seen = _drawn(labelled, min(look_at, number), wanted, config.run.seed)
    say(f"the student looks at {len(seen.row_N):,} of {number:,} labelled texts")
    texts = examples.read(seen.row_N, ["id", "text"])
    p_student_NC = _asked_of_student(store, config, texts["text"].to_pylist())
    answers = AuditAnswers.read(store)
    answered_N = np.isin(seen.row_N, answers.row_M)
    place_M, why_M, is_random_N = audit.choose(
        seen.row_N, seen.p_NC, p_student_NC, answered_N, wanted, config.run.seed
    )
    if not place_M.size:
        raise ConfigError("RUN: every text that would be asked about is answered: raise --random")
    names = config.labels.names
    label_N, student_N = seen.label_N, p_student_NC.argmax(axis=1)
    sure_N, student_sure_N = confidence(seen.p_NC), confidence(p_student_NC)
    chosen = texts.take(pa.array(place_M))
    questions = [
        Question(
            int(seen.row_N[place]),
            chosen["id"][i].as_py(),
            why_M[i],
            chosen["text"][i].as_py(),
            names[label_N[place]],
            float(sure_N[place]),
            names[student_N[place]],
            float(student_sure_N[place]),
        )
        for i, place in enumerate(place_M.tolist())
    ]
    # Before the file, or rows could come back that nobody knows of.
    asked_N = is_random_N.copy()
    asked_N[place_M] = True
    why = dict(zip(seen.row_N[place_M].tolist(), why_M, strict=True))
    _note_asked(store, seen, texts["id"], student_N, student_sure_N, why, is_random_N, asked_N)
    target.write_bytes(name, audit_files.written(questions, kind, blind))
    if kind == ".json":
        target.write_bytes(f"{name}.xml", audit_files.labelling_config(names).encode())
    counts = ", ".join(f"{why_M.count(one)} {one}" for one in dict.fromkeys(why_M))
    say(f"{len(questions)} texts ({counts}): {target.uri(name)}")
    return len(questions)


def bring_back(run_dir: str, rows: str, *, replace: bool = False, say: Say = print) -> dict[str, Any]:
    """Take people's answers into the run, say what the random sample is worth, and renew the model card.

    The same file a second time changes nothing. Raises ConfigError, and takes nothing, where a row was not
    asked about, a label is none of the run's, or two answers contradict each other (of an answer from
    before and a new one, the new one counts where ``replace``). Returns what audit/estimate.json holds.
    """
    kind = audit_files.kind_of(rows, "ROWS")
    store = open_run(run_dir, "RUN")
    config = run_config(store)
    if not store.exists(ASKED):
        raise ConfigError(f"RUN: nobody was asked about {run_dir!r} yet: begin with audit.py export")
    asked = store.read_table(ASKED)
    folder, _, name = rows.rpartition("/")
    try:
        content = RunStore(folder or ".").read_bytes(name)
    except FileNotFoundError:
        raise ConfigError(f"ROWS: {rows!r} does not exist: give the file with the answers") from None
    given = audit_files.read(content, kind, rows)
    new = checked(given, asked, config.labels.names)
    old = AuditAnswers.read(store).by_row()
    for row, label in new.items():
        if old.get(row, label) != label and not replace:
            names = config.labels.names
            raise ConfigError(
                f"ROWS: row {row} is {names[label]!r} here, but was {names[old[row]]!r} before: correct one, "
                "or take the new answers with --replace"
            )
    AuditAnswers.of(old | new).write(store)
    fresh, changed = len(new.keys() - old.keys()), sum(old.get(row, x) != x for row, x in new.items())
    empty = len({one.row for one in given}) - len(new)
    say(
        f"{fresh} new answers, {changed} changed, {len(new) - fresh - changed} known, {empty} rows left empty"
    )
    found = estimated(store, config)
    store.write_json(ESTIMATE, found)
    for line in audit.in_words(found):
        say(line)
    if store.exists(SUMMARY) and store.exists(CARD):
        write_pages(store)
    return found


def checked(given: Sequence[Answer], asked: pa.Table, names: Sequence[str]) -> dict[int, int]:
    """The label of each row that has one; raises ConfigError for the first answer that cannot be taken."""
    identity = dict(zip(asked["row"].to_pylist(), asked["id"].to_pylist(), strict=True))
    index = {name: c for c, name in enumerate(names)}
    found: dict[int, int] = {}
    for one in given:
        digits = one.row.removesuffix(".0")
        row = int(digits) if digits.isascii() and digits.isdigit() else -1
        if row not in identity:
            raise ConfigError(
                f"ROWS: {one.where}: row {one.row!r} was not asked about: keep the column 'row' of the export"
            )
        if one.id is not None and one.id != identity[row]:
            raise ConfigError(
                f"ROWS: {one.where}: row {row} has the id {one.id!r}, in the run it is {identity[row]!r}: is "
                "this the export of another run?"
            )
        if not one.label:
            continue
        label = index.get(one.label, index.get(audit_files.plain(one.label)))
        if label is None:
            raise ConfigError(
                f"ROWS: {one.where}: {one.label!r} is no label: take {', '.join(names)}, or leave it empty"
            )
        if found.setdefault(row, label) != label:
            raise ConfigError(
                f"ROWS: {one.where}: row {row} is {names[label]!r} here and {names[found[row]]!r} before in "
                "the same file: correct one"
            )
    return found


def estimated(store: RunStore, config: Config) -> dict[str, Any]:
    """What people's answers say, from the files of a run."""
    asked = store.read_table(ASKED)
    row_M = asked["row"].to_numpy()
    return audit.estimate(
        AuditAnswers.read(store).by_row(),
        row_M,
        asked["is_random"].to_numpy(zero_copy_only=False),
        asked["teacher"].to_numpy(),
        asked["student"].to_numpy(),
        asked["why"].to_pylist(),
        np.isin(row_M, trained_rows(store)),
        len(_labelled(store, config).row_N),
    )


# What a run holds


def _labelled(store: RunStore, config: Config) -> Labelled:
    """Pool and hold-out; of several answers to a row the last counts, for reviews come last."""
    examples = Examples.open(store)
    schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
    tickets = [*schedule.holdout_tickets, *schedule.pool_tickets, *schedule.review_tickets]
    labels = read_labels(store, tickets)
    calibrator = read_calibrator(store, config)
    if calibrator is None or not len(labels):
        raise ConfigError("RUN: the teacher has labelled nothing yet: let the run finish a round first")
    rows = labels["row"].to_numpy()
    row_N, from_end_N = np.unique(rows[::-1], return_index=True)
    place_N = rows.size - 1 - from_end_N
    probs_NC = matrix_of(labels["probs"].take(pa.array(place_N)), len(config.labels.names))
    return Labelled(row_N, calibrator.apply(probs_NC))


def _drawn(labelled: Labelled, number: int, wanted: Wanted, seed: int) -> Labelled:
    """The random sample, and beside it a random draw, up to ``number`` texts together."""
    sample = audit.random_order(labelled.row_N, seed)[: wanted.random]
    others = np.argsort(hash_uniform(seed ^ _LOOK_KEY, labelled.row_N), kind="stable")
    others = others[~np.isin(others, sample)][: max(0, number - sample.size)]
    place_N = np.sort(np.concatenate([sample, others]))
    return Labelled(labelled.row_N[place_N], labelled.p_NC[place_N])


def _asked_of_student(store: RunStore, config: Config, texts: Sequence[str]) -> Floats:
    """float[N, C]: by the model of a finished run, else by its last checkpoint."""
    folder = MODEL_DIR if store.exists(SUMMARY) else _last_checkpoint(store)
    checkpoint = inspect(store.uri(folder), max_tokens=config.student.max_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load(checkpoint, "auto", device)
    return score(student, texts, checkpoint.max_tokens, None, checkpoint.temperature)


def _last_checkpoint(store: RunStore) -> str:
    paths = [round_file(k, TRAINED) for k in range(len(store.folders(ROUNDS_DIR)))]
    trained = [path for path in paths if store.exists(path)]
    if not trained:
        raise ConfigError("RUN: no round is trained yet, so there is no student to ask: let one finish first")
    return str(store.read_json(trained[-1])["checkpoint"])


def _note_asked(
    store: RunStore,
    seen: Labelled,
    ids: pa.ChunkedArray,
    student_N: Ints,
    student_sure_N: Floats,
    why: dict[int, str],
    is_random_N: np.ndarray,
    asked_N: np.ndarray,
) -> None:
    """Add to what was asked before, whose opinions stay as they were; the sample is what it is now."""
    sample = set(seen.row_N[is_random_N].tolist())
    there = store.read_table(ASKED).to_pylist() if store.exists(ASKED) else []
    by_row = {one["row"]: one | {"is_random": one["row"] in sample} for one in there}
    label_N, sure_N = seen.label_N, confidence(seen.p_NC)
    for place in np.flatnonzero(asked_N).tolist():
        row = int(seen.row_N[place])
        if row not in by_row or row in why:
            by_row[row] = {
                "row": row,
                "id": ids[place].as_py(),
                "why": why.get(row, audit.RANDOM),
                "is_random": row in sample,
                "teacher": int(label_N[place]),
                "teacher_confidence": float(sure_N[place]),
                "student": int(student_N[place]),
                "student_confidence": float(student_sure_N[place]),
            }
    rows = [by_row[row] for row in sorted(by_row)]
    store.write_table(ASKED, pa.Table.from_pylist(rows, schema=schemas.AUDIT_ASKED))
