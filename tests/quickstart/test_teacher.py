"""The quickstart's teacher and its folder. The corpus itself: test_corpus.py."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.config.loading import parse_config
from llkd_ray.quickstart import teacher
from llkd_ray.quickstart.corpus import AREAS, Sentence
from llkd_ray.quickstart.teacher import PROMPT, Recipe, label_probs, last_logits, prepare, report_teacher
from llkd_ray.teacher.prompt import build_prompt, encode_prompts, label_sequences

TINY = Recipe(vocabulary=600, width=64, heads=1, epochs=3, batch=16, learning_rate=5e-3)
THINGS = {
    "algebra": "equation polynomial root",
    "drawing": "line colour figure",
    "graphs": "node edge path",
    "learning": "model loss weight",
    "parallel": "worker thread lock",
    "tables": "row column index",
    "web": "server request header",
}


def made_up_corpus(per_label: int = 60) -> list[Sentence]:
    """Sentences that a label's own words tell apart, in all three splits."""
    rng = np.random.default_rng(0)
    corpus = []
    for label in AREAS:
        for number in range(per_label):
            first, second = rng.choice(THINGS[label].split(), 2)
            text = f"Return the {first} that belongs to the {second} with the number {number}."
            split = ("teacher", "teacher", "teacher", "pool", "test")[number % 5]
            corpus.append(Sentence(f"{label}{number}", text, label, f"{label}.m{number}", split))
    return corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "read_corpus", lambda say: made_up_corpus())
        patch.setattr(teacher, "Recipe", lambda: TINY)
        tree = prepare(folder, seed=3, say=told.append)
    return folder, tree, told


def test_the_settings_are_a_whole_config_of_the_files(prepared: tuple[Path, dict, list[str]]) -> None:
    folder, tree, told = prepared
    config = parse_config(tree)
    assert config.test is not None
    assert (config.corpus.uri, config.test.uri) == (f"{folder}/pool.parquet", f"{folder}/test.parquet")
    assert (config.teacher.prompt, config.student.model, config.run.seed) == (PROMPT, "minilm", 3)
    assert Path(config.teacher.model or "").is_absolute()
    for split in ("pool", "test"):
        table = pq.read_table(folder / f"{split}.parquet")
        assert table.column_names == ["id", "text", "label", "module"]
        assert set(table["id"].to_pylist()) == {one.id for one in made_up_corpus() if one.split == split}
        assert set(table["label"].to_pylist()) <= set(config.labels.names)
    assert [line for line in told if line.startswith("teacher: right on")]
    for area in AREAS:
        assert any(line.split()[1:] == [area, "36", "12", "12"] for line in told)


def test_the_saved_teacher_answers_with_label_tokens(prepared: tuple[Path, dict, list[str]]) -> None:
    """Loaded as any checkpoint is, it gives labels nearly all probability, and mostly the right one."""
    folder, tree, _ = prepared
    config = parse_config(tree)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 256
    prompt = build_prompt(config.teacher.prompt, config.labels, tokenizer)
    label_tokens = [token for (token,) in label_sequences(prompt, config.labels, tokenizer)]
    assert [tokenizer.decode([token]).strip() for token in label_tokens] == list(config.labels.names)
    test = pq.read_table(folder / "test.parquet").to_pylist()
    tokens, cut = encode_prompts(prompt, [row["text"] for row in test], tokenizer, 256, "tail")
    assert not cut.any()
    with torch.inference_mode(), teacher._one_thread():
        p_NV = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in tokens]).softmax(-1).numpy()
    p_NC = p_NV[:, label_tokens]
    assert p_NC.sum(1).mean() > 0.9
    gold = [config.labels.names.index(row["label"]) for row in test]
    assert np.mean(p_NC.argmax(1) == gold) > 0.7
    # What the teacher was measured with is what it says, padding and all.
    short_cut = label_probs(model, [np.array(ids) for ids in tokens], torch.tensor(label_tokens))
    np.testing.assert_allclose(short_cut, p_NC, atol=1e-5)


def test_a_finished_folder_is_found_again(
    prepared: tuple[Path, dict, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tree, _ = prepared
    monkeypatch.setattr(teacher, "Recipe", lambda: TINY)
    monkeypatch.setattr(teacher, "read_corpus", lambda say: pytest.fail("made anew"))
    assert prepare(folder, seed=3, say=lambda line: None) == tree


@pytest.mark.parametrize("spoil", ["unfinished", "another seed"])
def test_a_folder_that_is_not_finished_is_made_anew(
    spoil: str, prepared: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = (prepared[0] / teacher.MARKER).read_text(encoding="utf-8")
    if spoil == "another seed":
        (tmp_path / teacher.MARKER).write_text(marker, encoding="utf-8")
    monkeypatch.setattr(teacher, "Recipe", lambda: TINY)
    monkeypatch.setattr(teacher, "read_corpus", lambda say: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        prepare(tmp_path, seed=3 if spoil == "unfinished" else 4, say=lambda line: None)
    assert not (tmp_path / teacher.MARKER).exists()


def train(seed: int, recipe: Recipe = TINY) -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(1)
    gold_N = rng.integers(0, 3, 160)
    tokens = [np.array([0, *rng.integers(20, 40, rng.integers(2, 9)), 10 + gold]) for gold in gold_N]
    told: list[str] = []
    label_tokens = torch.tensor([3, 4, 5])
    model = teacher.train_teacher(tokens, gold_N, label_tokens, 50, recipe, seed, told.append)
    return model.lm_head.weight.detach(), told


def test_training_repeats_by_seed() -> None:
    before = torch.random.get_rng_state()
    first, again, other = train(0)[0], train(0)[0], train(1)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are left alone"


def test_the_brake_ends_training_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(teacher, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    _, told = train(0, Recipe(vocabulary=50, width=64, heads=1, epochs=10_000, batch=16, seconds=60.0))
    assert any("this machine is busy; stopped after" in line for line in told)


def test_the_short_cut_agrees_with_the_model_itself() -> None:
    model = teacher._new_model(50, TINY, seed=0).eval()
    ids_BT = torch.randint(3, 50, (5, 12), generator=torch.Generator().manual_seed(0))
    seen_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    seen_BT[1, :7] = False
    with torch.inference_mode():
        expected = model(input_ids=ids_BT, attention_mask=seen_BT.long()).logits[:, -1]
        torch.testing.assert_close(last_logits(model, ids_BT, seen_BT), expected, atol=1e-5, rtol=1e-4)


def test_report_orders_by_confidence() -> None:
    told: list[str] = []
    confidence_N = np.linspace(0.5, 1.0, 10)
    p_NC = np.stack([confidence_N, 1 - confidence_N], axis=1)
    report_teacher(p_NC, np.repeat([1, 0], 5), told.append)  # right where it is sure
    assert told[0].startswith("teacher: right on 50.0% of 10")
    assert "right 100%, 100%, 50%, 0%, 0%" in told[1]
