"""Every kind of file gives the same rows; a bad byte or line spoils its own row only."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import readers
from llkd_ray.corpus.readers import RawRow, read_rows
from llkd_ray.corpus.sources import plan

ROWS = [
    {"text": "plain", "label": "no", "key": "k0", "fold": 1, "good": True},
    {"text": "a comma, a \"quote\"\nand a line", "label": "yes", "key": "k1", "fold": 2, "good": False},
    {"text": "Ünïcödé 漢字 🙂", "label": None, "key": "k2", "fold": 2, "good": True},
    {"text": None, "label": "no", "key": "k3", "fold": None, "good": None},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as what the ending says."""
    _, kind, *compression = path.name.split(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    file = io.StringIO(newline="")
    if kind in ("csv", "tsv"):
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    else:
        file.writelines(f"{row['text'] if kind == 'txt' else json.dumps(row)}\n" for row in rows)
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get("".join(compression), bytes)
    path.write_bytes(pack(file.getvalue().encode()))
    return path


def read(path: Path | str, **settings: object) -> list[RawRow]:
    source, labels = SourceConfig(uri=str(path), **settings), ["no", "yes"]
    units = plan(source, "corpus")
    return [row for unit in units for row in read_rows(unit, source, "corpus", labels)]


@pytest.mark.parametrize(
    "ending",
    ["parquet", "jsonl", "json", "ndjson", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "tsv"],
)
def test_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", ROWS)
    null = "" if ending.startswith(("csv", "tsv")) else None
    rows = [RawRow(n, row["text"] or null, row["label"] or null, row["key"]) for n, row in enumerate(ROWS)]
    assert read(path, gold="label", id="key") == rows


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "txt.zst"])
def test_lines(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", [{"text": text} for text in ("one", "", "🙂 two\r")])
    assert read(path) == [RawRow(0, "one"), RawRow(1, ""), RawRow(2, "🙂 two")]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ({"fold": 2}, [1, 2]),
        ({"fold": "2"}, [1, 2]),
        ({"good": True}, [0, 2]),
        ({"fold": 2, "good": True}, [2]),
        ({"label": "no"}, [0, 3]),
        ({"label": "other"}, []),
        ({"fold": 9}, []),
    ],
)
def test_where(tmp_path: Path, ending: str, where: dict[str, str | int | bool], positions: list[int]) -> None:
    path = write(tmp_path / f"a.{ending}", ROWS)
    assert [row.position for row in read(path, where=where)] == positions


