"""Pieces: every row in one of them or in quarantine, cut alike each time; none that is done comes again."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from toys import write_corpus

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.sources import pack, plan
from llkd_ray.prediction import pieces
from llkd_ray.prediction.pieces import (
    CORPUS,
    GOLD,
    TEXTS,
    Task,
    progress,
    read_pieces,
    read_tasks,
    write_tasks,
)
from llkd_ray.storage.run_dir import RunStore

LABELS = ("sea", "kitchen", "garden")


def task_of(source: SourceConfig, part: str = CORPUS) -> Task:
    (units,) = pack(plan(source, "corpus"))
    return Task(part, 0, tuple(units))


def read(task: Task, source: SourceConfig, store: RunStore, rows: int, done: frozenset[int] = frozenset()):
    return list(read_pieces(task, source, LABELS, store, rows, done))


def of_text(folder: Path, content: str) -> SourceConfig:
    (folder / "c.txt").write_text(content)
    return SourceConfig(uri=str(folder / "c.txt"))


lines = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(st.text(max_size=8), st.none(), st.integers())}).map(json.dumps),
    st.sampled_from(["{broken", "[1]", "", '{"other": 1}']),
)


@given(found=st.lists(lines, min_size=1, max_size=30), rows=st.integers(1, 7))
def test_every_row_is_in_a_piece_or_in_quarantine(tmp_path_factory, found, rows):
    folder = tmp_path_factory.mktemp("rows")
    file = folder / "corpus.jsonl"
    file.write_text('{"text": "first"}\n' + "\n".join(found) + "\n", encoding="utf-8")
    source, store = SourceConfig(uri=str(file)), RunStore(str(folder / "out"))
    task = task_of(source)
    tables = [table for _, table in read(task, source, store, rows)]
    refused = [store.read_table(f"quarantine/{name}") for name in store.names("quarantine")]
    places = sorted(place for table in [*tables, *refused] for place in table["position"].to_pylist())
    assert places == [0, *(n for n, line in enumerate(found, 1) if line.strip())]
    note = progress(store, CORPUS).notes[0]
    assert note.rows_in == len(places)
    assert note.pieces == tuple(table.num_rows for table in tables)
    assert all(size == rows for size in note.pieces[:-1])
    assert sum(note.reasons.values()) == sum(table.num_rows for table in refused)


def test_what_is_done_does_not_come_again_and_the_rest_comes_alike(tmp_path):
    source = SourceConfig(uri=str(write_corpus(tmp_path / "pool.parquet", 50)), id="id")
    store, task = RunStore(str(tmp_path / "out")), task_of(source)
    first = dict(read(task, source, store, 8))
    assert list(first) == [0, 1, 2, 3, 4, 5, 6]
    again = dict(read(task, source, store, 8, frozenset({0, 2, 6})))
    assert list(again) == [1, 3, 4, 5]
    assert all(again[number].equals(first[number]) for number in again)


def test_texts_come_with_their_ids_and_places_and_equal_ones_all_stay(tmp_path):
    file = write_corpus(tmp_path / "pool.parquet", 5)
    source, store = SourceConfig(uri=str(file), id="id"), RunStore(str(tmp_path / "out"))
    ((_, table),) = read(task_of(source), source, store, 8)
    assert table.schema == TEXTS
    written = pq.read_table(file, columns=["id", "text"])
    assert table.select(["id", "text"]).to_pylist() == written.to_pylist()
    assert table["position"].to_pylist() == [0, 1, 2, 3, 4]
    assert set(table["source"].to_pylist()) == {str(file)}
    source = of_text(tmp_path, "the same\n" * 3)
    ((_, table),) = read(task_of(source), source, RunStore(str(tmp_path / "same")), 8)
    assert table.num_rows == 3
    assert len(set(table["id"].to_pylist())) == 1  # ids as ingestion makes them: of the text


def test_gold_without_a_true_label_goes_to_quarantine(tmp_path):
    file = tmp_path / "gold.jsonl"
    file.write_text(
        '{"text": "a", "label": "sea"}\n{"text": "b"}\n{"text": "c", "label": "moon"}\n'
        '{"text": "d", "label": 2}\n'
    )
    source, store = SourceConfig(uri=str(file), gold="label"), RunStore(str(tmp_path / "out"))
    ((_, table),) = read(task_of(source, GOLD), source, store, 8)
    assert table["gold"].to_pylist() == [0, 2]
    assert progress(store, GOLD).notes[0].reasons == {"missing_gold": 1, "unknown_gold": 1}
    assert progress(store, CORPUS).notes == {}


def test_long_texts_fill_a_piece_before_its_rows_do_and_a_limit_counts_from_the_front(tmp_path, monkeypatch):
    source = SourceConfig(uri=str(write_corpus(tmp_path / "pool.parquet", 20)), limit=7)
    store = RunStore(str(tmp_path / "out"))
    assert [table.num_rows for _, table in read(task_of(source), source, store, 5)] == [5, 2]
    monkeypatch.setattr(pieces, "PIECE_CHARS", 100)
    source = of_text(tmp_path, f"{'x' * 60}\n" * 4)
    assert [table.num_rows for _, table in read(task_of(source), source, store, 8)] == [2, 2]


def test_a_task_is_done_when_its_note_and_all_its_pieces_are_there(tmp_path):
    source = SourceConfig(uri=str(write_corpus(tmp_path / "pool.parquet", 20)))
    store, task = RunStore(str(tmp_path / "out")), task_of(source)
    for number, table in islice(read_pieces(task, source, LABELS, store, 8), 2):
        store.write_table(task.piece_file(number), table)
    assert not progress(store, CORPUS).is_done(task)
    assert progress(store, CORPUS).pieces_of(task) == {0, 1}
    found = dict(read(task, source, store, 8, progress(store, CORPUS).pieces_of(task)))
    assert list(found) == [2]
    assert not progress(store, CORPUS).is_done(task)  # the note is there, the last piece is not
    store.write_table(task.piece_file(2), found[2])
    assert progress(store, CORPUS).is_done(task)
    (tmp_path / "out/predictions/piece-000000-00007.parquet.0123.tmp").touch()  # an unfinished file is none
    assert progress(store, CORPUS).pieces == {0: {0, 1, 2}}
    assert progress(store, GOLD).pieces == {}, "the files of both parts are apart"


def test_the_cut_is_kept(tmp_path):
    store = RunStore(str(tmp_path / "out"))
    assert read_tasks(store, CORPUS) is None
    units = plan(of_text(tmp_path, "one\ntwo\n"), "corpus")
    packs = [[replace(units[0], span=(0, 4))], [replace(units[0], span=(4, 8), first=1)]]
    assert write_tasks(store, CORPUS, packs) == read_tasks(store, CORPUS)
