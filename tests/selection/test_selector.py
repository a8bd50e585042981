"""The selector gives the same answers however often it is asked and however often it dies.

The plain class runs in a test's own event loop. Blocking is tested by a wait that must not end soon.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from selector_bench import N_CLASSES, N_POOL, N_TEST, TOKENS, Bench
from toys import toy_texts

from llkd_ray.config.base import ConfigError
from llkd_ray.metrics.uncertainty import entropy, margin, support
from llkd_ray.selection.recovery import delete_snapshots
from llkd_ray.selection.selector import ScoresLost, Selector
from llkd_ray.storage import tables
from llkd_ray.storage.lock import Fence, Superseded
from llkd_ray.storage.run_dir import (
    BATCH,
    CALIBRATION,
    EPOCHS_DIR,
    LABELS_DIR,
    LEASES_DIR,
    SCORES,
    SELECTED,
    SNAPSHOTS_DIR,
    RunStore,
    round_file,
    ticket_file,
)
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.labels import write_mark


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


async def still_waits(waiting: asyncio.Task) -> bool:
    """Whether a task is held up; it gets many turns of the loop to finish."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not waiting.done()


async def released(waiting: asyncio.Task):
    """The result of a task that nothing holds up any more."""
    return await asyncio.wait_for(waiting, timeout=5)


def run(coroutine):
    return asyncio.run(coroutine)


class TestLease:
    def test_every_kind_has_rows_of_its_own(self, bench):
        async def script():
            await bench.teach_for(0)
            holdout = [await bench.lease(t) for t in bench.schedule.holdout_tickets]
            first = [
                await bench.lease(t)
                for t in range(bench.schedule.pool_tickets.start, bench.schedule.tickets_before(1))
            ]
            test = [await bench.lease(t) for t in bench.schedule.test_tickets]
            return (np.concatenate(rows) for rows in (holdout, first, test))

        holdout, pool, test = run(script())
        assert holdout.size == bench.schedule.holdout == 20
        assert np.array_equal(np.sort(holdout), run(bench.selector.holdout_rows()))
        assert np.array_equal(test, np.arange(N_POOL, N_POOL + N_TEST))
        assert np.unique(pool).size == pool.size
        assert pool.max() < N_POOL
        assert not np.isin(pool, holdout).any()

    def test_sizes_are_those_of_the_schedule(self, bench):
        async def script():
            await bench.rounds()
            return [len(await bench.lease(t)) for t in range(bench.schedule.n_tickets)]

        assert run(script()) == [bench.schedule.ticket_rows(t) for t in range(bench.schedule.n_tickets)]

    def test_second_call_and_new_selector_give_the_same(self, bench):
        async def lease_all():
            tickets = [*range(bench.schedule.tickets_before(1)), *bench.schedule.test_tickets]
            return [(await bench.lease(ticket)).tolist() for ticket in tickets]

        first = run(lease_all())
        assert run(lease_all()) == first
        files = bench.store.names(LEASES_DIR)
        bench.restart()
        assert run(lease_all()) == first
        assert bench.store.names(LEASES_DIR) == files

    def test_is_in_its_file_before_it_is_answered(self, bench):
        ticket = bench.schedule.pool_tickets.start
        rows = run(bench.lease(ticket))
        leases = bench.store.read_table(f"{LEASES_DIR}/0000.parquet")
        assert leases.schema == tables.LEASES
        of_ticket = leases["row"].to_numpy()[leases["ticket"].to_numpy() == ticket]
        assert of_ticket.tolist() == rows.tolist()

    def test_does_not_depend_on_which_round_is_asked_for_first(self, tmp_path):
        async def lease(bench, rounds):
            tickets = [bench.schedule.tickets_before(k) - 1 for k in rounds]
            return {k: (await bench.lease(t)).tolist() for k, t in zip(rounds, tickets, strict=True)}

        in_order = run(lease(Bench(tmp_path / "a"), (0, 1)))
        assert run(lease(Bench(tmp_path / "b"), (1, 0))) == in_order

    def test_more_rounds_than_tickets(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"ticket_size": 150}, budget={"rounds": 6, "train": 60})
        assert len(bench.schedule.pool_tickets) == 2

        async def script():
            for k in range(6):
                await bench.round(k)
            return await bench.selector.stats()

        stats = run(script())
        assert stats["labelled"] == N_POOL
        assert stats["rounds_trained"] == 6
        bench.restart()
        assert run(bench.selector.stats())["labelled"] == N_POOL


