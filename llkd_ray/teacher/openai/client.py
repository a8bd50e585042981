"""Requests to a model server, with rate limiting, usage accounting, retries and a final failure.

Errors and their handling:
- the server is busy (429, or 503 with Retry-After): all requests pause for the stated time, then continue;
- a transient error (5xx, no connection, timeout, an invalid reply): the request is retried after a
  back-off, ``teacher.attempts`` times in all, and then the text has failed;
- the text is rejected (400, 413, 422, …): the text has failed at once;
- access is rejected (401, 403, 404, …), or no request gets a reply any more: the teacher is down.

The key is sent as a header and appears nowhere else: not in an error, a log or a file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import Meter, TeacherDown, TextFailed

logger = logging.getLogger(__name__)
LONGEST_BACK_OFF_S = 60.0
DETAIL_CHARS = 300  # of a server's error message
FEW = 2
"""Consecutive failed texts that are enough to suspect the server when no further text follows; a single
failure may be a bad text.
"""
T = TypeVar("T")


class BadReply(Exception):
    """An invalid reply; a retry may succeed."""


class NoScores(BadReply):
    """A valid reply without the requested scores: the server may not support them."""


class Refused(TextFailed):
    """The server rejects this request, and reports that the request is the cause."""


class NotServed(TeacherDown):
    """The server does not have this address or model."""


class _Busy(Exception):
    """The server is busy; a request rejected like this has used nothing."""

    def __init__(self, status: int, retry_after_s: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.retry_after_s = retry_after_s


class _Retryable(Exception):
    """The request may be retried. ``sent`` is false where it cannot have reached the server."""

    def __init__(self, reason: str, detail: str, sent: bool = True) -> None:
        super().__init__(detail)
        self.reason = reason
        self.sent = sent


class _CachedTokens(BaseModel):
    cached_tokens: NonNegativeInt | None = None


class _ReportedUsage(BaseModel):
    prompt_tokens: PositiveInt
    completion_tokens: NonNegativeInt = 0
    prompt_tokens_details: _CachedTokens | None = None


@dataclass(frozen=True)
class Post(Generic[T]):
    """A request, its maximum usage, and how to read its reply."""

    path: str
    """Relative to ``base_url``, such as /completions."""
    body: dict[str, Any]
    prompt_tokens: int
    answer_tokens: int
    read: Callable[[dict[str, Any]], T]
    """Raises :class:`BadReply`, or pydantic's ValidationError, for an invalid reply."""


