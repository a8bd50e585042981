"""Audit of a run: rows to review are exported to a file, and people's answers are imported as gold.

There are three kinds of texts: a *random* sample of all labelled texts; of the others, those where teacher
and student *disagree* and both are confident; and of the rest, those where the student is *unsure*. Only the
random sample estimates the quality of the labels: the others were chosen because they are probably wrong or
hard.

Shapes in names: N labelled texts that the student scored, M texts of the audit, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llkd_ray.audit import files
from llkd_ray.audit.files import SCORE_SAMPLE, Answer, Question, SampleSizes
from llkd_ray.config.base import ConfigError
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.display import unescape_formula
from llkd_ray.metrics.quality import binomial_interval
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence, hash_uniform, margin
from llkd_ray.report.pages import write_pages
from llkd_ray.storage import tables
from llkd_ray.storage.checkpoints import inspect
from llkd_ray.storage.run_dir import (
    ASKED,
    CARD,
    ESTIMATE,
    MODEL_DIR,
    ROUNDS_DIR,
    SUMMARY,
    TRAINED,
    RunStore,
    open_run,
    round_file,
    run_config,
)
from llkd_ray.storage.tables import (
    AuditAnswers,
    Examples,
    matrix_of,
    read_calibrator,
    read_labels,
    take_rows,
    trained_rows,
)
from llkd_ray.student.inference import load, score

_SCORE_SAMPLE_KEY = 0x4C4F4F4B
_DRAWN_FROM = b"drawn_from"
"""In the metadata of ASKED: how many texts were labelled when the random sample was drawn."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Labelled:
    """The texts that the run's teacher has labelled, by row."""

    row_N: Ints
    p_NC: Floats
    """The calibrated probabilities that the run uses."""

    @property
    def label_N(self) -> Ints:
        return self.p_NC.argmax(axis=1)


def export(
    run_dir: str,
    out: str,
    sizes: SampleSizes,
    *,
    blind: bool = False,
    score_sample: int = SCORE_SAMPLE,
    say: Say = print,
) -> int:
    """Write the rows that a person should review to the new file ``out``; returns their number.

    Raises ConfigError if the run has no student yet, if there is nothing left to ask, or if the file
    exists.
    """
    kind = files.kind_of(out, "--out")
    folder, _, name = out.rpartition("/")
    target = RunStore(folder or ".")
    if target.exists(name):
        raise ConfigError(f"--out: {out!r} exists and may hold answers: give another name")
    store = open_run(run_dir, "RUN")
    config = run_config(store)
    examples, labelled = Examples.open(store), _labelled(store, config)
    number = len(labelled.row_N)
    seen = _score_sample(labelled, min(score_sample, number), sizes, config.run.seed)
    say(f"the student scores {len(seen.row_N):,} of {number:,} labelled texts")
    texts = examples.read(seen.row_N, ["id", "text"])
    p_student_NC = _student_predictions(store, config, texts["text"].to_pylist())
    answers = AuditAnswers.read(store)
    answered_N = np.isin(seen.row_N, answers.row_M)
    place_M, why_M, is_random_N = choose(
        seen.row_N, seen.p_NC, p_student_NC, answered_N, sizes, config.run.seed
    )
    if not place_M.size:
        raise ConfigError("RUN: every text that would be asked about is answered: raise --random")
    names = config.labels.names
    label_N, student_N = seen.label_N, p_student_NC.argmax(axis=1)
    sure_N, student_sure_N = confidence(seen.p_NC), confidence(p_student_NC)
    chosen = take_rows(texts, place_M)
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
    # Recorded before the file is written, because every answer must find its question.
    asked_N = is_random_N.copy()
    asked_N[place_M] = True
    why = dict(zip(seen.row_N[place_M].tolist(), why_M, strict=True))
    _record_questions(store, number, seen, texts["id"], student_N, student_sure_N, why, is_random_N, asked_N)
    target.write_bytes(name, files.written(questions, kind, blind))
    if kind == ".json":
        target.write_bytes(f"{name}.xml", files.labelling_config(names).encode())
    counts = ", ".join(f"{why_M.count(one)} {one}" for one in dict.fromkeys(why_M))
    say(f"{len(questions)} texts ({counts}): {target.uri(name)}")
    return len(questions)


def import_answers(run_dir: str, rows: str, *, replace: bool = False, say: Say = print) -> dict[str, Any]:
    """Import people's answers into the run, report the random sample's results, and update the model card.

    Importing the same file again changes nothing. Raises ConfigError, and imports nothing, if a row was not
    asked about, a label is unknown to the run, or two answers contradict each other (with ``replace``, a new
    answer overrides an earlier one). Returns the content of audit/estimate.json.
    """
    kind = files.kind_of(rows, "ROWS")
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
    given = files.read(content, kind, rows)
    new = check_answers(given, asked, config.labels.names)
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
    found = estimate_quality(store, config)
    store.write_json(ESTIMATE, found)
    for line in describe(found):
        say(line)
    if store.exists(SUMMARY) and store.exists(CARD):
        write_pages(store)
    return found


