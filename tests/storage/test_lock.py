"""One driver at a time on a run directory, and whoever is superseded is stopped."""

from __future__ import annotations

import multiprocessing
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llkd_ray.config.base import ConfigError
from llkd_ray.storage import lock as module
from llkd_ray.storage.lock import Fence, Session, Superseded, hold_lock
from llkd_ray.storage.run_dir import EPOCHS_DIR, SESSIONS_DIR, RunStore

NOT_HERE = "other-host pid:[1]"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(module, "TAKEOVER_S", 0.5)
    return RunStore(str(tmp_path))


def quiet(word: str) -> None:
    pass


class TestFence:
    def test_the_newest_epoch_is_in_charge(self, store):
        old = Fence.claim(store, "a")
        old.check()
        new = Fence.claim(store, "a")
        new.check()
        with pytest.raises(Superseded, match="epoch 2 of session a"):
            old.check()

    def test_a_session_goes_on_through_its_own_epochs_and_no_others(self, store):
        of_session = Fence(store, "a")
        Fence.claim(store, "a")
        Fence.claim(store, "a")
        of_session.check()
        Fence.claim(store, "b")
        with pytest.raises(Superseded, match="session b"):
            of_session.check()

    def test_of_two_with_the_same_number_one_is_in_charge(self, store):
        claims = [Fence(store, session, f"actor-{session}") for session in ("b", "a", "c")]
        for claim in claims:  # on an object store, where each saw no file yet
            store.write_bytes(f"{EPOCHS_DIR}/000001", f"{claim.session} {claim.actor}".encode())
        standing = []
        for claim in claims:
            try:
                claim.check()
                standing.append(claim.session)
            except Superseded:
                pass
        assert standing == ["c"]

    def test_an_old_list_of_the_folder_misleads_nobody(self, store, monkeypatch):
        """As a shared volume shows it for a while."""
        first = Fence.claim(store, "a")
        monkeypatch.setattr(RunStore, "names", lambda self, folder, suffix="": ["000001"])
        second, third = Fence.claim(store, "b"), Fence.claim(store, "b")
        third.check()
        for old in (first, second):
            with pytest.raises(Superseded, match="epoch 3 of session b"):
                old.check()

    def test_of_many_that_claim_at_once_one_is_in_charge(self, store):
        start, claims = threading.Barrier(8), []

        def claim(session: str) -> None:
            start.wait()
            claims.append(Fence.claim(store, session))

        threads = [threading.Thread(target=claim, args=(f"s{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.names(EPOCHS_DIR) == [f"{n:06d}" for n in range(1, 9)]
        standing = 0
        for one in claims:
            with suppress(Superseded):
                one.check()
                standing += 1
        assert standing == 1

    def test_now_and_then_is_not_every_time(self, store, monkeypatch):
        fence = Fence.claim(store, "a")
        fence.check_throttled()
        Fence.claim(store, "b")
        fence.check_throttled()
        monkeypatch.setattr(module, "THROTTLE_S", 0.0)
        with pytest.raises(Superseded):
            fence.check_throttled()


class TestAtWork:
    def test_a_second_driver_is_refused_while_the_first_lives(self, store, monkeypatch):
        with hold_lock(store, quiet):
            monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that is set changes nothing
            words: list[str] = []
            with (
                pytest.raises(ConfigError, match="another driver is at work on this run"),
                hold_lock(store, words.append),
            ):
                pytest.fail("two are at work")
            assert "heartbeat" in words[0]
        with hold_lock(store, quiet) as third:
            third.check()
        assert len(store.names(EPOCHS_DIR)) == 2, "one that is refused takes no epoch"

    def test_a_driver_that_has_failed_leaves_the_run_free(self, store):
        with pytest.raises(RuntimeError, match="broken"), hold_lock(store, quiet):
            raise RuntimeError("broken")
        words: list[str] = []
        with hold_lock(store, words.append):
            pass
        assert not words, "nobody had to look whether it lives"

    def test_the_run_of_a_killed_driver_is_free_at_once_on_its_host(self, store):
        process = multiprocessing.get_context("spawn").Process(target=hold, args=(store.root,))
        process.start()
        while not store.names(EPOCHS_DIR):  # the last that it writes before it is at work
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=f"process {process.pid} on"), hold_lock(store, quiet):
            pytest.fail("two are at work")
        process.kill()
        process.join()
        words: list[str] = []
        with hold_lock(store, words.append):
            pass
        assert not words

    def test_elsewhere_a_count_that_stands_still_tells(self, store):
        begin_elsewhere(store, beat=7)
        words: list[str] = []
        with hold_lock(store, words.append) as own:
            own.check()
        assert NOT_HERE in words[0]

    def test_elsewhere_a_count_that_moves_tells_too(self, store):
        begin_elsewhere(store, beat=0)
        stop = threading.Event()

        def live() -> None:
            beat = 0
            while not stop.wait(0.05):
                beat += 1
                write_facts(store, beat=beat)

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(ConfigError, match="other-host"), hold_lock(store, quiet):
                pytest.fail("two are at work")
        finally:
            stop.set()
            thread.join()

    def test_a_machine_that_stands_still_for_a_while_kills_nobody(self, store, monkeypatch):
        begin_elsewhere(store, beat=0)
        looks = []

        def stand_still(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == module.TAKEOVER_CHECKS - 1:
                write_facts(store, beat=1)

        monkeypatch.setattr(module.time, "sleep", stand_still)
        monkeypatch.setattr(module.time, "monotonic", lambda: 1000.0 * len(looks))
        with pytest.raises(ConfigError, match="other-host"), hold_lock(store, quiet):
            pytest.fail("two are at work")
        assert sum(looks) <= module.TAKEOVER_S

    def test_one_that_was_taken_for_dead_hears_of_it(self, store):
        with hold_lock(store, quiet) as old:
            Fence.claim(store, "newer")
            while old.error is None:  # pytest's limit ends it
                time.sleep(0.02)
            with pytest.raises(Superseded):
                old.check()

    def test_of_two_that_begin_at_once_one_goes_on(self, store, monkeypatch):
        monkeypatch.setattr(module, "SETTLE_S", 10.0)
        outcomes: list[str] = []
        start, refused = threading.Barrier(2), threading.Event()

        def begin() -> None:
            session = Session(store)
            start.wait()
            try:
                session.begin()
                outcomes.append("goes on")
                refused.wait(30)  # where both go on, to no avail
                session.end()
            except ConfigError:
                outcomes.append("refused")
                refused.set()

        threads = [threading.Thread(target=begin) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["goes on", "refused"]


def hold(root: str) -> None:
    module.HEARTBEAT_S = 0.05
    with hold_lock(RunStore(root), quiet):
        time.sleep(60)


def begin_elsewhere(store: RunStore, beat: int) -> None:
    Fence.claim(store, "elsewhere")
    write_facts(store, beat)


def write_facts(store: RunStore, beat: int) -> None:
    facts = {"host": NOT_HERE, "pid": 1, "beat": beat, "ended": False}
    store.write_json(f"{SESSIONS_DIR}/elsewhere.json", facts)