class TestLookAhead:
    def test_one_round_ahead_is_given_and_two_must_wait(self, bench):
        async def script():
            await bench.teach_for(1)  # round 0 is not selected yet
            two_ahead = asyncio.create_task(bench.lease(bench.schedule.tickets_before(1)))
            assert bench.schedule.round_of(bench.schedule.tickets_before(1)) == 2
            assert await still_waits(two_ahead)
            await bench.selector.select(0)
            assert len(await released(two_ahead)) == 16

        run(script())

    def test_holds_after_a_restart(self, bench):
        async def before():
            await bench.round(0)

        async def after():
            for k, waits in ((1, False), (2, False), (3, True)):
                ticket = bench.schedule.tickets_before(k) - 1
                lease = asyncio.create_task(bench.lease(ticket))
                assert await still_waits(lease) == waits, k
                lease.cancel()

        run(before())
        bench.restart()
        run(after())

    def test_holdout_and_test_need_not_wait(self, bench):
        for ticket in (*bench.schedule.holdout_tickets, *bench.schedule.test_tickets):
            assert len(run(bench.lease(ticket))) == bench.schedule.ticket_rows(ticket)

    def test_finish_releases_waiters_with_nothing(self, bench):
        async def script():
            ticket = bench.schedule.pool_tickets.stop - 1
            lease = asyncio.create_task(bench.lease(ticket))
            files = asyncio.create_task(bench.selector.batch_files(0))
            labels = asyncio.create_task(bench.selector.wait_labels(0))
            for waiting in (lease, files, labels):
                assert await still_waits(waiting)
            await bench.selector.finish()
            assert (await released(lease)).tolist() == []
            assert await released(files) is None
            await released(labels)
            assert (await bench.lease(ticket)).tolist() == []
            assert len(await bench.lease(bench.schedule.test_tickets.start)) == 16

        run(script())
        assert bench.store.names(LEASES_DIR) == []


class TestLabels:
    def test_twice_counts_once(self, bench):
        async def script():
            ticket = bench.schedule.pool_tickets.start
            rows = await bench.lease(ticket)
            probs = bench.probs(rows)
            new = [await bench.put(ticket, rows, probs, 112) for _ in range(2)]
            # Another answer to the same texts changes nothing.
            other = np.roll(probs, 1, axis=1)
            new.append(await bench.put(ticket, rows, other, 112))
            assert new == [16, 0, 0]
            stats = await bench.selector.stats()
            assert (stats["labelled"], stats["teacher_tokens"], stats["tickets_done"]) == (16, 112, 1)
            assert bench.selector.table.label[rows].tolist() == probs.argmax(axis=1).tolist()

        run(script())

    def test_confidence_is_over_the_labels(self, bench):
        async def script():
            ticket = bench.schedule.pool_tickets.start
            rows = (await bench.lease(ticket))[:2]
            await bench.put(ticket, rows, np.array([[0.3, 0.1, 0.0], [0.0, 0.0, 0.0]]), 9)
            assert bench.selector.table.confidence[rows] == pytest.approx([0.75, 1 / 3])

        run(script())

    def test_of_holdout_and_pool_are_counted_and_of_test_are_not(self, bench):
        async def script():
            for ticket in bench.schedule.test_tickets:
                await bench.teach(ticket)
            assert (await bench.selector.stats())["labelled"] == 0
            for ticket in bench.schedule.holdout_tickets:
                await bench.teach(ticket)
            stats = await bench.selector.stats()
            assert stats["labelled"] == bench.schedule.holdout
            assert stats["teacher_tokens"] == TOKENS * (N_TEST + bench.schedule.holdout)

        run(script())

    def test_wait_labels_waits_for_the_last_of_them(self, bench):
        async def script():
            waiting = asyncio.create_task(bench.selector.wait_labels(0))
            needed = bench.schedule.tickets_before(0)
            for ticket in (*bench.schedule.test_tickets, *range(1, needed)):
                await bench.teach(ticket)
                assert await still_waits(waiting)
            await bench.teach(0)
            await released(waiting)

        run(script())

    @pytest.mark.parametrize("is_over", [False, True])
    def test_the_first_of_them_or_the_end_of_the_run_is_waited_for(self, bench, is_over):
        async def script():
            waiting = asyncio.create_task(bench.selector.wait_first_labels())
            assert await still_waits(waiting)
            if is_over:
                await bench.selector.finish()
            else:
                await bench.teach(next(iter(bench.schedule.holdout_tickets)))
            await released(waiting)
            await bench.selector.wait_first_labels()

        run(script())

    def test_ticket_whose_texts_all_went_to_quarantine_is_done(self, bench):
        async def script():
            await bench.put(0, np.empty(0, dtype=np.int64), np.empty((0, N_CLASSES)), 0)
            assert (await bench.selector.stats())["tickets_done"] == 1

        run(script())


