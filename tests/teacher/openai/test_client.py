"""Waiting, trying again and giving up: a real server on this machine that fails in every way."""

from __future__ import annotations

import asyncio
import types
from datetime import UTC, datetime
from typing import Any

import pytest
from server_teachers import KEY_ENV, LABELS, Counting, ask, teacher_config, texts_of
from stub_server import Answer, Request, Response, StubServer, free_port, in_turn, said

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import Answers, TeacherDown, Unlimited
from llkd_ray.teacher.openai import client as client_module
from llkd_ray.teacher.openai.client import api_key, retry_after_s
from llkd_ray.teacher.openai.teacher import OpenAITeacher

KEY = "sk-very-secret-1234"


class Clock:
    """The client's clock: who sleeps wakes at once, at the moment that was meant."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        fake: Any = types.ModuleType("asyncio")
        fake.__dict__.update(vars(asyncio))
        fake.sleep = self.sleep
        monkeypatch.setattr(client_module, "asyncio", fake)
        monkeypatch.setattr(client_module, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        then = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, then)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def good(request: Request) -> Response:
    return said(["C"])


def poisoned(reply: Response, *bad: str) -> Answer:
    """Good answers to all texts but those in which ``bad`` stands."""
    return lambda request: reply if any(word in request.text for word in bad) else good(request)


def dies_after(n: int, reply: Response) -> Answer:
    return in_turn([said(["C"])] * n, lambda _: reply)


def teacher_of(server: StubServer, settings: dict[str, Any] | None = None, **more: Any) -> OpenAITeacher:
    config: TeacherConfig = teacher_config(server.base_url, settings, **({"attempts": 2} | more))
    return OpenAITeacher(config, LABELS)


FAULTS = {
    "server error": (Response({"error": {"message": "out of memory"}}, status=500), "http_500"),
    "unavailable": (Response(status=503), "http_503"),
    "too slow": (Response({}, wait_s=3.5), "timed_out"),
    "truncated JSON": (Response(b'{"choices": [{"message": {"cont'), "bad_answer"),
    "truncated body": (Response(b'{"choices": [', promise_bytes=100), "no_connection"),
    "not UTF-8": (Response(b'{"choices": "\xff\xfe"}'), "bad_answer"),
    "nothing": (Response(hang_up=True), "no_connection"),
    "a list": (Response([1, 2]), "bad_answer"),
    "no choices": (Response({"choices": []}), "bad_answer"),
    "an error with status 200": (Response({"error": {"message": "overloaded"}}), "bad_answer"),
}
every_fault = pytest.mark.parametrize(("reply", "reason"), FAULTS.values(), ids=FAULTS)


def patience(reply: Response) -> float:
    """Seconds: short only where that is the fault, for good answers of a busy machine may take a while."""
    return 1.5 if reply.wait_s else 20.0


@every_fault
def test_a_fault_costs_a_try_and_a_text_that_always_fails_is_given_up_with_its_reason(reply, reason):
    passing = [reply]

    def answer(request: Request) -> Response:
        if "number 1." in request.text and passing:
            return passing.pop()
        return poisoned(reply, "number 3.")(request)

    with StubServer(answer) as server:
        answers = ask(teacher_of(server, timeout_s=patience(reply)), texts_of(8))
        tries = [sum(f"number {i}." in request.text for request in server.requests) for i in range(8)]
    assert list(answers.outcome_N) == ["", "", "", reason, "", "", "", ""]
    assert answers.probs_NC[answers.answered_N].tolist() == 7 * [[0.0, 1.0, 0.0]]
    assert tries == [1, 2, 1, 2, 1, 1, 1, 1], "as often as teacher.attempts says"
    assert (answers.usage.texts, answers.usage.requests) == (8, 10)
    per_try = answers.prompt_tokens_N[0]
    assert answers.prompt_tokens_N.tolist() == [per_try * n for n in tries], "failed tries are billed"


@every_fault
def test_a_server_that_has_never_answered_sends_no_text_to_quarantine(reply, reason):
    for n in (1, 3):
        with (
            StubServer(lambda _: reply) as server,
            pytest.raises(TeacherDown, match=rf"^teacher\..*{reason}.*; "),
        ):
            ask(teacher_of(server, timeout_s=patience(reply)), texts_of(n))


def test_pauses_between_tries_grow(clock):
    with StubServer(in_turn(3 * [Response(status=500)], good)) as server:
        ask(teacher_of(server, {"back_off_s": 8.0}, attempts=4), ["one text"])
    assert clock.slept == [pytest.approx(expected, rel=0.25) for expected in (8, 16, 32)]


# --- busy


def test_all_requests_wait_as_long_as_a_busy_server_says(clock):
    at = []

    def answer(request: Request) -> Response:
        at.append(clock.now - 1000)
        return good(request)

    with StubServer(in_turn([Response(status=429, headers={"Retry-After": "30"})], answer)) as server:
        answers = ask(teacher_of(server, {"concurrency": 2}), texts_of(5))
    assert answers.answered_N.all()
    assert len(at) == 5
    assert sum(moment < 30 for moment in at) <= 1, "two are under way at a time"


@pytest.mark.parametrize(
    "busy",
    [
        Response(status=429),
        Response(status=429, headers={"Retry-After": "0.01"}),
        Response(status=503, headers={"Retry-After": "0.01"}),
        Response(status=429, headers={"Retry-After": "0"}),
    ],
)
def test_a_refusal_for_now_uses_no_attempt_and_no_further_claim(busy):
    with StubServer(in_turn(5 * [busy], good)) as server:
        allowance = Counting()
        answers = ask(teacher_of(server), ["one text"], allowance=allowance)
        assert len(server.requests) == 6
    assert list(answers.outcome_N) == [""]
    assert answers.usage.requests == allowance.claims == 1


@pytest.mark.parametrize(
    ("headers", "message"),
    [({}, "429.*requests_per_minute"), ({"Retry-After": "86400"}, "86400 s")],
    ids=["refuses for long", "says how long"],
)
def test_a_server_that_only_refuses_is_given_up(clock, headers, message):
    """A wait that nobody would sit out is not begun."""
    with StubServer(lambda _: Response({"error": "quota"}, status=429, headers=headers)) as server:
        teacher = teacher_of(server, {"back_off_s": 2.0}, no_progress_timeout_s=60)
        with pytest.raises(TeacherDown, match=rf"teacher\.no_progress_timeout_s 60.*{message}"):
            ask(teacher, texts_of(3))
    assert (clock.now - 1000 > 20) == (not headers)
    assert clock.now - 1000 <= 62


def test_silence_before_a_call_is_not_the_servers(clock):
    async def run(teacher: OpenAITeacher) -> Answers:
        await teacher.label(["0"], ["one"], Unlimited())
        clock.now += 600  # the student trains
        return await teacher.label(["1"], ["two"], Unlimited())

    replies = [said(["C"]), Response(status=429, headers={"Retry-After": "5"})]
    with StubServer(in_turn(replies, good)) as server:
        answers = asyncio.run(run(teacher_of(server, no_progress_timeout_s=60)))
    assert list(answers.outcome_N) == [""]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), ("", None),
     ("Sun, 01 Mar 2026 12:01:30 GMT", 90.0), ("Sun, 01 Mar 2026 11:58:30 GMT", 0.0),
     ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0)],
)  # fmt: skip
def test_retry_after_in_seconds_or_as_a_date(header, seconds):
    assert retry_after_s(header, datetime(2026, 3, 1, 12, tzinfo=UTC)) == seconds


# --- refused


@pytest.mark.parametrize("status", [400, 413, 422, 403])
def test_a_text_that_is_refused_is_not_sent_again(status):
    """A 403 is the text's own where others have had answers."""
    refusal = Response({"error": {"message": "the text is too long"}}, status=status)
    with StubServer(poisoned(refusal, "number 2.")) as server:
        answers = ask(teacher_of(server, {"concurrency": 1}), texts_of(5))
        assert len(server.requests) == 5
    assert list(answers.outcome_N) == ["", "", f"refused_http_{status}", "", ""]


