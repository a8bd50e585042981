"""The ledger behind the budget's cap: what all teachers have used, and what they may still use.

The selector holds the only :class:`Ledger`; a teacher's ticket calls it through :class:`RemoteAllowance`.
This module does not use Ray: the calls are connected elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from decimal import Decimal
from typing import Literal

from llkd_ray.config.schema import CapConfig
from llkd_ray.config.teacher import PriceConfig
from llkd_ray.teacher.base import Usage, add_usages

Verdict = Literal["granted", "wait", "denied"]
UsageByTeacher = dict[str, Usage]


class Ledger:
    """Reserves usage in advance: the sum of spent and reserved usage never exceeds a cap.

    A ticket's reservations stay until it is committed, and are then replaced by its actual usage. So the
    cap holds as long as nobody uses more than was granted, no matter which process dies and when.

    *Attempts.* A ticket's newest attempt holds its reservations; older ones are dead, or at work unnoticed.
    When a new attempt reserves, the older one's reservations permanently count as spent, because it may have
    used them. Later calls of an older attempt, and of any attempt at a committed ticket, are denied; so no
    repeated call can release what is used. Of several attempts, any may finish first: :meth:`commit`.

    *Waiting.* Where a reservation would fit if other tickets turned out to use less than they hold, the
    answer is "wait": the caller retries once any ticket is committed. No ticket waits forever:

    - A ticket that holds nothing blocks nobody, so waiting is only useful as long as some other ticket
      holds something and does not wait itself. The ledger records which tickets wait. The last holder that
      would start to wait is denied instead; it ends, is committed, and releases its reservations.
    - A commit, like anything else that releases reservations, clears the record of waiting tickets. All
      waiting tickets then retry, in any order, and the rule above holds among them.
    - If a holder dies, its next attempt or :meth:`abandon` reports it. Where neither happens, the others
      wait: detecting a stall is the caller's responsibility.
    """

    def __init__(self, cap: CapConfig, prices: Mapping[str, PriceConfig]) -> None:
        """``prices`` by teacher; a teacher without one costs nothing. They share one currency."""
        self.cap = cap
        self._prices = prices
        self._answered: UsageByTeacher = {}
        self._lost: UsageByTeacher = {}
        self._held: dict[int, UsageByTeacher] = {}
        self._held_by_all: UsageByTeacher = {}  # cached: up to a thousand teachers reserve continuously
        self._attempt: dict[int, str] = {}
        self._superseded: set[tuple[int, str]] = set()
        self._committed: set[int] = set()
        self._waiting: set[int] = set()
        self._denied: set[tuple[int, str]] = set()

    def reserve(self, ticket: int, attempt: str, teacher: str, usage: Usage) -> Verdict:
        """Reserve further usage of a teacher; amounts of one attempt add up."""
        if self.open:
            return "granted"
        if ticket in self._committed or (ticket, attempt) in self._superseded:
            return "denied"  # the caller is obsolete, so this does not mean that the cap is reached
        if self._attempt.setdefault(ticket, attempt) != attempt:
            self._superseded.add((ticket, self._attempt[ticket]))
            self._attempt[ticket] = attempt
            self._lost = add_usages(self._lost, self._release(ticket))
        self._waiting.discard(ticket)
        more = {teacher: usage}
        if self._fits(more, self._held_by_all):
            self._held[ticket] = add_usages(self._held.get(ticket, {}), more)
            self._held_by_all = add_usages(self._held_by_all, more)
            self._denied.discard((ticket, teacher))
            return "granted"
        others_at_work = self._held.keys() - self._waiting - {ticket}
        if others_at_work and self._fits(more, self._held.get(ticket, {})):
            self._waiting.add(ticket)
            return "wait"
        self._denied.add((ticket, teacher))
        return "denied"

    def commit(self, ticket: int, usage: Mapping[str, Usage], attempt: str | None) -> None:
        """The ticket is finished with this usage of an attempt, by teacher. Only the first call counts.

        If that attempt holds the ticket's reservations, the usage replaces them. Another one, or None for an
        unknown one, says nothing of what the holder used: what is held beyond this usage permanently counts
        as spent. That is enough, because the usage of an older attempt has been counted as lost, too.
        """
        if ticket in self._committed:
            return
        self._committed.add(ticket)
        held = self._release(ticket)
        if attempt is None or attempt != self._attempt.get(ticket):
            beyond = {name: _beyond(one, usage.get(name, Usage())) for name, one in held.items()}
            self._lost = add_usages(self._lost, beyond)
        self._waiting.clear()
        self._answered = add_usages(self._answered, usage)

    def abandon(self, ticket: int) -> None:
        """The attempt has given up: its reservations permanently count as spent; another may start."""
        self._lost = add_usages(self._lost, self._release(ticket))
        self._waiting.clear()

    def restore(self, lost: Mapping[str, Usage]) -> None:
        """On resume: possible usage of the killed run's attempts, by teacher; permanently counts as spent."""
        self._lost = add_usages(self._lost, lost)

    def restore_committed(self, tickets: Iterable[int], usage: Mapping[str, Usage]) -> None:
        """On resume: these tickets are committed, with this total usage by teacher."""
        self._committed.update(tickets)
        self._answered = add_usages(self._answered, usage)

    @property
    def spent(self) -> UsageByTeacher:
        """By teacher: usage of finished tickets, and possible usage of attempts that died."""
        return add_usages(self._answered, self._lost)

    @property
    def lost(self) -> UsageByTeacher:
        """The part of ``spent`` that attempts may have used that died."""
        return dict(self._lost)

    @property
    def cost(self) -> float:
        """Cost of ``spent``, in the currency of the prices; ``lost`` is priced as uncached."""
        return float(self._cost(self._lost))

    @property
    def reached(self) -> bool:
        """Whether a ticket has been denied a reservation that was not granted later."""
        return bool(self._denied)

    @property
    def open(self) -> bool:
        """No cap is set: everything is granted, and only committed usage is recorded."""
        return self.cap.is_off

    def _cost(self, unknown: UsageByTeacher) -> Decimal:
        """Cost of the committed usage plus the maximum cost of ``unknown``."""
        free = PriceConfig()
        costs = [usage.cost(self._prices.get(name, free)) for name, usage in self._answered.items()]
        costs += [_at_most(usage, self._prices.get(name, free)) for name, usage in unknown.items()]
        return sum(costs, Decimal())

    def _release(self, ticket: int) -> UsageByTeacher:
        """Remove the ticket's reservations and return them."""
        held = self._held.pop(ticket, {})
        self._held_by_all |= {name: self._held_by_all[name] - usage for name, usage in held.items()}
        return held

    def _fits(self, more: UsageByTeacher, held: UsageByTeacher) -> bool:
        """Whether ``more`` fits on top of what is spent and what is held."""
        unknown = add_usages(add_usages(self._lost, more), held)
        together, cap = add_usages(self._answered, unknown).values(), self.cap
        if cap.texts is not None and sum(usage.texts for usage in together) > cap.texts:
            return False
        if cap.tokens is not None and sum(usage.tokens for usage in together) > cap.tokens:
            return False
        return cap.cost is None or self._cost(unknown) <= Decimal(str(cap.cost))


