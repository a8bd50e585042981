"""Every setting is checked at the door, and a mistake is told with field, value and remedy."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from toys import config_tree, make_config

from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import apply_overrides, dump_config, load_config, parse_config
from llkd_ray.config.schema import Config


def refusal(**sections) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    return str(caught.value)


@pytest.mark.parametrize(("written", "read"), [("off", "off"), ("0", 0.0), ("0.5", 0.5), ("null", None)])
@pytest.mark.parametrize("setting", ["quota", "prior"])
def test_an_exponent_that_is_off_is_not_one_of_zero(tmp_path, setting, written, read):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_tree()))
    config = load_config(path, [f"selection.{setting}={written}"])
    assert getattr(config.selection, setting) == read
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("setting", ["quota", "prior"])
@pytest.mark.parametrize("value", [True, 1.5, -0.1, "sometimes"])
def test_it_is_an_exponent_or_off(setting, value):
    assert refusal(selection={setting: value}).startswith(f"selection.{setting}: ")


def test_known_shares_come_in_the_order_of_the_names():
    labels = make_config(labels={"names": ["a", "b", "c"], "prior": {"b": 3, "a": 2, "c": 5}}).labels
    assert labels.known_prior == pytest.approx((0.2, 0.3, 0.5))
    assert make_config().labels.known_prior == ()


class TestMistakes:
    @pytest.mark.parametrize(
        ("sections", "field", "said"),
        [
            (
                {"labels": {"names": ["one"]}},
                "labels",
                "names has 1 label(s): a classifier needs at least two",
            ),
            ({"labels": {"names": ["a", "b", "a"]}}, "labels", "names holds 'a' twice"),
            ({"labels": {"names": ["a", " "]}}, "labels", "names holds an empty label"),
            (
                {"labels": {"names": ["a", "b"], "descriptions": {"c": "third"}}},
                "labels",
                "descriptions names 'c', which is not one of names",
            ),
            (
                {"labels": {"names": ["a", "b"], "prior": {"a": 0.5, "b": 0.4, "c": 0.1}}},
                "labels",
                "prior names 'c', which is not one of names",
            ),
            (
                {"labels": {"names": ["a", "b"], "prior": {"a": 0.5}}},
                "labels",
                "prior has no share for 'b': give one for every label, or none",
            ),
            (
                {"labels": {"names": ["a", "b"], "prior": {"a": 0.5, "b": 0}}},
                "labels.prior.b",
                "0 is refused: Input should be greater than 0",
            ),
            ({"corpus": {"uri": ""}}, "corpus.uri", "is empty: give a file, a glob, a folder or hf://NAME"),
            ({"corpus": {"uri": []}}, "corpus.uri", "is empty"),
            ({"corpus": {"uri": ["a.txt", " "]}}, "corpus.uri", "is empty"),
            ({"test": {"gold": None}}, "config", "test.gold is missing"),
            ({"teacher": {"kind": "vllm"}}, "teacher", "model is missing: kind 'vllm' needs a checkpoint"),
            ({"teacher": {"recorded": None}}, "teacher", "recorded is missing"),
            ({"student": {"workers": 0}}, "student.workers", "at least 1, or (min, max)"),
            ({"student": {"workers": [3, 2]}}, "student.workers", "at least 1, or (min, max)"),
            ({"budget": {"train": 1.5}}, "budget", "train is 1.5: give a whole number of texts, or a share"),
            (
                {"budget": {"train": 4, "rounds": 5}},
                "budget",
                "train is 4, less than one text for each of 5 rounds",
            ),
            (
                {"budget": {"train": 50, "labels": 40}},
                "budget",
                "labels is 40, less than train (50): only labelled texts can be trained on",
            ),
            (
                {"teacher": {"prompt": {"demonstrations": [{"text": "t", "label": "desert"}]}}},
                "config",
                "teacher.prompt.demonstrations uses the label 'desert', which is not in labels.names",
            ),
        ],
    )
    def test_is_told_with_field_value_and_remedy(self, sections, field, said):
        message = refusal(**sections)
        assert message.startswith(f"{field}: ")
        assert said in message
        assert "\n" not in message, "one mistake, one line"

    @pytest.mark.parametrize(
        ("teacher", "said"),
        [
            ({"kind": "openai", "model": "m"}, "server is missing: kind 'openai' needs server.base_url"),
            ({"kind": "openai", "server": {"base_url": "http://h/v1"}}, "model is missing: kind 'openai'"),
            ({"kind": "cascade"}, "cascade is missing: kind 'cascade' needs cascade.small and cascade.large"),
            ({"confidence": {"method": "votes"}}, "samples answers, which recorded ones cannot"),
        ],
    )
    def test_of_a_teacher(self, teacher, said):
        message = refusal(teacher=teacher)
        assert message.startswith("teacher: ")
        assert said in message

    def test_of_a_cascade(self):
        vllm = {"kind": "vllm", "model": "m"}
        nested = {"kind": "cascade", "cascade": {"small": vllm, "large": vllm}}

        def refused(**cascade):
            return refusal(teacher={"kind": "cascade", "cascade": {"small": vllm, "large": vllm} | cascade})

        assert "cascade.large is a cascade itself" in refused(large=nested)
        assert "USD and EUR for the two teachers" in refused(large=vllm | {"price": {"currency": "EUR"}})
        shot = {"demonstrations": [{"text": "t", "label": "desert"}]}
        message = refused(small=vllm | {"prompt": shot})
        assert "teacher.cascade.small.prompt.demonstrations uses the label 'desert'" in message
        fitted = nested | {"confidence": {"method": "batch"}}
        assert "have no common scale to be fitted: leave it 'raw'" in refusal(teacher=fitted)

    def test_of_what_a_run_may_cost(self):
        message = refusal(budget={"cap": {"cost": 3.0}})
        assert "budget.cap.cost is 3.0, but teacher.price says that nothing costs anything" in message
        make_config(budget={"cap": {"cost": 3.0}}, teacher={"price": {"input": 0.1}})
        assert refusal(budget={"cap": {"tokens": 0}}).startswith("budget.cap.tokens: 0 is refused")

    def test_of_a_temperature_without_gold(self):
        fitted = {"confidence": {"method": "temperature"}}
        message = refusal(teacher=fitted, corpus={"gold": None})
        assert "give corpus.gold (it may be empty for most texts) and evaluation.holdout" in message
        assert "is fitted on texts of the hold-out" in refusal(teacher=fitted, evaluation={"holdout": 0})

    def test_more_labels_than_letters(self):
        labels = {"names": [f"label {i}" for i in range(27)]}
        vllm = {"kind": "vllm", "model": "some-model"}
        message = refusal(labels=labels, teacher=vllm)
        assert "labels.names has 27 labels, but teacher.prompt.answer 'letters' has 26" in message
        assert "use 'names'" in message
        make_config(labels=labels, teacher=vllm | {"prompt": {"answer": "names"}})
        make_config(labels={"names": labels["names"][:26]}, teacher=vllm)
        make_config(labels=labels)  # recorded answers have no letters

    @pytest.mark.parametrize(
        ("sections", "field", "value"),
        [
            ({"budget": {"growth": 0.5}}, "budget.growth", "0.5"),
            ({"budget": {"rounds": 0}}, "budget.rounds", "0"),
            ({"student": {"warmup": 1}}, "student.warmup", "1"),
            ({"teacher": {"dtype": "int4"}}, "teacher.dtype", "'int4'"),
            ({"labels": {"names": ["a", False]}}, "labels.names.1", "False"),
            ({"student": {"model": None}}, "student.model", "None"),
        ],
    )
    def test_of_type_or_range_names_field_and_value(self, sections, field, value):
        assert refusal(**sections).startswith(f"{field}: {value} is refused: ")

    @pytest.mark.parametrize(
        ("sections", "field"),
        [
            ({"budget": {"train": "many"}}, "budget.train"),
            ({"corpus": {"uri": 5}}, "corpus.uri"),
            ({"student": {"workers": "x"}}, "student.workers"),
        ],
    )
    def test_in_a_setting_of_several_types_is_told_under_its_own_name(self, sections, field):
        for line in refusal(**sections).splitlines():
            assert line.startswith(f"{field}: "), line

    def test_all_mistakes_are_told_at_once(self):
        lines = refusal(budget={"rounds": 0}, student={"epochs": -1}).splitlines()
        assert [line.partition(":")[0] for line in lines] == ["student.epochs", "budget.rounds"]

    def test_missing_section(self):
        tree = config_tree()
        del tree["labels"]
        with pytest.raises(ConfigError, match=r"^labels: missing; it has no default, so set it$"):
            parse_config(tree)

    @pytest.mark.parametrize(
        ("tree", "field", "known"),
        [
            ({"studnet": {}}, "studnet", "student"),
            (config_tree(student={"learning_rat": 1}), "student.learning_rat", "learning_rate"),
            (config_tree(test={"golden": "x"}), "test.golden", "gold"),
            (config_tree(teacher={"recorded": {"prob": "x"}}), "teacher.recorded.prob", "probs"),
            (
                config_tree(
                    teacher={"prompt": {"demonstrations": [{"txt": "a", "text": "b", "label": "sea"}]}}
                ),
                "teacher.prompt.demonstrations.0.txt",
                "label, text",
            ),
        ],
    )
    def test_unknown_setting_lists_what_there_is(self, tree, field, known):
        with pytest.raises(ConfigError) as caught:
            parse_config(tree)
        lines = [line for line in str(caught.value).splitlines() if line.startswith(f"{field}: ")]
        assert len(lines) == 1
        assert "unknown setting; known here: " in lines[0]
        assert known in lines[0].partition("known here: ")[2]


class TestOverrides:
    def test_values_are_yaml(self):
        tree = apply_overrides(
            {}, ["a.n=3", "a.x=1e-3", "a.f=0.5", "a.none=null", "a.list=[p, q]", "a.s=x=y"]
        )
        assert tree["a"]["n"] == 3
        assert tree["a"]["f"] == 0.5
        assert tree["a"]["none"] is None
        assert tree["a"]["list"] == ["p", "q"]
        assert tree["a"]["s"] == "x=y", "only the first = divides"

    def test_exponents_without_a_point_are_numbers_to_the_config(self):
        # YAML 1.1 reads 1e-3 as a string.
        config = parse_config(apply_overrides(config_tree(), ["student.learning_rate=1e-3"]))
        assert config.student.learning_rate == 0.001

    def test_sections_are_made_and_others_kept(self):
        before = {"kept": {"x": 1}, "empty": None}
        after = apply_overrides(before, ["kept.y.z=2", "empty.a=3", "new.b.c=4"])
        assert after == {"kept": {"x": 1, "y": {"z": 2}}, "empty": {"a": 3}, "new": {"b": {"c": 4}}}
        assert before == {"kept": {"x": 1}, "empty": None}, "the given tree stays as it is"

    def test_the_last_one_counts(self):
        assert apply_overrides({"a": 1}, ["a=2", "a=3"]) == {"a": 3}

    def test_a_whole_section_can_be_dropped(self):
        assert parse_config(apply_overrides(config_tree(), ["test=null"])).test is None

    @pytest.mark.parametrize("override", ["a.b", "=3", "a..b=3", ".a=3", "a.=3", ""])
    def test_malformed(self, override):
        with pytest.raises(ConfigError, match=r"--set .*write it as section\.field=value"):
            apply_overrides({}, [override])

    def test_value_that_is_not_yaml(self):
        with pytest.raises(ConfigError, match=r"--set 'a.b=\[1': the value is not YAML"):
            apply_overrides({}, ["a.b=[1"])

    def test_field_below_a_value(self):
        with pytest.raises(ConfigError, match="'model' is a value, not a section"):
            apply_overrides({"student": {"model": "m"}}, ["student.model.name=x"])


class TestFiles:
    def test_load_with_overrides(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config_tree()), encoding="utf-8")
        config = load_config(path, ["budget.rounds=7", "labels.names=[x, y]"])
        assert config.budget.rounds == 7
        assert config.labels.names == ("x", "y")

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist"):
            load_config(tmp_path / "nowhere.yaml")

    @pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00bad"])
    def test_unreadable_file(self, tmp_path, content):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml' cannot be read: "):
            load_config(tmp_path / "bad.yaml")

    def test_folder_in_place_of_a_file(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path)

    @pytest.mark.parametrize("content", ["", "just words", "- a\n- b\n"])
    def test_file_without_settings(self, tmp_path, content):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"holds no settings: see configs/"):
            load_config(tmp_path / "c.yaml")

    @settings(max_examples=50, deadline=None)
    @given(
        where=st.dictionaries(st.text(min_size=1), st.booleans() | st.integers() | st.text(), max_size=3),
        names=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=5, unique=True),
        workers=st.integers(1, 5) | st.tuples(st.just(2), st.integers(2, 9)),
        train=st.integers(5, 1000) | st.floats(0.001, 1),
        uri=st.just("a.txt") | st.lists(st.just("s3://b/*.csv"), min_size=1, max_size=3),
    )
    def test_dump_is_read_back_unchanged(self, where, names, workers, train, uri):
        config = make_config(
            corpus={"where": where, "uri": uri},
            labels={"names": names, "descriptions": {names[0]: "first: one"}},
            student={"workers": workers},
            budget={"train": train},
            teacher={"engine": {"block_size": 16, "nested": {"list": [1, None, "x"]}}},
        )
        again = parse_config(yaml.safe_load(dump_config(config)))
        assert again == config
        for key, value in again.corpus.where.items():
            assert type(value) is type(where[key]), "true stays a truth value and 1 a number"
        assert type(again.budget.train) is type(train)

    def test_dump_goes_through_a_file(self, tmp_path):
        config = make_config(labels={"names": ["été", "日本"]})
        (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "c.yaml") == config


class TestTree:
    def test_is_frozen(self):
        config = make_config()
        with pytest.raises(ValidationError, match="frozen"):
            config.run = config.run
        with pytest.raises(ValidationError, match="frozen"):
            config.budget.rounds = 3

    def test_uris_and_workers_have_one_form(self):
        config = make_config(corpus={"uri": "a.txt"}, student={"workers": [1, 3]})
        assert config.corpus.uris == ("a.txt",)
        assert (config.student.min_workers, config.student.max_workers) == (1, 3)
        config = make_config(corpus={"uri": ["a.txt", "b.txt"]}, student={"workers": 2})
        assert config.corpus.uris == ("a.txt", "b.txt")
        assert (config.student.min_workers, config.student.max_workers) == (2, 2)

    def test_every_default_passes_its_own_checks(self):
        config = parse_config(
            {
                "corpus": {"uri": "a.txt"},
                "labels": {"names": ["a", "b"]},
                "teacher": {"model": "t"},
                "student": {"model": "s"},
            }
        )
        assert config.test is None
        assert isinstance(config, Config)
        assert all(isinstance(section, BaseModel) for section in (config.budget, config.run))
