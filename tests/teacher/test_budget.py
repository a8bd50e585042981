"""The cap is never exceeded, nobody waits for ever, and calls may come twice."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llkd_ray.config.schema import CapConfig
from llkd_ray.config.teacher import PriceConfig
from llkd_ray.teacher.base import Usage, add_usages
from llkd_ray.teacher.budget import Ledger, RemoteAllowance

PRICES = {
    "small": PriceConfig(input=0.1, output=0.3),
    "large": PriceConfig(input=3.0, cached=0.3, output=15.0),
    "odd": PriceConfig(input=1.0, cached=1.25, output=0.0),  # writing to a cache may cost more
}


def usage(tokens: int = 0, texts: int = 0, answer: int = 0) -> Usage:
    return Usage(texts=texts, prompt_tokens=tokens, answer_tokens=answer)


def ledger(**cap) -> Ledger:
    return Ledger(CapConfig(**cap), PRICES)


class TestReserve:
    def test_a_cap_may_be_used_up_to_the_last_token(self):
        books = ledger(tokens=100)
        assert books.reserve(1, "a", "small", usage(60)) == "granted"
        assert books.reserve(1, "a", "large", usage(39, answer=1)) == "granted"
        assert not books.reached
        assert books.reserve(1, "a", "small", usage(1)) == "denied"
        assert books.reached

    def test_it_waits_for_what_others_may_leave(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(80))
        assert books.reserve(2, "b", "small", usage(50)) == "wait"
        assert not books.reached
        books.commit(1, {"small": usage(50)})
        assert books.reserve(2, "b", "small", usage(50)) == "granted"
        assert books.spent == {"small": usage(50)}

    def test_it_does_not_wait_for_what_cannot_come(self):
        books = ledger(texts=10)
        books.commit(0, {"small": usage(texts=4)})
        books.reserve(1, "a", "small", usage(texts=3))
        assert books.reserve(2, "b", "small", usage(texts=7)) == "denied"

    def test_the_last_who_would_wait_is_denied(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(50))
        books.reserve(2, "b", "small", usage(50))
        assert books.reserve(1, "a", "small", usage(10)) == "wait"
        assert books.reserve(2, "b", "small", usage(10)) == "denied"
        books.commit(2, {"small": usage(50)})
        assert books.reserve(1, "a", "small", usage(10)) == "denied", "nobody is left to leave anything"

    def test_who_holds_nothing_keeps_nobody_waiting(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(80))
        assert books.reserve(2, "b", "small", usage(30)) == "wait"
        assert books.reserve(1, "a", "small", usage(30)) == "denied"

    def test_a_grant_after_a_denial_takes_the_denial_back(self):
        books = ledger(tokens=100)
        assert books.reserve(1, "a", "small", usage(128)) == "denied"
        assert books.reserve(1, "a", "small", usage(64)) == "granted"
        assert not books.reached
        assert books.reserve(1, "a", "large", usage(64)) == "denied"
        assert books.reserve(1, "a", "small", usage(1)) == "granted"
        assert books.reached, "the other teacher is still denied"

    def test_after_a_commit_all_who_waited_have_another_chance(self):
        books = ledger(tokens=100)
        for ticket, holds in ((1, 30), (2, 30), (3, 40)):
            books.reserve(ticket, "a", "small", usage(holds))
        assert [books.reserve(ticket, "a", "small", usage(15)) for ticket in (1, 2)] == ["wait"] * 2
        books.commit(3, {"small": usage(30)})
        assert books.reserve(1, "a", "small", usage(15)) == "wait", "2 may find that it has enough"
        books.commit(2, {"small": usage(20)})
        assert books.reserve(1, "a", "small", usage(15)) == "granted"

    def test_what_is_abandoned_is_spent_and_keeps_nobody_waiting(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(80))
        assert books.reserve(2, "b", "small", usage(30)) == "wait"
        for _ in range(2):
            books.abandon(1)
        assert books.spent == {"small": usage(80)}
        assert books.reserve(2, "b", "small", usage(30)) == "denied"
        assert books.reserve(1, "c", "small", usage(20)) == "granted"

    def test_a_small_cost_a_million_times_is_exact(self):
        books = ledger(cost=0.3)  # 0.1 + 0.1 + 0.1 is above 0.3 in binary
        for ticket in range(3):
            assert books.reserve(ticket, "a", "small", usage(1_000_000)) == "granted"
            books.commit(ticket, {"small": usage(1_000_000)})
        assert books.cost == pytest.approx(0.3)
        assert books.reserve(3, "a", "small", usage(1)) == "denied"

    def test_cost_is_reserved_as_if_nothing_were_cached(self):
        books = ledger(cost=3.0)
        assert books.reserve(1, "a", "large", usage(1_000_000)) == "granted"
        books.commit(1, {"large": Usage(prompt_tokens=1_000_000, cached_tokens=900_000)})
        assert books.cost == pytest.approx(0.3 + 0.27)
        assert books.reserve(2, "a", "large", usage(800_000)) == "granted"

    def test_where_writing_to_a_cache_costs_more_that_is_reserved(self):
        assert ledger(cost=1.2).reserve(1, "a", "odd", usage(1_000_000)) == "denied"
        assert ledger(cost=1.25).reserve(1, "a", "odd", usage(1_000_000)) == "granted"

    def test_without_a_cap_only_what_is_committed_is_booked(self):
        books = ledger()
        assert books.open
        assert books.reserve(1, "a", "small", usage(10**12)) == "granted"
        assert books.spent == {}
        books.commit(1, {"small": usage(7)})
        assert (books.spent, books.reached) == ({"small": usage(7)}, False)


class TestCallsThatComeTwice:
    def test_a_second_commit_changes_nothing(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(80))
        books.commit(1, {"small": usage(30)})
        books.commit(1, {"small": usage(40)})
        assert books.spent == {"small": usage(30)}

    def test_what_a_dead_attempt_held_is_spent_for_good(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(60))
        assert books.reserve(1, "b", "small", usage(30)) == "granted"
        assert books.spent == books.lost == {"small": usage(60)}
        books.commit(1, {"small": usage(20)})
        assert books.spent == {"small": usage(80)}
        assert books.reserve(2, "c", "small", usage(21)) == "denied"

    def test_a_dead_attempt_that_speaks_again_gets_nothing_and_frees_nothing(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(10))
        books.reserve(1, "b", "small", usage(20))
        assert books.reserve(1, "a", "small", usage(1)) == "denied"
        assert books.lost == {"small": usage(10)}
        books.commit(1, {"small": usage(20)})
        assert books.reserve(1, "b", "small", usage(1)) == "denied", "the ticket is finished"
        assert not books.reached, "neither says anything about the cap"

    def test_a_ticket_that_another_attempt_finished(self):
        books = ledger(tokens=100)
        books.reserve(1, "a", "small", usage(60))
        books.commit(1, {"small": Usage(reused_texts=8, reused_tokens=60)})  # it found all asked elsewhere
        assert books.lost == {"small": usage(60)}

    def test_what_a_killed_run_may_have_used_counts(self):
        books = ledger(tokens=100)
        books.restore({"small": usage(70), "large": usage(20)})
        assert books.reserve(1, "a", "small", usage(11)) == "denied"
        assert books.reserve(1, "a", "small", usage(10)) == "granted"


def true_cost(used: dict[str, Usage]) -> float:
    return float(sum(one.cost(PRICES[name]) for name, one in used.items()))


amounts = st.builds(
    Usage,
    texts=st.integers(0, 4),
    prompt_tokens=st.integers(0, 60),
    answer_tokens=st.integers(0, 5),
)
tickets = st.integers(0, 4)
caps = st.builds(
    CapConfig,
    texts=st.none() | st.integers(1, 20),
    tokens=st.none() | st.integers(1, 300),
    cost=st.none() | st.floats(1e-6, 1e-3),
)


class Bookkeeping(RuleBasedStateMachine):
    """Tickets that reserve, use some of it, die and are committed, in any order; calls come twice."""

    @initialize(cap=caps)
    def open_books(self, cap):
        self.cap, self.books = cap, Ledger(cap, PRICES)
        self.attempt = defaultdict(int)
        self.was_heard = defaultdict(set)
        self.granted = defaultdict(dict)  # of a ticket's living attempt
        self.used_for_good = {}
        self.committed = set()

    @rule(ticket=tickets, teacher=st.sampled_from(sorted(PRICES)), more=amounts, twice=st.booleans())
    def reserve(self, ticket, teacher, more, twice):
        for _ in range(1 + twice):
            verdict = self.books.reserve(ticket, str(self.attempt[ticket]), teacher, more)
            self.was_heard[ticket].add(self.attempt[ticket])
            if verdict == "granted" and not (self.cap.is_off and ticket in self.committed):
                assert ticket not in self.committed
                self.granted[ticket] = add_usages(self.granted[ticket], {teacher: more})

    @rule(ticket=tickets, more=amounts)
    def a_dead_attempt_asks(self, ticket, more):
        attempt = self.attempt[ticket]
        if self.was_heard[ticket] >= {attempt, attempt - 1} and not self.cap.is_off:
            assert self.books.reserve(ticket, str(attempt - 1), "small", more) == "denied"

    @rule(ticket=tickets, is_known=st.booleans())
    def die(self, ticket, is_known):
        """Everything that was granted may have been used."""
        if ticket not in self.committed:
            self.used_for_good = add_usages(self.used_for_good, self.granted.pop(ticket, {}))
            self.attempt[ticket] += 1
            if is_known:
                self.books.abandon(ticket)

    @rule(ticket=tickets, share=st.floats(0, 1), cached=st.floats(0, 1), twice=st.booleans())
    def commit(self, ticket, share, cached, twice):
        if ticket in self.committed:
            return
        used = {
            name: Usage(
                texts=int(one.texts * share),
                prompt_tokens=int(one.prompt_tokens * share),
                cached_tokens=int(int(one.prompt_tokens * share) * cached),
                answer_tokens=int(one.answer_tokens * share),
            )
            for name, one in self.granted.pop(ticket, {}).items()
        }
        self.committed.add(ticket)
        self.used_for_good = add_usages(self.used_for_good, used)
        for _ in range(1 + twice):
            self.books.commit(ticket, used)

    @invariant()
    def no_cap_is_exceeded(self):
        if not hasattr(self, "books") or self.cap.is_off:
            return
        used = self.used_for_good
        for granted in self.granted.values():
            used = add_usages(used, granted)
        assert sum(one.texts for one in used.values()) <= (self.cap.texts or 10**9)
        assert sum(one.tokens for one in used.values()) <= (self.cap.tokens or 10**9)
        assert true_cost(used) <= (self.cap.cost or 10**9) * (1 + 1e-9)  # the sum here is in binary
        assert self.books.cost <= (self.cap.cost or 10**9)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(max_examples=300, deadline=None)
@given(
    cap=st.integers(1, 400),
    needs=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=8),
    in_flight=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_nobody_waits_for_ever(cap, needs, in_flight, seed):
    """Tickets in any order; one that waits asks again only after a commit, as the ledger promises."""
    chance = random.Random(seed)
    books = ledger(tokens=cap)
    todo = list(enumerate(needs))
    active: dict[int, list[int]] = {}
    attempt: dict[int, int] = defaultdict(int)
    waiting: set[int] = set()
    used = 0
    while todo or active:
        while todo and len(active) < in_flight:
            ticket, parts = todo.pop()
            active[ticket] = list(parts)
        runnable = sorted(active.keys() - waiting)
        assert runnable, f"all of {sorted(active)} wait"
        ticket = chance.choice(runnable)
        if chance.random() < 0.05:  # the actor dies; the ticket begins again
            attempt[ticket] += 1
            active[ticket] = list(needs[ticket])
        verdict = "denied"
        if active[ticket]:
            verdict = books.reserve(ticket, str(attempt[ticket]), "small", usage(active[ticket][0]))
        if verdict == "granted":
            active[ticket].pop(0)
        elif verdict == "wait":
            waiting.add(ticket)
        else:
            done = needs[ticket][: len(needs[ticket]) - len(active.pop(ticket))]
            really = sum(chance.randint(0, part) for part in done)
            used += really
            books.commit(ticket, {"small": usage(really)})
            waiting.clear()
    assert used <= sum(one.tokens for one in books.spent.values()) <= cap


# --- the allowance of one ticket


class Teller:
    """Grants up to a number of tokens and texts; notes what it is asked and what is written down."""

    def __init__(self, tokens: int, texts: int = 10**9) -> None:
        self.left = usage(tokens, texts)
        self.asked: list[Usage] = []
        self.noted: list[Usage] = []
        self.allowance = RemoteAllowance(self.ask, self.note)

    async def ask(self, more: Usage) -> bool:
        await asyncio.sleep(0)
        self.asked.append(more)
        if more.tokens > self.left.prompt_tokens or more.texts > self.left.texts:
            return False
        self.left = usage(self.left.prompt_tokens - more.tokens, self.left.texts - more.texts)
        return True

    async def note(self, total: Usage) -> None:
        await asyncio.sleep(0)
        self.noted.append(total)

    @property
    def granted(self) -> Usage:
        return self.noted[-1] if self.noted else Usage()


class TestRemoteAllowance:
    def test_it_asks_in_blocks_that_grow(self):
        async def scenario():
            teller = Teller(10**6)
            for _ in range(128):
                assert await teller.allowance.take(texts=1, prompt_tokens=100, answer_tokens=1)
            assert len(teller.asked) == 8  # 1, 1, 2, 4, … 64
            assert teller.granted == usage(12_800, texts=128, answer=128)

        asyncio.run(scenario())

    def test_only_what_is_short_is_asked_for(self):
        async def scenario():
            teller = Teller(10**6, texts=2)
            await teller.allowance.take(texts=1, prompt_tokens=10)
            await teller.allowance.take(texts=1, prompt_tokens=10)
            assert await teller.allowance.take(prompt_tokens=10), "a further request for a text that is sent"
            assert teller.asked[-1] == usage(20)

        asyncio.run(scenario())

    def test_near_the_cap_it_asks_for_exactly_what_it_needs(self):
        async def scenario():
            teller = Teller(tokens=110)
            taken = [await teller.allowance.take(prompt_tokens=10) for _ in range(13)]
            assert taken == [True] * 11 + [False] * 2
            assert teller.granted == usage(110)

        asyncio.run(scenario())

    def test_at_its_end_it_asks_no_more_but_uses_up_what_it_has(self):
        async def scenario():
            teller = Teller(tokens=40)
            for need in (10, 10, 5):
                assert await teller.allowance.take(prompt_tokens=need)
            assert not await teller.allowance.take(prompt_tokens=30)
            calls = len(teller.asked)
            assert not await teller.allowance.take(prompt_tokens=30)
            assert await teller.allowance.take(prompt_tokens=5)
            assert len(teller.asked) == calls

        asyncio.run(scenario())

    def test_what_is_granted_is_written_down_before_it_is_used(self):
        async def scenario():
            teller = Teller(10**6)
            teller.allowance = RemoteAllowance(teller.ask, failing)
            with pytest.raises(OSError, match="disk full"):
                await teller.allowance.take(prompt_tokens=10)
            asked = len(teller.asked)
            teller.allowance._on_grant = teller.note
            assert await teller.allowance.take(prompt_tokens=5)
            assert len(teller.asked) == asked + 1, "what was not written down is not used"
            assert teller.granted == usage(15)

        async def failing(total: Usage) -> None:
            raise OSError("disk full")

        asyncio.run(scenario())

    @settings(max_examples=100, deadline=None)
    @given(tokens=st.integers(0, 500), needs=st.lists(st.integers(1, 60), max_size=40))
    def test_takes_at_once_never_use_more_than_is_granted(self, tokens, needs):
        async def scenario():
            teller = Teller(tokens)
            taken = await asyncio.gather(*(teller.allowance.take(prompt_tokens=need) for need in needs))
            used = sum(need for need, got in zip(needs, taken, strict=True) if got)
            assert used <= teller.granted.prompt_tokens <= tokens
            if sum(needs) <= tokens:
                assert all(taken)

        asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(1, 3000),
    texts=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_ledger_and_allowances_together(cap, texts, seed):
    """Tickets at once, as a selector wires them: all end, and the tokens used stay below the cap."""
    chance = random.Random(seed)

    async def scenario():
        books, changed = ledger(tokens=cap), asyncio.Condition()
        used = 0

        async def work(ticket: int) -> None:
            nonlocal used

            async def ask(more: Usage) -> bool:
                async with changed:
                    while (verdict := books.reserve(ticket, "a", "small", more)) == "wait":
                        await changed.wait()
                return verdict == "granted"

            async def note(total: Usage) -> None:
                await asyncio.sleep(0)

            allowance = RemoteAllowance(ask, note)
            mine = 0
            for need in texts[ticket]:
                for _ in range(chance.randint(0, 3)):
                    await asyncio.sleep(0)
                if await allowance.take(texts=1, prompt_tokens=need):
                    mine += need
            used += mine
            books.commit(ticket, {"small": usage(mine)})
            async with changed:
                changed.notify_all()

        async with asyncio.timeout(10):
            await asyncio.gather(*(work(ticket) for ticket in range(len(texts))))
        assert used == sum(one.tokens for one in books.spent.values()) <= cap
        if sum(map(sum, texts)) * 2 <= cap:
            assert not books.reached, "blocks may reserve twice what is needed, never more"
            assert used == sum(map(sum, texts))

    asyncio.run(scenario())