def _at_most(usage: Usage, price: PriceConfig) -> Decimal:
    """The maximum cost, as it is not yet known which prompt tokens are cached."""
    none_or_all = (0, usage.prompt_tokens)
    return max(price.cost(usage.prompt_tokens, cached, usage.answer_tokens) for cached in none_or_all)


_COUNTED = ("texts", "prompt_tokens", "answer_tokens")


def _beyond(held: Usage, used: Usage) -> Usage:
    return Usage(**{name: max(0, getattr(held, name) - getattr(used, name)) for name in _COUNTED})


class RemoteAllowance:
    """The allowance of one attempt at a ticket, for one teacher; reserves remotely, in growing blocks.

    ``ask(usage)`` requests the right to use this much more, and waits while the decision is open.
    ``on_grant(total)`` gets the total granted so far before any of a new grant is used: if this process is
    killed, what it wrote down is the maximum that may have been used.

    Each block is as large as the total granted of its kind so far, so that a ticket of N texts makes about
    log2(N) calls for texts and as many for tokens.

    Where a block is denied, exactly the required amount is requested; where that is denied too, the
    allowance is exhausted and requests no more, but what was granted may still be used up.
    """

    def __init__(
        self, ask: Callable[[Usage], Awaitable[bool]], on_grant: Callable[[Usage], Awaitable[None]]
    ) -> None:
        self._ask, self._on_grant = ask, on_grant
        self._lock = asyncio.Lock()
        self._granted = Usage()
        self._left = dict.fromkeys(_COUNTED, 0)
        self._block = dict.fromkeys(_COUNTED, 0)
        self._ended = False

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        """See :class:`~llkd_ray.teacher.base.Allowance`."""
        wanted = {"texts": texts, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
        async with self._lock:
            short = {name: n - self._left[name] for name, n in wanted.items() if n > self._left[name]}
            if short and not await self._fetch(short):
                return False
            for name, n in wanted.items():
                self._left[name] -= n
            return True

    async def _fetch(self, short: dict[str, int]) -> bool:
        """Reserve at least the missing amount, and a whole block if that is granted."""
        if self._ended:
            return False
        block = {name: max(n, self._block[name]) for name, n in short.items()}
        granted = await self._ask(Usage(**block))
        if not granted and block != short:
            # Near the cap: restart with small blocks, so that not every request needs two calls.
            self._block = dict.fromkeys(_COUNTED, 0)
            block = short
            granted = await self._ask(Usage(**block))
        if not granted:
            self._ended = True
            return False
        self._granted += Usage(**block)
        await self._on_grant(self._granted)
        for name, n in block.items():
            self._left[name] += n
            self._block[name] += n
        return True
