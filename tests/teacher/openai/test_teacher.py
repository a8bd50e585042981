"""The teacher behind a server: what it makes of the replies, whatever the server can do."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_teachers import LABELS, Counting, ask, teacher_config, texts_of
from stub_server import (
    Request,
    Response,
    StubServer,
    likeliest,
    next_token_probs,
    said,
    usage,
    vllm_like,
)
from toys import NAMES, WORDS, toy_texts
from transformers import AutoTokenizer

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import UNASKED, TeacherDown
from llkd_ray.teacher.openai.teacher import OpenAITeacher, check_server_teacher
from llkd_ray.teacher.prompt import build_prompt, encode_prompts, label_sequences, shorten

VOCABULARY = 800
NOWHERE = "http://127.0.0.1:1/v1"


@pytest.fixture(scope="module")
def tokenizer(tiny_llm: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llm)


def with_tokens(base_url: str, tiny_llm: str, answer: str = "letters", **settings: Any) -> TeacherConfig:
    """A teacher whose server has ``logprob_token_ids``, and which follows every branch of the labels."""
    server = {"scores": "label_ids", "tokenizer": tiny_llm} | settings.pop("server", {})
    prompt = {"answer": answer, "show_labels": False} | settings.pop("prompt", {})
    return teacher_config(base_url, server, prompt=prompt, min_branch_prob=0.0, max_model_len=256, **settings)


def expected_mass(config: TeacherConfig, labels: LabelsConfig, text: str, tokenizer: Any) -> np.ndarray:
    """float[C] of the stub's model, one label after the other, for labels none of which begins another."""
    prompt = build_prompt(config.prompt, labels, tokenizer)
    [token_ids], _ = encode_prompts(prompt, [text], tokenizer, config.max_model_len, "tail")
    return np.array(
        [
            math.prod(
                next_token_probs([*token_ids, *tokens[:i]], VOCABULARY)[token]
                for i, token in enumerate(tokens)
            )
            for tokens in label_sequences(prompt, labels, tokenizer)
        ]
    )


# --- label_ids

LETTERS = LabelsConfig(names=NAMES)
PHRASES = LabelsConfig(names=tuple(f"{name} {word}" for name in NAMES for word in WORDS[name].split()[:3]))


@pytest.mark.parametrize(("answer", "labels"), [("letters", LETTERS), ("names", PHRASES)])
def test_label_ids_gives_the_mass_of_whole_labels(answer, labels, tiny_llm, tokenizer):
    texts = toy_texts(6, 3, seed=3)[0]
    with StubServer(vllm_like(VOCABULARY)) as server:
        config = with_tokens(server.base_url, tiny_llm, answer)
        answers = ask(OpenAITeacher(config, labels), texts)
        prompts = [len(request.body["prompt"]) for request in server.requests]
    for text, probs_C in zip(texts, answers.probs_NC, strict=True):
        expected_C = expected_mass(config, labels, text, tokenizer)
        np.testing.assert_allclose(probs_C, expected_C, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-9)
    used = answers.usage
    assert (used.requests, used.prompt_tokens, used.answer_tokens) == (
        len(prompts),
        sum(prompts),
        len(prompts),
    )


@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
def test_long_texts_are_cut_to_the_models_length(cut, tiny_llm):
    text = " ".join(toy_texts(100, 3, seed=4)[0])
    with StubServer(vllm_like(VOCABULARY)) as server:
        config = with_tokens(server.base_url, tiny_llm, prompt={"cut": cut})
        answers = ask(OpenAITeacher(config, LETTERS), [text, "a short one"])
        longest = max(len(request.body["prompt"]) for request in server.requests)
    assert answers.usage.cut_texts == 1
    assert 240 <= longest <= 255, "a token is left for the answer"


def by_tokens(request: Request, first: Any, others: Any) -> Response:
    """A reply in which the first token asked for has one logprob, and the others another."""
    names = [f"token_id:{token}" for token in request.body["logprob_token_ids"]]
    top = dict.fromkeys(names, others) | {names[0]: first}
    return Response({"choices": [{"text": "x", "logprobs": {"top_logprobs": [top]}}]})


