"""Waiting, trying again and giving up: a real server on this machine that fails in every way."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import pytest
from server_teachers import KEY_ENV, LABELS, Counting, ask, teacher_config, texts_of
from stub_server import Answer, Request, Response, StubServer, free_port, in_turn, said

from llkd_ray.teacher.base import Answers, TeacherDown, Unlimited
from llkd_ray.teacher.openai.client import api_key, retry_after_s
from llkd_ray.teacher.openai.teacher import OpenAITeacher

KEY = "sk-very-secret-1234"


def good(request: Request) -> Response:
    return said(["B"])


def poisoned(reply: Response, *bad: str) -> Answer:
    """Good answers to all texts but those in which ``bad`` stands."""
    return lambda request: reply if any(word in request.text for word in bad) else good(request)


FAULTS = {
    "server error": (Response({"error": {"message": "out of memory"}}, status=500), "http_500"),
    "bad gateway": (Response(b"<html>", status=502), "http_502"),
    "unavailable": (Response(status=503), "http_503"),
    "too slow": (Response({}, wait_s=3.5), "timed_out"),
    "truncated JSON": (Response(b'{"choices": [{"message": {"cont'), "bad_answer"),
    "truncated body": (Response(b'{"choices": [', promise_bytes=100), "no_connection"),
    "empty body": (Response(b""), "bad_answer"),
    "not UTF-8": (Response(b'{"choices": "\xff\xfe"}'), "bad_answer"),
    "nothing": (Response(hang_up=True), "no_connection"),
    "a list": (Response([1, 2]), "bad_answer"),
    "no choices": (Response({"choices": []}), "bad_answer"),
    "an error with status 200": (Response({"error": {"message": "overloaded"}}), "bad_answer"),
    "wrong shape": (Response({"choices": [{"message": 3}]}), "bad_answer"),
}


def patience(reply: Response) -> float:
    """Seconds: short only where that is the fault, for good answers of a busy machine may take a while."""
    return 1.5 if reply.wait_s else 20.0


@pytest.mark.parametrize(("reply", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_text_that_always_fails_is_given_up_with_its_reason_and_the_others_are_answered(reply, reason):
    with StubServer(poisoned(reply, "number 3.")) as server:
        teacher = OpenAITeacher(
            teacher_config(server.base_url, attempts=2, timeout_s=patience(reply)), LABELS
        )
        answers = ask(teacher, texts_of(8))
        tries = [request for request in server.requests if "number 3." in request.text]
    assert list(answers.outcome_N) == ["", "", "", reason, "", "", "", ""]
    assert answers.probs_NC[answers.answered_N].tolist() == 7 * [[0.0, 1.0, 0.0]]
    assert len(tries) == 2, "as often as teacher.attempts says"
    assert answers.usage.texts == 8
    assert answers.usage.requests == 9, "every attempt counts"


@pytest.mark.parametrize(("reply", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_costs_another_try_and_no_text(reply, reason):
    with StubServer(in_turn([reply, reply], good)) as server:
        teacher = OpenAITeacher(
            teacher_config(server.base_url, attempts=3, timeout_s=patience(reply)), LABELS
        )
        answers = ask(teacher, ["one text"])
    assert list(answers.outcome_N) == [""]
    assert answers.usage.requests == 3
    assert answers.prompt_tokens_N[0] > 2 * answers.usage.prompt_tokens / 3.01, "failed tries are billed"


def test_pauses_between_tries_grow(monkeypatch):
    faults, slept, sleep = 3 * [Response(status=500)], [], asyncio.sleep

    def noting(seconds: float) -> Any:
        slept.append(seconds)
        return sleep(seconds)

    with StubServer(in_turn(faults, good)) as server:
        config = teacher_config(server.base_url, {"back_off_s": 0.1}, attempts=4)
        teacher = OpenAITeacher(config, LABELS)
        monkeypatch.setattr("llkd_ray.teacher.openai.client.asyncio.sleep", noting)
        ask(teacher, ["one text"])
        at = [request.at for request in server.requests]
    # What is slept, for a busy machine adds to what can be seen from outside, and what cannot be less.
    pauses = [after - before for before, after in pairwise(at)]
    for pause, asleep, expected in zip(pauses, slept, (0.1, 0.2, 0.4), strict=True):
        assert 0.75 * expected <= asleep <= 1.25 * expected
        assert pause > 0.99 * asleep


# --- busy


def test_all_requests_wait_as_long_as_a_busy_server_says():
    slow = Response(said(["B"]).content, wait_s=0.15)
    with StubServer(in_turn([Response(status=429, headers={"Retry-After": "1"})], lambda _: slow)) as server:
        answers = ask(OpenAITeacher(teacher_config(server.base_url, {"concurrency": 2}), LABELS), texts_of(5))
        at = [request.at for request in server.requests]
    assert answers.answered_N.all()
    assert len(at) == 6
    later = [moment for moment in at if moment > at[0] + 0.1]
    assert len(later) >= 4, "two are under way at a time"
    assert min(later) - at[0] > 0.95


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
        teacher = OpenAITeacher(teacher_config(server.base_url, attempts=2), LABELS)
        answers = ask(teacher, ["one text"], allowance=allowance)
        assert len(server.requests) == 6
    assert list(answers.outcome_N) == [""]
    assert answers.usage.requests == allowance.claims == 1


def test_a_server_that_only_refuses_is_given_up():
    with StubServer(lambda _: Response({"error": "quota"}, status=429)) as server:
        config = teacher_config(server.base_url, {"back_off_s": 0.02}, no_progress_timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises(
            TeacherDown, match=r"teacher\.no_progress_timeout_s 0\.5.*429.*requests_per_minute"
        ):
            ask(OpenAITeacher(config, LABELS), texts_of(3))
    assert 0.2 < time.monotonic() - began < 3


def test_a_wait_that_nobody_would_sit_out_is_not_begun():
    busy = Response(status=429, headers={"Retry-After": "86400"})
    with StubServer(lambda _: busy) as server, pytest.raises(TeacherDown, match="86400 s"):
        ask(OpenAITeacher(teacher_config(server.base_url, no_progress_timeout_s=60), LABELS), texts_of(3))


def test_silence_before_a_call_is_not_the_servers():
    async def run(teacher: OpenAITeacher) -> Answers:
        await teacher.label(["0"], ["one"], Unlimited())
        await asyncio.sleep(2.5)  # the student trains
        return await teacher.label(["1"], ["two"], Unlimited())

    replies = [said(["B"]), Response(status=429, headers={"Retry-After": "0.05"})]
    with StubServer(in_turn(replies, good)) as server:
        answers = asyncio.run(
            run(OpenAITeacher(teacher_config(server.base_url, no_progress_timeout_s=2.0), LABELS))
        )
    assert list(answers.outcome_N) == [""]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), ("", None)],
)
def test_retry_after_in_seconds(header, seconds):
    assert retry_after_s(header) == seconds


def test_retry_after_as_a_date():
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90.0
    assert retry_after_s(format_datetime(now - timedelta(seconds=90), usegmt=True), now) == 0.0
    assert retry_after_s("Sun, 01 Mar 2026 12:00:30 -0000", now) == 30.0


# --- refused


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_text_that_is_refused_is_not_sent_again(status):
    refusal = Response({"error": {"message": "the text is too long"}}, status=status)
    with StubServer(poisoned(refusal, "number 2.")) as server:
        answers = ask(OpenAITeacher(teacher_config(server.base_url), LABELS), texts_of(5))
        assert len(server.requests) == 5
    assert list(answers.outcome_N) == ["", "", f"refused_http_{status}", "", ""]


@pytest.mark.parametrize(
    ("status", "field"), [(401, "api_key_env"), (402, "api_key_env"), (403, "api_key_env"), (404, "base_url")]
)
def test_a_server_that_does_not_know_us_is_down_at_once(status, field, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    refusal = Response({"error": {"message": f"no access for {KEY}"}}, status=status)
    with StubServer(lambda _: refusal) as server:
        teacher = OpenAITeacher(teacher_config(server.base_url, {"concurrency": 1}), LABELS)
        with pytest.raises(TeacherDown) as down:
            ask(teacher, texts_of(5))
        assert len(server.requests) == 1
        assert server.base_url in str(down.value)
    assert f"teacher.server.{field}" in str(down.value)
    assert "'stub'" in str(down.value)
    assert KEY not in str(down.value)


def test_403_to_one_text_is_the_texts():
    with StubServer(poisoned(Response({"error": "flagged"}, status=403), "number 2.")) as server:
        answers = ask(OpenAITeacher(teacher_config(server.base_url, {"concurrency": 1}), LABELS), texts_of(4))
    assert list(answers.outcome_N) == ["", "", "refused_http_403", ""]


# --- down


def test_nobody_there():
    config = teacher_config(f"http://127.0.0.1:{free_port()}/v1", attempts=2)
    allowance = Counting()
    with pytest.raises(TeacherDown, match=r"teacher\.server\.base_url.*no_connection.*start the server"):
        ask(OpenAITeacher(config, LABELS), texts_of(50), allowance=allowance)
    assert allowance.claims < 50, "given up long before the last text"


@pytest.mark.parametrize(("reply", "reason"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("n", [1, 3], ids=["one text", "three texts"])
def test_a_server_that_has_never_answered_sends_no_text_to_quarantine(reply, reason, n):
    with StubServer(lambda _: reply) as server:
        teacher = OpenAITeacher(
            teacher_config(server.base_url, attempts=2, timeout_s=patience(reply)), LABELS
        )
        with pytest.raises(TeacherDown, match=rf"^teacher\..*{reason}.*; "):
            ask(teacher, texts_of(n))


def dies_after(n: int, reply: Response) -> Answer:
    return in_turn([said(["B"])] * n, lambda _: reply)


@pytest.mark.parametrize(
    "reply", [Response(status=500), Response(hang_up=True), Response({"a": 1}, status=400)]
)
def test_a_server_that_goes_down_half_way(reply):
    with StubServer(dies_after(10, reply)) as server:
        teacher = OpenAITeacher(teacher_config(server.base_url, attempts=2), LABELS)
        with pytest.raises(TeacherDown, match="texts in a row have failed"):
            ask(teacher, texts_of(60))
        assert len(server.requests) < 10 + 2 * 20, "not all were tried"


@pytest.mark.parametrize(
    "reply", [Response(status=500), Response(hang_up=True), Response({"a": 1}, status=400)]
)
def test_a_server_that_goes_down_a_few_texts_before_the_end(reply):
    """Too few to prove anything by themselves, and lost if they were taken for bad ones."""
    with StubServer(dies_after(10, reply)) as server:
        config = teacher_config(server.base_url, {"concurrency": 1}, attempts=2)
        with pytest.raises(TeacherDown, match="2 texts in a row have failed"):
            ask(OpenAITeacher(config, LABELS), texts_of(12))


@pytest.mark.parametrize(("n_bad", "asked_again"), [(1, 0), (2, 1), (3, 1)])
def test_a_few_bad_texts_at_the_end_are_bad(n_bad, asked_again):
    bad = [f"number {i}." for i in range(10 - n_bad, 10)]
    with StubServer(poisoned(Response(status=500), *bad)) as server:
        config = teacher_config(server.base_url, {"concurrency": 1}, attempts=2)
        answers = ask(OpenAITeacher(config, LABELS), texts_of(10))
        assert len(server.requests) == 10 + n_bad + asked_again, "one text that had an answer, to be sure"
    assert answers.answered_N.tolist() == [True] * (10 - n_bad) + [False] * n_bad
    assert answers.usage.texts == 10
    assert answers.usage.requests == 10 + n_bad + asked_again


@pytest.mark.parametrize("reply", [Response(status=500), Response({"error": "no"}, status=422)])
def test_many_bad_texts_in_a_row_do_not_bring_a_good_server_down(reply):
    bad = [f"number {i}." for i in range(10, 40)]
    with StubServer(poisoned(reply, *bad)) as server:
        teacher = OpenAITeacher(teacher_config(server.base_url, attempts=2), LABELS)
        answers = ask(teacher, texts_of(40))
    assert answers.answered_N.tolist() == [True] * 10 + [False] * 30


def test_a_server_that_comes_back_is_asked_again():
    async def run(teacher: OpenAITeacher) -> Answers:
        with pytest.raises(TeacherDown):
            await teacher.label(["0"] * 30, texts_of(30), Unlimited())
        server.answer = good
        return await teacher.label(["0"] * 30, texts_of(30), Unlimited())

    with StubServer(dies_after(3, Response(status=500))) as server:
        answers = asyncio.run(run(OpenAITeacher(teacher_config(server.base_url, attempts=2), LABELS)))
    assert answers.answered_N.all()


# --- manners


def test_the_key_is_sent_where_there_is_one(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with StubServer(good) as server:
        monkeypatch.setenv(KEY_ENV, f"{KEY}\n")
        ask(OpenAITeacher(teacher_config(server.base_url), LABELS), ["with"])
        monkeypatch.delenv(KEY_ENV)
        ask(OpenAITeacher(teacher_config(server.base_url), LABELS), ["without"])
        headers = [{name.lower(): v for name, v in request.headers.items()} for request in server.requests]
    assert headers[0]["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in headers[1]
    assert caplog.records, "or this says nothing"
    assert KEY not in caplog.text


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv(KEY_ENV, f"{KEY}\nX-Other: 1")
    with pytest.raises(TeacherDown) as down:
        api_key(KEY_ENV)
    assert KEY_ENV in str(down.value)
    assert KEY not in str(down.value)


def test_no_more_requests_at_a_time_than_allowed():
    slow = Response(said(["B"]).content, wait_s=0.05)
    with StubServer(lambda _: slow) as server:
        ask(OpenAITeacher(teacher_config(server.base_url, {"concurrency": 3}), LABELS), texts_of(12))
        assert server.most_at_once == 3


def test_requests_are_spaced_evenly():
    with StubServer(good) as server:
        config = teacher_config(server.base_url, {"requests_per_minute": 600, "concurrency": 8})
        began = time.monotonic()
        ask(OpenAITeacher(config, LABELS), texts_of(6))
        at = sorted(request.at for request in server.requests)
    # Any of them may be late; none is early.
    assert all(at[i] - began >= 0.1 * i - 0.001 for i in range(6))


def test_replies_of_a_call_that_ends_do_not_hold_the_next_one_up():
    """Cancelled requests give their slots back."""

    async def run(teacher: OpenAITeacher) -> Answers:
        with pytest.raises(TeacherDown):
            await teacher.label(["0"] * 20, texts_of(20), Unlimited())
        server.answer = good
        return await teacher.label(["0"] * 20, texts_of(20), Unlimited())

    with StubServer(lambda _: Response(status=401)) as server:
        answers = asyncio.run(run(OpenAITeacher(teacher_config(server.base_url), LABELS)))
    assert answers.answered_N.all()
