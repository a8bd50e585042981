"""A teacher without a model, for whatever stands around teachers; and the tickets that it is given."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from toys import make_config

from llkd_ray.config.schema import Config
from llkd_ray.storage.run_dir import QUARANTINE_DIR, RunStore
from llkd_ray.teacher.base import Allowance, Answers, Meter, TextFailed, label_batch

BASE_TOKENS = 10


def numbered(number: int) -> np.ndarray:
    """float[3]: an answer that tells its text; its mass is 0.3 and a hundredth of the number."""
    return np.array([number / 100, 0.1, 0.2])


class FakeTeacher:
    """Says ``says(number)`` to a text whose id ends in ``-number``; see ``answers.Teacher``.

    A text costs one request of ``BASE_TOKENS`` and its number in prompt tokens, and one answer token.
    """

    def __init__(
        self,
        says: Callable[[int], np.ndarray] = numbered,
        failing: Mapping[int, str] | None = None,
        errors: Sequence[Exception] = (),
        before_call: Callable[[], None] = lambda: None,
        after_request: Callable[[Meter], None] = lambda meter: None,
    ) -> None:
        self.says, self.failing, self.errors = says, failing or {}, list(errors)
        """``failing``: why numbers have no answer; ``errors``: what the first calls raise."""
        self.before_call, self.after_request = before_call, after_request
        self.calls: list[list[int]] = []
        """The numbers of each call."""
        self.is_closed = False

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        numbers = [int(one.rpartition("-")[2]) for one in ids]
        self.calls.append(numbers)
        self.before_call()
        if self.errors:
            raise self.errors.pop(0)

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            await meter.request(BASE_TOKENS + numbers[i], 1)
            self.after_request(meter)
            if numbers[i] in self.failing:
                raise TextFailed(self.failing[numbers[i]])
            probs_C = self.says(numbers[i])
            return probs_C, 1.0 - probs_C.sum()

        return await label_batch(len(ids), len(self.says(0)), one, allowance, cut=0)

    def close(self) -> None:
        self.is_closed = True


def leased(ticket: int, rows: Sequence[int], prefix: str = "id", words: str = "text") -> pa.Table:
    """A ticket as the leaser hands it on: ids are ``prefix-row``, texts ``words row``.

    Hashes are not those of ``corpus.cleaning``: nothing behind the leaser may compute them again.
    """
    texts = [f"{words} {row}" for row in rows]
    columns = [
        pa.array([ticket] * len(rows), pa.int32()),
        pa.array(rows, pa.int64()),
        pa.array([f"{prefix}-{row}" for row in rows], pa.string()),
        pa.array(texts, pa.string()),
        pa.array([zlib.crc32(text.encode()) for text in texts], pa.uint64()),
    ]
    return pa.Table.from_arrays(columns, names=["ticket", "row", "id", "text", "text_hash"])


def cost_of(numbers: Sequence[int]) -> int:
    """Tokens that some texts cost."""
    return sum(BASE_TOKENS + number + 1 for number in numbers)


def cascade_config(**sections: Any) -> Config:
    """A cascade in doubt below 0.6; the members' own kind does not matter, their teachers are fakes."""
    member = {"kind": "recorded", "recorded": {"uri": "answers.parquet"}}
    cascade = {"small": member, "large": member | {"tickets_in_flight": 3}, "escalate_below": 0.6}
    return make_config(teacher={"kind": "cascade", "cascade": cascade}, **sections)


def quarantined(store: RunStore, ticket: int) -> list[tuple[int, str]]:
    """Rows and reasons of a ticket's texts without an answer."""
    file = f"{QUARANTINE_DIR}/teacher-{ticket:08d}.parquet"
    if not store.exists(file):
        return []
    return [(one["position"], one["reason"]) for one in store.read_table(file).to_pylist()]