@pytest.mark.parametrize("value", [float("nan"), None, "x", 0.5, -0.1], ids=str)
def test_what_cannot_be_probabilities_fails_the_text(value, tiny_llm, tokenizer):
    """The last one is: each token has 0.9."""

    def answer(request: Request) -> Response:
        is_bad = "zzzz" in tokenizer.decode(request.body["prompt"])
        return by_tokens(request, value, value) if is_bad else vllm_like(VOCABULARY)(request)

    with StubServer(answer) as server:
        teacher = OpenAITeacher(with_tokens(server.base_url, tiny_llm, attempts=2), LETTERS)
        answers = ask(teacher, ["a boat", "zzzz", "a tram"])
        assert len(server.requests) == 4
    assert list(answers.outcome_N) == ["", "bad_answer", ""]


def test_infinitely_unlikely_is_a_probability(tiny_llm):
    with StubServer(lambda request: by_tokens(request, -0.5, float("-inf"))) as server:
        answers = ask(OpenAITeacher(with_tokens(server.base_url, tiny_llm), LETTERS), ["a text"])
    assert sorted(answers.probs_NC[0]) == pytest.approx([0, 0, 0, 0, 0, math.exp(-0.5)])


def test_scores_that_are_missing_once_are_asked_for_again(tiny_llm):
    model, turn = vllm_like(VOCABULARY), count()

    def second_without(request: Request) -> Response:
        return Response({"choices": [{"text": "x", "logprobs": None}]}) if next(turn) == 1 else model(request)

    with StubServer(second_without) as server:
        answers = ask(OpenAITeacher(with_tokens(server.base_url, tiny_llm), LETTERS), texts_of(3))
        assert len(server.requests) == 4
    assert answers.answered_N.all()


# --- top_logprobs


def by_top(base_url: str, **settings: Any) -> TeacherConfig:
    return teacher_config(base_url, {"scores": "top_logprobs", "top_logprobs": 5}, **settings)


@pytest.mark.parametrize(
    ("top", "probs"),
    [
        ({"C": 0.6, " C": 0.1, "B": 0.2, "The": 0.05}, [0.2, 0.7, 0.0]),
        ({"D\n": 0.5, "c": 0.3}, [0.0, 0.0, 0.5]),
        ({"c": 0.5, " d": 0.25, "Cd": 0.1}, [0.0, 0.5, 0.25]),
        ({"The": 0.7, "I": 0.2, "A": 0.05}, [0.0, 0.0, 0.0]),
    ],
    ids=["spaces", "small letters beside capital ones", "only small letters", "no letter"],
)
def test_top_logprobs_adds_up_what_means_a_letter(top, probs):
    with StubServer(lambda _: likeliest(top)) as server:
        answers = ask(OpenAITeacher(by_top(server.base_url), LABELS), ["a text"])
        body = server.requests[0].body
    assert answers.probs_NC[0] == pytest.approx(probs)
    assert answers.off_label_N[0] == pytest.approx(1 - sum(probs))
    asked_for = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 5, "model": "stub"}
    assert body.items() >= asked_for.items()


@pytest.mark.parametrize(
    "top",
    [[], [{"token": "B", "logprob": float("nan")}], [{"token": "B"}], [{"token": "B", "logprob": 0.0}] * 2],
    ids=["none", "nan", "missing", "more than one"],
)
def test_top_logprobs_that_make_no_sense_fail_the_text(top):
    content = [{"token": "B", "logprob": -0.1, "top_logprobs": top}]
    bad = Response({"choices": [{"message": {"content": "B"}, "logprobs": {"content": content}}]})
    with StubServer(lambda request: bad if "number 1." in request.text else likeliest({"B": 0.9})) as server:
        teacher = OpenAITeacher(by_top(server.base_url, attempts=2), LABELS)
        answers = ask(teacher, ["number 0."], texts_of(3))
    assert list(answers.outcome_N) == ["", "bad_answer", ""]


# --- votes


def by_votes(base_url: str, samples: int = 10) -> TeacherConfig:
    confidence = {"method": "votes", "samples": samples, "sampling_temperature": 0.9}
    return teacher_config(base_url, {"scores": "auto"}, confidence=confidence)


def test_votes_are_shares_of_the_answers():
    ten = ["B", "B.", " b", "C", "C", "D", "no idea", None, "A boat", "D. garden"]
    with StubServer(lambda _: said(ten)) as server:
        answers = ask(OpenAITeacher(by_votes(server.base_url), LABELS), ["a text"])
        (request,) = server.requests
    assert request.body.items() >= {"n": 10, "temperature": 0.9}.items()
    assert answers.probs_NC[0].tolist() == [0.3, 0.2, 0.2]
    assert answers.off_label_N.tolist() == [0.3]