class TestScoring:
    @pytest.mark.parametrize(("policy", "k"), [("random", 1), ("llkd", 0)])
    def test_nothing_is_scored_for_random_nor_before_the_first_round(self, tmp_path, policy, k):
        bench = Bench(tmp_path / "run", selection={"policy": policy})

        async def script():
            for earlier in range(k):
                await bench.round(earlier)
            await bench.teach_for(k)
            assert (await bench.rows_to_score(k)).size == 0
            await asyncio.wait_for(bench.selector.wait_refreshed(k), timeout=5)

        run(script())

    def test_candidates_of_the_round_are_scored(self, bench):
        async def script():
            await bench.round(0)
            waiting = asyncio.create_task(bench.rows_to_score(1))
            assert await still_waits(waiting), "the round's labels are not there yet"
            await bench.teach_for(2)  # further than round 1 may look
            rows = await released(waiting)
            trained = bench.batch(0)["row"].to_numpy()
            leased = np.concatenate(
                [
                    await bench.lease(t)
                    for t in range(bench.schedule.pool_tickets.start, bench.schedule.tickets_before(1))
                ]
            )
            assert np.array_equal(rows, np.setdiff1d(leased, trained))

        run(script())

    def test_selection_waits_for_the_scores(self, bench):
        async def script():
            await bench.round(0)
            await bench.teach_for(1)
            waiting = asyncio.create_task(bench.selector.wait_refreshed(1))
            assert await still_waits(waiting)
            await bench.score(1)
            await released(waiting)
            await bench.selector.select(1)
            assert (await bench.rows_to_score(1)).size == 0, "nothing more to score once selected"

        run(script())

    def test_scores_are_kept_in_a_file(self, bench):
        async def script():
            await bench.round(0)
            await bench.teach_for(1)
            return await bench.score(1)

        rows = run(script())
        scores = bench.store.read_table(round_file(1, SCORES))
        assert scores.schema == tables.SCORES
        assert scores["row"].to_pylist() == rows.tolist()
        p_MC = bench.opinion(1)[rows]
        label_M = bench.selector.table.label[rows]
        assert scores["uncertainty"].to_numpy() == pytest.approx(entropy(p_MC), abs=1e-5)
        assert scores["margin"].to_numpy() == pytest.approx(margin(p_MC), abs=1e-3)
        assert scores["support"].to_numpy() == pytest.approx(support(p_MC, label_M), abs=1e-3)


