"""Whatever a corpus is made of: each row is kept or in quarantine, found there by source and position.

The only error is a ConfigError of one line, for a file that cannot be read at all. Most tests run what a read
task runs, without Ray: plan, cut, read, clean, stage.
"""

import datetime
import decimal
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.ingest import ingest
from llkd_ray.corpus.sources import byte_ranges, pieces, plan, scan
from llkd_ray.corpus.staging import StagingWriter
from llkd_ray.storage.run_dir import EXAMPLES_INDEX, RunStore

LABELS = ["no", "yes"]
Fate = tuple[str, int]  # source and position of a row

few = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


class Fates:
    """What became of the rows of a source: its staged files, read back."""

    def __init__(self, store: RunStore, writer: StagingWriter) -> None:
        shards = [shard for group in writer.groups for shard in group.shards]
        keys = [row for shard in shards for row in store.read_table(shard.keys_file).to_pylist()]
        texts = [text for shard in shards for text in store.read_table(shard.file)["text"].to_pylist()]
        files = [store.read_table(f"quarantine/{name}") for name in store.names("quarantine")]
        refused = [row for table in files for row in table.to_pylist()]
        self.kept = {(row["source"], row["position"]): text for row, text in zip(keys, texts, strict=True)}
        self.refused = {(row["source"], row["position"]): row for row in refused}
        assert writer.rows_in == len(keys) + len(refused) == len(self.kept) + len(self.refused)
        assert not self.kept.keys() & self.refused.keys()
        assert writer.reasons == Counter(row["reason"] for row in refused)

    def at(self, position: int) -> str:
        """The text of the row there, or the reason against it in brackets."""
        places = {**self.kept, **{place: f"[{row['reason']}]" for place, row in self.refused.items()}}
        return next(fate for (_, at), fate in places.items() if at == position)


def stage(folder: Path, path: Path, size: int = 1 << 20, **source_settings: Any) -> Fates:
    """Take a file through what comes before de-duplication; files of lines in pieces of ``size`` bytes."""
    source = SourceConfig(**{"uri": str(path), "max_chars": 100, **source_settings})
    store = RunStore(str(folder / "run"))
    writer = StagingWriter(store, "pool-000000")
    for unit in plan(source, "corpus"):
        cut = [(one, scan(one, source.max_chars)) for one in byte_ranges(unit, size)]
        for kept in writer.clean(list(pieces(cut, source.max_chars)) or [unit], source, "corpus", LABELS):
            writer.keep(*kept)
    writer.flush()
    return Fates(store, writer)


def one_line(error: ConfigError, *words: str) -> None:
    message = str(error)
    assert message.startswith("corpus.")
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words)


# Files of lines

PIECES = [
    b"\n", b"\r\n", b'"', b",", b"\t", b"{", b"}", b"[", b":", b'{"text": "', b'"}\n', b"\xef\xbb\xbf",
    b"\\u", b"\0",
]  # fmt: skip
ANY_BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=40).map(b"".join)


@few
@given(content=ANY_BYTES, size=st.integers(5, 200))
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_any_bytes(tmp_path_factory: Any, kind: str, content: bytes, size: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / f"a.{kind}"
    head, end = {
        "jsonl": (b'{"text": "first"}\n', b'\n{"text": "last"}'),
        "txt": (b"first\n", b"\nlast"),
    }.get(kind, (b"text\nfirst\n", b"\nlast"))
    path.write_bytes(head + content + end)
    fates = stage(folder, path, size)
    assert fates.at(0) == "first"
    if kind in ("jsonl", "txt"):
        lines = path.read_bytes().split(b"\n")
        rows = [n for n, line in enumerate(lines) if kind == "txt" or line.decode(errors="replace").strip()]
        assert sorted(position for _, position in {**fates.kept, **fates.refused}) == rows
        assert fates.at(len(lines) - 1) == "last"
    else:  # nothing is skipped: a record is a number
        positions = sorted(position for _, position in {**fates.kept, **fates.refused})
        assert positions == list(range(len(positions)))


@few
@given(ANY_BYTES, st.sampled_from(["jsonl", "csv", "tsv", "txt", "json", "parquet", "csv.gz", "txt.zst"]))
def test_a_file_of_any_bytes_alone_is_read_or_named(tmp_path_factory: Any, content: bytes, kind: str) -> None:
    folder = tmp_path_factory.mktemp("alone")
    path = folder / f"a.{kind}"
    path.write_bytes(content)
    try:
        stage(folder, path)
    except ConfigError as error:
        one_line(error)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates and controls, too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=10,
)


