"""The kinds of teachers: how they are made, what is checked before a run, what tells them apart."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from toys import NAMES, make_config, toy_texts, write_answers, write_corpus
from transformers import AutoConfig

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig, TeacherConfig
from llkd_ray.teacher.factory import (
    cache_folder,
    cache_key,
    check_teacher,
    make_teacher,
    self_contained,
    with_demonstrations,
)
from llkd_ray.teacher.openai.teacher import OpenAITeacher
from llkd_ray.teacher.recorded import RecordedTeacher
from llkd_ray.teacher.vllm.teacher import VllmTeacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVER = {"base_url": "http://127.0.0.1:9/v1"}


def nothing_agreed(found: str | None) -> str | None:
    return found


def vllm(model: Any, **settings: Any) -> dict[str, Any]:
    return {"kind": "vllm", "model": str(model), "max_model_len": 256} | settings


def openai(**settings: Any) -> dict[str, Any]:
    return {"kind": "openai", "model": "served-model", "server": SERVER} | settings


def cascade(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "cascade", "cascade": {"small": small, "large": large}}


def teacher_of(tree: dict[str, Any]) -> TeacherConfig:
    return make_config(teacher=tree).teacher


@pytest.fixture
def recorded(tmp_path) -> dict[str, Any]:
    answers = write_answers(tmp_path / "answers.parquet", [write_corpus(tmp_path / "pool.parquet", 12)])
    return {"kind": "recorded", "recorded": {"uri": str(answers)}}


class TestMake:
    def test_each_kind(self, tiny_llm, recorded):
        started: list[float] = []
        kinds = ((vllm(tiny_llm), VllmTeacher), (openai(), OpenAITeacher), (recorded, RecordedTeacher))
        for tree, kind in kinds:
            teacher = make_teacher(teacher_of(tree), make_config().labels, started.append, nothing_agreed)
            assert type(teacher) is kind
            teacher.close()
        assert started == [], "an engine is not started before it is asked"

    def test_a_cascade_is_its_members(self, recorded):
        teacher = teacher_of(cascade(recorded, recorded))
        with pytest.raises(AssertionError, match="asked by its members"):
            make_teacher(teacher, make_config().labels, lambda seconds: None, nothing_agreed)


class TestCheck:
    def test_facts(self, tiny_llm, recorded):
        def facts(tree: dict[str, Any]) -> dict[str, Any]:
            return check_teacher(make_config(teacher=tree))

        answers = {"kind": "recorded", "uri": recorded["recorded"]["uri"], "answers": 12}
        assert facts(recorded) == answers
        local = facts(vllm(tiny_llm))
        assert (local["kind"], local["model"]) == ("vllm", tiny_llm)
        other = facts(vllm(tiny_llm, prompt={"instruction": "Say."}))
        assert local["prompt_hash"] != other["prompt_hash"]
        served = facts(openai())
        assert (served["kind"], served["model"]) == ("openai", "served-model")
        assert served["base_url"] == SERVER["base_url"]
        both = {"kind": "cascade", "small": answers, "large": local}
        assert facts(cascade(recorded, vllm(tiny_llm))) == both

    def test_names_that_begin_alike_are_told_apart(self, tiny_llm):
        teacher = vllm(tiny_llm, prompt={"answer": "names"})
        config = make_config(teacher=teacher, labels={"names": ["sea", "sea calm", "sea rough"]})
        assert check_teacher(config)["kind"] == "vllm"

    def test_prompt_that_does_not_fit(self, tiny_llm):
        with pytest.raises(ConfigError, match=r"teacher\.max_model_len leaves no room for a text"):
            check_teacher(make_config(teacher=vllm(tiny_llm, max_model_len=16)))

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_model_without_tokenizer_files(self, tmp_path, kind):
        AutoConfig.for_model(kind).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"^teacher\.model: "):
            check_teacher(make_config(teacher=vllm(tmp_path)))

    def test_a_mistake_is_told_where_it_stands(self, tmp_path, recorded):
        config = make_config(teacher=cascade(recorded, vllm(tmp_path / "nowhere")))
        with pytest.raises(ConfigError, match=r"^teacher\.cascade\.large\.model: there is no folder"):
            check_teacher(config)


class TestCache:
    def test_its_folder_and_where_there_is_none_there_is_no_key(self):
        config = make_config(run={"dir": "s3://bucket/runs/"})
        assert cache_folder(config, teacher_of(openai())) == "s3://bucket/runs/teacher-cache"
        assert cache_folder(config, teacher_of(openai(cache="/elsewhere"))) == "/elsewhere"
        for teacher in (teacher_of(openai(cache=None)), config.teacher):  # recorded answers are not worth it
            assert cache_folder(config, teacher) is cache_key(config, teacher) is None

    @pytest.mark.parametrize("kind", ["vllm", "openai"])
    def test_its_key_is_of_what_decides_an_answer(self, tiny_llm, kind):
        labels = make_config().labels

        def key(labels=labels, **settings):
            tree = vllm(tiny_llm, **settings) if kind == "vllm" else openai(**settings)
            config = make_config().model_copy(update={"labels": labels})
            return cache_key(config, teacher_of(tree))

        assert key(actors=4, price={"input": 2.0}, attempts=9) == key()
        described = labels.model_copy(update={"descriptions": {NAMES[0]: "ships and the like"}})
        turned = labels.model_copy(update={"names": labels.names[::-1]})
        keys = [key(), key(prompt={"instruction": "Say."}), key(described), key(turned)]
        assert len(set(keys)) == 4


class TestSelfContained:
    @pytest.fixture
    def prompt(self, tmp_path) -> dict[str, Any]:
        """A prompt that takes a template and examples from files."""
        (tmp_path / "prompt.j2").write_text("{{ instruction }} {{ text }} ->")
        texts = [f"example {i} of {name}" for name in NAMES[:3] for i in range(4)]
        labels = [name for name in NAMES[:3] for _ in range(4)]
        pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "shots.parquet")
        return {
            "template": str(tmp_path / "prompt.j2"),
            "draw": {"uri": str(tmp_path / "shots.parquet"), "per_class": 2},
        }

    def assert_whole(self, teacher: TeacherConfig) -> None:
        assert teacher.prompt.template == "{{ instruction }} {{ text }} ->"
        assert teacher.prompt.draw is None
        assert len(teacher.prompt.demonstrations) == 6
        for shot in teacher.prompt.demonstrations:
            assert shot.text.endswith(f"of {shot.label}")

    def test_the_prompt_needs_no_files_any_more(self, prompt, tmp_path):
        config = make_config(teacher=openai(prompt=prompt))
        whole = self_contained(config)
        self.assert_whole(whole.teacher)
        for file in tmp_path.iterdir():
            file.unlink()
        assert self_contained(whole) == whole
        assert whole.model_copy(update={"teacher": config.teacher}) == config, "nothing else is touched"

    def test_a_branch_of_the_hub_becomes_a_commit(self, tmp_path, tiny_llm, monkeypatch):
        """The branch may move, and answers of another model must not be reused."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        model = tmp_path / "models--org--llm"
        keys = []
        for commit in (COMMIT, COMMIT[::-1]):
            shutil.copytree(tiny_llm, model / "snapshots" / commit)
            (model / "refs").mkdir(exist_ok=True)
            (model / "refs/main").write_text(commit)
            config = self_contained(make_config(teacher=vllm("org/llm")))
            assert config.teacher.revision == commit
            assert self_contained(config) == config
            keys.append(cache_key(config, config.teacher))
        assert len(set(keys)) == 2
        assert self_contained(make_config(teacher=vllm(tiny_llm))).teacher.revision is None

    def test_of_each_teacher_of_a_cascade(self, prompt):
        config = make_config(teacher=cascade(openai(prompt=prompt), openai()))
        (_, small), large = self_contained(config).teacher.members()
        self.assert_whole(small)
        assert large == ("large", list(config.teacher.members())[1][1])

    def test_a_mistake_is_told_where_it_stands(self, prompt, tmp_path):
        prompt["draw"]["per_class"] = 5
        config = make_config(teacher=cascade(openai(), openai(prompt=prompt)))
        with pytest.raises(ConfigError, match=r"^teacher\.cascade\.large\.prompt\.draw\.per_class is 5"):
            self_contained(config)

    def test_what_takes_nothing_from_files_stays_as_it_is(self):
        assert self_contained(make_config()) == make_config()