def check_answers(given: Sequence[Answer], asked: pa.Table, names: Sequence[str]) -> dict[int, int]:
    """The label of each row that has one; raises ConfigError for the first invalid answer."""
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
        label = index.get(one.label, index.get(unescape_formula(one.label)))
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


def estimate_quality(store: RunStore, config: Config) -> dict[str, Any]:
    """Evaluate people's answers, from the files of a run.

    They speak for the texts that were labelled when the sample was drawn, which may be fewer than now.
    """
    asked = store.read_table(ASKED)
    drawn_from = int(asked.schema.metadata[_DRAWN_FROM])
    row_M = asked["row"].to_numpy()
    return estimate(
        AuditAnswers.read(store).by_row(),
        row_M,
        asked["is_random"].to_numpy(zero_copy_only=False),
        asked["teacher"].to_numpy(),
        asked["student"].to_numpy(),
        asked["why"].to_pylist(),
        np.isin(row_M, trained_rows(store)),
        drawn_from,
        len(_labelled(store, config).row_N) - drawn_from,
    )


# Contents of a run


def _labelled(store: RunStore, config: Config) -> Labelled:
    """Pool and hold-out; of several answers for a row the last one counts, because reviews come last."""
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


def _score_sample(labelled: Labelled, number: int, sizes: SampleSizes, seed: int) -> Labelled:
    """The random sample plus further random texts, up to ``number`` texts in total."""
    sample = random_order(labelled.row_N, seed)[: sizes.random]
    others = np.argsort(hash_uniform(seed ^ _SCORE_SAMPLE_KEY, labelled.row_N), kind="stable")
    others = others[~np.isin(others, sample)][: max(0, number - sample.size)]
    place_N = np.sort(np.concatenate([sample, others]))
    return Labelled(labelled.row_N[place_N], labelled.p_NC[place_N])


def _student_predictions(store: RunStore, config: Config, texts: Sequence[str]) -> Floats:
    """float[N, C]: by the model of a finished run, else by its last checkpoint."""
    folder = MODEL_DIR if store.exists(SUMMARY) else _last_checkpoint(store)
    checkpoint = inspect(store.uri(folder), max_tokens=config.student.max_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load(checkpoint, "auto", device)
    return score(student, texts, checkpoint.max_tokens)


def _last_checkpoint(store: RunStore) -> str:
    paths = [round_file(k, TRAINED) for k in range(len(store.folders(ROUNDS_DIR)))]
    trained = [path for path in paths if store.exists(path)]
    if not trained:
        raise ConfigError("RUN: no round is trained yet, so there is no student to ask: let one finish first")
    return str(store.read_json(trained[-1])["checkpoint"])


def _record_questions(
    store: RunStore,
    number: int,
    seen: Labelled,
    ids: pa.ChunkedArray,
    student_N: Ints,
    student_sure_N: Floats,
    why: dict[int, str],
    is_random_N: np.ndarray,
    asked_N: np.ndarray,
) -> None:
    """Add to earlier questions, which keep their predictions; the random sample is the current one.

    ``number`` labelled texts are what it was drawn from.
    """
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
                "why": why.get(row, RANDOM),
                "is_random": row in sample,
                "teacher": int(label_N[place]),
                "teacher_confidence": float(sure_N[place]),
                "student": int(student_N[place]),
                "student_confidence": float(student_sure_N[place]),
            }
    rows = [by_row[row] for row in sorted(by_row)]
    table = pa.Table.from_pylist(rows, schema=tables.AUDIT_ASKED)
    store.write_table(ASKED, table.replace_schema_metadata({_DRAWN_FROM: str(number)}))


RANDOM, DISAGREE, UNSURE = "random", "disagree", "unsure"
_KEY = 0x41554449
"""Separates the sample's random numbers from other uses of the same seed."""


def random_order(row_N: Ints, seed: int) -> Ints:
    """int64[N]: indices of the rows in the order in which the random sample takes them.

    A row's rank depends only on the row and the seed, so a larger sample contains the smaller one.
    """
    return np.argsort(hash_uniform(seed ^ _KEY, row_N), kind="stable")


