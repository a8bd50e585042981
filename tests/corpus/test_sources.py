"""From uri to units: which files, checked how, cut where; a file in pieces gives what it gives in one go."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import readers, sources
from llkd_ray.corpus.readers import RawRow, Unit, read_rows
from llkd_ray.corpus.sources import byte_ranges, pack, pieces, plan, scan


def names(*uris: str | Path) -> list[str]:
    found = plan(SourceConfig(uri=tuple(str(uri) for uri in uris)), "corpus")
    return [Path(unit.source).name for unit in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "_SUCCESS", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a text\n")
    return tmp_path


@pytest.mark.parametrize(
    ("glob", "files"),
    [
        ("", ["a.txt", "b.txt", "c.txt", "d.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("[b-z].txt", ["b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("*/*.txt", ["c.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "c.txt", "d.txt"]),
        ("d*/**", ["c.txt", "d.txt"]),
        ("deep/**", ["c.txt", "d.txt"]),
    ],
)
def test_globs(folder: Path, glob: str, files: list[str]) -> None:
    assert names(folder / glob) == files
    if "?" not in glob and "[" not in glob:
        assert names(f"file://{folder}/{glob}") == files


def test_a_name_may_hold_anything_that_is_utf8(tmp_path: Path) -> None:
    odd = [
        "=cmd|<img src=x>.txt",
        "\x1b]0;t\x07.txt",
        "two\nlines.txt",
        "a\u202eb.txt",
        "%41 #?.txt",
        "a*[b].txt",
    ]
    for name in odd:
        (tmp_path / name).write_text("a text\n")
        assert names(tmp_path / name) == [name]
    assert names(tmp_path) == names(tmp_path / "*.txt") == sorted(odd)
    bad = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / bad).write_text("a text\n")
    for uri in (tmp_path, tmp_path / "*.txt", tmp_path / bad):
        with pytest.raises(ConfigError, match="has a name that is not UTF-8"):
            names(uri)


def test_uris_keep_their_order_and_no_file_comes_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(folder / "b.txt", folder / "*.txt") == ["b.txt", "a.txt"]
    (folder / "deep" / "a[1].txt").write_text("text\n")
    assert names(folder / "deep" / "a[1].txt") == ["a[1].txt"], "a file that is there, for all its wildcards"
    monkeypatch.chdir(folder)  # workers run elsewhere
    found = [unit.path for unit in plan(SourceConfig(uri="*.txt"), "corpus")]
    assert found == [f"{folder}/a.txt", f"{folder}/b.txt"]


def test_parquet_is_cut_at_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": ["x" * 500 + str(n) for n in range(50)], "other": ["y" * 9000] * 50})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    source = SourceConfig(uri=str(tmp_path / "a.parquet"))
    assert [unit.part for unit in plan(source, "corpus")] == [(0, 5)]
    monkeypatch.setattr(sources, "TASK_BYTES", 9000)  # two groups of texts; the other column is not read
    units = plan(source, "corpus")
    assert [(unit.part, unit.first) for unit in units] == [((0, 2), 0), ((2, 4), 20), ((4, 5), 40)]


def test_small_files_share_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = plan(SourceConfig(uri=str(folder)), "corpus")
    assert [len(one) for one in pack(units)] == [4]
    monkeypatch.setattr(sources, "TASK_BYTES", 14)  # a file has 7 bytes
    assert [len(one) for one in pack(units)] == [2, 2]
    assert [unit for one in pack(units) for unit in one] == units
    assert pack([]) == []


def refusal(uri: str | Path, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(SourceConfig(uri=str(uri), **settings), "corpus")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["none.csv", "none/*.csv", "none", "*.csv"])
def test_nothing_matches(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name)
    assert message.startswith("corpus.uri: ")
    assert f"{name}' matches no file" in message
    assert "'foo://x/y.csv' cannot be opened" in refusal("foo://x/y.csv")


@pytest.mark.parametrize(
    ("files", "settings", "says"),
    [
        *(({name: b"x"}, {}, f"the kind of {name!r} is unknown: the name must end in one of .parquet, .jsonl")
          for name in ("a.xlsx", "noending", "a.parquet.gz", "a.gz")),
        ({"a.csv": b"text\nx\n", "b.txt": b"x\n"}, {}, "b.txt' are of different kinds"),
        *(({"a.json": text}, {}, "is a JSON array: write one object a line")
          for text in (b'[{"text": "x"}]', b'[\n {"text": "x"}\n]')),
        *(({"a.txt": b"x\n"}, setting, "txt files have no columns")
          for setting in ({"gold": "y"}, {"id": "key"}, {"where": {"a": 1}})),
        ({"a.csv": b""}, {}, "has no header line"),
        *(({"a.parquet": content}, {}, "a.parquet' cannot be read (")
          for content in (b"", b"PAR1 and then something else")),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(
    tmp_path: Path, files: dict[str, bytes], settings: dict[str, object], says: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path, **settings)


def write_one_row(path: Path, row: dict[str, str]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), path)
    elif path.suffix == ".csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        path.write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("setting", "value"), [("text", "body"), ("gold", "y"), ("id", "key"), ("where", {"part": 1})]
)
def test_column_not_found(tmp_path: Path, ending: str, setting: str, value: object) -> None:
    write_one_row(tmp_path / f"a.{ending}", {"text": "x", "label": "no"})
    message = refusal(tmp_path / f"a.{ending}", **{setting: value})
    assert message.startswith(f"corpus.{setting}: there is no column ")
    assert message.endswith("its columns are text, label")


def test_every_csv_and_parquet_file_is_checked_and_a_jsonl_key_may_come_late(tmp_path: Path) -> None:
    for ending in ("parquet", "csv"):
        write_one_row(tmp_path / f"a.{ending}", {"text": "x"})
        write_one_row(tmp_path / f"b.{ending}", {"body": "x"})
        assert f"b.{ending}" in refusal(tmp_path / f"*.{ending}")
    (tmp_path / "a.jsonl").write_text("\n".join(['{"body": "x"}', "[1, 2", '{"text": "x"}']))
    assert names(tmp_path / "a.jsonl") == ["a.jsonl"]


@pytest.mark.timeout(60)
def test_hub_mistakes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "train.parquet")
    assert "unknown option 'spilt'" in refusal(f"hf://{tmp_path}?spilt=train")
    assert "cannot be read (Bad split: nope." in refusal(f"hf://{tmp_path}?split=nope")
    assert "there is no column 'body'" in refusal(f"hf://{tmp_path}", text="body")
    assert "cannot be read (Couldn't find any data file" in refusal(f"hf://{tmp_path}/none")


# --- files of lines in pieces

MAX_CHARS = 10


def unit_of(path: Path) -> Unit:
    return Unit(str(path), path.suffix[1:], path.stat().st_size, str(path.parent), str(path))


def read(units: list[Unit], text: str) -> list[RawRow]:
    source = SourceConfig(uri="x", text=text, max_chars=MAX_CHARS)
    return [row for unit in units for row in read_rows(unit, source, "corpus", [])]


def check(path: Path, size: int) -> list[Unit]:
    """Cut the file, and hold all pieces against the file in one go."""
    ranges = byte_ranges(unit_of(path), min(size, path.stat().st_size - 1))
    cut = list(pieces([(one, scan(one, MAX_CHARS)) for one in ranges], MAX_CHARS))
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
def cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[list[Unit], int, int]]:
    """The pieces of a file, of how many ranges, and how often a piece begins where no scan looked."""
    calls: list[object] = []
    real = sources.found_from
    monkeypatch.setattr(sources, "found_from", lambda *given: calls.append(given) or real(*given))

    def cut(path: Path) -> tuple[list[Unit], int, int]:
        ranges = byte_ranges(unit_of(path), 500)
        found = [(one, scan(one, 100)) for one in ranges]
        calls.clear()
        return list(pieces(found, 100)), len(ranges), len(calls)

    return cut


def test_guesses_are_right_in_a_proper_csv_and_noticed_where_they_are_wrong(
    tmp_path: Path, cut_and_counted: Callable[[Path], tuple[list[Unit], int, int]]
) -> None:
    path = tmp_path / "a.csv"
    proper = [f'{n},"a line\nand ""another""\n, {n}"\n\n' for n in range(200)]
    path.write_text("id,text\n" + "".join(proper))
    units, n_ranges, again = cut_and_counted(path)
    assert (len(units), again) == (n_ranges, 0)
    assert n_ranges > 10
    assert len(read(units, "text")) == 200

    path.write_text("id,text,size\n" + "".join(f'{n},"x\ny",5" pipe\n' for n in range(400)))
    units, _, again = cut_and_counted(path)
    assert again > 0
    assert read(units, "text") == read([unit_of(path)], "text")
    assert len(read(units, "text")) == 400


def test_positions_go_on_from_piece_to_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\n" + b"".join(b"t%d\n" % n for n in range(50)))
    units = check(path, 60)
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
    assert len(byte_ranges(unit, 30)) == count
    assert byte_ranges(unit, 100) == []