class TestSelect:
    def test_batch_holds_what_teacher_and_corpus_say(self, bench):
        run(bench.round(0))
        batch = bench.batch(0)
        rows = batch["row"].to_numpy()
        texts, _ = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)
        mass = bench.probs(rows)
        assert batch.schema == tables.ROUND
        assert len(batch) == 15
        assert batch["text"].to_pylist() == [texts[row] for row in rows]
        assert batch["label"].to_pylist() == mass.argmax(axis=1).tolist()
        expected = mass / mass.sum(axis=1, keepdims=True)
        assert np.array(batch["probs"].to_pylist()) == pytest.approx(expected, abs=1e-6)
        assert batch["weight"].to_numpy().mean() == pytest.approx(1.0)

    def test_second_call_changes_nothing(self, bench):
        async def script():
            await bench.teach_for(0)
            facts = await bench.selector.select(0)
            first = bench.store.read_bytes(round_file(0, BATCH))
            assert await bench.selector.select(0) == facts
            assert bench.store.read_bytes(round_file(0, BATCH)) == first
            assert (await bench.selector.stats())["trained"] == facts["selected"] == len(bench.batch(0))

        run(script())

    @pytest.mark.parametrize("policy", ["random", "llkd"])
    def test_rows_are_of_the_pool_never_twice_and_the_same_for_a_seed(self, tmp_path, policy):
        def finished(name, seed):
            bench = Bench(tmp_path / name, selection={"policy": policy}, run={"seed": seed})
            run(bench.rounds())
            return bench

        bench = finished("a", seed=1)
        chosen = np.concatenate(bench.batch_rows())
        assert np.unique(chosen).size == chosen.size == run(bench.selector.stats())["trained"]
        assert chosen.max() < N_POOL
        assert not np.isin(chosen, run(bench.selector.holdout_rows())).any()
        if policy == "random":
            assert [len(rows) for rows in bench.batch_rows()] == [15, 15, 15, 15]
        assert finished("b", seed=1).batch_rows() == bench.batch_rows()
        assert finished("c", seed=2).batch_rows() != bench.batch_rows()

    def test_a_round_looks_only_at_the_tickets_it_waited_for(self, tmp_path):
        late, early = Bench(tmp_path / "late"), Bench(tmp_path / "early")

        async def script():
            await late.teach_for(0)
            await early.teach_for(1)  # the teacher is ahead
            for ticket in early.schedule.test_tickets:
                await early.teach(ticket)
            await late.selector.select(0)
            await early.selector.select(0)

        run(script())
        assert late.batch(0).equals(early.batch(0))

    def test_fewer_candidates_than_wanted_are_made_up_for_later(self, tmp_path):
        bench = Bench(tmp_path / "run", selection={"policy": "random"}, budget={"rounds": 2, "train": 170})

        async def script():
            return [await bench.round(k) for k in range(2)]

        run(script())
        assert [bench.schedule.train_target(k) for k in range(2)] == [85, 170]
        sizes = [len(rows) for rows in bench.batch_rows(2)]
        assert sum(sizes) == 170
        assert sizes[0] <= 85

    def test_a_round_of_nothing(self, tmp_path):
        bench = Bench(tmp_path / "run")

        async def script():
            for ticket in range(bench.schedule.tickets_before(0)):
                none = np.empty(0, dtype=np.int64)
                bench.write_labels(ticket, none)
                await bench.put(ticket, none, np.empty((0, N_CLASSES)), 0)
            return await bench.selector.select(0)

        facts = run(script())
        assert (facts["selected"], facts["candidates"]) == (0, 0)
        assert bench.batch(0).schema == tables.ROUND
        assert len(bench.batch(0)) == 0
        assert bench.restart().state.selected == {0: facts}

    def test_batch_files_wait_for_the_selection(self, bench):
        async def script():
            await bench.teach_for(0)
            waiting = asyncio.create_task(bench.selector.batch_files(0))
            assert await still_waits(waiting)
            await bench.selector.select(0)
            assert await released(waiting) == [round_file(0, BATCH)]
            await bench.selector.trained(0, {"ranks": 1})
            await bench.round(1)
            assert await bench.selector.batch_files(1) == [round_file(0, BATCH), round_file(1, BATCH)]

        run(script())

    def test_trained_is_told_to_those_who_wait(self, bench):
        async def script():
            assert await bench.selector.last_trained() is None
            assert await bench.selector.next_round() == 0
            await bench.teach_for(0)
            await bench.selector.select(0)
            waiting = asyncio.create_task(bench.selector.wait_trained(0))
            assert await still_waits(waiting)
            facts = {"ranks": 2, "loss": 0.5, "checkpoint": "checkpoints/x"}
            for _ in range(2):
                await bench.selector.trained(0, facts)
            assert await released(waiting) == facts
            assert await bench.selector.last_trained() == facts
            assert await bench.selector.next_round() == 1

        run(script())
        bench.restart()
        assert run(bench.selector.next_round()) == 1
        assert run(bench.selector.last_trained())["checkpoint"] == "checkpoints/x"

    def test_options_reach_the_policy(self, tmp_path):
        options = {"order": "product", "thresholds": "global"}
        bench = Bench(tmp_path / "run", selection={"policy": "llkd", "options": options})

        async def script():
            await bench.round(0)
            await bench.teach_for(1)
            await bench.score(1)
            table = bench.selector.table
            candidates = table.candidates(bench.schedule.tickets_before(1))
            await bench.selector.select(1)
            return candidates

        candidates = run(script())
        value = candidates.confidence_N * candidates.uncertainty_N
        passing = (candidates.confidence_N >= candidates.confidence_N.mean()) & (
            candidates.uncertainty_N >= candidates.uncertainty_N.mean()
        )
        order = np.argsort(-np.where(passing, value, -1), kind="stable")[: min(15, passing.sum())]
        assert bench.batch(1)["row"].to_pylist() == candidates.row_N[order].tolist()
        weights = bench.batch(1)["weight"].to_numpy()
        assert weights == pytest.approx(value[order] / value[order].mean(), rel=1e-5)

    @pytest.mark.parametrize("quota", [0.0, None])
    def test_quota_shares_all_rounds_out_between_the_classes(self, tmp_path, quota):
        bench = Bench(tmp_path / "run", selection={"policy": "random", "quota": quota})
        run(bench.rounds())
        labels = np.concatenate([bench.batch(k)["label"].to_numpy() for k in range(4)])
        counts = np.bincount(labels, minlength=N_CLASSES).tolist()
        assert sum(counts) == 60
        assert (counts == [20, 20, 20]) == (quota == 0.0)

    def test_the_student_is_told_what_to_reckon_with(self, tmp_path):
        bench = Bench(tmp_path / "run", selection={"policy": "random", "prior": 0.5})

        async def script():
            await bench.teach_for(1)  # more than round 0 waits for
            await bench.selector.select(0)
            prior_C = await bench.selector.target_prior(0)
            again = await bench.restart().target_prior(0)
            return prior_C, again

        prior_C, again = run(script())
        below = bench.schedule.tickets_before(0)
        rows = np.concatenate([bench.selector.leases.rows[t] for t in range(below)])
        rows = rows[rows < N_POOL]
        count_C = np.bincount(bench.probs(rows).argmax(axis=1), minlength=N_CLASSES)
        assert prior_C == pytest.approx(count_C**0.5 / (count_C**0.5).sum())
        assert again.tolist() == prior_C.tolist()

    def test_a_policy_without_a_prior_leaves_the_student_alone(self, tmp_path):
        bench = Bench(tmp_path / "run", selection={"policy": "random"})

        async def script():
            await bench.round(0)
            return await bench.selector.target_prior(0)

        assert run(script()) is None


