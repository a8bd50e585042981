"""A teacher with its surroundings: answers of earlier runs, the cap, and marks of requests in progress.

Shapes in names: M texts of a ticket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.metrics.uncertainty import confidence, normalise
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    ENGINES_DIR,
    LABELS_DIR,
    NO_LABEL,
    SCORES_METHOD,
    SMALL_DIR,
    RunStore,
    teacher_quarantine_file,
    ticket_file,
)
from llkd_ray.storage.tables import Examples, matrix_of
from llkd_ray.teacher.base import UNASKED, Allowance, Teacher, TeacherDown, Unlimited, Usage
from llkd_ray.teacher.budget import RemoteAllowance
from llkd_ray.teacher.cache import AnswerCache, register
from llkd_ray.teacher.factory import cache_folder, make_teacher
from llkd_ray.teacher.labels import (
    TicketLabels,
    in_row_order,
    labels_table,
    mark_file,
    read_ticket,
    ticket_labels,
    write_mark,
    write_ticket,
)

Reserve = Callable[[int, str, str, Usage], Awaitable[bool]]
"""``reserve(ticket, attempt, teacher, usage)``: whether the selector allows this much more usage."""


@dataclass(frozen=True)
class TicketAnswers:
    """The results for the texts of a ticket."""

    labels: pa.Table
    """LABELS of texts with an answer, in the order of the texts."""
    usage: Usage
    outcome_M: Sequence[str]
    """For every text: empty where it has an answer, ``UNASKED``, or the reason why it has none."""
    mark: str | None
    """Name in SENT_DIR until the answers are written to a file; None where nothing was sent."""

    @property
    def unasked(self) -> int:
        return sum(outcome == UNASKED for outcome in self.outcome_M)


class TeacherWorker:
    """One teacher of a run, ``member`` of the config's; it is created in its actor, in the background."""

    def __init__(
        self,
        config: Config,
        store_uri: str,
        member: int,
        reserve: Reserve,
        teacher: Teacher | None = None,
        key: str | None = None,
    ) -> None:
        """``key``: identifies its answers for later runs; without one, nothing is reused."""
        self.config, self.store_uri, self.store = config, store_uri, RunStore(store_uri)
        self.member = member
        self.name, self.teacher_config = list(config.teacher.members())[member]
        self._reserve = reserve
        self._teacher = teacher
        self._key = key
        self._cache: AnswerCache | None = None
        maker = ThreadPoolExecutor(1, "teacher")
        self._made = maker.submit(self._make)
        maker.shutdown(wait=False)

    async def label(self, ticket: int, texts: pa.Table) -> TicketAnswers:
        """Answers to ``texts`` (row, id, text, text_hash), from an earlier run where available.

        The caller writes the labels and then calls :meth:`clear_mark`. Raises
        :class:`~llkd_ray.teacher.base.TeacherDown` where the teacher has given up.
        """
        await asyncio.shield(asyncio.wrap_future(self._made))
        began = time.monotonic()
        hash_M = texts["text_hash"].to_numpy()
        found_M, reused = await asyncio.to_thread(self._reuse, hash_M, texts)
        usage = Usage(reused_texts=len(reused), reused_tokens=_tokens(reused))
        if found_M.all():
            return self._with_labels_only(TicketAnswers(reused, usage, [""] * len(texts), None), texts)
        sent, sent_hash = texts.filter(pa.array(~found_M)), hash_M[~found_M]
        mark = f"ticket-{ticket:08d}.{uuid.uuid4().hex}"
        # After a kill, the mark shows which texts were sent and never answered.
        await asyncio.to_thread(write_mark, self.store, mark, len(sent), {})
        assert self._teacher is not None
        answers = await self._teacher.label(
            sent["id"].to_pylist(), sent["text"].to_pylist(), self._allowance(ticket, mark, len(sent))
        )
        fresh = labels_table(sent, sent_hash, answers, self.member)
        outcome_M = np.full(len(texts), "", dtype=object)
        outcome_M[~found_M] = list(answers.outcome_N)
        all_answers = TicketAnswers(
            labels=in_row_order([reused, fresh], texts["row"].to_numpy()),
            usage=usage + replace(answers.usage, seconds=time.monotonic() - began),
            outcome_M=outcome_M.tolist(),
            mark=mark,
        )
        return self._with_labels_only(all_answers, texts)

    def _with_labels_only(self, answers: TicketAnswers, texts: pa.Table) -> TicketAnswers:
        """Without answers that say no label, such as refusals: they have the outcome ``NO_LABEL`` instead.

        Normalised, they would look like labels: one without any mass like the first of all labels.
        """
        labels, n_classes = answers.labels, len(self.config.labels.names)
        off_label_L = labels["off_label"].to_numpy()
        mass_L = matrix_of(labels["probs"], n_classes).sum(axis=1)
        says_L = (mass_L > 0) & (off_label_L <= self.teacher_config.max_off_label)
        if says_L.all():
            return answers
        silent_M = np.isin(texts["row"].to_numpy(), labels["row"].to_numpy()[~says_L])
        outcome_M = np.where(silent_M, NO_LABEL, np.array(answers.outcome_M, dtype=object))
        return replace(answers, labels=labels.filter(pa.array(says_L)), outcome_M=outcome_M.tolist())

    async def clear_mark(self, answers: TicketAnswers) -> None:
        """Delete the mark, once the labels are written."""
        if answers.mark is not None:
            await asyncio.to_thread(self.store.delete, mark_file(answers.mark))

    def close(self) -> None:
        """Close the teacher, as soon as it is created."""

        def put_away(_: object) -> None:
            if self._teacher is not None:
                self._teacher.close()

        self._made.add_done_callback(put_away)

    def _make(self) -> None:
        labels = self.config.labels
        folder = cache_folder(self.config, self.teacher_config)
        if folder is not None and self._key is not None:
            own = self.store.uri(self._labels_dir)
            self._cache = AnswerCache.open(folder, self._key, len(labels.names), own)
            register(folder, self._key, own, self.member)
        if self._teacher is None:
            self._teacher = make_teacher(
                self.teacher_config, labels, self._note_start, self._agree, prestart=not self._cache
            )

    @property
    def _labels_dir(self) -> str:
        return SMALL_DIR if self.name == "small" else LABELS_DIR

    def _agree(self, found: str | None) -> str | None:
        """The method of scoring that is kept with this run's labels, or with the earlier ones it reuses.

        Where there is none, ``found`` becomes it. Answers of one run must not come from several methods: a
        single odd reply would decide it for one actor, and votes are coarser than probabilities.
        """
        file = f"{self._labels_dir}/{SCORES_METHOD}"
        if self.store.exists(file):
            return str(self.store.read_json(file))
        found = (self._cache.scores_method() if self._cache else None) or found
        return None if found is None else str(self.store.write_json_once(file, found))

    def _reuse(self, hash_M: np.ndarray, texts: pa.Table) -> tuple[np.ndarray, pa.Table]:
        """bool[M]: which texts have an answer of an earlier run; and LABELS of those, as this run's."""
        if self._cache is None:
            return np.zeros(len(texts), dtype=bool), tables.LABELS.empty_table()
        found_M, there = self._cache.find(hash_M)
        mine = texts.filter(pa.array(found_M))
        columns = {name: there[name].combine_chunks() for name in tables.LABELS.names}
        columns |= {
            "row": mine["row"].combine_chunks(),
            "id": mine["id"].combine_chunks(),
            "member": pa.array(np.full(len(mine), self.member, dtype=np.int8)),
            "reused": pa.array(np.ones(len(mine), dtype=bool)),
        }
        return found_M, pa.Table.from_arrays(list(columns.values()), schema=tables.LABELS)

    def _allowance(self, ticket: int, mark: str, texts: int) -> Allowance:
        if self.config.budget.cap.is_off:
            return Unlimited()

        async def ask(usage: Usage) -> bool:
            return await self._reserve(ticket, mark, self.name, usage)

        async def note(total: Usage) -> None:
            await asyncio.to_thread(write_mark, self.store, mark, texts, {self.name: total})

        return RemoteAllowance(ask, note)

    def _note_start(self, seconds: float) -> None:
        """Write a file for each engine start."""
        facts = {"teacher": self.name, "model": self.teacher_config.model, "seconds_to_start": seconds}
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        self.store.write_json(f"{ENGINES_DIR}/{uuid.uuid4().hex}.json", facts | where)


