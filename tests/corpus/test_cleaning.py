"""One row at a time: what is an example, and why a row is refused."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.cleaning import Cleaner, Example, GoldNames, Refusal, clean_text, start_of_text
from llkd_ray.corpus.readers import RawRow

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates and controls too
ONE_VALUE = st.none() | ANY_TEXT | st.binary() | st.integers() | st.floats() | st.booleans()
SEVERAL = st.lists(ANY_TEXT, max_size=3) | st.dictionaries(ANY_TEXT, st.integers(), max_size=3)
ANY_VALUE = ONE_VALUE | SEVERAL
TEXT_REASONS = {"missing", "not_text", "undecodable", "empty", "too_long"}
ROW_REASONS = {*TEXT_REASONS, "broken_line", "unknown_gold", "missing_gold"}


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two words \n", "two words"),
        ("tab\tand\nline stay", "tab\tand\nline stay"),
        ("nul\x00 bell\x07 del\x7f c1\x9b", "nul bell del c1"),
        ("one\r\ntwo\rthree\x0cfour\x85five", "one\ntwo\nthree\nfour\nfive"),
        ("cafe\u0301", "caf\u00e9"),
        ("naïve".encode(), "naïve"),
        ("\u3000wide space\u2003", "wide space"),
    ],
)
def test_clean_text(raw: object, clean: str) -> None:
    assert clean_text(raw, 100) == clean


@pytest.mark.parametrize(
    ("raw", "reason", "detail"),
    [
        (None, "missing", ""),
        (7, "not_text", ""),
        (["a"], "not_text", ""),
        ("", "empty", ""),
        (" \t\n ", "empty", ""),
        ("\x00\x01", "empty", ""),
        (b"caf\xe9", "undecodable", "byte 0xe9 at character 3"),
        ("half \ud83d a pair", "undecodable", ""),
        ("12345678901", "too_long", "11 characters; test.max_chars is 10"),
    ],
)
def test_refused_texts(raw: object, reason: str, detail: str) -> None:
    refusal = clean_text(raw, 10, "test")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason
    assert detail in refusal.detail
    assert clean_text("  1234567890\x00 ", 10) == "1234567890", "the clean text is measured"


@given(ANY_VALUE, st.integers(1, 30))
def test_any_value_is_a_clean_text_or_a_refusal(value: object, max_chars: int) -> None:
    result = clean_text(value, max_chars)
    if isinstance(result, Refusal):
        assert result.reason in TEXT_REASONS
        result.detail.encode()
    else:
        result.encode()
        assert 1 <= len(result) <= max_chars
        assert result == result.strip() == unicodedata.normalize("NFC", result)
        assert not any(unicodedata.category(char) == "Cc" for char in result if char not in "\t\n")
        assert clean_text(result, max_chars) == result


@given(ANY_VALUE)
def test_start_of_text_is_short_and_valid(value: object) -> None:
    start = start_of_text(value)
    start.encode()
    assert len(start) <= 200


@given(ANY_VALUE, ANY_VALUE, ANY_VALUE, st.sampled_from(["", "wrong"]), st.sampled_from(["corpus", "test"]))
def test_any_row_is_an_example_or_a_refusal(text, gold, id_, broken, field) -> None:
    source = SourceConfig(uri="x", gold="gold", max_chars=20)
    result = Cleaner(source, field, ["no", "yes"])(RawRow(0, text, gold, id_, broken))
    if isinstance(result, Refusal):
        assert result.reason in ROW_REASONS
        result.detail.encode()
    else:
        assert isinstance(result, Example)
        assert result.id
        result.id.encode()
        assert result.gold in ((-1, 0, 1) if field == "corpus" else (0, 1))
        assert 0 <= result.hash < 2**64
        assert not broken


@pytest.mark.parametrize(
    ("names", "value", "index"),
    [
        *(("no yes", value, 0) for value in ("no", 0)),
        *(("no yes", value, 1) for value in ("yes", " yes ", b"yes", 1, "1", 1.0)),
        *(("no yes", value, None) for value in (None, "", float("nan"))),
        *(("no yes", value, "unknown_gold") for value in ("maybe", "2", 2, -1, 0.5, True, ["no"])),
        *(("no yes", value, "unknown_gold") for value in ("9" * 5000, float("inf"))),
        # Names that are numbers are never taken for indices.
        *(("1 2 3", value, int(value) - 1) for value in ("1", 1, "3", 3, 3.0)),
        *(("1 2 3", value, "unknown_gold") for value in (0, "0")),
    ],
)
def test_gold_is_a_name_or_an_index(names: str, value: object, index: int | str | None) -> None:
    found = GoldNames(names.split()).index(value)
    assert (found.reason if isinstance(found, Refusal) else found) == index


def test_gold_may_be_missing_in_the_pool_only() -> None:
    source = SourceConfig(uri="x", gold="gold")
    row = RawRow(0, "text", None)
    assert Cleaner(source, "corpus", ["no", "yes"])(row).gold == -1
    assert Cleaner(source, "test", ["no", "yes"])(row).reason == "missing_gold"


def test_id_is_the_column_or_the_hash_of_the_text() -> None:
    clean = Cleaner(SourceConfig(uri="x"), "corpus", ["no", "yes"])
    assert clean(RawRow(0, "text", id=17)).id == "17"
    assert clean(RawRow(0, "text", id="a-1")).id == "a-1"
    by_hash = clean(RawRow(0, " text ")).id
    assert len(by_hash) == 16
    assert int(by_hash, 16) == clean(RawRow(5, "text", id="a-1")).hash
    assert clean(RawRow(0, "other")).id != by_hash
    assert clean(RawRow(0, "text", id="\udcff")).reason == "undecodable"