def four_at_most(request: Request) -> Response:
    return said(["C"] * min(4, request.body.get("n", 1)))


def one_only(request: Request) -> Response:
    return Response({"error": "n must be 1"}, status=400) if "n" in request.body else said(["C"])


@pytest.mark.parametrize(
    ("answer", "samples", "wanted"),
    [(four_at_most, 10, [10, 4, 2, 4, 4, 2]), (one_only, 3, [3, 1, 1, 1, 1, 1, 1])],
)
def test_a_server_that_gives_fewer_answers_is_asked_until_there_are_enough(answer, samples, wanted):
    """Once is enough to learn it."""
    with StubServer(answer) as server:
        answers = ask(OpenAITeacher(by_votes(server.base_url, samples), LABELS), ["first", "second"])
        assert [request.body.get("n", 1) for request in server.requests] == wanted
    assert answers.probs_NC[:, 1].tolist() == [1.0, 1.0]


# --- which way


def no_chat_scores(request: Request) -> Response:
    return said(["C"] * request.body.get("n", 1), usage=usage(50, 1))


def ignores_ids(request: Request) -> Response:
    """Like most servers: the likeliest tokens, by their text, whatever else is asked for."""
    if request.path == "/v1/completions":
        return Response({"choices": [{"text": "x", "logprobs": {"top_logprobs": [{"x": -0.5, "y": -1.5}]}}]})
    return likeliest({"C": 0.75}) if request.body.get("logprobs") else no_chat_scores(request)


def refuses(status: int, message: str) -> Any:
    def answer(request: Request) -> Response:
        if request.path == "/v1/completions":
            return Response({"error": {"message": message}}, status=status)
        return ignores_ids(request)

    return answer


@pytest.mark.parametrize(
    ("answer", "method", "tries"),
    [
        (vllm_like(VOCABULARY), "label_ids", 1),
        (ignores_ids, "top_logprobs", 2 + 1),
        (refuses(400, "logprob_token_ids: unknown field"), "top_logprobs", 1 + 1),
        (refuses(404, "not found"), "top_logprobs", 1 + 1),
        (refuses(405, ""), "top_logprobs", 1 + 1),
        (no_chat_scores, "votes", 2 + 2),
    ],
    ids=["has it", "ignored", "refused", "no completions", "not allowed", "no scores at all"],
)
def test_auto_finds_the_best_way_with_a_text_of_its_own(answer, method, tries, tiny_llm):
    with StubServer(answer) as server:
        config = with_tokens(server.base_url, tiny_llm, server={"scores": "auto"})
        teacher = OpenAITeacher(config, LABELS)
        answers = ask(teacher, texts_of(5))
        assert len(server.requests) == answers.usage.requests == tries + 5
    assert teacher.method is not None
    assert teacher.method.name == method
    if method != "label_ids":
        share = {"top_logprobs": 0.75, "votes": 1.0}[method]
        assert answers.probs_NC == pytest.approx(np.array([[0.0, share, 0.0]] * 5))


def test_one_odd_reply_does_not_decide_and_what_is_agreed_holds(tiny_llm):
    """One actor finds the method, the others use it: votes and probabilities are not mixed in a run."""
    odd = iter([said(["C"], usage=usage(50, 1))])
    chat = {"scores": "auto", "tokenizer": None}

    def answer(request: Request) -> Response:
        return next(odd, None) or likeliest({"C": 0.75}, usage=usage(50, 1))

    agreed: list[str] = []

    def agree(found: str | None) -> str | None:
        agreed.extend([found] if found and not agreed else [])
        return agreed[0] if agreed else None

    with StubServer(answer) as server:
        config = teacher_config(server.base_url, chat)
        first = OpenAITeacher(config, LABELS, agree)
        ask(first, texts_of(2))
        assert agreed == ["top_logprobs"]
        agreed[:] = ["votes"]
        before = len(server.requests)
        second = OpenAITeacher(config, LABELS, agree)
        ask(second, texts_of(1))
        assert second.method is not None
        assert second.method.name == "votes"
        assert all("logprobs" not in request.body for request in server.requests[before:])
        agreed[:] = ["label_ids"]
        with pytest.raises(TeacherDown, match=r"by 'label_ids'.*set teacher\.server as it was"):
            ask(OpenAITeacher(config, LABELS, agree), texts_of(1))