def _tokens(labels: pa.Table) -> int:
    return int(sum(labels[name].to_numpy().sum() for name in ("prompt_tokens", "answer_tokens")))


_RECEIPT = pa.schema([pa.field("ticket", pa.int32()), pa.field("rows", pa.int32())])

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stage(ABC):
    """The common part of stages: one ticket per call, and handling of a teacher that gives up."""

    member = 0
    """Index of the stage's teacher among the config's."""

    def __init__(
        self,
        config: Config,
        store_uri: str,
        selector: Any,
        teacher: Teacher | None = None,
        key: str | None = None,
        on_drop: Callable[[TeacherConfig], None] | None = None,
    ) -> None:
        self.config = config
        self.store = RunStore(store_uri)
        self.selector = selector
        self.actor = uuid.uuid4().hex
        # Not a bound method: that would keep the stage, and with it an engine, alive after it is dropped.
        self.worker = TeacherWorker(config, store_uri, self.member, partial(_reserve, selector), teacher, key)
        self.on_drop = on_drop

    def __del__(self) -> None:
        # Ray Data drops the stage when the stream ends; an engine that is killed together with its actor
        # prints errors.
        if worker := getattr(self, "worker", None):
            worker.close()
            if self.on_drop:
                self.on_drop(worker.teacher_config)

    async def __call__(self, leased: pa.Table) -> AsyncIterator[pa.Table]:
        if not len(leased):
            yield self.empty(leased)
            return
        ticket = leased["ticket"][0].as_py()
        assert leased["ticket"].unique().to_pylist() == [ticket], "a block holds one ticket"
        try:
            done = await self.process(ticket, leased)
        except TeacherDown as down:
            await self._give_back(ticket, str(down))
            done = self.empty(leased)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            await self._give_back(ticket, f"no room to write labels: {error}")
            done = self.empty(leased)
        yield done

    @abstractmethod
    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        """Make sure that the ticket's file exists; returns the next stage's input. Raises TeacherDown."""

    def empty(self, leased: pa.Table) -> pa.Table:
        """The output for a ticket without texts, or one that was returned."""
        return _RECEIPT.empty_table()

    def is_review(self, ticket: int) -> bool:
        """Whether its texts already have labels and a cascade's large teacher reviews them."""
        return ticket in self._reviews

    @cached_property
    def _reviews(self) -> range:
        examples = Examples.open(self.store)
        return Schedule.plan(self.config, examples.n_pool, examples.n_test).review_tickets

    async def commit(
        self, ticket: int, leased: pa.Table, labels: pa.Table, usage: dict[str, Usage], answers: TicketAnswers
    ) -> TicketLabels:
        """Write a finished ticket's labels, and its failed texts to quarantine; returns what
        :meth:`notify` sends to the selector.
        """
        has_label_M = pc.is_in(leased["row"], value_set=labels["row"].combine_chunks()).to_numpy(
            zero_copy_only=False
        )
        outcome_M = np.array(answers.outcome_M, dtype=object)
        failed_M = ~has_label_M & (outcome_M != "") & (outcome_M != UNASKED)
        if failed_M.any():
            refused = leased.filter(pa.array(failed_M))
            self._quarantine(ticket, refused, outcome_M[failed_M].tolist())
        unasked = int(np.count_nonzero(~has_label_M & (outcome_M == UNASKED)))
        try:
            await self._write(LABELS_DIR, ticket, labels, usage, unasked)
        except FileExistsError:
            # Another attempt at this ticket was faster. This one's mark stays: its answers are lost.
            done = await self.existing(ticket)
            assert done is not None
            return done
        await self.worker.clear_mark(answers)
        done = ticket_labels(labels, usage, unasked, len(self.config.labels.names))
        return replace(done, attempt=answers.mark)

    async def _write(
        self, folder: str, ticket: int, labels: pa.Table, usage: dict[str, Usage], unasked: int
    ) -> None:
        in_flight, names = self.worker.teacher_config.tickets_in_flight, self.config.labels.names
        await asyncio.to_thread(
            write_ticket, self.store, folder, ticket, labels, usage, unasked, in_flight, names
        )

    async def existing(self, ticket: int) -> TicketLabels | None:
        """The contents of the ticket's file, if an earlier attempt died before it notified the selector."""
        if not self.store.exists(ticket_file(LABELS_DIR, ticket)):
            return None
        said = await asyncio.to_thread(read_ticket, self.store, LABELS_DIR, ticket)
        return ticket_labels(*said, len(self.config.labels.names))

    async def notify(self, ticket: int, labels: TicketLabels) -> pa.Table:
        """Notify the selector of a ticket whose file exists; returns the receipt."""
        await self.selector.put_labels.remote(ticket, labels)
        return pa.table({"ticket": [ticket], "rows": [len(labels.row_M)]}, schema=_RECEIPT)

    async def _give_back(self, ticket: int, reason: str) -> None:
        """Return the ticket for another actor, and take no further one until teaching is over."""
        call = uuid.uuid4().hex
        await self.selector.give_back.remote(ticket, self.worker.name, self.actor, reason, call)
        await self.selector.wait_taught.remote()

    def _quarantine(self, ticket: int, refused: pa.Table, reasons: Sequence[str]) -> None:
        n = len(refused)
        columns = {
            "source": ["teacher"] * n,
            "position": refused["row"],
            "reason": reasons,
            "detail": [f"ticket {ticket}"] * n,
            "start_of_text": [text[:200] for text in refused["text"].to_pylist()],
        }
        table = pa.table(columns, schema=tables.QUARANTINE)
        self.store.write_table(teacher_quarantine_file(ticket), table)


