"""Probabilities do not depend on batches, padding, chunks or the device's way of scoring."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_students import CPU, UNEVEN, make_config, make_student, toy_batch
from torch import nn
from toys import toy_texts

from llkd_ray.student.inference import by_length, predict, prefetched, score
from llkd_ray.student.train import train_round


@pytest.fixture(scope="module")
def student(tiny_encoder):
    return make_student(tiny_encoder)


def some_texts() -> list[str]:
    texts, _ = toy_texts(30, 3, seed=2)
    texts[4], texts[9] = "sea " * 100, ""  # longer than max_tokens, and empty
    return texts


def test_probabilities_are_those_of_each_text_alone_in_the_given_order(student):
    texts = some_texts()
    p_NC = predict(student, texts, make_config(score_batch_size=64))
    assert (p_NC.shape, p_NC.dtype) == ((30, 3), np.float64)
    assert p_NC.sum(axis=1) == pytest.approx(np.ones(30))
    assert np.ptp(p_NC[:, 0]) > 0.001, "the texts get different probabilities"
    assert p_NC == pytest.approx(
        np.concatenate([predict(student, [text], make_config()) for text in texts]), abs=1e-5
    )
    assert predict(student, texts, make_config(score_batch_size=7)) == pytest.approx(p_NC, abs=1e-5)
    assert predict(student, texts[::-1], make_config())[::-1] == pytest.approx(p_NC, abs=1e-5)
    assert score(student, texts, 32, batch_tokens=50) == pytest.approx(p_NC, abs=1e-5)
    assert predict(student, [], make_config()).shape == score(student, [], 32, None).shape == (0, 3)


def test_dropout_is_off_and_training_puts_it_back(tiny_encoder):
    config, modes = make_config(tiny_encoder, epochs=1), []
    student = make_student(tiny_encoder)
    train_round(student, toy_batch(16), config)
    one, other = (predict(student, ["the sea"], config) for _ in range(2))
    assert np.array_equal(one, other)
    train_round(student, toy_batch(16), config, on_step=lambda *_: modes.append(student.model.training))
    assert modes == [True]


def test_a_wrapped_model_is_called_without_its_wrapper(student):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **_):
            raise AssertionError("the wrapper would wait for other ranks")

    wrapped = replace(student, model=Wrapper(student.model))
    assert np.array_equal(predict(wrapped, UNEVEN, make_config()), predict(student, UNEVEN, make_config()))


def test_decoder_padded_on_the_left_answers_as_on_the_right(tiny_llm):
    student = make_student(tiny_llm)
    right = predict(student, UNEVEN, make_config())
    student.tokenizer.padding_side = "left"
    assert predict(student, UNEVEN, make_config()) == pytest.approx(right, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.integers(1, 9),
    st.none() | st.integers(1, 200),
)
def test_batches_fill_the_budget_and_hold_each_text_once(length_N, size, budget):
    tokens_N = [{"input_ids": [1] * length} for length in length_N]
    batches = list(by_length(tokens_N, size, budget))
    assert sorted(np.concatenate(batches)) == list(range(len(length_N)))
    longest = [max(length_N[i] for i in index_B) for index_B in batches]
    assert longest == sorted(longest, reverse=True)
    for index_B, most in zip(batches[:-1], longest, strict=False):
        assert index_B.size == max(size, (budget or 0) // most)


class TestOnAGpu:
    """What scoring does for a GPU only, on the CPU, which takes the GPU's place."""

    @pytest.fixture
    def on_gpu(self, student, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        plain = torch.Tensor.to

        def stay(self, *where, **options):
            return self if torch.device("cuda") in where else plain(self, *where, **options)

        monkeypatch.setattr(torch.Tensor, "to", stay)
        monkeypatch.setattr("llkd_ray.student.inference.CHUNK", 8)
        return replace(student, device=torch.device("cuda"))

    def test_probabilities_are_the_same(self, on_gpu):
        config = make_config(score_batch_size=3)
        on_cpu = predict(replace(on_gpu, device=CPU), some_texts(), config)
        assert predict(on_gpu, some_texts(), config) == pytest.approx(on_cpu, abs=1e-5)
        assert predict(on_gpu, [], config).shape == (0, 3)

    def test_short_texts_fill_a_batch_and_a_mask_without_padding_is_left_out(self, on_gpu, monkeypatch):
        shapes, plain = [], type(on_gpu).forward

        def noting(self, inputs):
            shapes.append((*inputs["input_ids"].shape, "attention_mask" in inputs))
            return plain(self, inputs)

        monkeypatch.setattr(type(on_gpu), "forward", noting)
        texts = ["sea"] * 8 + ["sea"] * 6 + ["the sea", "sea"]
        predict(on_gpu, texts, make_config(score_batch_size=1, max_tokens=16))
        assert shapes == [(5, 3, False), (3, 3, False), (4, 4, True), (4, 3, False)]

    def test_a_failure_while_batches_are_prepared_is_raised(self, on_gpu, monkeypatch):
        def refuse(self, tokens_B):
            raise RuntimeError("out of pinned memory")

        monkeypatch.setattr(type(on_gpu), "pad", refuse)
        with pytest.raises(RuntimeError, match="out of pinned memory"):
            predict(on_gpu, ["the sea"] * 20, make_config())


class TestPrefetched:
    def test_order_and_number(self):
        made, used = [], []
        for item in prefetched((made.append(i) or i for i in range(20)), 3):
            used.append(item)
            assert len(made) <= len(used) + 3
        assert used == list(range(20))

    def test_an_item_is_made_while_the_one_before_is_in_use(self):
        in_use = threading.Event()

        def items():
            yield 0
            assert in_use.wait(60)
            yield 1

        for item in prefetched(items(), 1):
            if item == 0:
                in_use.set()
        assert item == 1

    def test_a_user_that_stops_ends_the_thread(self):
        before = threading.active_count()
        ahead = prefetched(iter(range(1000)), 2)
        assert next(ahead) == 0
        ahead.close()
        assert threading.active_count() == before
