"""The ledger behind the budget's cap: what all teachers have used, and what they may use right now.

:class:`Ledger` is held by the one selector; :class:`RemoteAllowance` is how a teacher's ticket asks it.
No Ray here: who calls whom is wired elsewhere.
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
    """Books before anything is used: what is spent and what is reserved never exceeds a cap together.

    A ticket's reservations stay until it is committed, and are then replaced by what it has really used. So
    the cap holds as long as nobody uses more than was granted to it, whoever dies and whenever.

    *Attempts.* A ticket is asked by one attempt at a time. When a new attempt reserves, what the older one
    held counts as spent for good, because it may have used it before it died. An older attempt that is
    heard of again, and an attempt of a ticket that is committed, are denied everything; so nothing that comes
    twice can free what is used.

    *Waiting.* Where a reservation would fit if other tickets turned out to use less than they hold, the
    answer is "wait": ask again once any ticket is committed. Nobody can wait for ever:

    - A ticket that holds nothing keeps nobody waiting, so there is something to wait for only as long as
      some other ticket holds something and does not wait itself. The ledger notes who waits. The last of
      the holders that would begin to wait is denied instead; it ends, is committed, and makes room.
    - A commit forgets who waits, and so does whatever else makes room. All waiting tickets then ask
      again, in any order, and the rule above holds among them.
    - Of a holder that has died, the next attempt or :meth:`abandon` says so. Where neither comes, the others
      wait: to notice that nothing goes on is the caller's part.
    """

    def __init__(self, cap: CapConfig, prices: Mapping[str, PriceConfig]) -> None:
        """``prices`` by teacher; a teacher without one costs nothing. They share one currency."""
        self.cap = cap
        self._prices = prices
        self._answered: UsageByTeacher = {}
        self._lost: UsageByTeacher = {}
        self._held: dict[int, UsageByTeacher] = {}
        self._held_by_all: UsageByTeacher = {}  # kept, for a thousand teachers ask all the time
        self._attempt: dict[int, str] = {}
        self._superseded: set[tuple[int, str]] = set()
        self._committed: set[int] = set()
        self._waiting: set[int] = set()
        self._denied: set[tuple[int, str]] = set()

    def reserve(self, ticket: int, attempt: str, teacher: str, usage: Usage) -> Verdict:
        """Ask for the right to use so much more of a teacher; amounts of one attempt add up."""
        if self.open:
            return "granted"
        if ticket in self._committed or (ticket, attempt) in self._superseded:
            return "denied"  # nobody uses it any more, so it says nothing about the cap
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

    def commit(self, ticket: int, usage: Mapping[str, Usage]) -> None:
        """The ticket is finished and has used so much, by teacher. Only the first call counts.

        A teacher that it holds something of and has used nothing of was asked by an attempt that died, and
        another one found the answers elsewhere: what it holds is spent for good.
        """
        if ticket in self._committed:
            return
        self._committed.add(ticket)
        held = self._release(ticket)
        unasked = {name: one for name, one in held.items() if not _has_asked(usage.get(name, Usage()))}
        self._lost = add_usages(self._lost, unasked)
        self._waiting.clear()
        self._answered = add_usages(self._answered, usage)

    def abandon(self, ticket: int) -> None:
        """Whoever asked for the ticket has given up: what it holds is spent for good; another may ask."""
        self._lost = add_usages(self._lost, self._release(ticket))
        self._waiting.clear()

    def restore(self, lost: Mapping[str, Usage]) -> None:
        """On resume: what attempts of the killed run may have used, by teacher; counts as spent for good."""
        self._lost = add_usages(self._lost, lost)

    def restore_committed(self, tickets: Iterable[int], usage: Mapping[str, Usage]) -> None:
        """These tickets were committed before, and have used so much together, by teacher."""
        self._committed.update(tickets)
        self._answered = add_usages(self._answered, usage)

    @property
    def spent(self) -> UsageByTeacher:
        """By teacher: what finished tickets have used, and what may have been used for nothing."""
        return add_usages(self._answered, self._lost)

    @property
    def lost(self) -> UsageByTeacher:
        """The part of ``spent`` that attempts may have used that died."""
        return dict(self._lost)

    @property
    def cost(self) -> float:
        """Of what is spent, in the currency of the prices; what is lost as if no cache had known it."""
        return float(self._cost(self._lost))

    @property
    def reached(self) -> bool:
        """Whether some ticket has been denied what it has not been granted since."""
        return bool(self._denied)

    @property
    def open(self) -> bool:
        """No cap is set: everything is granted, and only what is committed is booked."""
        return self.cap.is_off

    def _cost(self, unknown: UsageByTeacher) -> Decimal:
        """Of what is answered, and of what may be used at most beside it."""
        free = PriceConfig()
        costs = [usage.cost(self._prices.get(name, free)) for name, usage in self._answered.items()]
        costs += [_at_most(usage, self._prices.get(name, free)) for name, usage in unknown.items()]
        return sum(costs, Decimal())

    def _release(self, ticket: int) -> UsageByTeacher:
        """The ticket holds nothing more; returns what it held."""
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
    """Before it is known which of the prompt's tokens a cache knows."""
    none_or_all = (0, usage.prompt_tokens)
    return max(price.cost(usage.prompt_tokens, cached, usage.answer_tokens) for cached in none_or_all)


def _has_asked(usage: Usage) -> bool:
    return bool(usage.requests or usage.texts or usage.tokens)


_COUNTED = ("texts", "prompt_tokens", "answer_tokens")


class RemoteAllowance:
    """The allowance of one attempt at a ticket, for one teacher; asks elsewhere, in growing blocks.

    ``ask(usage)`` gets the right to use so much more, or not, and waits as long as that is undecided.
    ``on_grant(total)`` is told all that has been granted so far before any of a new grant is used: what it
    writes down is what may have been used should this process be killed.

    A block is as much again as has been granted of its kind, so that a ticket of N texts makes about log2(N)
    calls for texts and as many for tokens.
    Where a block is refused, exactly what is needed is asked for; where that is refused, too, the allowance
    is at its end and asks no more, but what was granted may still be used up.
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
        """Get at least what is short, and a block of it where that is to be had."""
        if self._ended:
            return False
        block = {name: max(n, self._block[name]) for name, n in short.items()}
        granted = await self._ask(Usage(**block))
        if not granted and block != short:
            # Near the cap: begin again with small blocks, so that not every request asks twice.
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