class TestAcquisitionByTheStudent:
    """The student's opinion decides what is read, so a lease waits until the opinion is complete."""

    @pytest.fixture
    def asking(self, tmp_path):
        return self.make(tmp_path / "run")

    def make(self, folder, policy="entropy", **sections):
        selection = {"policy": "random"} | sections.pop("selection", {})
        acquisition = {"policy": policy, "explore": 0.0} | sections.pop("acquisition", {})
        return Bench(folder, selection=selection, acquisition=acquisition, **sections)

    def tickets_of(self, bench, k):
        first = bench.schedule.tickets_before(k - 1) if k else bench.schedule.pool_tickets.start
        return range(first, bench.schedule.tickets_before(k))

    async def lease_for(self, bench, k):
        rows = [await bench.lease(ticket) for ticket in self.tickets_of(bench, k)]
        return np.concatenate(rows)

    def test_leases_wait_for_the_selection_of_the_round_before(self, asking):
        async def script():
            await asking.teach_for(0)
            next_round = asyncio.create_task(asking.lease(asking.schedule.tickets_before(0)))
            assert await still_waits(next_round), "round 0 is not selected yet"
            await asking.selector.select(0)
            assert len(await released(next_round)) == 16

        run(script())

    @pytest.mark.parametrize("policy", ["random", "llkd"])
    def test_unread_texts_are_scored_too_whatever_selects(self, tmp_path, policy):
        bench = self.make(tmp_path / "run", selection={"policy": policy})

        async def script():
            await bench.round(0)
            await bench.teach_for(1)
            waiting = asyncio.create_task(bench.selector.wait_refreshed(1))
            assert await still_waits(waiting)
            rows = await bench.score(1)
            await released(waiting)
            assert np.array_equal(rows, bench.selector.table.untrained())
            assert np.isin(bench.selector.table.unread().row_N, rows).all()
            assert bench.selector.table.unread().row_N.size > 0

        run(script())

    @pytest.mark.parametrize("policy", ["entropy", "margin"])
    def test_reads_what_the_student_of_the_round_before_was_least_sure_of(self, tmp_path, policy):
        bench = self.make(tmp_path / "run", policy)

        async def script():
            await bench.rounds(2)
            unread = bench.selector.table.unread().row_N
            return unread, await self.lease_for(bench, 2)

        unread, leased = run(script())
        p_MC = bench.opinion(1)[unread]
        sure_M = -entropy(p_MC) if policy == "entropy" else margin(p_MC)
        cutoff = np.sort(sure_M)[leased.size - 1]
        assert leased.size < unread.size
        assert sure_M[np.isin(unread, leased)].max() <= cutoff + 1e-3, "margins are kept in 16 bits"

    def test_explore_and_seed_reach_the_policy(self, tmp_path, monkeypatch):
        bench = self.make(tmp_path / "run", acquisition={"explore": 0.25}, run={"seed": 5})
        seen = []
        policy = bench.selector.leases.policy

        class Spy:
            uses_student = True

            def choose(self, *arguments, **more):
                seen.append(more)
                return policy.choose(*arguments, **more)

        bench.selector.leases.policy = Spy()
        run(bench.lease(bench.schedule.pool_tickets.start))
        assert seen == [{"seed": 5, "explore": 0.25}]

    def test_a_restarted_selector_leases_the_same(self, tmp_path):
        kept, dying = (self.make(tmp_path / name, "margin") for name in ("kept", "dying"))
        for bench in (kept, dying):
            run(bench.rounds(2))
        # Once before the leases are in a file, so that they come from the scores in theirs; once after.
        dying.restart()
        first = run(self.lease_for(dying, 2)).tolist()
        dying.restart()
        assert run(self.lease_for(dying, 2)).tolist() == first == run(self.lease_for(kept, 2)).tolist()

    def test_a_whole_run(self, tmp_path):
        def rounds(name, restart):
            bench = self.make(
                tmp_path / name,
                "m_raru",
                selection={"policy": "llkd_sample", "quota": 0.5},
                acquisition={"explore": 0.1},
                budget={"labels": 120},
            )
            for k in range(4):
                run(bench.round(k))
                if restart:
                    bench.restart()
            stats = run(bench.selector.stats())
            assert (stats["labelled"], stats["trained"]) == (120, 60)
            return bench.batch_rows()

        assert rounds("once", restart=False) == rounds("often", restart=True)


STAGES = ("leases", "labels", "scores", "batch without mark", "select", "trained")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Batches and counts of a run that nothing broke."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed") / "run")

    async def script():
        for k in range(4):
            await bench.round(k)
        return await bench.selector.stats()

    stats = run(script())
    return bench.batch_rows(), stats


