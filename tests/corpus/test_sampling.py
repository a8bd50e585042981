"""Rows are counted and drawn without reading everything; what is a guess says so."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import sampling, sources
from llkd_ray.corpus.sampling import Rows, count_rows, draw

NAMES = ["no", "yes"]


def look(n: int = 50, **settings):
    source = SourceConfig(**settings)
    units = sources.plan(source, "corpus")
    return count_rows(units, source, "corpus"), draw(units, source, "corpus", NAMES, n)


def write_parquet(path: Path, start: int, stop: int, group: int = 10) -> Path:
    numbers = range(start, stop)
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"text": [f"text {n}" for n in numbers], "part": [n % 4 for n in numbers]})
    pq.write_table(table, path, row_group_size=group)
    return path


def numbers(sample) -> list[int]:
    return sorted(int(example.text.split()[1]) for example in sample.kept)


class TestParquet:
    def test_rows_are_exact_and_the_sample_is_spread(self, tmp_path):
        for file in range(3):
            write_parquet(tmp_path / f"{file}.parquet", 200 * file, 200 * file + 200)
        rows, sample = look(uri=str(tmp_path))
        assert rows == Rows(600, True)
        assert sample.parts == 20
        found = numbers(sample)
        assert len(found) == 50
        assert found[0] == 0
        assert found[-1] >= 540, "the last part is among them"
        assert max(b - a for a, b in pairwise(found)) <= 30

    def test_it_is_spread_inside_of_one_row_group(self, tmp_path, monkeypatch):
        write_parquet(tmp_path / "x.parquet", 0, 999, group=10_000)
        _, sample = look(n=500, uri=str(tmp_path))
        found = numbers(sample)
        assert len(found) == 500
        assert (found[0], found[-1] >= 990) == (0, True)
        assert max(b - a for a, b in pairwise(found)) == 2
        monkeypatch.setattr(sampling, "SCAN_BYTES", 1000)
        assert numbers(look(uri=str(tmp_path))[1])[-1] < 200, "no more is read than that"

    def test_a_small_source_is_read_whole_and_a_limit_and_where_are_reckoned_with(self, tmp_path):
        for file in range(60):
            write_parquet(tmp_path / f"{file:02}.parquet", 2 * file, 2 * file + 2)
        assert numbers(look(n=500, uri=str(tmp_path))[1]) == list(range(120))
        rows, sample = look(uri=str(tmp_path), limit=15)
        assert rows == Rows(15, True)
        assert numbers(sample) == list(range(15))
        one = str(write_parquet(tmp_path / "one" / "x.parquet", 0, 1000, group=100))
        rows, sample = look(uri=one, where={"part": 1})
        assert rows == Rows(1000, True)
        assert all(number % 4 == 1 for number in numbers(sample))
        assert rows.count * sample.usable == pytest.approx(250)


def lines(n: int) -> list[str]:
    return [json.dumps({"text": f"text {number} " + "and more " * (number % 7)}) for number in range(n)]


class TestLines:
    @pytest.mark.parametrize(
        ("name", "content", "count"),
        [
            ("x.jsonl", "\n".join(lines(40)) + "\n", 40),
            ("x.jsonl", "\n".join(lines(40)), 40),
            ("x.csv", "text\n" + "\n".join(f"text {n}" for n in range(7)), 7),
            ("x.txt", "", 0),
        ],
        ids=["ended", "not ended", "a header is no row", "empty"],
    )
    def test_a_file_that_is_seen_whole_is_counted(self, tmp_path, name, content, count):
        (tmp_path / name).write_text(content)
        rows, sample = look(uri=str(tmp_path))
        assert rows == Rows(count, False)
        assert (len(sample.kept), sample.usable) == (count, float(count > 0))

    def test_a_large_file_is_estimated_and_its_sample_is_spread(self, tmp_path, monkeypatch):
        (tmp_path / "x.jsonl").write_text("\n".join(lines(2000)) + "\n")
        found = numbers(look(uri=str(tmp_path))[1])
        assert len(found) == 50
        assert found[-1] > 1700
        monkeypatch.setattr(sampling, "LOOK_BYTES", 2000)
        rows, _ = look(uri=str(tmp_path))
        assert not rows.is_exact
        assert rows.count == pytest.approx(2000, rel=0.15)

    @pytest.mark.parametrize("kind", ["gz", "zst"])
    def test_a_compressed_file_is_estimated(self, tmp_path, monkeypatch, kind):
        content = ("\n".join(lines(20_000)) + "\n").encode()
        packed = gzip.compress(content) if kind == "gz" else pa.compress(content, codec="zstd", asbytes=True)
        (tmp_path / f"x.jsonl.{kind}").write_bytes(packed)
        whole, sample = look(uri=str(tmp_path))
        assert (whole.count, len(sample.kept)) == (20_000, 50)
        if kind == "gz":  # a zstd block of 128 KiB comes as one
            monkeypatch.setattr(sampling, "LOOK_BYTES", len(packed) // 3)
            part, _ = look(uri=str(tmp_path))
            assert part.count == pytest.approx(20_000, rel=0.2)


def test_refusals_and_repeats_are_counted(tmp_path):
    rows = ["a", "b", "", "a", "c"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet")
    _, sample = look(uri=str(tmp_path))
    assert [example.text for example in sample.kept] == ["a", "b", "c"]
    assert dict(sample.refused) == {"empty": 1, "duplicate": 1}
    assert (sample.read, sample.usable) == (5, 0.6)