ANY_ROW = st.fixed_dictionaries({}, optional=dict.fromkeys(("text", "y", "id", "fold"), ANY_JSON)) | ANY_JSON


@few
@given(st.lists(ANY_ROW, max_size=12), st.booleans())
def test_any_json(tmp_path_factory: Any, rows: list[Any], picks: bool) -> None:
    folder = tmp_path_factory.mktemp("json")
    path = folder / "a.jsonl"
    first = {"text": "first", "y": "no", "id": "a", "fold": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *rows]))
    where = {"fold": 1} if picks else {}
    fates = stage(folder, path, gold="y", id="id", where=where)
    assert fates.at(0) == "first"
    if not picks:
        assert len(fates.kept) + len(fates.refused) == 1 + len(rows)


@pytest.mark.parametrize("depth", [50, *range(800, 1100, 50), 100_000])
@pytest.mark.parametrize("column", ["text", "y", "id", "fold", "other"])
def test_any_depth(tmp_path: Path, depth: int, column: str) -> None:
    row = {"text": "deep", "y": "no", "id": "a", "fold": "1"}
    deep = json.dumps({**row, column: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row | {'text': 'first'})}\n{deep}\n")
    fates = stage(tmp_path, tmp_path / "a.jsonl", gold="y", id="id")
    assert fates.at(0) == "first"
    reasons = {"text": "[not_text]", "y": "[unknown_gold]", "id": "[bad_id]"}
    assert fates.at(1) in (reasons.get(column, "deep"), "[broken_line]")
    (tmp_path / "run").rename(tmp_path / "before")
    fates = stage(tmp_path, tmp_path / "a.jsonl", gold="y", id="id", where={"fold": 1})
    assert fates.at(0) == "first"


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("\u202eright to left\u202c", "\u202eright to left\u202c"),
        ("\u05e9\u05dc \u0645\u0631", "\u05e9\u05dc \u0645\u0631"),
        ("zero\u200bwidth\u200d\ufeff", "zero\u200bwidth\u200d\ufeff"),
        ("e\u0301" * 60, "\u00e9" * 60),
        ("nul\0nul", "nulnul"),
        ("\ud800 alone", "[undecodable]"),
        ("\U0010ffff\ufffe", "\U0010ffff\ufffe"),
        ("\u2028\u2029", "[empty]"),
        ("\ufdfa" * 99, "\ufdfa" * 99),
    ],
)  # fmt: skip
def test_odd_text_stays_in_its_row(tmp_path: Path, text: str, fate: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    (tmp_path / "a.txt").write_bytes(b"first\n" + raw + b"\nlast\n")
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in ("first", text, "last"))
    (tmp_path / "b.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))
    (tmp_path / "c.csv").write_bytes(b"text\nfirst\n" + raw + b"\nlast\n")
    column = pa.array([b"first", raw, b"last"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    for name in ("a.txt", "b.jsonl", "c.csv", "d.parquet"):
        fates = stage(tmp_path / name.replace(".", "-"), tmp_path / name)
        assert [fates.at(n) for n in range(3)] == ["first", fate, "last"], name


# Parquet

COLUMNS: dict[str, pa.Array] = {
    "strings": pa.array(["a", None, "b"]),
    "large": pa.array(["a", None, "b"], pa.large_string()),
    "views": pa.array(["a", None, "b"], pa.string_view()),
    "binary": pa.array([b"a", b"\xff", None]),
    "large binary": pa.array([b"a", b"\xff", None], pa.large_binary()),
    "fixed": pa.array([b"abc", b"ab\xff", None], pa.binary(3)),
    "bad strings": pa.array([b"a", b"\xff", None]).view(pa.string()),
    "dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
    "dictionary of numbers": pa.array([1, None, 2]).dictionary_encode(),
    "nulls": pa.nulls(3),
    "numbers": pa.array([1, None, 2]),
    "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "floats": pa.array([float("nan"), None, float("inf")]),
    "halves": pa.array(np.array([1, 2, 3], np.float16)),
    "booleans": pa.array([True, None, False]),
    "lists": pa.array([["a"], None, []]),
    "bad lists": pa.ListArray.from_arrays([0, 1, 2, 2], pa.array([b"\xff", b"a"]).view(pa.string())),
    "structs": pa.array([{"a": 1}, None, {"a": 2}]),
    "maps": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int8())),
    "decimals": pa.array([decimal.Decimal("1.0"), None, decimal.Decimal("0.0")]),
    "dates": pa.array([datetime.date(2000, 1, 1), None, datetime.date(1, 1, 1)]),
    "far dates": pa.array([2**31 - 1, None, 0], pa.int32()).view(pa.date32()),
    "times": pa.array([5, None, 6], pa.time64("us")),
    "timestamps": pa.array([0, None, 1], pa.timestamp("us", "Europe/London")),
    "far timestamps": pa.array([2**62, None, 1]).view(pa.timestamp("ms")),
    "no such zone": pa.array([0, None, 1], pa.timestamp("us", "No/Where")),
    "durations": pa.array([2**60, None, 1]).view(pa.duration("ms")),
}  # fmt: skip
TEXT_LIKE = {"strings", "large", "views", "binary", "large binary", "fixed", "bad strings", "dictionary"}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_any_type(tmp_path: Path, kind: str) -> None:
    good = pa.array(["x1", "x2", "x3"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": COLUMNS[kind]}), path)
    fates = stage(tmp_path / "text", path)
    assert len(fates.kept) + len(fates.refused) == 3
    assert bool(fates.kept) == (kind in TEXT_LIKE)
    for setting in ("id", "gold"):
        pq.write_table(pa.table({"text": good, "odd": COLUMNS[kind]}), path)
        fates = stage(tmp_path / setting, path, **{setting: "odd"})
        assert len(fates.kept) + len(fates.refused) == 3
        for row in fates.refused.values():
            assert row["reason"] in {"id": ("bad_id", "undecodable"), "gold": ("unknown_gold",)}[setting]
    for wanted in ("a", 1, True):
        try:
            stage(tmp_path / f"where-{wanted}", path, where={"odd": wanted})
        except ConfigError as error:
            assert kind in ("lists", "bad lists", "structs", "maps")
            one_line(error, "corpus.where", "'odd'", "single values")


@few
@given(st.data())
def test_mixed_columns_of_parquet(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    kinds = data.draw(st.fixed_dictionaries({name: st.sampled_from(sorted(COLUMNS)) for name in ("y", "id")}))
    picked = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=20))
    texts = data.draw(st.lists(st.text(max_size=5), min_size=len(picked), max_size=len(picked)))
    columns = {
        name: pa.concat_arrays([COLUMNS[kind].slice(at, 1) for at in picked]) for name, kind in kinds.items()
    }
    group = data.draw(st.integers(1, 5))
    pq.write_table(pa.table({"text": texts, **columns}), folder / "a.parquet", row_group_size=group)
    fates = stage(folder, folder / "a.parquet", gold="y", id="id")
    assert sorted(at for _, at in {**fates.kept, **fates.refused}) == list(range(len(picked)))


def test_columns_that_arrow_does_not_read_and_of_one_name(tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff"]).view(pa.string())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), values)
    pq.write_table(pa.table({"text": column}), tmp_path / "bad.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    for name, said in (
        ("bad.parquet", "cannot be read (Invalid UTF8"),
        ("a.parquet", "2 columns 'text'"),
        ("b.csv", "2 columns 'text'"),
    ):
        with pytest.raises(ConfigError) as caught:
            stage(tmp_path, tmp_path / name)
        one_line(caught.value, name, said)


@few
@given(st.integers(0, 2000), st.sampled_from(["parquet", "txt.gz", "jsonl.zst"]))
def test_truncated_files(tmp_path_factory: Any, left: int, kind: str) -> None:
    """A file that ends too early is named, however much is left; only an empty archive is an empty file."""
    folder = tmp_path_factory.mktemp("cut")
    path = folder / f"a.{kind}"
    texts = [f"text {n * n}" for n in range(2000)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=100)
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * left // 2001])
    try:
        fates = stage(folder, path)
    except ConfigError as error:
        one_line(error, f"a.{kind}", "cannot be read", "repair it or leave it out")
    else:
        assert not fates.kept
        assert path.stat().st_size == 0


@few
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4))
def test_damaged_archives(tmp_path_factory: Any, how: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(gzip.compress("\n".join(f"text {n * n}" for n in range(2000)).encode()))
    for place, value in how:
        content[place % len(content)] = value
    (folder / "a.txt.gz").write_bytes(content)
    try:
        stage(folder, folder / "a.txt.gz")
    except ConfigError as error:
        one_line(error, "a.txt.gz")


# With Ray


def config_of(uri: str, **source_settings: Any) -> Any:
    tree = {"corpus": {"uri": uri, **source_settings}, "labels": {"names": LABELS}}
    return parse_config({**tree, "student": {"model": "s"}, "teacher": {"model": "t"}})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
class TestIngest:
    def balanced(self, store: RunStore, rows: int) -> Counter[Any]:
        """Rows in are rows kept and rows in quarantine; returns the latter by reason."""
        index = store.read_json(EXAMPLES_INDEX)
        names = store.names("quarantine", ".parquet")
        refused = pa.concat_tables([store.read_table(f"quarantine/{name}") for name in names])
        places = set(zip(refused["source"].to_pylist(), refused["position"].to_pylist(), strict=True))
        assert len(places) == len(refused)
        assert index["rows_in"]["pool"] == rows
        assert rows == sum(shard["rows"] for shard in index["pool"]) + len(refused)
        reasons = Counter(refused["reason"].to_pylist())
        assert index["quarantined"]["pool"] == reasons
        return reasons

    def test_a_million_duplicates(self, tmp_path: Path) -> None:
        texts = pa.array(["the same"]).take(pa.array(np.zeros(1_000_000, dtype=np.int64)))
        for number in range(2):
            more = pa.array([f"another {number}"])
            table = pa.table({"text": pa.concat_arrays([more, texts.slice(0, 500_000), more])})
            pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=100_000)
        store = RunStore(str(tmp_path / "run"))
        examples = ingest(config_of(f"{tmp_path}/*.parquet"), store, lambda said: None)
        kept = examples.read(range(examples.n_rows))["text"].to_pylist()
        assert kept == ["another 0", "the same", "another 1"]
        assert self.balanced(store, 1_000_004) == {"duplicate": 1_000_001}

    def test_rot_of_all_kinds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("llkd_ray.corpus.sources.TASK_BYTES", 20_000)
        rng = np.random.default_rng(0)
        bad = [
            b'{"text": ', b'{"text": null}', b'{"text": [1]}', b'{"text": "\xff"}', b"[" * 5000,
            b'{"text": "\\ud800"}', rng.bytes(200).replace(b"\n", b"") + b"!", b'{"text": "good 7"}',
            b'{"text": "t", "id": {"a": 1}}',
        ]  # fmt: skip
        good = [json.dumps({"text": f"good {n}", "id": n}).encode() for n in range(500)]
        lines = good + [bad[n % len(bad)] for n in range(200)]
        lines = [lines[n] for n in rng.permutation(len(lines))]
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        store = RunStore(str(tmp_path / "run"))
        examples = ingest(config_of(f"{tmp_path}/a.jsonl", id="id", max_chars=100), store, lambda said: None)
        reasons = self.balanced(store, 700)
        assert set(reasons) == {"broken_line", "missing", "not_text", "undecodable", "bad_id", "duplicate"}
        assert reasons["duplicate"] == 22
        kept = list(dict.fromkeys(json.loads(line)["text"] for line in lines if b"good" in line))
        assert examples.read(range(examples.n_rows))["text"].to_pylist() == kept
        marks = {"duplicate": b'"good 7"', "bad_id": b'"id": {', "missing": b"null", "not_text": b"[1]"}
        for name in store.names("quarantine", ".parquet"):
            for row in store.read_table(f"quarantine/{name}").to_pylist():
                assert marks.get(row["reason"], b"") in lines[row["position"]]  # the line in the file
