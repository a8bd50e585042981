"""The kinds of teachers: how they are made, what is checked before a run, what tells them apart."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import NAMES, make_config, write_answers, write_corpus
from transformers import AutoConfig

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.factory import cache_folder, cache_key, check_teacher, make_teacher, self_contained
from llkd_ray.teacher.openai.teacher import OpenAITeacher
from llkd_ray.teacher.recorded import RecordedTeacher
from llkd_ray.teacher.vllm.teacher import VllmTeacher

SERVER = {"base_url": "http://127.0.0.1:9/v1"}


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
        labels = make_config().labels
        for tree, kind in (
            (vllm(tiny_llm), VllmTeacher),
            (openai(), OpenAITeacher),
            (recorded, RecordedTeacher),
        ):
            teacher = make_teacher(teacher_of(tree), labels, lambda seconds: None)
            assert type(teacher) is kind
            teacher.close()

    def test_an_engine_is_not_started_before_it_is_asked(self, tiny_llm):
        started: list[float] = []
        make_teacher(teacher_of(vllm(tiny_llm)), make_config().labels, started.append).close()
        assert started == []

    def test_a_cascade_is_its_members(self, recorded):
        teacher = teacher_of(cascade(recorded, recorded))
        with pytest.raises(AssertionError, match="asked by its members"):
            make_teacher(teacher, make_config().labels, lambda seconds: None)


class TestCheck:
    def test_recorded(self, recorded):
        facts = check_teacher(make_config(teacher=recorded))
        assert facts == {"kind": "recorded", "uri": recorded["recorded"]["uri"], "answers": 12}

    def test_vllm(self, tiny_llm):
        def facts(**prompt):
            return check_teacher(make_config(teacher=vllm(tiny_llm, prompt=prompt)))

        assert (facts()["kind"], facts()["model"]) == ("vllm", tiny_llm)
        assert facts()["prompt_hash"] == facts()["prompt_hash"] != facts(instruction="Say.")["prompt_hash"]

    def test_openai(self):
        facts = check_teacher(make_config(teacher=openai()))
        assert (facts["kind"], facts["model"]) == ("openai", "served-model")
        assert facts["base_url"] == SERVER["base_url"]

    def test_cascade(self, tiny_llm, recorded):
        facts = check_teacher(make_config(teacher=cascade(recorded, vllm(tiny_llm))))
        assert (facts["kind"], facts["small"]["kind"], facts["large"]["kind"]) == (
            "cascade",
            "recorded",
            "vllm",
        )
        assert facts["large"] == check_teacher(make_config(teacher=vllm(tiny_llm)))

    def test_prompt_that_does_not_fit(self, tiny_llm):
        with pytest.raises(ConfigError, match=r"teacher\.max_model_len leaves no room for a text"):
            check_teacher(make_config(teacher=vllm(tiny_llm, max_model_len=16)))

    def test_names_that_begin_alike_are_told_apart(self, tiny_llm):
        config = make_config(
            teacher=vllm(tiny_llm, prompt={"answer": "names"}),
            labels={"names": ["sea", "sea calm", "sea rough"]},
        )
        assert check_teacher(config)["kind"] == "vllm"

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_model_without_tokenizer_files(self, tmp_path, kind):
        AutoConfig.for_model(kind).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"^teacher\.model: "):
            check_teacher(make_config(teacher=vllm(tmp_path)))

    def test_a_mistake_is_told_where_it_stands(self, tmp_path, recorded):
        config = make_config(teacher=cascade(recorded, vllm(tmp_path / "nowhere")))
        with pytest.raises(ConfigError, match=r"^teacher\.cascade\.large\.model: no tokenizer can be loaded"):
            check_teacher(config)


class TestCache:
    def test_its_folder(self):
        config = make_config(run={"dir": "s3://bucket/runs/"})
        assert cache_folder(config, teacher_of(openai())) == "s3://bucket/runs/teacher-cache"
        assert cache_folder(config, teacher_of(openai(cache="/elsewhere"))) == "/elsewhere"
        assert cache_folder(config, teacher_of(openai(cache=None))) is None

    def test_recorded_answers_are_not_worth_it(self):
        assert cache_folder(make_config(), make_config().teacher) is None

    @pytest.mark.parametrize("kind", ["vllm", "openai"])
    def test_its_key_is_of_what_decides_an_answer(self, tiny_llm, kind):
        labels = make_config().labels

        def key(labels=labels, **settings):
            tree = vllm(tiny_llm, **settings) if kind == "vllm" else openai(**settings)
            config = make_config().model_copy(update={"labels": labels})
            return cache_key(config, teacher_of(tree))

        same = [key(), key(actors=4), key(price={"input": 2.0}), key(attempts=9)]
        assert len(set(same)) == 1
        described = labels.model_copy(update={"descriptions": {NAMES[0]: "ships and the like"}})
        turned = labels.model_copy(update={"names": labels.names[::-1]})
        others = [key(prompt={"instruction": "Say."}), key(described), key(turned), key(revision="v2")]
        assert len({*same, *others}) == 1 + len(others)

    def test_where_it_is_served_does_not_matter(self):
        config = make_config()
        here, there = (openai(server={"base_url": f"http://{host}/v1"}) for host in ("a", "b"))
        assert cache_key(config, teacher_of(here)) == cache_key(config, teacher_of(there))

    def test_without_a_folder_there_is_none(self):
        assert cache_key(make_config(), teacher_of(openai(cache=None))) is None
        assert cache_key(make_config(), make_config().teacher) is None


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
        config: Config = make_config()
        assert self_contained(config) == config
