"""The lock of a run directory: one driver at a time, and only the newest incarnation of each actor.

A driver or actor that starts work writes an epoch: a file whose name is the next free number and whose
content is its owner. The newest epoch holds the lock. An actor checks its :class:`Fence` before it writes
files that only the newest incarnation may write, so an actor wrongly considered dead is stopped there. A
shared volume may show an old list of a folder's files, so a number is taken by creating its file, which only
one can, and after the list the next numbers are looked for by name. On an object store the last of two
writers of a number owns it. A driver sends heartbeats as an increasing count, so clocks need not agree: if
the last driver's count no longer increases, its run may be taken over.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import EPOCHS_DIR, SESSIONS_DIR, RunStore

HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
TAKEOVER_S = 3 * HEARTBEAT_S
"""Seconds without a heartbeat after which a driver is considered dead."""
TAKEOVER_CHECKS = 15
"""Checks in that time. Checks are counted because clocks may advance while the machine is suspended."""
SETTLE_S = 1.0
"""Seconds; longer than a driver takes from listing the epochs to writing its own."""
THROTTLE_S = 5.0


class Superseded(RuntimeError):
    """Another driver, or a newer incarnation of an actor, holds the run directory."""


class Fence:
    """Checks that its owner's epoch is still the newest."""

    def __init__(self, store: RunStore, session: str, actor: str = "") -> None:
        """With an ``actor``, only its own epoch is the owner's; otherwise all epochs of the session are."""
        self.store, self.session, self.actor = store, session, actor
        self._looked = -THROTTLE_S

    @classmethod
    def claim(cls, store: RunStore, session: str) -> Fence:
        """Write a new epoch."""
        fence = cls(store, session, uuid.uuid4().hex)
        number = _newest(store) + 1
        while True:
            with suppress(FileExistsError):
                store.write_bytes(_file(number), f"{session} {fence.actor}".encode(), replace=False)
                return fence
            number += 1

    def check(self) -> None:
        """Raise :class:`Superseded` if a newer epoch exists; costs three requests for small files."""
        number = _newest(self.store)
        session, actor = _owner(self.store, number)
        if session != self.session or (self.actor and actor != self.actor):
            raise Superseded(
                f"{self.store.root}: epoch {number} of session {session} has taken over this run"
            )

    def check_throttled(self) -> None:
        """Like :meth:`check`, at most once every THROTTLE_S; for frequent calls that do no harm if stale."""
        if time.monotonic() - self._looked >= THROTTLE_S:
            self.check()
            self._looked = time.monotonic()


class Session:
    """A driver's lock on a run directory, with heartbeats from a thread."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.id = uuid.uuid4().hex
        self.error: Superseded | None = None
        self.fence = Fence(store, self.id)
        self._facts = _identity() | {"beat": 0, "ended": False}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="session", daemon=True)

    def begin(self) -> None:
        """Acquire the lock; raises ConfigError if another driver started at the same moment."""
        self._write()
        own = Fence.claim(self.store, self.id)
        time.sleep(SETTLE_S / 10 if self.store.is_local else SETTLE_S)
        try:
            own.check()
        except Superseded:
            self._end()
            raise ConfigError(_in_use(self.store, "started at the same moment")) from None
        self._thread.start()

    def check(self) -> None:
        """Raise :class:`Superseded` if another driver has taken over."""
        if self.error:
            raise self.error

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self.error:
            self._end()

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.fence.check()
                self._facts["beat"] += 1
                self._write()
            except Superseded as error:
                self.error = error
                return
            except OSError:  # the store is temporarily unreachable; the next heartbeat retries
                continue

    def _end(self) -> None:
        self._facts["ended"] = True
        self._write()

    def _write(self) -> None:
        self.store.write_json(f"{SESSIONS_DIR}/{self.id}.json", self._facts)


@contextmanager
def hold_lock(store: RunStore, say: Callable[[str], None] = print) -> Iterator[Session]:
    """Hold the lock of the run directory. Raises ConfigError if another live driver holds it."""
    wait_until_free(store, say)
    session = Session(store)
    session.begin()
    try:
        yield session
    finally:
        session.end()


def wait_until_free(store: RunStore, say: Callable[[str], None]) -> None:
    """Return once the last driver has ended or is considered dead; raises ConfigError if it is alive."""
    number = _newest(store)
    if not number:
        return
    file = f"{SESSIONS_DIR}/{_owner(store, number)[0]}.json"
    last = store.read_json(file)
    if _has_ended(last):
        return
    # The process id may have been reused, and is unknown on other hosts, so only heartbeats tell.
    who = f"process {last['pid']} on {last['host']}"
    say(f"the last driver, {who}, has not ended this run: waiting {TAKEOVER_S:.0f} s for a heartbeat")
    for _ in range(TAKEOVER_CHECKS):
        time.sleep(TAKEOVER_S / TAKEOVER_CHECKS)
        now = store.read_json(file)
        if now["ended"]:
            return
        if now != last:
            raise ConfigError(_in_use(store, who))


def _has_ended(session: dict[str, Any]) -> bool:
    """Whether a driver has ended, as far as its file and, on its own host, its process tell."""
    is_here = session["host"] == _identity()["host"]
    return session["ended"] or (is_here and not psutil.pid_exists(session["pid"]))


def driver_is_alive(store: RunStore) -> bool:
    """Whether the run's last driver is at work, without waiting for its heartbeat.

    For display only: a driver that was killed on another host still counts as alive.
    """
    number = _newest(store)
    if not number:
        return False
    return not _has_ended(store.read_json(f"{SESSIONS_DIR}/{_owner(store, number)[0]}.json"))


def _in_use(store: RunStore, who: str) -> str:
    return f"{store.root}: another driver is at work on this run ({who}): wait for its end, or stop it first"


def _identity() -> dict[str, Any]:
    """Host, process namespace and process id; no times, as clocks may be changed."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return {"host": f"{socket.gethostname()} {namespace}".strip(), "pid": os.getpid()}


def _newest(store: RunStore) -> int:
    """Number of the newest epoch, from 1; 0 if there is none."""
    number = max((int(name) for name in store.names(EPOCHS_DIR)), default=0)
    while store.exists(_file(number + 1)):
        number += 1
    return number


def _owner(store: RunStore, number: int) -> tuple[str, str]:
    """The session and the actor that wrote an epoch."""
    session, _, actor = store.read_bytes(_file(number)).decode().partition(" ")
    return session, actor


def _file(number: int) -> str:
    return f"{EPOCHS_DIR}/{number:06d}"
