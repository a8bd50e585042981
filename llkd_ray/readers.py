"""File readers: one unit of a corpus to raw rows, one at a time, in bounded memory. Needs no Ray.

Nothing is cleaned here: a broken row comes out as a broken row. What to read is planned in
:mod:`llkd_ray.sources`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config import ConfigError, SourceConfig
from llkd_ray.store import open_filesystem

BATCH_ROWS = 1024  # rows turned into Python objects at a time
MIN_LINE_BYTES = 16 << 20  # the longest line read whole, unless max_chars asks for longer ones
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}


class RawRow(NamedTuple):
    """One row as it was read. ``position``: the 0-based row in its source (line, for jsonl and txt).

    Text read from bytes that are not UTF-8 holds surrogates. Where ``broken`` says what is wrong with
    the row, ``text`` is what was read of it.
    """

    position: int
    text: object
    gold: object = None
    id: object = None
    broken: str = ""


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a file, some row groups of a parquet file, or a share of a hub data set."""

    source: str  # as people know it
    kind: str  # parquet, jsonl, json, ndjson, csv, tsv, txt or hf
    size: int  # bytes, roughly
    base: str = ""  # opens the file's filesystem
    path: str = ""  # on that filesystem
    part: tuple[int, int] = (0, 1)  # parquet: row groups [start, stop); hf: (index, of how many)
    first: int = 0  # position of the first row


def read_rows(unit: Unit, source: SourceConfig, field: str, labels: Sequence[str]) -> Iterator[RawRow]:
    """The rows of one unit that pass ``source.where``, in order.

    Blank lines of jsonl and csv files are no rows. ``labels`` are the label names: a hub data set that
    knows its classes by the same names gives names, not its own indices. Raises :class:`ConfigError`
    where the file cannot be read to its end.
    """
    with reading(unit, field):
        match unit.kind:
            case "parquet":
                yield from _parquet_rows(unit, source)
            case "hf":
                yield from _hub_rows(unit, source, labels)
            case "csv" | "tsv":
                yield from _csv_rows(unit, source)
            case "txt":
                for position, line, cut in _lines(unit, source.max_chars):
                    yield RawRow(position, line, broken=cut)
            case _:
                yield from _jsonl_rows(unit, source)


@contextmanager
def reading(unit: Unit, field: str) -> Iterator[None]:
    """Turn what goes wrong while a unit is read into a :class:`ConfigError` that names it."""
    # The hub library raises errors of many kinds, ValueError and its own among them.
    expected = Exception if unit.kind == "hf" else (OSError, EOFError, pa.ArrowException, csv.Error)
    try:
        yield
    except ConfigError:
        raise
    except expected as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{field}.uri: {unit.source!r} cannot be read ({reason}): repair it or leave it out"
        ) from error


def wanted_columns(source: SourceConfig) -> list[str]:
    names = (source.text, source.gold, source.id, *source.where)
    return list(dict.fromkeys(name for name in names if name is not None))


# Parquet and hub data sets


def open_parquet(unit: Unit) -> pq.ParquetFile:
    fs, _ = open_filesystem(unit.base)
    # A buffered stream reads page by page, so a large row group need not fit into memory.
    return pq.ParquetFile(unit.path, filesystem=fs, buffer_size=1 << 20, pre_buffer=False)


def _parquet_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    with open_parquet(unit) as file:
        position = unit.first
        for group in range(*unit.part):
            # The texts of a row group are read only where one of its rows is wanted.
            filters = file.read_row_group(group, columns=list(source.where)) if source.where else None
            if filters is None or passing(filters, source.where).any():
                start = position
                for batch in file.iter_batches(
                    BATCH_ROWS, row_groups=[group], columns=wanted_columns(source)
                ):
                    yield from _table_rows(pa.Table.from_batches([batch]), start, source)
                    start += batch.num_rows
            position += file.metadata.row_group(group).num_rows


def _table_rows(table: pa.Table, first: int, source: SourceConfig) -> Iterator[RawRow]:
    """The wanted rows of a table whose first row stands at ``first``."""
    kept = np.flatnonzero(passing(table, source.where))
    if kept.size < table.num_rows:
        table = table.take(pa.array(kept))
    blank = [None] * table.num_rows
    texts = _values(table[source.text])
    golds = blank if source.gold is None else _values(table[source.gold])
    ids = blank if source.id is None else _values(table[source.id])
    for position, text, gold, id_ in zip((kept + first).tolist(), texts, golds, ids, strict=True):
        yield RawRow(position, text, gold, id_)


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values. Arrow does not check strings when reading; bad bytes become surrogates."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if one is None else one.decode("utf-8", "surrogateescape") for one in raw]


def passing(table: pa.Table, where: dict[str, Any]) -> np.ndarray:
    """bool[rows]: the rows whose columns equal the wanted values; each distinct value is compared once."""
    mask = np.ones(table.num_rows, dtype=bool)
    for name, wanted in where.items():
        column = table[name].combine_chunks()
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        fits = np.array([*(_equals(value, wanted) for value in _values(encoded.dictionary)), False])
        mask &= fits[encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy()]
    return mask


