"""The cap is never exceeded, nobody waits for ever, and calls may come twice."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import replace

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


class Books:
    """A ledger of 100 tokens; attempt "a" and the small teacher, if nothing else is said."""

    def __init__(self, **cap) -> None:
        self.ledger = ledger(**(cap or {"tokens": 100}))

    def ask(self, ticket: int, tokens: int, attempt: str = "a", teacher: str = "small") -> str:
        return self.ledger.reserve(ticket, attempt, teacher, usage(tokens))

    def commit(self, ticket: int, tokens: int, attempt: str | None = "a") -> None:
        self.ledger.commit(ticket, {"small": usage(tokens)}, attempt)

    @property
    def spent(self) -> int:
        return sum(one.tokens for one in self.ledger.spent.values())

    @property
    def lost(self) -> int:
        return sum(one.tokens for one in self.ledger.lost.values())


@pytest.fixture
def books() -> Books:
    return Books()


class TestWaiting:
    def test_for_what_others_may_leave(self, books):
        assert books.ask(1, 80) == "granted"
        assert books.ask(2, 50) == "wait"
        assert not books.ledger.reached
        books.commit(1, 50)
        assert books.ask(2, 50) == "granted", "up to the last token"
        assert (books.spent, books.ledger.reached) == (50, False)
        assert books.ask(2, 1) == "denied"
        assert books.ledger.reached

    def test_not_for_what_cannot_come(self, books):
        books.commit(0, 40)
        books.ask(1, 30)
        assert books.ask(2, 70) == "denied"

    def test_the_last_who_would_wait_is_denied(self, books):
        books.ask(1, 50)
        books.ask(2, 50)
        assert books.ask(1, 10) == "wait"
        assert books.ask(2, 10) == "denied"
        books.commit(2, 50)
        assert books.ask(1, 10) == "denied", "nobody is left to leave anything"

    def test_who_holds_nothing_keeps_nobody_waiting(self, books):
        books.ask(1, 80)
        assert books.ask(2, 30) == "wait"
        assert books.ask(1, 30) == "denied"

    def test_after_a_commit_all_have_another_chance(self, books):
        for ticket, holds in ((1, 30), (2, 30), (3, 40)):
            books.ask(ticket, holds)
        assert [books.ask(ticket, 15) for ticket in (1, 2)] == ["wait"] * 2
        books.commit(3, 30)
        assert books.ask(1, 15) == "wait", "2 may find that it has enough"
        books.commit(2, 20)
        assert books.ask(1, 15) == "granted"


class TestDenied:
    def test_a_grant_after_it_takes_it_back(self, books):
        assert [books.ask(1, 128), books.ask(1, 64)] == ["denied", "granted"]
        assert not books.ledger.reached
        assert books.ask(1, 64, teacher="large") == "denied"
        assert books.ask(1, 1) == "granted"
        assert books.ledger.reached, "the other teacher is still denied"

    def test_without_a_cap_nobody_is_and_only_what_is_committed_is_booked(self):
        books = ledger()
        assert books.open
        assert books.reserve(1, "a", "small", usage(10**12)) == "granted"
        assert books.spent == {}
        books.commit(1, {"small": usage(7)}, "a")
        assert (books.spent, books.reached) == ({"small": usage(7)}, False)


class TestCost:
    def test_a_small_one_a_million_times_is_exact(self):
        books = Books(cost=0.3)  # 0.1 + 0.1 + 0.1 is above 0.3 in binary
        for ticket in range(3):
            assert books.ask(ticket, 1_000_000) == "granted"
            books.commit(ticket, 1_000_000)
        assert books.ledger.cost == pytest.approx(0.3)
        assert books.ask(3, 1) == "denied"

    def test_it_is_reserved_as_if_nothing_were_cached(self):
        books = Books(cost=3.0)
        assert books.ask(1, 1_000_000, teacher="large") == "granted"
        books.ledger.commit(1, {"large": Usage(prompt_tokens=1_000_000, cached_tokens=900_000)}, "a")
        assert books.ledger.cost == pytest.approx(0.3 + 0.27)
        assert books.ask(2, 800_000, teacher="large") == "granted"

    @pytest.mark.parametrize(("cap", "verdict"), [(1.2, "denied"), (1.25, "granted")])
    def test_where_writing_to_a_cache_costs_more_that_is_reserved(self, cap, verdict):
        assert Books(cost=cap).ask(1, 1_000_000, teacher="odd") == verdict


class TestWhoDiesOrComesTwice:
    def test_what_a_dead_attempt_held_is_spent_for_good_and_frees_nothing(self, books):
        books.ask(1, 60)
        assert books.ask(1, 30, "b") == "granted"
        assert books.spent == books.lost == 60
        assert books.ask(1, 1) == "denied", "the dead one speaks again"
        assert books.lost == 60
        books.commit(1, 20, "b")
        assert books.ask(1, 1, "b") == "denied", "the ticket is finished"
        assert not books.ledger.reached, "neither says anything about the cap"
        assert (books.spent, books.ask(2, 21)) == (80, "denied")

    @pytest.mark.parametrize("attempt", ["a", None])
    def test_answers_of_an_older_attempt_do_not_free_what_the_newer_one_holds(self, books, attempt):
        """Both are alive, and the older one, which asked less, was the first to write."""
        books.ask(1, 10)
        books.ask(1, 60, "b")
        books.commit(1, 10, attempt)
        assert books.spent == 70
        assert (books.ask(2, 31), books.ask(2, 30)) == ("denied", "granted")

    def test_what_is_abandoned_is_spent_and_keeps_nobody_waiting(self, books):
        books.ask(1, 80)
        assert books.ask(2, 30) == "wait"
        for _ in range(2):
            books.ledger.abandon(1)
        assert books.spent == 80
        assert (books.ask(2, 30), books.ask(1, 20, "c")) == ("denied", "granted")

    def test_what_a_killed_run_may_have_used_counts(self, books):
        books.ledger.restore({"small": usage(70), "large": usage(20)})
        assert (books.ask(1, 11), books.ask(1, 10)) == ("denied", "granted")


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
        self.unheard = set()
        """Tickets of whose last death the ledger cannot know yet."""
        self.committed = set()

    @rule(ticket=tickets, teacher=st.sampled_from(sorted(PRICES)), more=amounts, twice=st.booleans())
    def reserve(self, ticket, teacher, more, twice):
        for _ in range(1 + twice):
            verdict = self.books.reserve(ticket, str(self.attempt[ticket]), teacher, more)
            self.unheard.discard(ticket)
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
            self.unheard.add(ticket)
            if is_known:
                self.books.abandon(ticket)
                self.unheard.discard(ticket)

    @rule(
        ticket=tickets,
        share=st.floats(0, 1),
        cached=st.floats(0, 1),
        twice=st.booleans(),
        is_holder=st.booleans(),
    )
    def commit(self, ticket, share, cached, twice, is_holder):
        if ticket in self.committed:
            return
        granted = self.granted.pop(ticket, {})
        used = {
            name: Usage(
                texts=int(one.texts * share),
                prompt_tokens=int(one.prompt_tokens * share),
                cached_tokens=int(int(one.prompt_tokens * share) * cached),
                answer_tokens=int(one.answer_tokens * share),
            )
            for name, one in granted.items()
        }
        # The answers of somebody else say nothing of what the holder used.
        counted = ("texts", "prompt_tokens", "answer_tokens")
        kept = (
            used
            if is_holder
            else {
                name: replace(one, **{field: getattr(granted[name], field) for field in counted})
                for name, one in used.items()
            }
        )
        self.committed.add(ticket)
        self.unheard.discard(ticket)
        self.used_for_good = add_usages(self.used_for_good, kept)
        for _ in range(1 + twice):
            self.books.commit(ticket, used, str(self.attempt[ticket]) if is_holder else None)

    @invariant()
    def no_cap_is_exceeded_and_the_books_are_right(self):
        if not hasattr(self, "books") or self.cap.is_off:
            return
        used = self.used_for_good
        if not self.unheard:
            spent = add_usages(dict.fromkeys(used, Usage()), self.books.spent)
            assert spent == add_usages(dict.fromkeys(spent, Usage()), used)
        for granted in self.granted.values():
            used = add_usages(used, granted)
        assert sum(one.texts for one in used.values()) <= (self.cap.texts or 10**9)
        assert sum(one.tokens for one in used.values()) <= (self.cap.tokens or 10**9)
        assert true_cost(used) <= (self.cap.cost or 10**9) * (1 + 1e-9)  # the sum here is in binary
        assert self.books.cost <= (self.cap.cost or 10**9)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


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

    async def take(self, *needs: int) -> list[bool]:
        return [await self.allowance.take(prompt_tokens=need) for need in needs]


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

    def test_near_the_cap_it_asks_for_exactly_what_it_needs_and_at_its_end_no_more(self):
        async def scenario():
            teller = Teller(tokens=110)
            assert await teller.take(*[10] * 13) == [True] * 11 + [False] * 2
            assert teller.granted == usage(110)
            teller = Teller(tokens=40)
            assert await teller.take(10, 10, 5, 30) == [True, True, True, False]
            calls = len(teller.asked)
            assert await teller.take(30, 5) == [False, True], "it uses up what it has"
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


@settings(max_examples=150, deadline=None)
@given(
    cap=st.integers(1, 3000),
    texts=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=8),
    in_flight=st.integers(1, 6),
    deaths=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**32),
)
def test_ledger_and_allowances_together(cap, texts, in_flight, deaths, seed):
    """Tickets at once, as a selector wires them, and actors die: nobody waits for ever or passes the cap."""
    chance = random.Random(seed)
    books, used = ledger(tokens=cap), 0

    async def scenario():
        changed, slots = asyncio.Condition(), asyncio.Semaphore(in_flight)

        async def attempt(ticket: int, name: str) -> int | None:
            """The tokens used, of which nobody hears where the actor dies."""
            nonlocal used

            async def ask(more: Usage) -> bool:
                async with changed:
                    while (verdict := books.reserve(ticket, name, "small", more)) == "wait":
                        await changed.wait()
                return verdict == "granted"

            async def note(total: Usage) -> None:
                await asyncio.sleep(0)

            allowance, mine = RemoteAllowance(ask, note), 0
            for need in texts[ticket]:
                for _ in range(chance.randint(0, 3)):
                    await asyncio.sleep(0)
                if await allowance.take(texts=1, prompt_tokens=need):
                    mine += need
                    used += need
                if chance.random() < deaths:
                    return None
            return mine

        async def work(ticket: int) -> None:
            async with slots:
                number = 0
                while (mine := await attempt(ticket, str(number))) is None:
                    number += 1
                books.commit(ticket, {"small": usage(mine)}, str(number))
                async with changed:
                    changed.notify_all()

        async with asyncio.timeout(60):
            await asyncio.gather(*(work(ticket) for ticket in range(len(texts))))

    asyncio.run(scenario())
    spent = sum(one.tokens for one in books.spent.values())
    assert used <= spent <= cap
    if not deaths:
        assert used == spent
        if sum(map(sum, texts)) * 2 <= cap:
            assert not books.reached, "blocks may reserve twice what is needed, never more"
            assert used == sum(map(sum, texts))
