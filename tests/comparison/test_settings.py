"""A comparison's settings, its trials, and the texts and labels that they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toys import NAMES, make_config, make_run, toy_probs, toy_texts

from llkd_ray.comparison.settings import Comparison, changed, dump, entries, load_comparison
from llkd_ray.comparison.tables import ALL, GOLD, RANDOM
from llkd_ray.comparison.trial import gold_labels, labels_of, read_teacher, read_texts
from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import EXAMPLES_INDEX
from llkd_ray.storage.tables import Examples

N_POOL, N_TEST, N_CLASSES = 100, 20, 3
SETTINGS = {
    "base": "run.yaml",
    "teachers": {"ann": {}, "bob": {"recorded": {"uri": "bob.parquet"}}},
    "lines": {"llkd": {"selection": {"policy": "llkd"}}, "calm": {"student": {"learning_rate": 1e-5}}},
    "sizes": [0.05, 0.1, 0.2],
    "report": [0.1, 0.2],
    "seeds": [3, 4],
}


def make(**fields) -> Comparison:
    return Comparison.model_validate(SETTINGS | fields)


def write(folder: Path, **fields) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | fields), encoding="utf-8")
    return path


class TestSettings:
    def test_are_read_and_come_back_from_their_dump(self, tmp_path):
        comparison = load_comparison(write(tmp_path), ["seeds=[7]", "lines.calm.student.epochs=2"])
        assert comparison.base == str(tmp_path / "run.yaml"), "the base lies beside the file"
        assert (comparison.sizes, comparison.reported) == ((0.05, 0.1, 0.2), (0.1, 0.2))
        assert comparison.seeds == (7,)
        assert comparison.lines["calm"] == {"student": {"learning_rate": 1e-5, "epochs": 2}}
        assert make(report=[]).reported == (0.05, 0.1, 0.2), "all, unless it says which"
        assert Comparison.model_validate(yaml.safe_load(dump(make()))) == make()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"sizes": []}, "sizes: "),
            ({"seeds": []}, "seeds: "),
            ({"lines": {}}, "comparison: teachers and lines need"),
            ({"teachers": {}}, "comparison: teachers and lines need"),
            ({"sizes": [0.2, 0.1]}, "comparison: sizes is [0.2, 0.1]: "),
            ({"sizes": [0.1, 0.1]}, "comparison: sizes is [0.1, 0.1]: "),
            ({"sizes": [0.1, 200]}, "comparison: sizes is [0.1, 200.0]: "),
            ({"sizes": [0, 0.1]}, "comparison: sizes is [0.0, 0.1]: "),
            ({"report": [0.1, 0.3]}, "comparison: report holds 0.3"),
            ({"seeds": [1, 1]}, "comparison: seeds is [1, 1]: "),
            ({"lines": {GOLD: {}}}, f"comparison: lines holds '{GOLD}'"),
            ({"lines": {ALL: {}}}, f"comparison: lines holds '{ALL}'"),
            ({"lines": {"x": {"corpus": {}}}}, "comparison: lines.x changes corpus"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, fields, message):
        with pytest.raises(ConfigError) as caught:
            load_comparison(write(tmp_path, **fields))
        assert str(caught.value).startswith(message)


class TestEntries:
    def entries(self, tmp_path, base=None, **fields):
        return entries(make(**fields), base or make_config(), N_POOL, tmp_path)

    def test_references_are_always_there_and_gold_has_no_teacher(self, tmp_path):
        found = self.entries(tmp_path)
        pairs = [(line, one) for line in (ALL, RANDOM, "llkd", "calm") for one in ("ann", "bob")]
        expected = [(seed, line, one) for seed in (3, 4) for line, one in [(GOLD, ""), *pairs]]
        assert [(entry.seed, entry.line, entry.teacher) for entry in found] == expected
        for entry in found:
            whole = entry.line in (GOLD, ALL)
            assert entry.trial.sizes == ((100,) if whole else (5, 10, 20))
            assert entry.trial.reported == ((100,) if whole else (10, 20))
            assert entry.trial.folder == tmp_path
        assert len({entry.trial.key(entry.teacher, 0) for entry in found}) == len(found), "a file for each"

    def test_lines_differ_from_the_base_in_what_they_say(self, tmp_path):
        base = make_config(
            selection={"policy": "llkd", "options": {"order": "product"}, "quota": 0.5},
            budget={"labels": 50},
            student={"epochs": 4},
        )
        configs = {entry.line: entry.trial.config for entry in self.entries(tmp_path, base)}
        assert configs["calm"].student.learning_rate == 1e-5
        assert configs["calm"].student.epochs == configs["llkd"].student.epochs == 4
        assert configs["llkd"].selection == configs["calm"].selection == base.selection
        for name, policy in ((GOLD, "all"), (ALL, "all"), (RANDOM, "random")):
            plain = {"policy": policy, "options": {}, "quota": "off", "prior": "off"}
            assert configs[name].selection.model_dump() == configs[RANDOM].selection.model_dump() | plain
        for config in configs.values():
            assert (config.budget.labels, config.budget.first_labels) == (None, 1.0), "all labels are there"

    def test_a_line_may_have_labels_grow_and_take_randoms_place(self, tmp_path):
        lines = {RANDOM: {"selection": {"policy": "random", "quota": 0.5}}, "few": {"budget": {"labels": 50}}}
        configs = {entry.line: entry.trial.config for entry in self.entries(tmp_path, lines=lines)}
        assert configs[RANDOM].selection.quota == 0.5
        assert configs["few"].budget.labels == 50

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"selection": {"polcy": "llkd"}}, "selection.polcy"),
            ({"student": {"epochs": 0}}, "student.epochs"),
            ({"student": {"start": "warm"}}, "student.start: 'warm' cannot be compared"),
            ({"student": {"replay": "new"}}, "student.replay: 'new' cannot be compared"),
        ],
    )
    def test_changes_that_do_not_fit(self, changes, message):
        with pytest.raises(ConfigError) as caught:
            changed(make_config(), changes, seed=0)
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(("n_pool", "sizes"), [(5, "[0, 1, 1]"), (12, "[1, 1, 2]")])
    def test_a_pool_that_is_too_small(self, tmp_path, n_pool, sizes):
        with pytest.raises(ConfigError) as caught:
            entries(make(), make_config(), n_pool, tmp_path)
        assert str(caught.value).startswith("sizes: ")
        assert f"of a pool of {n_pool} texts makes {sizes}" in str(caught.value)


@pytest.fixture
def examples(tmp_path) -> Examples:
    return Examples.open(make_run(tmp_path / "run", N_POOL, N_TEST, N_CLASSES))


def write_answers(folder: Path, rows) -> str:
    """Answers to the texts of these rows, in this order; returns the file."""
    gold = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)[1]
    probs = [toy_probs(gold[[row]], N_CLASSES, 0.9, np.random.default_rng(row))[0] for row in rows]
    ids, tokens = [f"toy-{row}" for row in rows], [10 + row for row in rows]
    pq.write_table(pa.table({"id": ids, "probs": probs, "prompt_tokens": tokens}), folder / "answers.parquet")
    return str(folder / "answers.parquet")


def of(uri: str):
    return make_config(teacher={"recorded": {"uri": uri, "prompt_tokens": "prompt_tokens"}})


class TestTexts:
    def test_pool_and_test_set_with_gold(self, examples):
        texts = read_texts(examples, NAMES[:3])
        words, gold = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)
        assert (texts.pool + texts.test, len(texts.pool), texts.names) == (words, N_POOL, NAMES[:3])
        assert texts.gold_N.tolist() + texts.gold_T.tolist() == gold.tolist()
        labels = gold_labels(examples, texts)
        np.testing.assert_array_equal(labels.p_NC, np.eye(N_CLASSES)[texts.gold_N])
        assert (labels.test_label_T, labels.tokens_N.sum()) == (None, 0)

    def test_gold_must_be_known_of_all_and_a_test_set_there(self, examples, tmp_path):
        with pytest.raises(ConfigError, match=r"^corpus\.gold, test: "):
            read_texts(Examples.open(make_run(tmp_path / "other", N_POOL, 0)), NAMES[:3])
        store = make_run(tmp_path / "unknown", N_POOL, N_TEST)
        file = store.read_json(EXAMPLES_INDEX)["pool"][0]["file"]
        table = store.read_table(file)
        column = table.schema.get_field_index("gold")
        unknown = pa.array([-1, *table["gold"].to_pylist()[1:]], table.schema.field("gold").type)
        store.write_table(file, table.set_column(column, table.schema.field("gold"), unknown))
        with pytest.raises(ConfigError, match=r"^corpus\.gold, test: "):
            read_texts(Examples.open(store), NAMES[:3])


class TestTeacher:
    def test_answers_are_put_in_the_order_of_the_rows(self, examples, tmp_path):
        order = np.random.default_rng(0).permutation(N_POOL + N_TEST)
        labels, p_TC = read_teacher(of(write_answers(tmp_path, order)), examples)
        assert (labels.p_NC.shape, p_TC.shape) == ((N_POOL, N_CLASSES), (N_TEST, N_CLASSES))
        np.testing.assert_allclose(labels.p_NC.sum(axis=1), 1)
        np.testing.assert_allclose(p_TC.sum(axis=1), 1)
        np.testing.assert_array_equal(labels.tokens_N, 10 + np.arange(N_POOL))
        again, _ = read_teacher(of(write_answers(tmp_path, range(N_POOL + N_TEST))), examples)
        np.testing.assert_array_equal(again.p_NC, labels.p_NC)
        assert again.digest == labels.digest
        np.testing.assert_array_equal(labels.test_label_T, p_TC.argmax(axis=1))

    @pytest.mark.parametrize("missing", [[7], [N_POOL + 3], [7, 8]])
    def test_a_missing_answer_is_refused(self, examples, tmp_path, missing):
        uri = write_answers(tmp_path, [row for row in range(N_POOL + N_TEST) if row not in missing])
        with pytest.raises(ConfigError) as caught:
            read_teacher(of(uri), examples)
        assert str(caught.value).startswith(
            f"teacher.recorded.uri: no answer to {len(missing)} of {N_POOL + N_TEST} texts, "
            f"'toy-{missing[0]}' for one"
        )

    def test_a_teacher_that_is_not_recorded(self, examples):
        config = make_config(teacher={"kind": "vllm", "recorded": None, "model": "some-model"})
        with pytest.raises(ConfigError, match=r"^teacher\.kind: a comparison needs recorded answers"):
            read_teacher(config, examples)


def test_digest_stands_for_texts_and_distributions():
    p_NC = np.array([[0.2, 0.8], [0.5, 0.5]])

    def digest(ids, p_NC):
        return labels_of(ids, p_NC, np.zeros(2, dtype=int)).digest

    same = digest(["a", "b"], p_NC)
    assert digest(["a", "b"], p_NC + 1e-12) == same, "a rounding error is no other label"
    less = p_NC + np.array([[0.001, -0.001], [0, 0]])
    others = [(["b", "a"], p_NC), (["a", "c"], p_NC), (["a", "b"], p_NC[::-1]), (["a", "b"], less)]
    assert len({same, *(digest(*one) for one in others)}) == 5