class TestRebuild:
    """A selector that dies at any stage of round 1 leaves a run that ends as if it had not."""

    async def until(self, bench, stage):
        await bench.round(0)
        if stage == "leases":
            await bench.lease(bench.schedule.tickets_before(0))
            return
        await bench.teach_for(1)
        if stage == "labels":
            return
        await bench.score(1)
        if stage == "scores":
            return
        await bench.selector.select(1)
        if stage == "batch without mark":
            bench.store.delete(round_file(1, SELECTED))
        if stage == "trained":
            await bench.selector.trained(1, {"ranks": 1})

    async def onwards(self, bench):
        for k in range(1, 4):
            await bench.teach_for(k)
            if (await bench.rows_to_score(k)).size:
                await bench.score(k)
            await asyncio.wait_for(bench.selector.wait_refreshed(k), timeout=5)
            await bench.selector.select(k)
            if await bench.selector.next_round() == k:
                await bench.selector.trained(k, {"ranks": 1})

    @pytest.mark.parametrize("stage", STAGES)
    def test_after(self, bench, undisturbed, stage):
        run(self.until(bench, stage))
        before = run(bench.selector.stats())
        bench.restart()
        if stage != "batch without mark":
            assert run(bench.selector.stats()) == before
        run(self.onwards(bench))
        batches, stats = undisturbed
        assert bench.batch_rows() == batches
        assert run(bench.selector.stats()) == stats

    @pytest.mark.parametrize("told_before", [1, 2])
    def test_amid_the_scores(self, bench, undisturbed, told_before):
        """What some or all ranks told the dead one is in no file, so all score again."""

        async def script():
            await self.until(bench, "labels")
            rows, labels = await bench.selector.rows_to_score(1)
            halves = np.array_split(np.arange(rows.size), 2)  # two ranks
            for i, mine in enumerate(halves):
                if i == told_before:
                    bench.restart()
                await bench.tell(1, rows[mine], labels[mine])
            if told_before == 2:
                bench.restart()
            lost = sum(mine.size for mine in halves[:told_before])
            with pytest.raises(ScoresLost, match=rf"{lost} of {rows.size} scores"):
                await bench.selector.refresh_done(1, rows.size)
            assert not bench.store.exists(round_file(1, SCORES))
            await self.onwards(bench)
            # Once they are in their file, a successor that is told so again is content.
            await bench.restart().refresh_done(1, rows.size)

        run(script())
        assert bench.batch_rows() == undisturbed[0]

    def test_table_is_the_same(self, bench):
        async def script():
            for k in range(3):
                await bench.round(k)
            await bench.teach_for(3)

        run(script())
        assert_same_table(bench.selector.table, bench.restart().table)

    def test_a_run_whose_rounds_are_over_is_finished(self, bench):
        run(bench.rounds())
        assert bench.restart().state.finished
        assert run(bench.selector.batch_files(4)) is None

    def test_half_a_write_is_no_label(self, bench):
        ticket = bench.schedule.pool_tickets.start
        run(bench.lease(ticket))
        bench.store.write_bytes(f"{LABELS_DIR}/ticket-00000002.parquet.0123.tmp", b"PAR1 half")
        assert run(bench.restart().stats())["tickets_done"] == 0


def assert_same_table(before, after):
    columns = {name for name, value in vars(before).items() if isinstance(value, np.ndarray)}
    assert {"label", "uncertainty", "margin", "support", "ticket"} < columns
    for column in sorted(columns):
        one, other = getattr(before, column), getattr(after, column)
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), column


