"""Ingestion, whole: what is kept, what is refused, and that it comes out the same every time."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import Config
from llkd_ray.corpus import cleaning, sources
from llkd_ray.corpus.ingest import ingest
from llkd_ray.storage import tables as tables_module
from llkd_ray.storage.run_dir import EXAMPLES_INDEX, RunStore
from llkd_ray.storage.tables import Examples

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


def config_of(pool: dict[str, object], test: dict[str, object] | None = None) -> Config:
    tree = {"corpus": pool, "labels": {"names": ["no", "yes"]}, "student": {"model": "s"}}
    return parse_config({**tree, "teacher": {"model": "t"}, **({"test": test} if test else {})})


def quiet(message: str) -> None:
    """No words on progress."""


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(examples: Examples) -> list[str]:
    return examples.read(np.arange(examples.n_rows))["text"].to_pylist()


def quarantine(store: RunStore) -> list[dict[str, object]]:
    tables = [store.read_table(f"quarantine/{name}") for name in store.names("quarantine", ".parquet")]
    assert all(table.schema.equals(tables_module.QUARANTINE) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    words = ["one", "two", "three"]
    (tmp_path / "a.txt").write_text("\n".join(words))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(["text", *words]).encode()))
    lines = "".join(json.dumps({"text": word}) + "\n" for word in words)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "hub").mkdir()
    for word in words:
        pq.write_table(pa.table({"text": [word]}), tmp_path / "hub" / f"train-{words.index(word)}.parquet")
    tables = []
    for uri in ("a.txt", "a.csv.gz", "a.jsonl.*", "hub", f"hf://{tmp_path}/hub?split=train"):
        store = RunStore(str(tmp_path / f"run-{len(tables)}"))
        uri = uri if "://" in uri else f"{tmp_path}/{uri}"
        examples = ingest(config_of({"uri": uri}), store, quiet)
        assert (examples.n_pool, examples.n_test) == (3, 0)
        tables.append(examples.read([0, 1, 2]))
    assert tables[0]["text"].to_pylist() == words
    assert all(table.equals(tables[0]) for table in tables)


def test_labels_that_match_nothing_are_an_error_with_their_values(tmp_path: Path, store: RunStore) -> None:
    """A few are accidents, which go to quarantine; more of them are a mistake of the file or the config."""
    rows = [{"text": f"text {n}", "y": "no" if n % 2 else "perhaps"} for n in range(10)]
    config = config_of({"uri": jsonl(tmp_path / "pool.jsonl", rows), "gold": "y"})
    with pytest.raises(
        ConfigError, match=r"corpus\.gold: 5 of 10 values .* no label: 'perhaps' \(5\); labels\.names"
    ):
        ingest(config, store)
    assert not store.exists(EXAMPLES_INDEX)


def test_each_refusal_is_counted_and_kept_for_reading(
    tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "MAX_UNKNOWN_GOLD", 0.1)
    pool = tmp_path / "pool.jsonl"
    lines: list[bytes] = [
        b'{"text": " kept\\u0000 ", "y": "yes", "id": "a"}',
        b'{"text": "no gold", "y": null}',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": " \\u0000 "}',
        b'{"text": "caf\xe9"}',
        b'{"text": "longer than twenty characters"}',
        b'{"text": ',
        b'{"text": "odd", "y": "maybe"}',
        b'{"text": "kept"}',
        b'{"text": "in the test"}',
        b'{"text": "in the test"}',
    ]
    pool.write_bytes(b"\n".join(lines))
    test_rows = [("in the test", 1), ("kept not", None), ("in  the test", 0), ("in the test", 0)]
    test = jsonl(tmp_path / "test.jsonl", [{"text": text, "y": gold} for text, gold in test_rows])
    config = config_of(
        {"uri": str(pool), "gold": "y", "id": "id", "max_chars": 20}, {"uri": test, "gold": "y"}
    )
    said: list[str] = []
    examples = ingest(config, store, said.append)

    table = examples.read(np.arange(examples.n_rows))
    assert table.schema.equals(tables_module.NUMBERED_EXAMPLES)
    assert table["text"].to_pylist() == ["kept", "no gold", "in the test", "in  the test"]
    assert table["gold"].to_pylist() == [1, -1, 1, 0]
    assert table["id"].to_pylist()[0] == "a"
    assert (examples.n_pool, examples.n_test) == (2, 2)
    refused = {(Path(str(row["source"])).stem, row["position"]): row for row in quarantine(store)}
    of_pool = ["missing", "not_text", "empty", "undecodable", "too_long", "broken_line", "unknown_gold"]
    of_pool += ["duplicate", "in_test_set", "in_test_set"]
    reasons = {("pool", 2 + n): reason for n, reason in enumerate(of_pool)}
    reasons |= {("test", 1): "missing_gold", ("test", 3): "duplicate"}
    assert {place: row["reason"] for place, row in refused.items()} == reasons
    assert refused["pool", 6]["detail"] == "29 characters; corpus.max_chars is 20"
    starts = {5: "caf?", 7: '{"text": ', 10: "in the test"}
    assert {n: refused["pool", n]["start_of_text"] for n in starts} == starts
    index = store.read_json(EXAMPLES_INDEX)
    assert index["rows_in"] == {"pool": 12, "test": 4}
    assert index["quarantined"]["test"] == {"duplicate": 1, "missing_gold": 1}
    assert index["quarantined"]["pool"] == Counter(of_pool)
    assert said[-1].startswith("pool: 12 rows read, 2 kept, 10 in quarantine (broken_line 1, ")


def test_repeats_go_whatever_files_and_buckets_they_are_in(
    tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 1)  # a task, and so a shard, for every row group
    monkeypatch.setattr("llkd_ray.corpus.ingest.BUCKET_ROWS", 60)
    rng = np.random.default_rng(0)
    files = [[f"text {n}" for n in rng.integers(0, 120, size=50)] for _ in range(3)]
    files.insert(1, files[0])  # this shard vanishes
    for number, rows in enumerate(files):
        pq.write_table(pa.table({"text": rows}), tmp_path / f"{number}.parquet", row_group_size=25)
    (tmp_path / "test").mkdir()
    test_rows = {"text": [f"text {n}" for n in (5, 6, 7, 5)], "y": [0] * 4}
    pq.write_table(pa.table(test_rows), tmp_path / "test" / "test.parquet")
    test = {"uri": str(tmp_path / "test"), "gold": "y"}
    examples = ingest(config_of({"uri": f"{tmp_path}/*.parquet"}, test), store, quiet)

    in_test = ["text 5", "text 6", "text 7"]
    once = list(dict.fromkeys(text for rows in files for text in rows))
    assert texts(examples) == [text for text in once if text not in in_test] + in_test
    reasons = store.read_json(EXAMPLES_INDEX)["quarantined"]
    leaked = sum(text in in_test for rows in files for text in rows)
    assert leaked > 0
    assert reasons["pool"] == {"duplicate": 200 - leaked - examples.n_pool, "in_test_set": leaked}
    assert reasons["test"] == {"duplicate": 1}
    assert len(quarantine(store)) == 200 - examples.n_pool + 1
    shards = store.read_json(EXAMPLES_INDEX)["pool"]
    assert len(shards) < 8  # eight were staged
    assert store.names("examples") == sorted(
        ["index.json", "test-000000-00000.parquet", *(Path(shard["file"]).name for shard in shards)]
    )
    assert store.folders("examples") == []


@pytest.mark.slow
def test_same_input_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 1000)
    for number in range(6):
        rows = [{"text": f"text {number * 70 + n} \u00e9", "id": n} for n in range(100)]
        jsonl(tmp_path / f"{number}.jsonl", rows)
    contents = []
    for run in ("one", "two"):
        store = RunStore(str(tmp_path / run))
        ingest(config_of({"uri": f"{tmp_path}/*.jsonl", "id": "id"}), store, quiet)
        names = store.names("examples")
        contents.append({name: store.read_bytes(f"examples/{name}") for name in names})
        contents[-1]["quarantine"] = json.dumps(quarantine(store)).encode()
    assert len(contents[0]) > 6 * 3 + 2  # the files are cut, too
    assert contents[0] == contents[1]


def test_finished_ingestion_is_opened_and_a_half_one_starts_over(tmp_path: Path, store: RunStore) -> None:
    config = config_of({"uri": jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ""}])})
    for name in ("examples/pool-00007", "examples/staging/pool-9", "quarantine/pool-9"):
        store.write_bytes(f"{name}.parquet", b"left by a run that died")
    store.write_bytes("quarantine/teacher-0.parquet", b"not ours")
    assert texts(ingest(config, store, quiet)) == ["x"]
    assert store.names("examples") == ["index.json", "pool-000000-00000.parquet"]
    assert store.folders("examples") == []
    assert store.names("quarantine") == ["pool-000000-00000.parquet", "teacher-0.parquet"]

    (tmp_path / "a.jsonl").unlink()  # a finished one does not look at its source again
    again = ingest(config, store, quiet)
    assert (again.n_pool, texts(again)) == (1, ["x"])


def test_where_is_no_refusal_and_limit_counts_from_the_front(tmp_path: Path, store: RunStore) -> None:
    for number in range(3):
        rows = [{"text": f"text {number}-{n}", "fold": n % 2} for n in range(10)]
        jsonl(tmp_path / f"{number}.jsonl", [*rows, {"text": None, "fold": 1}])
    config = config_of({"uri": str(tmp_path / "*.jsonl"), "where": {"fold": 1}, "limit": 8})
    examples = ingest(config, store, quiet)
    assert texts(examples) == [f"text 0-{n}" for n in (1, 3, 5, 7, 9)] + ["text 1-1", "text 1-3"]
    index = store.read_json(EXAMPLES_INDEX)
    assert index["rows_in"] == {"pool": 8, "test": 0}
    assert index["quarantined"] == {"pool": {"missing": 1}, "test": {}}
    assert index["test"] == []


def mistake(config: Config, store: RunStore) -> str:
    with pytest.raises(ConfigError) as caught:
        ingest(config, store, quiet)
    assert type(caught.value) is ConfigError  # not a Ray error that is also a ConfigError
    assert not store.exists(EXAMPLES_INDEX)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_before_and_while_reading_are_plain(tmp_path: Path, store: RunStore) -> None:
    good = jsonl(tmp_path / "a.jsonl", [{"text": "x", "y": 0}])
    message = mistake(config_of({"uri": good}, {"uri": good, "gold": "label"}), store)
    assert message.startswith("test.gold: there is no column 'label'")
    content = gzip.compress("\n".join(f"text {n * n}" for n in range(9999)).encode())
    (tmp_path / "cut.txt.gz").write_bytes(content[:-100])
    message = mistake(config_of({"uri": f"{tmp_path}/cut.txt.gz"}), store)
    assert message.startswith("corpus.uri: ")
    assert "cut.txt.gz' cannot be read (" in message


def test_nothing_kept(tmp_path: Path, store: RunStore) -> None:
    bad = jsonl(tmp_path / "bad.jsonl", [{"text": ""}, {"text": None}, {"text": ""}])
    message = mistake(config_of({"uri": bad}), store)
    assert "gave no usable text: 3 rows read, in quarantine: empty 2, missing 1" in message
    good = jsonl(tmp_path / "good.jsonl", [{"text": "x", "y": 0}])
    message = mistake(config_of({"uri": good}, {"uri": good, "gold": "y"}), store)
    assert "gave no usable text: 1 rows read, in quarantine: in_test_set 1" in message
    assert message.startswith("corpus.uri: ")
    message = mistake(config_of({"uri": good}, {"uri": bad, "gold": "text"}), store)
    assert message.startswith("test.uri: ")
    message = mistake(config_of({"uri": good, "where": {"y": 3}}), store)
    assert "holds no rows: is any row as corpus.where asks?" in message


def test_run_directory_may_be_a_uri(tmp_path: Path) -> None:
    uri = jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "x"}, {"text": "y"}])
    store = RunStore(f"file://{tmp_path}/run")
    assert texts(ingest(config_of({"uri": f"file://{uri}"}), store, quiet)) == ["x", "y"]
    assert quarantine(store)[0]["source"] == f"file://{uri}"


def test_a_large_csv_is_read_in_pieces_and_its_positions_are_true(
    tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f'{n},"text {n},\nwith ""quotes"" and\n\nbreaks"' for n in range(300)]
    lines[77], lines[222], lines[290] = "77,", "222,one,too many", '290,"never ""closed'
    lines[100] = lines[99]
    (tmp_path / "a.csv").write_text("\n".join(["id,text", *lines]))
    monkeypatch.setattr(sources, "TASK_BYTES", 3000)
    said: list[str] = []
    examples = ingest(config_of({"uri": f"{tmp_path}/a.csv", "id": "id"}), store, said.append)
    assert said[:2] == [
        "finding where 1 large file(s) can be cut, in 5 task(s)",
        "reading the corpus in 5 task(s)",
    ]
    refused = {row["position"]: row["reason"] for row in quarantine(store)}
    odd = {77: "empty", 100: "duplicate", 222: "broken_line"}
    assert {place: refused.pop(place) for place in odd} == odd
    # What is never closed takes rows behind it along, until a quote stands where none can.
    assert set(refused.values()) == {"broken_line"}
    assert min(refused) == 290
    ids = examples.read(range(examples.n_rows))["id"].to_pylist()
    assert ids[:287] == [str(n) for n in range(290) if n not in (77, 100, 222)]