def choose(
    row_N: Ints,
    p_teacher_NC: Floats,
    p_student_NC: Floats,
    answered_N: np.ndarray,
    sizes: SampleSizes,
    seed: int,
) -> tuple[Ints, list[str], np.ndarray]:
    """Indices of the texts to ask about, the reason for each, and bool[N]: the random sample.

    The sample is the first ``sizes.random`` rows of its order, including answered ones, which are not asked
    about again; the other kinds take the highest-ranked texts that are neither answered nor in the sample.
    The returned order is random, because adjacent similar texts tend to be answered alike.
    """
    order_N = random_order(row_N, seed)
    is_random_N = np.zeros(len(row_N), dtype=bool)
    is_random_N[order_N[: sizes.random]] = True
    why = dict.fromkeys(np.flatnonzero(is_random_N & ~answered_N).tolist(), RANDOM)

    label_N = p_teacher_NC.argmax(axis=1)
    both_sure_N = confidence(p_teacher_NC) * confidence(p_student_NC)
    for kind, number, open_N, value_N in (
        (DISAGREE, sizes.disagree, p_student_NC.argmax(axis=1) != label_N, both_sure_N),
        (UNSURE, sizes.unsure, np.ones(len(row_N), dtype=bool), -margin(p_student_NC)),
    ):
        there_N = open_N & ~answered_N & ~is_random_N
        there_N[list(why)] = False
        place_M = np.flatnonzero(there_N)
        best_M = place_M[np.argsort(-value_N[place_M], kind="stable")][:number]
        why |= dict.fromkeys(best_M.tolist(), kind)
    chosen = [place for place in order_N.tolist() if place in why]
    return np.array(chosen, dtype=np.int64), [why[place] for place in chosen], is_random_N


def share(right: int, asked: int) -> dict[str, Any]:
    """A share of texts with its exact 95 % interval; None if no text has an answer."""
    return {
        "texts": asked,
        "right": right,
        "share": right / asked if asked else None,
        "interval": list(binomial_interval(right, asked)),
    }


def estimate(
    answers: Mapping[int, int],
    row_M: Ints,
    is_random_M: np.ndarray,
    teacher_M: Ints,
    student_M: Ints,
    why_M: list[str],
    trained_M: np.ndarray,
    labelled: int,
    labelled_since: int = 0,
) -> dict[str, Any]:
    """Estimates from the answers to the texts that were asked about, for audit/estimate.json.

    ``labelled`` texts are what the random sample was drawn from, ``labelled_since`` were labelled later.
    ``pseudo_labels``: the accuracy of the teacher's labels by the random sample, without bias if the
    whole sample is answered; ``trained_on``: the same for those in it that the student was trained on, which
    are a random sample of all such texts; ``student``: the student's accuracy on those it was not trained on;
    ``asked_for``: how many texts of each kind the teacher labelled correctly, which says nothing of others.
    """
    said_M = np.array([answers.get(row, -1) for row in row_M.tolist()])
    known_M, right_M = said_M >= 0, teacher_M == said_M
    sample_M = is_random_M & known_M
    by_kind = {}
    for kind in (RANDOM, DISAGREE, UNSURE):
        of_kind_M = known_M & np.array([why == kind for why in why_M], dtype=bool)
        by_kind[kind] = {"texts": int(of_kind_M.sum()), "right": int((right_M & of_kind_M).sum())}
    unseen_M = sample_M & ~trained_M
    return {
        "labelled": labelled,
        "labelled_since": labelled_since,
        "answered": int(known_M.sum()),
        "sample": int(is_random_M.sum()),
        "unanswered_in_sample": int((is_random_M & ~known_M).sum()),
        "pseudo_labels": share(int((right_M & sample_M).sum()), int(sample_M.sum())),
        "trained_on": share(int((right_M & sample_M & trained_M).sum()), int((sample_M & trained_M).sum())),
        "student": share(int(((student_M == said_M) & unseen_M).sum()), int(unseen_M.sum())),
        "asked_for": by_kind,
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = [
        f"pseudo-labels: {_describe_share(found['pseudo_labels'])}, by the random sample alone, which stands "
        f"for {found['labelled']:,} labelled texts without bias; the other texts were chosen for being "
        "doubtful and count nothing here"
    ]
    if found["labelled_since"]:
        lines.append(
            f"{found['labelled_since']:,} texts were labelled after the sample was drawn: it covers "
            "none of them, so export again"
        )
    if found["unanswered_in_sample"]:
        lines.append(
            f"{found['unanswered_in_sample']} of the random sample's {found['sample']} texts have no answer: "
            "if those are the hard ones, the labels are worse than this"
        )
    if found["trained_on"]["texts"]:
        lines.append(f"pseudo-labels that the student was trained on: {_describe_share(found['trained_on'])}")
    if found["student"]["texts"]:
        lines.append(f"student, on texts it was not trained on: {_describe_share(found['student'])}")
    return lines


def _describe_share(one: Mapping[str, Any]) -> str:
    if not one["texts"]:
        return "unknown, for none is answered"
    low, high = one["interval"]
    return f"{one['right']} of {one['texts']} right, {one['share']:.3f} [{low:.3f}, {high:.3f}]"
