"""Every setting is checked at the door, and a mistake is told with field, value and remedy."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from toys import config_tree, make_config

from llkd_ray.config.base import ConfigError, with_absolute_paths
from llkd_ray.config.loading import apply_overrides, dump_config, load_config, parse_config

VLLM = {"kind": "vllm", "model": "m"}
SHOT = {"prompt": {"demonstrations": [{"text": "t", "label": "desert"}]}}
SERVER = {"kind": "openai", "server": {"base_url": "http://h/v1"}}
MISSPELT = {"prompt": {"demonstrations": [{"txt": "a", "text": "b", "label": "sea"}]}}
LETTERS = {"names": [f"label {i}" for i in range(25)]}
FITTED = {"confidence": {"method": "temperature"}}


def cascade(**members) -> dict:
    return {"kind": "cascade", "cascade": {"small": VLLM, "large": VLLM} | members}


def refusal(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


class TestMistakes:
    @pytest.mark.parametrize(
        ("sections", "field", "named"),
        [
            ({"labels": {"names": ["one"]}}, "labels", "1 label(s)"),
            ({"labels": {"names": ["a", "b", "a"]}}, "labels", "'a' twice"),
            ({"labels": {"names": ["a", " "]}}, "labels", "an empty label"),
            ({"labels": {"names": ["a", False]}}, "labels.names.1", "False is refused: "),
            ({"labels": {"names": ["a", "b"], "descriptions": {"c": "third"}}}, "labels", "'c'"),
            ({"labels": {"names": ["a", "b"], "prior": {"a": 0.5, "b": 0.4, "c": 0.1}}}, "labels", "'c'"),
            ({"labels": {"names": ["a", "b"], "prior": {"a": 0.5}}}, "labels", "no share for 'b'"),
            ({"labels": {"names": ["a", "b"], "prior": {"a": 1, "b": 0}}}, "labels.prior.b", "0 is refused"),
            ({"corpus": {"uri": ""}}, "corpus.uri", "is empty"),
            ({"corpus": {"uri": []}}, "corpus.uri", "is empty"),
            ({"corpus": {"uri": ["a.txt", " "]}}, "corpus.uri", "is empty"),
            ({"test": {"gold": None}}, "config", "test.gold is missing"),
            ({"teacher": {"kind": "vllm"}}, "teacher", "model is missing: kind 'vllm'"),
            ({"teacher": {"recorded": None}}, "teacher", "recorded is missing"),
            ({"teacher": {"kind": "openai", "model": "m"}}, "teacher", "server is missing: kind 'openai'"),
            ({"teacher": SERVER}, "teacher", "model is missing: kind 'openai'"),
            ({"teacher": {"kind": "cascade"}}, "teacher", "cascade is missing"),
            ({"teacher": {"confidence": {"method": "votes"}}}, "teacher", "confidence.method 'votes'"),
            ({"teacher": {"dtype": "int4"}}, "teacher.dtype", "'int4' is refused"),
            ({"teacher": SHOT}, "config", "teacher.prompt.demonstrations uses the label 'desert'"),
            ({"teacher": cascade(large=cascade())}, "teacher", "cascade.large is a cascade"),
            ({"teacher": cascade(large=VLLM | {"price": {"currency": "EUR"}})}, "teacher", "USD and EUR"),
            ({"teacher": cascade(small=VLLM | SHOT)}, "config", "cascade.small.prompt.demonstrations"),
            ({"teacher": cascade() | {"confidence": {"method": "batch"}}}, "teacher", "leave it 'raw'"),
            ({"teacher": FITTED, "corpus": {"gold": None}}, "config", "give corpus.gold"),
            ({"teacher": FITTED, "evaluation": {"holdout": 0}}, "config", "evaluation.holdout"),
            ({"labels": LETTERS, "teacher": VLLM}, "config", "25 labels, but teacher.prompt.answer"),
            ({"labels": {"names": ["sea", "a\x1b[2J"]}}, "labels.names.1", "U+001B, a control character"),
            ({"labels": {"names": ["sea", "a\nb"]}}, "labels.names.1", r"'a\nb' contains U+000A"),
            ({"labels": {"names": ["sea", "\u202eb"]}}, "labels.names.1", r"'\u202eb' contains U+202E"),
            ({"teacher": VLLM | {"engine": {"trust_remote_code": True}}}, "teacher.engine", "leave it out"),
            (
                {"teacher": VLLM | {"engine": {"load_format": "PT"}}},
                "teacher.engine",
                "'PT' may load a pickle",
            ),
            ({"student": {"workers": 0}}, "student.workers", "at least 1, or (min, max)"),
            ({"student": {"workers": [3, 2]}}, "student.workers", "at least 1, or (min, max)"),
            ({"student": {"warmup": 1}}, "student.warmup", "1 is refused"),
            ({"budget": {"growth": 0.5}}, "budget.growth", "0.5 is refused"),
            ({"budget": {"train": 1.5}}, "budget", "train is 1.5"),
            ({"budget": {"train": "many"}}, "budget.train", "'many' is refused"),
            ({"budget": {"train": 4, "rounds": 5}}, "budget", "train is 4"),
            ({"budget": {"train": 50, "labels": 40}}, "budget", "labels is 40, less than train (50)"),
            ({"budget": {"cap": {"cost": 3.0}}}, "config", "budget.cap.cost is 3.0, but teacher.price"),
            ({"budget": {"cap": {"tokens": 0}}}, "budget.cap.tokens", "0 is refused"),
            ({"studnet": {}}, "studnet", "unknown setting; known here: acquisition, budget,"),
            ({"student": {"learning_rat": 1}}, "student.learning_rat", "learning_rate"),
            ({"teacher": {"recorded": {"prob": "x"}}}, "teacher.recorded.prob", "probs"),
            ({"teacher": MISSPELT}, "teacher.prompt.demonstrations.0.txt", "known here: label, text"),
        ],
    )
    def test_is_one_line_with_field_and_value(self, sections, field, named):
        message = refusal(config_tree(**sections))
        assert message.startswith(f"{field}: ")
        assert named in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("sections", "field"),
        [
            ({"corpus": {"uri": "s3://AKIA7:s3cr3t@bucket/texts"}}, "corpus.uri"),
            ({"corpus": {"uri": ["a.csv", "s3://AKIA7:s3cr3t@bucket/texts"]}}, "corpus.uri"),
            ({"run": {"dir": "s3://s3cr3t@bucket/runs?region=eu-west-1"}}, "run.dir"),
            ({"corpus": {"uri": "s3://bucket/texts?secret_key=s3cr3t"}}, "corpus.uri"),
            ({"corpus": {"uri": "https://host/a.csv?X-Amz-Signature=s3cr3t"}}, "corpus.uri"),
            ({"teacher": VLLM | {"engine": {"hf_token": "s3cr3t"}}}, "teacher.engine.hf_token"),
            (
                {"teacher": cascade(small=VLLM | {"engine": {"env": {"API_KEY": "s3cr3t"}}})},
                "teacher.cascade",
            ),
        ],
    )
    def test_a_secret_is_refused_and_not_repeated(self, sections, field):
        """Settings reach config.yaml, the report, the model card, trackers and the hub."""
        message = refusal(config_tree(**sections))
        assert message.startswith(field)
        assert "environment" in message
        assert "s3cr3t" not in message

    def test_what_only_looks_like_a_secret_is_accepted(self):
        make_config(corpus={"uri": "s3://bucket/a@b.csv", "where": {"token": "x"}})
        make_config(teacher=VLLM | {"prompt": {"instruction": "https://you@host/ is spam"}})
        make_config(teacher=VLLM | {"engine": {"max_num_batched_tokens": 4, "tokenizer": "x"}})

    def test_what_is_just_right_is_accepted(self):
        make_config(budget={"cap": {"cost": 3.0}}, teacher={"price": {"input": 0.1}})
        make_config(labels=LETTERS, teacher=VLLM | {"prompt": {"answer": "names"}})
        make_config(labels={"names": LETTERS["names"][:24]}, teacher=VLLM)
        make_config(labels=LETTERS)  # recorded answers have no letters
        make_config(labels={"names": ["=x", "<b>|", "שלום\u200f", "می\u200cخواهم", "👩\u200d🔬"]})

    def test_all_mistakes_are_told_at_once(self):
        tree = config_tree(budget={"rounds": 0}, student={"epochs": -1})
        del tree["labels"]
        lines = refusal(tree).splitlines()
        assert [line.partition(":")[0] for line in lines] == ["labels", "student.epochs", "budget.rounds"]
        assert lines[0] == "labels: missing; it has no default, so set it"


class TestOverrides:
    def test_values_are_yaml(self):
        tree = apply_overrides({}, ["a.n=3", "a.f=0.5", "a.none=null", "a.list=[p, q]", "a.s=x=y", "a.n=4"])
        assert tree["a"] == {"n": 4, "f": 0.5, "none": None, "list": ["p", "q"], "s": "x=y"}
        # YAML 1.1 reads 1e-3 as a string.
        config = parse_config(apply_overrides(config_tree(), ["student.learning_rate=1e-3", "test=null"]))
        assert config.student.learning_rate == 0.001
        assert config.test is None, "a whole section can be dropped"

    def test_sections_are_made_and_others_kept(self):
        before = {"kept": {"x": 1}, "empty": None}
        after = apply_overrides(before, {"kept.y.z": 2, "empty.a": "no: yaml", "new.b.c": None})
        made = {"empty": {"a": "no: yaml"}, "new": {"b": {"c": None}}}
        assert after == {"kept": {"x": 1, "y": {"z": 2}}} | made
        assert before == {"kept": {"x": 1}, "empty": None}, "the given tree stays as it is"

    @pytest.mark.parametrize(
        "override", ["a.b", "=3", "a..b=3", ".a=3", "a.=3", "", "a.b=[1", "student.model.name=x"]
    )
    def test_malformed(self, override):
        with pytest.raises(ConfigError, match=r"^--set "):
            apply_overrides(config_tree(), [override])


class TestFiles:
    def test_load_with_overrides(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config_tree()), encoding="utf-8")
        config = load_config(path, ["budget.rounds=7", "labels.names=[x, y]"])
        assert (config.budget.rounds, config.labels.names) == (7, ("x", "y"))
        with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist"):
            load_config(tmp_path / "nowhere.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path)

    @pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00bad", b"", b"just words", b"- a\n- b\n"])
    def test_a_file_without_settings(self, tmp_path, content):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml' (cannot be read|holds no settings): "):
            load_config(tmp_path / "bad.yaml")

    SHOWN = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)

    @settings(max_examples=50)
    @given(
        where=st.dictionaries(st.text(min_size=1), st.booleans() | st.integers() | st.text(), max_size=3),
        names=st.lists(SHOWN.filter(str.strip), min_size=2, max_size=5, unique=True),
        workers=st.integers(1, 5) | st.tuples(st.just(2), st.integers(2, 9)),
        train=st.integers(5, 1000) | st.floats(0.001, 1),
        uri=st.just("a.txt") | st.lists(st.just("s3://b/*.csv"), min_size=1, max_size=3),
    )
    def test_dump_is_read_back_unchanged(self, tmp_path_factory, where, names, workers, train, uri):
        config = make_config(
            corpus={"where": where, "uri": uri},
            labels={"names": names, "descriptions": {names[0]: "first: one"}},
            student={"workers": workers},
            budget={"train": train},
            teacher={"engine": {"block_size": 16, "nested": {"list": [1, None, "x"]}}},
        )
        config = with_absolute_paths(config)
        path = tmp_path_factory.mktemp("dump") / "c.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        again = load_config(path)
        assert again == config
        for key, value in again.corpus.where.items():
            assert type(value) is type(where[key]), "true stays a truth value and 1 a number"
        assert type(again.budget.train) is type(train)

    @pytest.mark.parametrize(("written", "read"), [("off", "off"), ("0", 0.0), ("0.5", 0.5), ("null", None)])
    @pytest.mark.parametrize("setting", ["quota", "prior"])
    def test_an_exponent_that_is_off_is_not_one_of_zero(self, tmp_path, setting, written, read):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config_tree()))
        config = load_config(path, [f"selection.{setting}={written}"])
        assert getattr(config.selection, setting) == read
        path.write_text(dump_config(config))
        assert load_config(path) == with_absolute_paths(config)
        for value in (True, 1.5, -0.1, "sometimes"):
            assert refusal(config_tree(selection={setting: value})).startswith(f"selection.{setting}: ")


class TestTree:
    def test_is_frozen(self):
        with pytest.raises(ValidationError, match="frozen"):
            make_config().budget.rounds = 3

    def test_uris_and_workers_and_known_shares_have_one_form(self):
        config = make_config(corpus={"uri": "a.txt"}, student={"workers": [1, 3]})
        assert config.corpus.uris == ("a.txt",)
        assert (config.student.min_workers, config.student.max_workers) == (1, 3)
        config = make_config(corpus={"uri": ["a.txt", "b.txt"]}, student={"workers": 2})
        assert config.corpus.uris == ("a.txt", "b.txt")
        assert (config.student.min_workers, config.student.max_workers) == (2, 2)
        labels = make_config(labels={"names": ["a", "b", "c"], "prior": {"b": 3, "a": 2, "c": 5}}).labels
        assert labels.known_prior == pytest.approx((0.2, 0.3, 0.5))
        assert make_config().labels.known_prior == ()
