"""Drawing few-shot examples: balanced, by the seed alone, and self-contained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import NAMES, toy_texts

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.teacher.factory import with_demonstrations

LABELS = LabelsConfig(names=NAMES[:3])
TEXTS, GOLD = toy_texts(90, 3, seed=4)


def write(path: Path, order=range(90), texts=TEXTS) -> str:
    names = [NAMES[GOLD[i]] for i in order]
    pq.write_table(pa.table({"text": [texts[i] for i in order], "label": names}), path)
    return str(path)


def drawn(uri: str, labels: LabelsConfig = LABELS, shots=(), **settings) -> list[tuple[str, str]]:
    config = PromptConfig.model_validate({"draw": {"uri": uri} | settings, "demonstrations": shots})
    return [(shot.text, shot.label) for shot in with_demonstrations(config, labels).demonstrations]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "shots.parquet")


def test_as_many_of_each_class_with_their_own_labels(file):
    shots = drawn(file, per_class=4)
    assert Counter(label for _, label in shots) == dict.fromkeys(NAMES[:3], 4)
    label_of = {text: NAMES[gold] for text, gold in zip(TEXTS, GOLD, strict=True)}
    assert all(label_of[text] == label for text, label in shots)
    assert len({text for text, _ in shots}) == 12


def test_the_seed_decides_which_and_in_what_order(file):
    one, again, other = (drawn(file, per_class=3, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert set(one) != set(other)
    orders = {tuple(label for _, label in drawn(file, per_class=3, seed=seed)) for seed in range(6)}
    assert len(orders) > 3, "classes are mixed, and differently"


def test_the_order_of_rows_and_files_means_nothing(tmp_path, file):
    folder = tmp_path / "parts"
    folder.mkdir()
    mixed = np.random.default_rng(0).permutation(90)
    for name, part in zip(("b", "a", "c"), np.array_split(mixed, 3), strict=True):
        write(folder / f"{name}.parquet", part)
    assert drawn(str(folder), per_class=5, seed=3) == drawn(file, per_class=5, seed=3)


def test_every_text_of_a_class_has_the_same_chance(file):
    counts = Counter(shot for seed in range(400) for shot in drawn(file, seed=seed))
    per_class = np.bincount(GOLD)
    expected = {text: 400 / per_class[gold] for text, gold in zip(TEXTS, GOLD, strict=True)}
    chi2 = sum((counts[text, NAMES[gold]] - expected[text]) ** 2 / expected[text]
               for text, gold in zip(TEXTS, GOLD, strict=True))  # fmt: skip
    assert chi2 < 133, "87 degrees of freedom: 0.1 % of fair draws are above"


def test_they_stand_behind_the_config_s_own_and_nothing_is_left_to_draw(file):
    own = {"text": "the tide came in", "label": "sea"}
    config = PromptConfig.model_validate({"demonstrations": [own], "draw": {"uri": file}})
    resolved = with_demonstrations(config, LABELS)
    assert resolved.demonstrations[0].text == "the tide came in"
    assert len(resolved.demonstrations) == 4
    assert resolved.draw is None
    assert with_demonstrations(resolved, LABELS) == resolved
    assert PromptConfig.model_validate(resolved.model_dump(mode="json")) == resolved


def test_a_text_that_is_shown_already_is_not_drawn(tmp_path):
    uri = write(tmp_path / "few.parquet", [list(GOLD).index(label) for label in range(3)])
    shot = {"text": TEXTS[list(GOLD).index(0)], "label": NAMES[0]}
    with pytest.raises(ConfigError, match=f"has 0 usable example.s. of '{NAMES[0]}'"):
        drawn(uri, shots=[shot])


def test_texts_are_cleaned_and_the_same_one_counts_once(tmp_path):
    pool = pa.table({"text": ["  one\x00 ", "one", "two", "three"], "label": ["sea", "sea", "kitchen", "2"]})
    pq.write_table(pool, tmp_path / "shots.parquet")
    assert sorted(drawn(str(tmp_path / "shots.parquet"))) == [
        ("one", "sea"),
        ("three", "garden"),
        ("two", "kitchen"),
    ]
    with pytest.raises(ConfigError, match="has 1 usable example"):
        drawn(str(tmp_path / "shots.parquet"), per_class=2)


def test_long_texts_are_not_drawn(tmp_path):
    texts = [text if i % 2 else text * 20 for i, text in enumerate(TEXTS)]
    uri = write(tmp_path / "shots.parquet", texts=texts)
    assert all(len(text) <= 100 for seed in range(5) for text, _ in drawn(uri, seed=seed, max_chars=100))


def test_other_formats_and_columns(tmp_path):
    lines = [f'"{text}",{NAMES[gold]}' for text, gold in zip(TEXTS, GOLD, strict=True)]
    (tmp_path / "shots.csv").write_text("\n".join(["body,topic", *lines]))
    plain = drawn(write(tmp_path / "shots.parquet"), seed=5)
    assert drawn(str(tmp_path / "shots.csv"), text="body", label="topic", seed=5) == plain


class TestRefusals:
    def refusal(self, uri: str, **settings) -> str:
        with pytest.raises(ConfigError) as caught:
            drawn(uri, **settings)
        return str(caught.value)

    def test_too_few_of_a_class(self, file):
        count = int((GOLD == 0).sum())
        message = self.refusal(file, per_class=count + 30)
        assert message.startswith(f"teacher.prompt.draw.per_class is {count + 30}, but {file!r} has {count} ")
        assert f"usable example(s) of '{NAMES[0]}'" in message
        assert "lower it" in message

    def test_why_rows_were_not_used_is_told(self, file):
        message = self.refusal(file, max_chars=3)
        assert "has 0 usable example(s)" in message
        assert "(rows refused: 90 too_long)" in message

    def test_labels_that_nobody_knows(self, file):
        message = self.refusal(file, labels=LabelsConfig(names=("x", "y")))
        assert "unknown_gold" in message

    def test_missing_file(self, tmp_path):
        message = self.refusal(str(tmp_path / "none.parquet"))
        assert message.startswith("teacher.prompt.draw.uri: ")
        assert "matches no file" in message

    @pytest.mark.parametrize("setting", ["text", "label"])
    def test_missing_column(self, file, setting):
        message = self.refusal(file, **{setting: "typo"})
        assert message.startswith(f"teacher.prompt.draw.{setting}: there is no column 'typo'")

    def test_the_field_can_be_another(self, tmp_path):
        config = PromptConfig.model_validate({"draw": {"uri": str(tmp_path / "none.csv")}})
        with pytest.raises(ConfigError, match=r"^teacher\.cascade\.small\.prompt\.draw\.uri: "):
            with_demonstrations(config, LABELS, "teacher.cascade.small.prompt.draw")