def test_the_first_text_may_be_a_bad_one(tiny_llm, tokenizer):
    """It does not decide how the others are asked."""

    def answer(request: Request) -> Response:
        asked = request.text if "messages" in request.body else tokenizer.decode(request.body["prompt"])
        return Response({"error": "?"}, status=400) if "zzzz" in asked else vllm_like(VOCABULARY)(request)

    with StubServer(answer) as server:
        teacher = OpenAITeacher(with_tokens(server.base_url, tiny_llm, server={"scores": "auto"}), LABELS)
        answers = ask(teacher, ["zzzz", *texts_of(2)])
    assert list(answers.outcome_N) == ["refused_http_400", "", ""]
    assert teacher.method is not None
    assert teacher.method.name == "label_ids"


@pytest.mark.parametrize(
    ("scores", "answer"),
    [
        ("label_ids", ignores_ids),
        ("label_ids", refuses(400, "Unrecognized request argument: logprob_token_ids")),
        ("top_logprobs", no_chat_scores),
    ],
)
def test_a_way_that_is_asked_for_and_not_there_is_an_error(scores, answer, tiny_llm):
    with StubServer(answer) as server:
        teacher = OpenAITeacher(with_tokens(server.base_url, tiny_llm, server={"scores": scores}), LABELS)
        with pytest.raises(TeacherDown, match=rf"teacher\.server\.scores '{scores}'.*'auto'"):
            ask(teacher, texts_of(4))
        assert len(server.requests) == 1


# --- what it uses


