"""Weights are counted from a checkpoint's headers, and a guess has two ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llkd_ray.run import estimate
from llkd_ray.run.estimate import UTILISATION, count_weights, matmul_flops, tokens_per_s


def test_weights_are_those_that_work_on_every_token(tiny_llm):
    model = AutoModelForCausalLM.from_pretrained(tiny_llm)
    working = sum(one.numel() for one in model.model.layers.parameters()) + model.model.norm.weight.numel()
    assert count_weights(Path(tiny_llm)) == working


def test_what_is_no_checkpoint_here_has_no_guess(tmp_path):
    assert count_weights(tmp_path / "nothing") == count_weights(tmp_path) == 0
    assert tokens_per_s("org/model", "auto", on_gpu=False) is None
    assert tokens_per_s(str(tmp_path), "auto", on_gpu=False) is None


@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_the_guess_follows_the_machine_and_the_model(tiny_llm, monkeypatch, dtype, kind):
    measured = []

    def flops(device, kind):
        measured.append((device, kind))
        return 1e12

    monkeypatch.setattr(estimate, "matmul_flops", flops)
    found = tokens_per_s(tiny_llm, dtype, on_gpu=False)
    most = 1e12 / (2 * count_weights(Path(tiny_llm)))
    assert found == pytest.approx(tuple(share * most for share in UTILISATION))
    assert measured == [("cpu", kind)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_not_guessed_from_a_cpu(tiny_llm):
    assert tokens_per_s(tiny_llm, "auto", on_gpu=True) is None


def test_products_are_measured(monkeypatch):
    monkeypatch.setattr(estimate, "MEASURE_S", 0.02)
    assert matmul_flops("cpu", torch.float32) > 1e6
