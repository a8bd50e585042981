"""A teacher and all that stands around it: answers of earlier runs, the cap, the mark of what is under way.

Shapes in names: M texts of a ticket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.answer_cache import AnswerCache, register
from llkd_ray.answers import UNASKED, Allowance, Labeller, Unlimited, Usage
from llkd_ray.cleaning import text_hash
from llkd_ray.config import Config
from llkd_ray.label_files import in_row_order, labels_table, mark_file, write_mark
from llkd_ray.ledger import RemoteAllowance
from llkd_ray.store import ENGINES_DIR, LABELS_DIR, SMALL_DIR, RunStore
from llkd_ray.teachers import cache_folder, make_labeller

Reserve = Callable[[int, str, str, Usage], Awaitable[bool]]
"""``reserve(ticket, attempt, teacher, usage)``: whether so much more may be used, says the selector."""


@dataclass(frozen=True)
class Asked:
    """What came of the texts of a ticket."""

    labels: pa.Table
    """LABELS of those with an answer, in the order of the texts."""
    usage: Usage
    outcome_M: Sequence[str]
    """Of every text: empty where it has an answer, ``UNASKED``, or why it has none."""
    mark: str | None
    """In SENT_DIR while the answers are not in a file; None where nothing was sent."""

    @property
    def unasked(self) -> int:
        return sum(outcome == UNASKED for outcome in self.outcome_M)


class Asker:
    """One teacher of a run, ``member`` of the config's; made in its actor, which prepares it meanwhile."""

    def __init__(
        self,
        config: Config,
        store_uri: str,
        member: int,
        reserve: Reserve,
        labeller: Labeller | None = None,
        key: str | None = None,
    ) -> None:
        """``key``: what its answers are found by in later runs; without one, nothing is reused."""
        self.config, self.store_uri, self.store = config, store_uri, RunStore(store_uri)
        self.member = member
        self.name, self.teacher = list(config.teacher.members())[member]
        self._reserve = reserve
        self._labeller = labeller
        self._key = key
        self._cache: AnswerCache | None = None
        maker = ThreadPoolExecutor(1, "teacher")
        self._made = maker.submit(self._make)
        maker.shutdown(wait=False)

    async def ask(self, ticket: int, texts: pa.Table) -> Asked:
        """Answers to ``texts`` (row, id, text), from an earlier run where there is one.

        The caller puts the labels in place and then calls :meth:`forget`. Raises
        :class:`~llkd_ray.answers.TeacherDown` where the teacher has given up.
        """
        await asyncio.shield(asyncio.wrap_future(self._made))
        began = time.monotonic()
        hash_M = np.array([text_hash(text) for text in texts["text"].to_pylist()], dtype=np.uint64)
        found_M, reused = await asyncio.to_thread(self._reuse, hash_M, texts)
        usage = Usage(reused_texts=len(reused), reused_tokens=_tokens(reused))
        if found_M.all():
            return Asked(reused, usage, [""] * len(texts), None)
        sent, sent_hash = texts.filter(pa.array(~found_M)), hash_M[~found_M]
        mark = f"ticket-{ticket:08d}.{uuid.uuid4().hex}"
        # The mark tells, after a kill, which texts were sent and never answered.
        await asyncio.to_thread(write_mark, self.store, mark, len(sent), {})
        assert self._labeller is not None
        answers = await self._labeller.label(
            sent["id"].to_pylist(), sent["text"].to_pylist(), self._allowance(ticket, mark, len(sent))
        )
        fresh = labels_table(sent, sent_hash, answers, self.member)
        outcome_M = np.full(len(texts), "", dtype=object)
        outcome_M[~found_M] = list(answers.outcome_N)
        return Asked(
            labels=in_row_order([reused, fresh], texts["row"].to_numpy()),
            usage=usage + replace(answers.usage, seconds=time.monotonic() - began),
            outcome_M=outcome_M.tolist(),
            mark=mark,
        )

    async def forget(self, asked: Asked) -> None:
        """The labels are in place, so nothing of them is under way any more."""
        if asked.mark is not None:
            await asyncio.to_thread(self.store.delete, mark_file(asked.mark))

    def close(self) -> None:
        """Close the teacher, as soon as it is made."""

        def put_away(_: object) -> None:
            if self._labeller is not None:
                self._labeller.close()

        self._made.add_done_callback(put_away)

    def _make(self) -> None:
        labels = self.config.labels
        folder = cache_folder(self.config, self.teacher)
        if folder is not None and self._key is not None:
            own = self.store.uri(SMALL_DIR if self.name == "small" else LABELS_DIR)
            self._cache = AnswerCache.open(folder, self._key, len(labels.names), own)
            register(folder, self._key, own, self.member)
        if self._labeller is None:
            self._labeller = make_labeller(self.teacher, labels, self._note_start, begin=not self._cache)

    def _reuse(self, hash_M: np.ndarray, texts: pa.Table) -> tuple[np.ndarray, pa.Table]:
        """bool[M]: which texts have an answer of an earlier run; and LABELS of those, as this run's."""
        if self._cache is None:
            return np.zeros(len(texts), dtype=bool), schemas.LABELS.empty_table()
        found_M, there = self._cache.find(hash_M)
        mine = texts.filter(pa.array(found_M))
        columns = {name: there[name].combine_chunks() for name in schemas.LABELS.names}
        columns |= {
            "row": mine["row"].combine_chunks(),
            "id": mine["id"].combine_chunks(),
            "member": pa.array(np.full(len(mine), self.member, dtype=np.int8)),
            "reused": pa.array(np.ones(len(mine), dtype=bool)),
        }
        return found_M, pa.Table.from_arrays(list(columns.values()), schema=schemas.LABELS)

    def _allowance(self, ticket: int, mark: str, texts: int) -> Allowance:
        if self.config.budget.cap.is_off:
            return Unlimited()

        async def ask(usage: Usage) -> bool:
            return await self._reserve(ticket, mark, self.name, usage)

        async def note(total: Usage) -> None:
            await asyncio.to_thread(write_mark, self.store, mark, texts, {self.name: total})

        return RemoteAllowance(ask, note)

    def _note_start(self, seconds: float) -> None:
        """A file for each engine that was started."""
        facts = {"teacher": self.name, "model": self.teacher.model, "seconds_to_start": seconds}
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        self.store.write_json(f"{ENGINES_DIR}/{uuid.uuid4().hex}.json", facts | where)


def _tokens(labels: pa.Table) -> int:
    return int(sum(labels[name].to_numpy().sum() for name in ("prompt_tokens", "answer_tokens")))