@pytest.mark.parametrize(
    ("status", "field"), [(401, "api_key_env"), (402, "api_key_env"), (403, "api_key_env"), (404, "base_url")]
)
def test_a_server_that_does_not_know_us_is_down_at_once(status, field, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    refusal = Response({"error": {"message": f"no access for {KEY}"}}, status=status)
    with StubServer(lambda _: refusal) as server:
        with pytest.raises(TeacherDown, match=rf"teacher\.server\.{field}.*'stub'") as down:
            ask(teacher_of(server, {"concurrency": 1}), texts_of(5))
        assert len(server.requests) == 1
        assert server.base_url in str(down.value)
    assert KEY not in str(down.value)


# --- down


def test_nobody_there():
    config = teacher_config(f"http://127.0.0.1:{free_port()}/v1", attempts=2)
    allowance = Counting()
    with pytest.raises(TeacherDown, match=r"teacher\.server\.base_url.*no_connection.*start the server"):
        ask(OpenAITeacher(config, LABELS), texts_of(50), allowance=allowance)
    assert allowance.claims < 50, "given up long before the last text"


@pytest.mark.parametrize(
    "reply", [Response(status=500), Response(hang_up=True), Response({"a": 1}, status=400)]
)
def test_a_server_that_goes_down_half_way_or_a_few_texts_before_the_end(reply):
    """A few prove nothing by themselves, and would be lost if they were taken for bad ones."""
    with StubServer(dies_after(10, reply)) as server:
        with pytest.raises(TeacherDown, match="texts in a row have failed"):
            ask(teacher_of(server), texts_of(60))
        assert len(server.requests) < 10 + 2 * 20, "not all were tried"
    with (
        StubServer(dies_after(10, reply)) as server,
        pytest.raises(TeacherDown, match="2 texts in a row have failed"),
    ):
        ask(teacher_of(server, {"concurrency": 1}), texts_of(12))


@pytest.mark.parametrize(("n_bad", "asked_again"), [(1, 0), (2, 1), (3, 1)])
def test_a_few_bad_texts_at_the_end_are_bad(n_bad, asked_again):
    bad = [f"number {i}." for i in range(10 - n_bad, 10)]
    with StubServer(poisoned(Response(status=500), *bad)) as server:
        answers = ask(teacher_of(server, {"concurrency": 1}), texts_of(10))
        sent = len(server.requests)
    assert sent == 10 + n_bad + asked_again, "one text that had an answer, to be sure"
    assert answers.answered_N.tolist() == [True] * (10 - n_bad) + [False] * n_bad
    assert (answers.usage.texts, answers.usage.requests) == (10, sent)


@pytest.mark.parametrize("reply", [Response(status=500), Response({"error": "no"}, status=422)])
def test_many_bad_texts_in_a_row_do_not_bring_a_good_server_down(reply):
    with StubServer(poisoned(reply, *(f"number {i}." for i in range(10, 40)))) as server:
        answers = ask(teacher_of(server), texts_of(40))
    assert answers.answered_N.tolist() == [True] * 10 + [False] * 30


@pytest.mark.parametrize("answer", [dies_after(3, Response(status=500)), lambda _: Response(status=401)])
def test_a_server_that_comes_back_is_asked_again(answer):
    """Cancelled requests have given their slots back."""

    async def run(teacher: OpenAITeacher) -> Answers:
        with pytest.raises(TeacherDown):
            await teacher.label(["0"] * 30, texts_of(30), Unlimited())
        server.answer = good
        return await teacher.label(["0"] * 30, texts_of(30), Unlimited())

    with StubServer(answer) as server:
        answers = asyncio.run(run(teacher_of(server)))
    assert answers.answered_N.all()


# --- manners


def test_the_key_is_sent_where_there_is_one(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with StubServer(good) as server:
        monkeypatch.setenv(KEY_ENV, f"{KEY}\n")
        ask(teacher_of(server), ["with"])
        monkeypatch.delenv(KEY_ENV)
        ask(teacher_of(server), ["without"])
        headers = [{name.lower(): v for name, v in request.headers.items()} for request in server.requests]
    assert headers[0]["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in headers[1]
    assert caplog.records, "or this says nothing"
    assert KEY not in caplog.text


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv(KEY_ENV, f"{KEY}\nX-Other: 1")
    with pytest.raises(TeacherDown, match=KEY_ENV) as down:
        api_key(KEY_ENV)
    assert KEY not in str(down.value)


def test_no_more_requests_at_a_time_than_allowed():
    slow = Response(said(["C"]).content, wait_s=0.05)
    with StubServer(lambda _: slow) as server:
        ask(teacher_of(server, {"concurrency": 3}), texts_of(12))
        assert server.most_at_once == 3


def test_requests_are_spaced_evenly(clock):
    with StubServer(good) as server:
        # One at a time, so that each has its turn before the next one waits for its own.
        ask(teacher_of(server, {"requests_per_minute": 6, "concurrency": 1}), texts_of(6))
    assert clock.slept == pytest.approx([0, 10, 10, 10, 10, 10])
    assert clock.now == pytest.approx(1050)