async def _reserve(selector: Any, ticket: int, attempt: str, teacher: str, usage: Usage) -> bool:
    return await selector.reserve.remote(ticket, attempt, teacher, usage.as_dict())


class OnlyStage(Stage):
    """The one teacher of a run."""

    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        done = await self.existing(ticket)
        if done is None:
            answers = await self.worker.label(ticket, leased)
            done = await self.commit(
                ticket, leased, answers.labels, {self.worker.name: answers.usage}, answers
            )
        return await self.notify(ticket, done)


class SmallStage(Stage):
    """A cascade's small teacher: labels all tickets except reviews, and passes every ticket on."""

    def empty(self, leased: pa.Table) -> pa.Table:
        return leased.slice(0, 0)

    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        is_done = any(self.store.exists(ticket_file(folder, ticket)) for folder in (SMALL_DIR, LABELS_DIR))
        if not is_done and not self.is_review(ticket):
            answers = await self.worker.label(ticket, leased)
            try:
                used = {self.worker.name: answers.usage}
                await self._write(SMALL_DIR, ticket, answers.labels, used, answers.unasked)
            except FileExistsError:  # as in commit
                return leased
            await self.worker.clear_mark(answers)
            await self.selector.commit_usage.remote(
                ticket, self.worker.name, answers.usage.as_dict(), answers.mark
            )
        return leased


