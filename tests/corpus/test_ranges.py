"""A file read in pieces gives what it gives in one go: same rows, same positions, whatever is in it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import readers, sources
from llkd_ray.corpus.readers import RawRow, Unit, read_rows
from llkd_ray.corpus.sources import Found, pieces, stretches, survey

MAX_CHARS = 10


def unit_of(path: Path) -> Unit:
    return Unit(str(path), path.suffix[1:], path.stat().st_size, str(path.parent), str(path))


def in_pieces(path: Path, size: int) -> list[Unit]:
    cut = stretches(unit_of(path), min(size, path.stat().st_size - 1))
    return list(pieces([(one, survey(one, MAX_CHARS)) for one in cut], MAX_CHARS))


def read(units: list[Unit], text: str) -> list[RawRow]:
    source = SourceConfig(uri="x", text=text, max_chars=MAX_CHARS)
    return [row for unit in units for row in read_rows(unit, source, "corpus", [])]


def check(path: Path, size: int) -> list[Unit]:
    """Cut the file, and hold all pieces against the file in one go."""
    cut = in_pieces(path, size)
    assert read(cut, "text") == read([unit_of(path)], "text")
    assert [unit.span[0] for unit in cut] == [0, *(unit.span[1] for unit in cut[:-1])]
    assert cut[-1].span[1] == path.stat().st_size
    assert sum(unit.size for unit in cut) == path.stat().st_size
    return cut


ANY_BYTES = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b'"', b'""', b",", b"a", b"bc", b"\xff", b"\0", b'{"text": "x"}', b" "]
    )
    | st.binary(max_size=3)
).map(b"".join)
CSV_FIELDS = st.text(st.sampled_from('ab,"\n\r \t\u00e9'), max_size=12)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
@given(content=ANY_BYTES, size=st.integers(1, 40))
def test_any_bytes(tmp_path_factory, kind: str, content: bytes, size: int) -> None:
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    path.write_bytes((b"text\n" if kind in ("csv", "tsv") else b"") + content + b"\nend")
    check(path, size)


@given(st.lists(st.tuples(CSV_FIELDS, CSV_FIELDS)), st.integers(1, 60))
def test_records_of_several_lines(tmp_path_factory, rows: list[tuple[str, str]], size: int) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    quoted = [",".join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
    path.write_bytes("\n".join(["id,text", *quoted]).encode())
    assert len(read(check(path, size), "text")) == len(rows)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("size", [1, 7, 50, 99, 100, 101, 120, 500])
def test_lines_too_long_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    monkeypatch.setattr(sources, "CHUNK", 16)
    monkeypatch.setattr(readers, "MIN_LINE_BYTES", 100)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b'text\none\n"open\n' + b"x" * 500 + b'\ntwo\n"' + b"y\n" * 200 + b"three\n")
    check(path, size)


@pytest.fixture
def surveyed_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a piece begins where no survey looked."""
    calls = []
    real = sources.found_from

    def counted(*arguments: object) -> Found:
        calls.append(arguments)
        return real(*arguments)

    def count() -> int:
        return len(calls)

    def survey_apart(cut, max_chars):
        found = [(one, survey(one, max_chars)) for one in cut]
        calls.clear()
        return found

    monkeypatch.setattr(sources, "found_from", counted)
    count.survey = survey_apart  # type: ignore[attr-defined]
    return count


def test_guesses_are_right_in_a_proper_csv_and_noticed_where_they_are_wrong(
    tmp_path: Path, surveyed_again
) -> None:
    path = tmp_path / "a.csv"
    proper = [f'{n},"a line\nand ""another""\n, {n}"\n\n' for n in range(200)]
    path.write_text("id,text\n" + "".join(proper))
    cut = stretches(unit_of(path), 500)
    units = list(pieces(surveyed_again.survey(cut, 100), 100))
    assert len(units) == len(cut) > 10
    assert surveyed_again() == 0
    assert len(read(units, "text")) == 200

    path.write_text("id,text,size\n" + "".join(f'{n},"x\ny",5" pipe\n' for n in range(400)))
    cut = stretches(unit_of(path), 500)
    units = list(pieces(surveyed_again.survey(cut, 100), 100))
    assert surveyed_again() > 0
    assert read(units, "text") == read([unit_of(path)], "text")
    assert len(read(units, "text")) == 400


def test_positions_go_on_from_piece_to_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\n" + b"".join(b"t%d\n" % n for n in range(50)))
    units = in_pieces(path, 60)
    assert len(units) == 4
    assert [row.position for row in read(units, "text")] == list(range(50))
    assert read(units[1:2], "text")[0] == RawRow(units[1].first, f"t{units[1].first}")


@pytest.mark.parametrize(
    ("name", "count"), [("a.txt", 4), ("a.csv.gz", 0), ("a.jsonl.zst", 0), ("a.parquet", 0)]
)
def test_what_can_be_cut(tmp_path: Path, name: str, count: int) -> None:
    path = tmp_path / name
    path.write_bytes(b"x\n" * 50)
    unit = replace(unit_of(path), kind=name.split(".")[1])
    assert len(stretches(unit, 30)) == count
    assert stretches(unit, 100) == []