def test_where_picks_rows_by_dictionary_and_across_row_groups(tmp_path: Path) -> None:
    split = pa.array(["train", None, "dev", "train"]).dictionary_encode()
    pq.write_table(pa.table({"text": list("abcd"), "split": split}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", where={"split": "train"}) == [RawRow(0, "a"), RawRow(3, "d")]
    table = pa.table({"text": [f"t{n}" for n in range(10)], "fold": [n // 4 for n in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert read(tmp_path / "a.parquet", where={"fold": 2}) == [RawRow(8, "t8"), RawRow(9, "t9")]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\none\n")
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.csv") == [RawRow(0, "one")]


def test_broken_jsonl_lines(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', '{"text": ', "", "[1]", '"word"', "[" * 100_000, '{"text": "good too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert [row.position for row in rows if not row.broken] == [0, 6]
    assert [row.position for row in rows if row.broken] == [1, 3, 4, 5]  # line 2 is blank, so it is no row
    assert rows[1].text == '{"text": '
    assert rows[2].broken == "the line holds a list, not an object"
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    assert read(tmp_path / "a.jsonl") == [RawRow(0, "x"), RawRow(1, None)], "an absent key is null"


def test_broken_csv_records(tmp_path: Path) -> None:
    lines = ["a,text", "1,good", "2", "3,too,many", '4,"stray" quote', "", '5,"good\ntoo"', '6,"never closed']
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\nswallowed\n")
    rows = read(tmp_path / "a.csv")
    assert [(row.position, row.text) for row in rows if not row.broken] == [(0, "good"), (4, "good\ntoo")]
    assert [row.position for row in rows if row.broken] == [1, 2, 3, 5]
    assert rows[1].broken == "1 fields, but the header has 2"


def test_endless_lines_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MIN_LINE_BYTES", 100)
    long = "x" * 250
    (tmp_path / "a.txt").write_text(f"one\n{long}\ntwo\n{'y' * 99}\n")
    (tmp_path / "a.csv").write_text(f"text\none\n{long}\ntwo\n")
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{{"text": "{long}"}}\n{{"text": "two"}}\n')
    for ending in ("txt", "csv", "jsonl"):
        rows = read(tmp_path / f"a.{ending}", max_chars=5)[:3]
        assert [row.broken for row in rows] == ["", "the line is longer than 100 bytes", ""], ending
        assert [rows[0].text, rows[2].text] == ["one", "two"]
    assert read(tmp_path / "a.txt", max_chars=5)[3] == RawRow(3, "y" * 99)


def test_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n * n}" for n in range(2000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet' cannot be read \("):
        read(path)


@pytest.mark.timeout(60)
def test_hub_folder(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"text": f"text {number}-{n}", "label": n % 2, "fold": n} for n in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{number}.parquet")
    uri = f"hf://{tmp_path}?split=train"
    assert [unit.part for unit in plan(SourceConfig(uri=uri), "corpus")] == [(0, 3), (1, 3), (2, 3)]
    rows = read(uri, gold="label")
    assert [row.text for row in rows] == [f"text {number}-{n}" for number in range(3) for n in range(4)]
    assert [row.gold for row in rows] == [0, 1, 0, 1] * 3
    assert read(uri, where={"fold": 3}) == [RawRow(3, f"text {number}-3") for number in range(3)]


@pytest.mark.timeout(60)
def test_hub_classes_are_matched_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])}
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, datasets.Features(features))
    data.to_parquet(tmp_path / "train.parquet")
    # Our labels are no, yes: the other way round.
    assert [row.gold for row in read(f"hf://{tmp_path}", gold="label")] == ["yes", "no"]


SAID = [("k0", "Größe paßt nicht; bitte umtauschen", "no"), ("k1", "für mich zu klein, schade", "yes")]


@pytest.mark.parametrize(
    ("encoding", "delimiter", "says"),
    [
        ("utf-8", ",", ""),
        ("utf-8-sig", ";", "split at semicolons"),
        ("utf-16", ";", "read as utf-16; .* split at semicolons"),
        ("utf-16-le", "\t", "read as utf-16-le; .* split at tabs"),
        ("utf-16-be", ",", "read as utf-16-be"),
        ("utf-32", ",", "read as utf-32"),
        ("latin-1", "|", "read as cp1252; .* split at vertical bars"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_encoding_and_delimiter_are_found_and_said(tmp_path, encoding, delimiter, says, ending) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["key", "text", "label"])
    writer.writerows(SAID)
    path = tmp_path / f"a.{ending}"
    content = file.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read(path, gold="label", id="key") == [
        RawRow(n, text, y, k) for n, (k, text, y) in enumerate(SAID)
    ]
    found = readers.describe_format(plan(SourceConfig(uri=str(path)), "corpus"))
    assert bool(found) == bool(says)
    assert re.search(says, found)
    if encoding != "utf-8-sig":  # what is set goes before what is found
        assert read(path, encoding=encoding, delimiter=delimiter)[1].text == SAID[1][1]


def test_damaged_bytes_do_not_change_the_encoding_of_a_file(tmp_path: Path) -> None:
    """A row with bytes that are not UTF-8 goes to quarantine; the others are read as they are."""
    for damage in (b"caf\xe9", b"\xff\xfe\xfd\xfc" * 3, b"na\xefve caf\xe9 \xfcber"):
        path = tmp_path / "a.txt"
        path.write_bytes("schön\n".encode() * 20 + damage + b"\n")
        rows = read(path)
        assert rows[0].text == "schön"
        assert len(rows) == 21
        with pytest.raises(UnicodeEncodeError):
            str(rows[20].text).encode()