class LargeStage(Stage):
    """A cascade's large teacher: labels texts that the small one is unsure of or failed on, and reviews."""

    member = 1

    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        done = await self.existing(ticket)
        if done is None:
            small, usage = await asyncio.to_thread(self._small_answers, ticket)
            doubtful = leased.filter(pa.array(~np.isin(leased["row"].to_numpy(), self._sure_rows(small))))
            answers = await self.worker.label(ticket, doubtful)
            answered_by_large = pc.is_in(small["row"], value_set=answers.labels["row"].combine_chunks())
            kept = small.filter(pc.invert(answered_by_large))
            labels = in_row_order([kept, answers.labels], leased["row"].to_numpy())
            if self.is_review(ticket):
                # A text whose review fails keeps its label, so it is not quarantined.
                answers = replace(answers, outcome_M=[""] * len(doubtful))
            done = await self.commit(
                ticket, doubtful, labels, usage | {self.worker.name: answers.usage}, answers
            )
        return await self.notify(ticket, done)

    def _small_answers(self, ticket: int) -> tuple[pa.Table, dict[str, Usage]]:
        if not self.store.exists(ticket_file(SMALL_DIR, ticket)):  # a review
            return tables.LABELS.empty_table(), {}
        labels, usage, _ = read_ticket(self.store, SMALL_DIR, ticket)
        return labels.replace_schema_metadata(None), usage

    def _sure_rows(self, small: pa.Table) -> np.ndarray:
        """int64: the rows whose small answer is accepted without the large teacher."""
        cascade = self.config.teacher.cascade
        assert cascade is not None
        p_MC = normalise(matrix_of(small["probs"], len(self.config.labels.names)))
        return small["row"].to_numpy()[confidence(p_MC) >= cascade.escalate_below]
