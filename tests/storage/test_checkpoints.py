"""Any Hugging Face classifier: found in its several places, refused where it is none, scored right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import NAMES, toy_texts, with_trap
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from llkd_ray.cli.main import main
from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import StudentConfig
from llkd_ray.storage.checkpoints import inspect, load_tokenizer
from llkd_ray.student.inference import load, score
from llkd_ray.student.model import check_student, load_classifier

CPU = torch.device("cpu")


def copied(source: str, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with changes of its config.json; None takes a key out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def test_probabilities_are_those_of_the_pipeline(tiny_classifier):
    texts = [text * (1 + n % 5) for n, text in enumerate(toy_texts(70, 3, seed=3)[0])]
    checkpoint = inspect(tiny_classifier)
    p_NC = score(load(checkpoint, "float32", CPU), texts, checkpoint.max_tokens, batch_tokens=200)
    classify = pipeline("text-classification", model=tiny_classifier, top_k=None, device="cpu")
    for p_C, found in zip(p_NC, classify(texts, truncation=True), strict=True):
        theirs = {one["label"]: one["score"] for one in found}
        np.testing.assert_allclose(p_C, [theirs[name] for name in checkpoint.labels], atol=1e-5)
    assert len({tuple(p) for p in p_NC.round(3).tolist()}) > 10  # the toy does tell texts apart


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_batches_keep_to_their_tokens_and_change_nothing(tiny_classifier, budget):
    texts = [text * n for n, text in enumerate(toy_texts(30, 3, seed=4)[0], 1)]
    student = load(inspect(tiny_classifier), "float32", CPU)
    expected = score(student, texts, 64, 500)
    sizes, forward = [], student.model.forward
    student.model.forward = lambda **inputs: sizes.append(inputs["input_ids"].shape) or forward(**inputs)
    np.testing.assert_allclose(score(student, texts, 64, budget), expected, atol=1e-6)
    assert all(rows * tokens <= budget or rows == 1 for rows, tokens in sizes)
    assert (len(sizes) == 1) == (budget == 100_000)


def test_a_folder_a_run_and_its_model_are_found(tiny_classifier, tmp_path):
    copied(tiny_classifier, tmp_path / "run/model")
    (tmp_path / "run/config.yaml").write_text("student: {model: x, max_tokens: 48}\n")
    of_run, of_model = inspect(str(tmp_path / "run")), inspect(str(tmp_path / "run/model"))
    alone = inspect(tiny_classifier)
    assert of_run == of_model
    assert of_run.max_tokens == 48  # as the run has trained
    assert alone.max_tokens == 128  # as the tokenizer says
    assert alone.labels == NAMES[:3]
    assert inspect("file://" + tiny_classifier).fingerprint == alone.fingerprint


def test_the_fingerprint_is_of_weights_and_not_of_place(tiny_classifier, tmp_path):
    shutil.copytree(tiny_classifier, tmp_path / "same")
    same = inspect(str(tmp_path / "same"))
    assert same.fingerprint == inspect(tiny_classifier).fingerprint
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "same")
    assert inspect(str(tmp_path / "same")).fingerprint != same.fingerprint


def refusal(model: object, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        inspect(str(model), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model) in message
    return message


def test_what_is_no_classifier_is_refused(tiny_encoder, tiny_classifier, tmp_path):
    assert "has no classification head (it is BertModel)" in refusal(tiny_encoder)
    one = copied(tiny_classifier, tmp_path / "one", id2label={"0": "score"}, label2id={"score": 0})
    assert "is made for regression with 1 output(s)" in refusal(one)
    many = copied(tiny_classifier, tmp_path / "many", problem_type="multi_label_classification")
    assert "is made for multi label classification" in refusal(many)
    twice = copied(tiny_classifier, tmp_path / "twice", id2label={"0": "a", "1": "a", "2": "b"})
    assert "has a label twice" in refusal(twice)


def test_what_is_not_there_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds neither config.json nor model/" in refusal(tmp_path)
    (tmp_path / "config.yaml").write_text("student: {}\n")
    assert "has no model/ yet: finish it first: llkd resume" in refusal(tmp_path)
    assert "cannot be loaded" in refusal("no-such/hub-name")


def test_weights_that_are_missing_are_not_made_up(tiny_classifier, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_classifier, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks the weights classifier\.weight"):
        load(inspect(str(folder)), "float32", CPU)


def test_no_pickle_is_ever_read(tiny_classifier, tmp_path, capsys):
    mark, gold = tmp_path / "it ran", tmp_path / "gold.csv"
    gold.write_text("text,label\none,sea\n")
    trapped = with_trap(tiny_classifier, tmp_path / "bin", mark)
    for job in (
        ["evaluate", trapped, str(gold)],
        ["predict", trapped, str(gold), "--out", str(tmp_path / "out")],
    ):
        assert main(job) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"error: MODEL: {trapped!r} has its weights only as a pickle (pytorch_model.bin)"
        )
        assert f"AutoModelForSequenceClassification.from_pretrained({trapped!r}).save_pretrained" in line
    with pytest.raises(OSError, match="safetensors"):
        load_classifier(trapped)
    both = with_trap(tiny_classifier, tmp_path / "both", mark, keep_safe=True)
    load(inspect(both), "float32", CPU)
    assert not mark.exists()
    torch.load(Path(both) / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "the trap works"


def test_no_code_of_a_checkpoint_is_run_or_offered(tiny_classifier, tmp_path, monkeypatch):
    """By itself, transformers asks on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("a question"))
    mark = tmp_path / "it ran"
    folder = copied(tiny_classifier, tmp_path / "own", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    assert "cannot be loaded" in refusal(folder)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        check_student(StudentConfig(model=str(folder)))
    assert not mark.exists()


def test_settings_that_do_not_fit_the_model_are_refused(tiny_classifier):
    with pytest.raises(ConfigError, match=r"--max-tokens: 129 is too long, .* reads 128"):
        inspect(tiny_classifier, max_tokens=129)
    assert inspect(tiny_classifier, max_tokens=20).max_tokens == 20
    with pytest.raises(ConfigError, match=r"--revision: 'v1' is of a hub name"):
        inspect(tiny_classifier, "v1")


def test_a_tokenizer(tiny_llm):
    tokenizer = load_tokenizer(tiny_llm, None, "teacher.model")
    text = "the captain left the harbour"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("kind", [None, "llama", "qwen2"])
def test_a_tokenizer_that_is_not_there(tmp_path, kind):
    if kind:  # for some types, transformers makes an empty tokenizer, without a word
        AutoConfig.for_model(kind).save_pretrained(tmp_path / "model")
    field = "teacher.cascade.small.server.tokenizer"
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / "model"), None, field)
    assert str(caught.value).startswith(f"{field}: ")
    assert f"{tmp_path}/model" in str(caught.value)
    assert "\n" not in str(caught.value)