# --- demonstrations that are drawn

LABELS = LabelsConfig(names=NAMES[:3])
TEXTS, GOLD = toy_texts(90, 3, seed=4)
GOLD_NAMES = [NAMES[gold] for gold in GOLD]
LABEL_OF = dict(zip(TEXTS, GOLD_NAMES, strict=True))


def write(path: Path, texts: Iterable[str] = TEXTS, labels: Iterable[str] = GOLD_NAMES) -> str:
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), path)
    return str(path)


def drawn(uri: str, labels: LabelsConfig = LABELS, shots=(), **settings: Any) -> list[tuple[str, str]]:
    config = PromptConfig.model_validate({"draw": {"uri": uri} | settings, "demonstrations": shots})
    whole = with_demonstrations(config, labels)
    assert whole.draw is None
    return [(shot.text, shot.label) for shot in whole.demonstrations]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "shots.parquet")


class TestDraw:
    def test_as_many_of_each_class_by_the_seed(self, file):
        one, again, other = (drawn(file, per_class=4, seed=seed) for seed in (1, 1, 2))
        assert one == again
        assert set(one) != set(other)
        assert Counter(label for _, label in one) == dict.fromkeys(NAMES[:3], 4)
        assert all(LABEL_OF[text] == label for text, label in one)
        assert len({text for text, _ in one}) == 12
        orders = {tuple(label for _, label in drawn(file, per_class=3, seed=seed)) for seed in range(6)}
        assert len(orders) > 3, "classes are mixed, and differently"

    def test_the_order_of_rows_and_files_their_format_and_columns_mean_nothing(self, tmp_path, file):
        folder = tmp_path / "parts"
        folder.mkdir()
        mixed = np.random.default_rng(0).permutation(90)
        for name, part in zip(("b", "a", "c"), np.array_split(mixed, 3), strict=True):
            texts = [TEXTS[i] for i in part]
            write(folder / f"{name}.parquet", texts, map(LABEL_OF.__getitem__, texts))
        lines = [f'"{text}",{label}' for text, label in LABEL_OF.items()]
        (tmp_path / "shots.csv").write_text("\n".join(["body,topic", *lines]))
        plain = drawn(file, per_class=5, seed=3)
        assert drawn(str(folder), per_class=5, seed=3) == plain
        csv = {"text": "body", "label": "topic"}
        assert drawn(str(tmp_path / "shots.csv"), per_class=5, seed=3, **csv) == plain

    def test_every_text_of_a_class_has_the_same_chance(self, file):
        counts = Counter(shot for seed in range(400) for shot in drawn(file, seed=seed))
        per_class = Counter(GOLD_NAMES)
        chi2 = sum(
            (counts[shot] - 400 / per_class[shot[1]]) ** 2 / (400 / per_class[shot[1]])
            for shot in LABEL_OF.items()
        )
        assert chi2 < 133, "87 degrees of freedom: 0.1 % of fair draws are above"

    def test_they_stand_behind_the_configs_own_and_no_text_is_shown_twice(self, tmp_path, file):
        own = {"text": "the tide came in", "label": "sea"}
        shots = drawn(file, shots=[own])
        assert (shots[0], len(shots)) == (("the tide came in", "sea"), 4)
        one_each = {label: text for text, label in LABEL_OF.items()}
        uri = write(tmp_path / "few.parquet", one_each.values(), one_each.keys())
        shown = {"text": one_each["sea"], "label": "sea"}
        with pytest.raises(ConfigError, match=r"has 0 usable example.s. of 'sea'"):
            drawn(uri, shots=[shown])

    def test_texts_are_cleaned_and_the_same_one_counts_once(self, tmp_path):
        texts, labels = ["  one\x00 ", "one", "two", "three"], ["sea", "sea", "kitchen", "2"]
        uri = write(tmp_path / "few.parquet", texts, labels)
        assert sorted(drawn(uri)) == [("one", "sea"), ("three", "garden"), ("two", "kitchen")]
        with pytest.raises(ConfigError, match="has 1 usable example"):
            drawn(uri, per_class=2)

    def test_long_texts_are_not_drawn(self, tmp_path):
        texts = [text if i % 2 else text * 20 for i, text in enumerate(TEXTS)]
        uri = write(tmp_path / "long.parquet", texts)
        assert all(len(text) <= 100 for seed in range(5) for text, _ in drawn(uri, seed=seed, max_chars=100))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"per_class": 80}, r"per_class is 80, but .* usable example\(s\) of '\w+'; lower it"),
            ({"max_chars": 3}, r"per_class is 1, but .* has 0 usable .*\(rows refused: 90 too_long\)"),
            ({"labels": LabelsConfig(names=("x", "y"))}, "per_class .*unknown_gold"),
            ({"uri": "nowhere.csv"}, "uri: .*matches no file"),
            ({"text": "typo"}, "text: there is no column 'typo'"),
            ({"label": "typo"}, "label: there is no column 'typo'"),
        ],
    )
    def test_refusals(self, file, settings, message):
        with pytest.raises(ConfigError, match=rf"^teacher\.prompt\.draw\.{message}"):
            drawn(**({"uri": file} | settings))


def test_a_model_is_given_what_it_reads_unless_told_otherwise(tiny_llm):
    reads = AutoConfig.from_pretrained(tiny_llm).max_position_embeddings
    for given, expected in ((None, reads), (64, 64)):
        config = make_config(teacher=vllm(tiny_llm, max_model_len=given))
        assert self_contained(config).teacher.max_model_len == expected