class Purse(Counting):
    """An allowance of some tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.left = tokens

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        if prompt_tokens + answer_tokens > self.left:
            return False
        self.left -= prompt_tokens + answer_tokens
        return True


@pytest.mark.parametrize("cap", [1, 100, 1000, 3000])
def test_a_cap_is_never_passed_even_where_the_server_stumbles(cap, tiny_llm):
    model, turn = vllm_like(VOCABULARY), count()

    def sometimes(request: Request) -> Response:
        return Response(status=500) if next(turn) % 4 == 3 else model(request)

    with StubServer(sometimes) as server:
        config = with_tokens(server.base_url, tiny_llm, "names")
        answers = ask(OpenAITeacher(config, PHRASES), toy_texts(40, 3, seed=9)[0], allowance=Purse(cap))
        billed = sum(len(request.body["prompt"]) + 1 for request in server.requests)
    # What was claimed and then not sent, because another request of the text met the cap, counts, too.
    assert billed <= answers.usage.tokens <= cap
    assert UNASKED in answers.outcome_N
    assert set(answers.outcome_N) <= {"", UNASKED, "http_500"}
    assert answers.answered_N.any() == (cap >= 1000)


def test_without_a_tokenizer_claims_are_above_what_any_tokenizer_counts():
    texts = ["plain words " * 20, "日本語のテキスト" * 20, "😀" * 40]

    def by_bytes(request: Request) -> Response:
        tokens = len(request.text.encode()) + 5  # a byte a token, and what a chat template adds
        return said(["B"], usage=usage(tokens, 1, cached_tokens=10))

    with StubServer(by_bytes) as server:
        purse = Purse(10**9)
        answers = ask(OpenAITeacher(teacher_config(server.base_url), LABELS), texts, allowance=purse)
        real = sum(len(request.text.encode()) + 5 for request in server.requests)
    used = answers.usage
    assert (used.prompt_tokens, used.answer_tokens, used.cached_tokens) == (real, 3, 30), "as the server says"
    assert real + 3 <= 10**9 - purse.left


def test_a_server_that_counts_more_than_was_claimed_is_reported_once(caplog):
    with StubServer(lambda _: said(["B"], usage=usage(100_000, 1))) as server:
        answers = ask(OpenAITeacher(teacher_config(server.base_url), LABELS), texts_of(3))
    assert answers.usage.prompt_tokens == 300_000
    assert len([record for record in caplog.records if "100001 tokens" in record.getMessage()]) == 1


@pytest.mark.parametrize("reported", [None, {}, {"prompt_tokens": 0}, {"prompt_tokens": "many"}, [], "x"])
def test_usage_that_is_not_told_stays_as_claimed(reported):
    with StubServer(lambda _: said(["B"], usage=reported)) as server:
        answers = ask(OpenAITeacher(teacher_config(server.base_url), LABELS), ["a text"])
        (request,) = server.requests
    assert answers.usage.prompt_tokens == len(request.text.encode()) + 16
    assert answers.usage.answer_tokens == request.body["max_tokens"]


# --- cutting for chat


@pytest.mark.parametrize("known", [False, True], ids=["by characters", "by tokens"])
@pytest.mark.parametrize(("cut", "kept"), [("head", "END"), ("tail", "BEGIN"), ("middle", "BEGIN END")])
def test_chat_texts_are_cut_at_the_place_of_the_config(known, cut, kept, tiny_llm, tokenizer):
    text = f"BEGIN {' '.join(toy_texts(200, 3, seed=4)[0])} END"
    server_settings = {"tokenizer": tiny_llm if known else None}
    prompt = {"cut": cut, "instruction": "Which is it?"}
    with StubServer(lambda _: said(["B"])) as server:
        config = teacher_config(server.base_url, server_settings, max_model_len=200, prompt=prompt)
        answers = ask(OpenAITeacher(config, LABELS), [text, "short"])
        long, short = sorted((request.text for request in server.requests), key=len, reverse=True)
        room = 200 - server.requests[0].body["max_tokens"]
    assert answers.usage.cut_texts == 1
    assert [word for word in ("BEGIN", "END") if word in long] == kept.split()
    assert "Which is it?" in long
    assert "Text: short\n" in short
    size = len(tokenizer(long)["input_ids"]) if known else len(long) / 4
    assert room - 25 <= size <= room


@given(
    words=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=2, max_size=30),
    room=st.integers(1, 29),
    cut=st.sampled_from(["head", "tail", "middle"]),
)
def test_what_is_kept_of_a_text_are_whole_pieces_of_its_ends(words, room, cut):
    room = min(room, len(words) - 1)
    ends = np.cumsum([len(word) for word in words]).tolist()
    pieces = list(zip([0, *ends[:-1]], ends, strict=True))
    begin = {"head": 0, "tail": room, "middle": (room + 1) // 2}[cut]
    first, last = "".join(words[:begin]), "".join(words[len(words) - (room - begin) :])
    between = " … " if cut == "middle" else ""
    assert shorten("".join(words), pieces, room, cut) == first + between + last


# --- before anything is asked


@pytest.mark.parametrize(
    ("server", "settings", "message"),
    [
        ({"scores": "label_ids"}, {}, r"^small\.server\.tokenizer is missing"),
        ({"scores": "label_ids", "tokenizer": "no/such-model"}, {}, r"^small\.server\.tokenizer: .*no/such"),
        (
            {"scores": "top_logprobs"},
            {"prompt": {"answer": "names"}},
            r"^small\.server\.scores: 'top_logprobs'",
        ),
        ({"base_url": "http://ann:pw123@localhost/v1"}, {}, r"^small\.server\.base_url: (?!.*pw123)"),
        ({"base_url": "http://localhost/v1?key=pw123"}, {}, r"^small\.server\.base_url: (?!.*pw123)"),
        ({"base_url": "http://[::1/v1"}, {}, r"^small\.server\.base_url: 'http://\[::1/v1'"),
        ({}, {"max_model_len": 40}, r"^small\.max_model_len: 40 leaves no room"),
    ],
)
def test_mistakes_are_found_without_a_request(server, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_server_teacher(teacher_config(NOWHERE, server, **settings), LABELS, "small")


def test_facts_for_the_manifest_and_a_prompt_that_leaves_no_room(tiny_llm):
    auto = teacher_config(NOWHERE, {"scores": "auto"})
    ways = [auto, by_votes(NOWHERE), with_tokens(NOWHERE, tiny_llm)]
    facts = [check_server_teacher(config, LABELS) for config in ways]
    assert facts[0].items() >= {"kind": "openai", "model": "stub", "base_url": NOWHERE}.items()
    assert len(facts[0]["prompt_hash"]) == 16
    assert [one["scores"] for one in facts] == ["auto", "votes", "label_ids"]
    many = LabelsConfig(names=tuple(f"label {i}" for i in range(40)))
    only_votes = teacher_config(NOWHERE, {"scores": "auto"}, prompt={"answer": "names"})
    assert check_server_teacher(only_votes, many)["scores"] == "votes", "names need a tokenizer"
    wordy = with_tokens(NOWHERE, tiny_llm, prompt={"instruction": "Which one? " * 100})
    with pytest.raises(ConfigError, match="max_model_len"):
        check_server_teacher(wordy, PHRASES)