def _equals(value: object, wanted: str | int | bool) -> bool:
    """Whether a value is the wanted one; a csv has only strings, so ``3`` equals ``"3"``."""
    if isinstance(value, str) and isinstance(wanted, bool):
        return value.strip().lower() == str(wanted).lower()
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted or (isinstance(wanted, str) and str(value).lower() == wanted.lower())
    return value == wanted or (value is not None and str(value) == str(wanted))


def open_hub(unit: Unit) -> Any:
    """The streaming data set behind ``hf://NAME?split=…&config=…&revision=…``."""
    import datasets  # slow to import, and only needed here

    name, _, query = unit.source.removeprefix("hf://").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    return datasets.load_dataset(
        name,
        options.get("config"),
        split=options.get("split", "train"),
        revision=options.get("revision"),
        streaming=True,
    )


def _hub_rows(unit: Unit, source: SourceConfig, labels: Sequence[str]) -> Iterator[RawRow]:
    data = open_hub(unit)
    classes = getattr((data.features or {}).get(source.gold), "names", None)
    named: list[str] = list(classes) if classes and set(classes) <= set(labels) else []
    index, count = unit.part
    data = data.select_columns(wanted_columns(source)).shard(num_shards=count, index=index)
    position = 0
    for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in _table_rows(table, position, source):
            if isinstance(row.gold, int) and 0 <= row.gold < len(named):
                row = row._replace(gold=named[row.gold])
            yield row
        position += table.num_rows


# Files of lines


def _lines(unit: Unit, max_chars: int) -> Iterator[tuple[int, str, str]]:
    """Position, text without its end, and "" or what is wrong with the line.

    Read as bytes and decoded line by line: bad bytes become surrogates and spoil one line. A line too
    long to hold is cut, its rest passed over.
    """
    # A character takes at most 12 bytes in JSON (a pair of \\u escapes), so no text is cut unseen.
    limit = max(MIN_LINE_BYTES, 16 * max_chars)
    fs, _ = open_filesystem(unit.base)
    compression = COMPRESSIONS.get(unit.path.lower().rpartition(".")[2])
    with io.BufferedReader(fs.open_input_stream(unit.path, compression=compression), 1 << 20) as stream:
        position = 0
        while line := stream.readline(limit):
            wrong = ""
            if len(line) == limit and not line.endswith(b"\n"):
                wrong = f"the line is longer than {limit} bytes"
                while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                    pass
            if position == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield position, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"), wrong
            position += 1


def jsonl_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, Any, str, str]]:
    """Position, value, the line as it is, and "" or what is wrong with it; blank lines are left out."""
    for position, line, wrong in _lines(unit, max_chars):
        if line.strip():
            record = None
            if not wrong:
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        wrong = f"the line holds a {type(record).__name__}, not an object"
                except (ValueError, RecursionError) as error:
                    wrong = f"the line is not JSON: {error}"
            yield position, record, line, wrong


def _jsonl_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    for position, record, line, wrong in jsonl_records(unit, source.max_chars):
        if wrong:
            yield RawRow(position, line, broken=wrong)
        elif all(_equals(record.get(name), wanted) for name, wanted in source.where.items()):
            gold = None if source.gold is None else record.get(source.gold)
            id_ = None if source.id is None else record.get(source.id)
            yield RawRow(position, record.get(source.text), gold, id_)


def csv_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, list[str], str]]:
    """Number (-1 for the header), fields, and "" or what is wrong; blank lines are left out."""
    csv.field_size_limit(max(MIN_LINE_BYTES, 16 * max_chars))
    cut = ""

    def feed() -> Iterator[str]:
        nonlocal cut
        for _, line, wrong in _lines(unit, max_chars):
            cut = cut or wrong
            yield line + "\n"

    # Strict: a stray quote breaks its own record and does not silently swallow the next ones.
    reader = csv.reader(feed(), delimiter="\t" if unit.kind == "tsv" else ",", strict=True)
    number = -1
    while True:
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cut = cut or str(error)
        if fields or cut:
            yield number, fields, cut
            number, cut = number + 1, ""


def _csv_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    records = csv_records(unit, source.max_chars)
    header = next(records)[1]
    column = {name: place for place, name in enumerate(header)}
    for number, fields, wrong in records:
        if not wrong and len(fields) != len(header):
            wrong = f"{len(fields)} fields, but the header has {len(header)}"
        if wrong:
            yield RawRow(number, ",".join(fields), broken=wrong)
        elif all(_equals(fields[column[name]], wanted) for name, wanted in source.where.items()):
            gold = None if source.gold is None else fields[column[source.gold]]
            id_ = None if source.id is None else fields[column[source.id]]
            yield RawRow(number, fields[column[source.text]], gold, id_)