class TestSnapshot:
    """A selector that restarts while its driver lives."""

    @pytest.fixture
    def bench(self, tmp_path):
        bench = Bench(tmp_path / "run")
        bench.restart("one")
        return bench

    def spy_on_files(self, bench, monkeypatch) -> list[str]:
        """Will hold the names of label files and score files that are read from now on."""
        read: list[str] = []
        for method in ("read_bytes", "read_table"):
            original = getattr(RunStore, method)

            def reading(store, relative, *more, original=original):
                read.append(relative)
                return original(store, relative, *more)

            monkeypatch.setattr(RunStore, method, reading)
        return read

    def test_what_is_in_it_is_not_read_again(self, bench, monkeypatch):
        async def script():
            await bench.rounds(2)
            done = set(bench.selector.ingest.done)
            await bench.teach_for(2)
            await bench.score(2)
            return bench.selector.ingest.done - done

        later = run(script())
        assert later
        before, read = bench.selector, self.spy_on_files(bench, monkeypatch)
        after = bench.restart("one")
        assert {name for name in read if name.endswith(".parquet")} == {
            *(ticket_file(LABELS_DIR, ticket) for ticket in later),
            *(f"{LEASES_DIR}/{name}" for name in bench.store.names(LEASES_DIR)),
            round_file(2, SCORES),
        }
        assert_same_table(before.table, after.table)
        assert run(after.stats()) == run(before.stats())

    def test_the_rounds_are_those_of_an_undisturbed_run(self, bench, undisturbed):
        for k in range(4):
            run(bench.rounds(k + 1, start=k))
            bench.restart("one")
        batches, stats = undisturbed
        assert bench.batch_rows() == batches
        assert run(bench.selector.stats()) == stats

    def test_what_comes_while_it_is_copied_is_not_lost(self, bench, monkeypatch):
        """The copy is taken in many steps; a ticket comes between two of them."""
        monkeypatch.setattr("llkd_ray.selection.table._ROWS_A_STEP", 10)

        async def script():
            await bench.round(0)
            for ticket in range(bench.schedule.tickets_before(0), bench.schedule.tickets_before(1)):
                await bench.teach(ticket)
            assert not bench.selector.snapshot_task.done()
            await bench.selector.snapshot_task

        run(script())
        before = bench.selector
        after = bench.restart("one")
        assert_same_table(before.table, after.table)
        assert run(after.stats()) == run(before.stats())

    def test_one_half_written_is_left_out(self, bench):
        run(bench.rounds(2))
        before = bench.selector
        (name,) = bench.store.names(SNAPSHOTS_DIR)
        content = bench.store.read_bytes(f"{SNAPSHOTS_DIR}/{name}")
        bench.store.write_bytes(f"{SNAPSHOTS_DIR}/{name}", content[: len(content) // 2])
        after = bench.restart("one")
        assert_same_table(before.table, after.table)
        assert run(after.stats()) == run(before.stats())

    def test_another_driver_reads_the_files(self, bench, monkeypatch):
        """What it finds damaged is asked again; nobody has looked at the files since."""
        run(bench.rounds(2))
        read = self.spy_on_files(bench, monkeypatch)
        bench.restart("two")
        done = bench.selector.ingest.done
        assert done
        assert {ticket_file(LABELS_DIR, ticket) for ticket in done} <= set(read)

    def test_a_full_disk_costs_the_snapshot_only(self, bench, monkeypatch):
        def no_space(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr("llkd_ray.selection.selector.save_snapshot", no_space)
        run(bench.rounds(2))
        assert bench.store.names(SNAPSHOTS_DIR) == []
        before = bench.selector
        assert_same_table(before.table, bench.restart("one").table)

    def test_the_last_round_needs_none(self, bench):
        run(bench.rounds(3))
        bench.store.delete(f"{SNAPSHOTS_DIR}/{bench.store.names(SNAPSHOTS_DIR)[0]}")

        async def last():
            bench.selector.snapshot_task = None
            await bench.round(3)
            return bench.selector.snapshot_task

        assert run(last()) is None
        delete_snapshots(bench.store)
        delete_snapshots(bench.store)  # a second time, there is nothing left
        assert bench.store.names(SNAPSHOTS_DIR) == []


class TestDamage:
    def test_a_damaged_label_file_is_put_aside_and_its_ticket_is_not_done(self, bench):
        run(bench.round(0))
        ticket = bench.schedule.pool_tickets.start
        bench.store.write_bytes(ticket_file(LABELS_DIR, ticket), b"PAR1 and zeros")
        selector = bench.restart()
        stats = run(selector.stats())
        assert stats["damaged"] == [ticket]
        (line,) = stats["put_aside"]
        assert line.startswith(f"{ticket_file(LABELS_DIR, ticket)} cannot be read (")
        assert ticket not in selector.ingest.done
        run(bench.teach(ticket))
        assert run(bench.restart().stats())["damaged"] == []

    @pytest.mark.parametrize("part", ["leases", "scores", "batch", "selected"])
    def test_what_cannot_be_made_again_is_named(self, bench, part):
        run(bench.rounds(2))
        file = {
            "leases": f"{LEASES_DIR}/{bench.store.names(LEASES_DIR)[0]}",
            "scores": round_file(1, SCORES),
            "batch": round_file(1, BATCH),
            "selected": round_file(1, SELECTED),
        }[part]
        content = bench.store.read_bytes(file)
        bench.store.write_bytes(file, content[: len(content) // 2])
        with pytest.raises(ConfigError, match=rf"{file} cannot be read \(.*\): if it is damaged, put a copy"):
            bench.restart()


class TestFence:
    """A selector whose node was lost may go on answering for a while after the next one has begun."""

    def test_one_that_was_replaced_writes_nothing_more(self, bench):
        async def script():
            await bench.round(0)
            await bench.teach_for(1)
            await bench.score(1)
            stale, newest = bench.selector, bench.restart()
            files = everything_below(bench.store)
            with pytest.raises(Superseded):
                await stale.select(1)
            with pytest.raises(Superseded):
                await stale.refresh_done(1, 0)
            with pytest.raises(Superseded):
                await stale.trained(1, {})
            with pytest.raises(Superseded):
                await stale.lease(bench.schedule.tickets_before(1))
            assert everything_below(bench.store) == files
            assert (await newest.select(1))["selected"] > 0

        run(script())

    def test_of_another_driver_too(self, bench):
        Fence.claim(bench.store, "another driver")

        async def script():
            with pytest.raises(Superseded, match="another driver"):
                await bench.lease(bench.schedule.pool_tickets.start)

        run(script())


def everything_below(store):
    """Content of all files of a run but the epochs."""
    files = (file for file in Path(store.root).rglob("*") if file.is_file() and EPOCHS_DIR not in file.parts)
    return {file: file.read_bytes() for file in files}


class TestNothingIsLeft:
    def test_a_round_without_candidates_does_not_wait_for_their_scores(self, bench):
        """As when the cap ends the teaching after the first round."""

        async def script():
            await bench.round(0)
            for ticket in range(bench.schedule.tickets_before(0), bench.schedule.tickets_before(1)):
                await bench.lease(ticket)
                none = np.empty(0, dtype=np.int64)
                await bench.put(ticket, none, np.empty((0, N_CLASSES)), 0)
            rest = bench.selector.table.candidates(bench.schedule.tickets_before(1)).row_N
            bench.selector.table.mark_trained(0, rest)
            assert (await bench.rows_to_score(1)).size == 0
            await asyncio.wait_for(bench.selector.wait_refreshed(1), timeout=5)
            assert (await bench.selector.select(1))["selected"] == 0

        run(script())


class TestTeachers:
    def test_a_ticket_that_is_given_back_goes_to_a_spare_one_once(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"actors": 2})

        async def script():
            spare = asyncio.create_task(bench.selector.lease(-1))
            rows = await bench.lease(0)
            assert await still_waits(spare)
            for _ in range(2):  # a call may come twice
                await bench.selector.give_back(0, "teacher", "actor-1", "no memory", "call-1")
            ticket, again = await released(spare)
            assert (ticket, again.tolist()) == (0, rows.tolist())
            other = asyncio.create_task(bench.selector.lease(-2))
            assert await still_waits(other)
            await bench.rounds()
            for ticket in bench.schedule.test_tickets:
                await bench.teach(ticket)
            assert (await released(other))[1].size == 0, "nothing was left to be taken"

        run(script())

    def test_what_was_given_back_outlives_the_selector_but_not_the_driver(self, bench):
        async def script():
            rows = await bench.lease(0)
            await bench.selector.give_back(0, "teacher", "actor-1", "no memory", "call-1")
            assert "no memory" in (await bench.selector.stats())["trouble"], "there was but one actor"
            same = Selector(bench.config, bench.store.root, bench.selector.session)
            assert (await same.lease(-1))[1].tolist() == rows.tolist()
            assert "no memory" in (await same.stats())["trouble"]
            later = Selector(bench.config, bench.store.root, "another driver")
            assert (await later.stats())["trouble"] is None
            assert not later.teachers.returned

        run(script())

    def test_a_claim_waits_for_what_others_may_leave(self, tmp_path):
        bench = Bench(tmp_path / "run", budget={"cap": {"tokens": 200}})
        claim = Usage(texts=1, prompt_tokens=120).as_dict()

        async def script():
            for ticket in (0, 1):
                await bench.lease(ticket)
            assert await bench.selector.reserve(0, "a", "teacher", claim)
            second = asyncio.create_task(bench.selector.reserve(1, "b", "teacher", claim))
            assert await still_waits(second), "the first may use less than it claimed"
            rows = bench.selector.leases.rows[0][:1]
            bench.write_labels(0, rows)
            await bench.put(0, rows, bench.probs(rows), TOKENS)
            assert await released(second)
            assert not await bench.selector.reserve(1, "b", "teacher", claim)
            assert (await bench.selector.stats())["cap_reached"]
            # What a killed attempt may have used stays used.
            write_mark(bench.store, "ticket-00000001.b", 1, {"teacher": Usage(**claim)})
            later = bench.restart()
            assert not await later.reserve(
                1, "c", "teacher", Usage(texts=1, prompt_tokens=200 - 120 - TOKENS + 1).as_dict()
            )
            assert await later.reserve(
                1, "c", "teacher", Usage(texts=1, prompt_tokens=200 - 120 - TOKENS).as_dict()
            )

        run(script())

    def test_labels_wait_for_the_calibrator(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"confidence": {"method": "batch"}})

        async def script():
            needed = range(bench.schedule.tickets_before(0))
            for ticket in needed[:-1]:
                await bench.teach(ticket)
            stats = await bench.selector.stats()
            assert (stats["labelled"], stats["tickets_done"]) == (0, 0)
            assert not bench.store.exists(CALIBRATION)
            await bench.teach(needed[-1])
            assert (await bench.selector.stats())["tickets_done"] == len(needed)
            await bench.teach(needed[-1] + 1)
            mean_C = np.mean([bench.probs(bench.selector.leases.rows[t]).sum(axis=0) for t in needed], axis=0)
            fitted = bench.store.read_json(CALIBRATION)
            assert fitted["method"] == "batch"
            prior_C = np.array(fitted["prior_C"])
            assert prior_C / prior_C.sum() == pytest.approx(mean_C / mean_C.sum(), abs=0.02)
            before = bench.selector.table.confidence.copy()
            again = bench.restart().table.confidence
            assert np.array_equal(before, again, equal_nan=True)

        run(script())


def test_say_is_shown_in_stats(bench):
    run(bench.selector.say("round 0: training"))
    assert run(bench.selector.stats())["note"] == "round 0: training"
