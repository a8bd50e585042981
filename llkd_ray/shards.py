"""A score table in shards by row range: each finds little, and together they choose as one table would.

A shard can live in an actor of its own. It is asked twice for each choice and sends counts and sums (a
survey), then the texts that may be chosen; its columns stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from llkd_ray.acquisition import AcquisitionPolicy, FoundUnread, Reading
from llkd_ray.chunks import Chunked
from llkd_ray.policies import Search, Selection, SelectionPolicy
from llkd_ray.priors import Exponent
from llkd_ray.scan import Found, Survey
from llkd_ray.signals import Ints
from llkd_ray.table import Candidates, ScoreTable, Unread


@dataclass(frozen=True)
class Shard:
    """A run's rows from ``first_row`` on, in a table of their own that counts them from 0.

    Updates and questions to the table itself take and give its own row numbers.
    """

    table: ScoreTable
    first_row: int

    def survey(self, policy: SelectionPolicy, tickets_below: int) -> Survey:
        """Counts and sums of the shard's candidates."""
        return policy.survey(self._candidates(tickets_below))

    def find(self, search: Search, tickets_below: int) -> Found:
        """The shard's candidates that may be chosen, under the run's row numbers."""
        return search.find(self._candidates(tickets_below))

    def find_unread(self, reading: Reading) -> FoundUnread:
        """The shard's unread texts that may be read, under the run's row numbers."""
        return reading.find(self._unread())

    def _candidates(self, tickets_below: int) -> Chunked[Candidates]:
        chunks = self.table.candidate_chunks(tickets_below)
        return Chunked(lambda: (replace(chunk, row_N=chunk.row_N + self.first_row) for chunk in chunks))

    def _unread(self) -> Chunked[Unread]:
        chunks = self.table.unread_chunks()
        return Chunked(lambda: (replace(chunk, row_N=chunk.row_N + self.first_row) for chunk in chunks))


def choose_from_shards(
    shards: Sequence[Shard],
    policy: SelectionPolicy,
    n: int,
    rng: np.random.Generator,
    *,
    tickets_below: int,
    quota: Exponent = None,
    trained_C: Ints | None = None,
    options: Mapping[str, Any] | None = None,
) -> Selection:
    """What ``policy.choose`` would choose from one table of all the shards' rows, bit for bit.

    There is one shard at least; their order does not matter. ``trained_C`` is of all shards together.
    """
    survey = reduce(add, (shard.survey(policy, tickets_below) for shard in shards))
    search = policy.search(survey, n, rng, quota=quota, trained_C=trained_C, options=options)
    return search.settle([shard.find(search, tickets_below) for shard in shards])


def read_from_shards(
    shards: Sequence[Shard],
    policy: AcquisitionPolicy,
    n: int,
    rng: np.random.Generator,
    *,
    seed: int = 0,
    explore: float = 0.0,
) -> Ints:
    """int64[M], ascending: what ``policy.choose`` would read of one table of all the shards' rows."""
    reading = policy.reading(n, rng, seed=seed, explore=explore)
    return reading.settle([shard.find_unread(reading) for shard in shards])
