"""Who works on a run directory: one driver at a time, and of each part the newest only.

Whoever begins writes an epoch, a file named by a number one above all others and by the driver's session.
The newest epoch is in charge; a part asks its :class:`Fence` before it writes what only the newest may
write, and one that was taken for dead and was not is stopped there. A driver that lives says so by a count
that moves, so clocks need not agree: where the count of the last driver stands still, its run may be taken
over.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import EPOCHS_DIR, SESSIONS_DIR, RunStore

BEAT_S = 5.0
"""Between two signs of life."""
LOOK_S = 3 * BEAT_S
"""How long a count must stand still for its driver to count as dead."""
LOOKS = 15
"""Looks in that time. Counted, for a clock goes on where the whole machine stands still for a while."""
SETTLE_S = 1.0
"""Longer than two that begin at once take from their look at the epochs to their own; locally far less."""
THROTTLE_S = 5.0


class Superseded(RuntimeError):
    """Another driver, or a newer incarnation of an actor, is in charge of the run directory."""


class Fence:
    """Whether one's own epoch is still in charge."""

    def __init__(self, store: RunStore, session: str, number: int | None = None) -> None:
        """With a ``number``, only that epoch is one's own; without, all of the session are."""
        self.store, self.session, self.number = store, session, number
        self._looked = -THROTTLE_S

    @classmethod
    def claim(cls, store: RunStore, session: str) -> Fence:
        """Begin a new epoch."""
        number = max((n for n, _ in _epochs(store)), default=0) + 1
        store.write_bytes(f"{EPOCHS_DIR}/{number:06d}-{session}", b"")
        return cls(store, session, number)

    def check(self) -> None:
        """Raise :class:`Superseded` if a newer epoch is there; one listing of a small folder."""
        number, session = max(_epochs(self.store))
        if session != self.session or self.number not in (None, number):
            raise Superseded(
                f"{self.store.root}: epoch {number} of session {session} has taken over this run"
            )

    def check_now_and_then(self) -> None:
        """The same, but not every time: for what is asked often and does no lasting harm."""
        if time.monotonic() - self._looked >= THROTTLE_S:
            self.check()
            self._looked = time.monotonic()


class Session:
    """A driver's hold on a run directory, with a sign of life in the background."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.id = uuid.uuid4().hex
        self.error: Superseded | None = None
        self.fence = Fence(store, self.id)
        self._facts = _identity() | {"beat": 0, "ended": False}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="session", daemon=True)

    def begin(self) -> None:
        """Raises ConfigError where another driver has begun at the same moment."""
        self._write()
        mine = Fence.claim(self.store, self.id)
        time.sleep(SETTLE_S / 10 if self.store.is_local else SETTLE_S)
        try:
            mine.check()
        except Superseded:
            self._end()
            raise ConfigError(_in_use(self.store, "begun at the same moment")) from None
        self._thread.start()

    def check(self) -> None:
        """Raise :class:`Superseded` where another driver has taken over."""
        if self.error:
            raise self.error

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self.error:
            self._end()

    def _live(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self.fence.check()
                self._facts["beat"] += 1
                self._write()
            except Superseded as error:
                self.error = error
                return
            except OSError:  # a store that is out of reach for a while; the next beat comes
                continue

    def _end(self) -> None:
        self._facts["ended"] = True
        self._write()

    def _write(self) -> None:
        self.store.write_json(f"{SESSIONS_DIR}/{self.id}.json", self._facts)


@contextmanager
def hold_lock(store: RunStore, say: Callable[[str], None] = print) -> Iterator[Session]:
    """Hold the run directory. Raises ConfigError where another driver that lives holds it."""
    require_free(store, say)
    session = Session(store)
    session.begin()
    try:
        yield session
    finally:
        session.end()


def require_free(store: RunStore, say: Callable[[str], None]) -> None:
    """Return if the last driver has ended, or has died, which takes a look at its count to know.

    Raises ConfigError where it lives.
    """
    epochs = _epochs(store)
    if not epochs:
        return
    file = f"{SESSIONS_DIR}/{max(epochs)[1]}.json"
    last = store.read_json(file)
    here = last["host"] == _identity()["host"]
    if last["ended"] or (here and not psutil.pid_exists(last["pid"])):
        return
    # Its number may be another process's by now, and of other hosts nothing is known: does its count move?
    who = f"process {last['pid']} on {last['host']}"
    say(f"the last driver, {who}, has not ended this run: looking for {LOOK_S:.0f} s whether it lives")
    for _ in range(LOOKS):
        time.sleep(LOOK_S / LOOKS)
        now = store.read_json(file)
        if now["ended"]:
            return
        if now != last:
            raise ConfigError(_in_use(store, who))


def _in_use(store: RunStore, who: str) -> str:
    return f"{store.root}: another driver is at work on this run ({who}); wait for its end, or stop it first"


def _identity() -> dict[str, Any]:
    """Host, process namespace and number; no times, for a clock may be set."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return {"host": f"{socket.gethostname()} {namespace}".strip(), "pid": os.getpid()}


def _epochs(store: RunStore) -> list[tuple[int, str]]:
    """Number and session of all epochs."""
    parts = (name.partition("-") for name in store.names(EPOCHS_DIR))
    return [(int(number), session) for number, _, session in parts]