class ServerClient:
    """The requests of one teacher actor; belongs to one event loop."""

    def __init__(self, teacher: TeacherConfig) -> None:
        assert teacher.server is not None
        self.teacher = teacher
        self.server = teacher.server
        self._key = api_key(self.server.api_key_env)
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(self.server.concurrency)
        self._next_turn = self._resume_at = 0.0  # time.monotonic()
        self._calls = 0
        self._working_since = self._answered_at = 0.0
        self._failed_in_a_row = 0
        self._known_good: Post[Any] | None = None
        self._judging = asyncio.Lock()
        self._not_judging = asyncio.Event()
        self._not_judging.set()
        self._warned_of_usage = False

    @property
    def has_answered(self) -> bool:
        """Whether any request has had a valid reply so far."""
        return self._known_good is not None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Context of a request in progress. Silence counts from here: nothing was requested before."""
        if not self._calls:
            self._working_since = time.monotonic()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def post(self, request: Post[T], meter: Meter, *, probing: bool = False) -> T:
        """The result of ``request.read`` on the reply.

        Raises TextFailed, TeacherDown, and CapReached where the allowance ends. When ``probing``, a reply
        without the scores raises NoScores at once; otherwise it counts as an invalid reply.
        """
        # The slot is kept between retries, so that further texts are not sent to a server that is down before
        # the first ones have failed.
        async with self._slots:
            await self._not_judging.wait()
            return await self._send_with_retries(request, meter, probing)

    async def _send_with_retries(self, request: Post[T], meter: Meter, probing: bool) -> T:
        claimed = False
        tries = refusals = 0
        while True:
            await self._wait_turn()
            if not claimed:
                await meter.request(request.prompt_tokens, request.answer_tokens)
                claimed = True
            try:
                reply = await self._send(request)
                self._correct(request, reply, meter)
                answer = _read(request, reply)
            except _Busy as busy:
                # It has used nothing, so the claim stays valid for the next try.
                refusals += 1
                self._pause(busy, refusals)
            except NoScores as error:
                if probing:
                    raise
                tries += 1
                claimed = False
                await self._back_off(tries, "bad_answer", str(error))
            except _Retryable as failure:
                tries += 1
                claimed = not failure.sent
                await self._back_off(tries, failure.reason, str(failure))
            else:
                self._answered_at = time.monotonic()
                self._failed_in_a_row = 0
                self._known_good = request
                return answer

    async def judge(self, failure: TextFailed, meter: Meter, *, is_last: bool = False) -> None:
        """After a text has failed: raises TeacherDown where the server is the cause, not the text.

        Many consecutive failures prove nothing, as bad texts take longest and so come last. Therefore the
        last request that succeeded is repeated: if it succeeds again, the texts are bad. A few failures are
        enough for this check where the text is the last one of its call, which would otherwise end as if the
        server were healthy.
        """
        self._failed_in_a_row += 1
        many = 3 * self.teacher.attempts
        async with self._judging:
            silent_s = time.monotonic() - self._quiet_since
            in_doubt = is_last and self.has_answered and self._failed_in_a_row >= FEW
            if (
                self._failed_in_a_row < many
                and silent_s < self.teacher.no_progress_timeout_s
                and not in_doubt
            ):
                return
            if self._known_good is not None:
                self._not_judging.clear()  # no further text is sent before the result
                try:
                    await self._send_with_retries(self._known_good, meter, probing=False)
                except TextFailed as again:
                    failure = again
                else:
                    return
                finally:
                    self._not_judging.set()
        raise self.down(f"{self._failed_in_a_row} texts in a row have failed", failure)

    def down(self, what: str, last: TextFailed) -> TeacherDown:
        """The error for a server that answers nothing, with possible causes."""
        if last.reason.startswith("refused"):
            field, remedy = f"model {self.teacher.model!r}", "see what it says, and teacher.server.scores"
        elif last.reason == "timed_out":
            field = f"timeout_s {self.teacher.timeout_s:g}"
            remedy = "raise it, lower teacher.server.concurrency, or see whether the server hangs"
        elif last.reason == "bad_answer":
            field = f"server.base_url {self.server.base_url!r}"
            remedy = "see whether it speaks the OpenAI protocol there, up to and with the version"
        else:
            field = f"server.base_url {self.server.base_url!r}"
            remedy = "start the server, see its log, or correct the address"
        detail = "" if str(last) == last.reason else f": {last}"
        return TeacherDown(f"teacher.{field}: {what}, the last with {last.reason}{detail}; {remedy}")

    def close(self) -> None:
        """Close the connections, if the event loop still runs; otherwise they end with the process."""
        client, self._client = self._client, None
        if client is not None and self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop)

    # --- one attempt

    async def _wait_turn(self) -> None:
        """Wait for the end of a pause, and for this request's turn within ``requests_per_minute``."""
        while (wait := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait + random.uniform(0, 0.1 * self.server.back_off_s))  # not all at once
        if self.server.requests_per_minute is not None:
            mine = max(self._next_turn, time.monotonic())
            self._next_turn = mine + 60.0 / self.server.requests_per_minute
            await asyncio.sleep(mine - time.monotonic())

    async def _send(self, request: Post[Any]) -> dict[str, Any]:
        client = self._http()  # created before the timeout starts
        try:
            async with asyncio.timeout(self.teacher.timeout_s):
                reply = await client.post(self.server.base_url.rstrip("/") + request.path, json=request.body)
        except TimeoutError:
            raise _Retryable("timed_out", f"no answer in {self.teacher.timeout_s:g} s") from None
        except httpx.ConnectError as error:
            raise _Retryable("no_connection", self._without_key(str(error)), sent=False) from None
        except httpx.HTTPError as error:  # connection lost, or not HTTP
            raise _Retryable("no_connection", self._without_key(str(error))) from None
        if not reply.is_success:
            self._raise_for_status(reply)
        try:
            content = json.loads(reply.content)
        except (ValueError, RecursionError) as error:
            raise _Retryable("bad_answer", f"not JSON ({error})") from None
        if not isinstance(content, dict):
            raise _Retryable("bad_answer", f"a JSON {type(content).__name__} instead of an object")
        return content

    def _raise_for_status(self, reply: httpx.Response) -> None:
        """Raise the exception for an error status."""
        status = reply.status_code
        detail = self._without_key(_error_text(reply))
        wait_s = retry_after_s(reply.headers.get("retry-after"))
        if status == 429 or (status == 503 and wait_s is not None):
            raise _Busy(status, wait_s)
        if status in (401, 402) or (status == 403 and not self.has_answered):
            # Later, a 403 may concern one text (some hosts moderate); a revoked key is detected soon anyway.
            key = "is set" if self._key else "is not set"
            raise TeacherDown(
                f"teacher.server.api_key_env: {self.server.base_url!r} answers HTTP {status} ({detail}) and "
                f"{self.server.api_key_env!r} {key} here; set it to a key that may use "
                f"{self.teacher.model!r}, where the teacher's actors run"
            )
        if status in (404, 405):
            raise NotServed(
                f"teacher.server.base_url {self.server.base_url!r}, teacher.model {self.teacher.model!r}: "
                f"HTTP {status} ({detail}); correct the address, up to and with the version, or name a model "
                f"that is served there"
            )
        if 400 <= status < 500 and status not in (408, 409, 425):
            raise Refused(f"refused_http_{status}", detail)
        raise _Retryable(f"http_{status}", detail)

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            self._loop = asyncio.get_running_loop()
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                limits=httpx.Limits(
                    max_connections=self.server.concurrency,
                    max_keepalive_connections=self.server.concurrency,
                ),
                timeout=None,  # asyncio.timeout covers the whole attempt, even if bytes arrive slowly
            )
        return self._client

    def _correct(self, request: Post[Any], reply: dict[str, Any], meter: Meter) -> None:
        """Replace the claimed usage by the usage in the server's reply, where it reports one."""
        try:
            usage = _ReportedUsage.model_validate(reply.get("usage"))
        except ValidationError:
            return
        more_prompt = usage.prompt_tokens - request.prompt_tokens
        more_answer = usage.completion_tokens - request.answer_tokens
        details = usage.prompt_tokens_details
        meter.correct(
            prompt_tokens=more_prompt,
            cached_tokens=min((details and details.cached_tokens) or 0, usage.prompt_tokens),
            answer_tokens=more_answer,
        )
        if more_prompt + more_answer > 0 and not self._warned_of_usage:
            self._warned_of_usage = True
            logger.warning(
                "the server counts %d tokens for a request that was thought to use %d at most; a cap may be "
                "passed by as much for each request that is under way",
                usage.prompt_tokens + usage.completion_tokens,
                request.prompt_tokens + request.answer_tokens,
            )

    # --- between attempts

    @property
    def _quiet_since(self) -> float:
        return max(self._answered_at, self._working_since)

    def _pause(self, busy: _Busy, refusals: int) -> None:
        """Pause all requests, as the limit is the server's."""
        wait_s = busy.retry_after_s or self._back_off_s(refusals)
        now = time.monotonic()
        silent_s = now + wait_s - self._quiet_since
        if silent_s > self.teacher.no_progress_timeout_s:
            raise TeacherDown(
                f"teacher.no_progress_timeout_s {self.teacher.no_progress_timeout_s:g}: "
                f"{self.server.base_url!r} takes no request ({busy}, to be tried again in "
                f"{wait_s:.0f} s) and has answered none for so long; see the "
                f"quota of {self.teacher.model!r}, set teacher.server.requests_per_minute, or raise "
                "no_progress_timeout_s"
            ) from None
        self._resume_at = max(self._resume_at, now + wait_s)

    async def _back_off(self, tries: int, reason: str, detail: str) -> None:
        if tries >= self.teacher.attempts:
            raise TextFailed(reason, detail) from None
        await asyncio.sleep(self._back_off_s(tries))

    def _back_off_s(self, tries: int) -> float:
        """Doubles each time, with ±25% jitter, so that requests are not retried together."""
        longest = min(LONGEST_BACK_OFF_S, self.server.back_off_s * 2.0 ** min(tries - 1, 30))
        return longest * random.uniform(0.75, 1.25)

    def _without_key(self, said: str) -> str:
        return said.replace(self._key, "***") if self._key else said


def _read(request: Post[T], reply: dict[str, Any]) -> T:
    try:
        return request.read(reply)
    except NoScores:
        raise
    except (BadReply, ValidationError) as error:
        error_said = reply.get("error")
        raise _Retryable("bad_answer", " ".join(str(error_said or error).split())[:DETAIL_CHARS]) from None


def _error_text(reply: httpx.Response) -> str:
    """The server's error message, in one line."""
    try:
        content = json.loads(reply.content)
        error = content.get("error", content) if isinstance(content, dict) else content
        said = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        said = reply.text
    return " ".join(said.split())[:DETAIL_CHARS] or reply.reason_phrase


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds in a Retry-After header (RFC 9110, 10.2.3), given as a number or a date; else None."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = parsedate_to_datetime(header)
        except ValueError:
            return None
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        seconds = (then - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None


def api_key(variable: str) -> str | None:
    """The key in an environment variable; raises TeacherDown, without the key, if it cannot be sent."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise TeacherDown(
            f"teacher.server.api_key_env: {variable!r} holds what cannot be sent as a key (line breaks or "
            "letters beyond ASCII); set it again"
        )
    return key or None
