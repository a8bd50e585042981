"""File readers: one unit of a corpus to raw rows, one at a time, in bounded memory. Needs no Ray.

Nothing is cleaned here: a broken row comes out as a broken row. What to read is planned in
:mod:`llkd_ray.corpus.sources`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.storage.run_dir import open_filesystem

BATCH_ROWS = 1024  # rows turned into Python objects at a time, at most
BATCH_BYTES = 32 << 20  # of such rows, where a parquet file tells
MIN_LINE_BYTES = 16 << 20  # the longest line read whole, unless max_chars asks for longer ones
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value in a file that Python cannot hold, such as a date in the year 300,000."""

    kind: str


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
    """What is read in one go: a file or a piece of it, some row groups of parquet, a share of a hub's set."""

    source: str  # as people know it
    kind: str  # parquet, jsonl, json, ndjson, csv, tsv, txt or hf
    size: int  # bytes, roughly
    base: str = ""  # opens the file's filesystem
    path: str = ""  # on that filesystem
    part: tuple[int, int] = (0, 1)  # parquet: row groups [start, stop); hf: (index, of how many)
    span: tuple[int, int] | None = None  # file of lines: bytes [start, stop), whole records; None: all of it
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
                for position, (line, cut, _) in enumerate(_lines(unit, source.max_chars), unit.first):
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
                meta = file.metadata.row_group(group)
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // (meta.total_byte_size or 1)))
                for batch in file.iter_batches(rows, row_groups=[group], columns=wanted_columns(source)):
                    yield from _table_rows(pa.Table.from_batches([batch]), start, source)
                    start += batch.num_rows
            position += file.metadata.row_group(group).num_rows


def _table_rows(table: pa.Table, first: int, source: SourceConfig) -> Iterator[RawRow]:
    """The wanted rows of a table whose first row stands at ``first``."""
    blank = [None] * table.num_rows
    texts = _values(table[source.text])
    golds = blank if source.gold is None else _values(table[source.gold])
    ids = blank if source.id is None else _values(table[source.id])
    # Picked in Python: Arrow cannot take rows of every type, and takes those of string views wrongly.
    for at in np.flatnonzero(passing(table, source.where)).tolist():
        yield RawRow(first + at, texts[at], golds[at], ids[at])


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values. Arrow does not check strings when reading; bad bytes become surrogates."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # bad bytes, dates that Python does not know
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, (pa.StringScalar, pa.LargeStringScalar, pa.StringViewScalar)):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError):
        pass
    return Unreadable(str(scalar.type))


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
    if value is None or isinstance(value, (list, dict, Unreadable)):
        return False
    if isinstance(value, str) and isinstance(wanted, bool):
        return value.strip().lower() == str(wanted).lower()
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted or (isinstance(wanted, str) and str(value).lower() == wanted.lower())
    return value == wanted or str(value) == str(wanted)


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


def _lines(unit: Unit, max_chars: int) -> Iterator[tuple[str, str, int]]:
    """Text without its end, "" or what is wrong with the line, and the byte behind it (decompressed).

    Read as bytes and decoded line by line: bad bytes become surrogates and spoil one line. A line too
    long to hold is cut, its rest passed over.
    """
    # A character takes at most 12 bytes in JSON (a pair of \\u escapes), so no text is cut unseen.
    limit = max(MIN_LINE_BYTES, 16 * max_chars)
    at, stop = unit.span or (0, None)
    with _open_at(unit, at) as stream:
        while (stop is None or at < stop) and (line := stream.readline(limit)):
            begin, wrong = at, ""
            at += len(line)
            if len(line) == limit and not line.endswith(b"\n"):
                wrong = f"the line is longer than {limit} bytes"
                while rest := stream.readline(limit):
                    at += len(rest)
                    if rest.endswith(b"\n"):
                        break
            if begin == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"), wrong, at


def _open_at(unit: Unit, start: int) -> io.BufferedReader:
    """The file's bytes, decompressed; a piece's, from ``start`` on, as only plain files have pieces."""
    fs, _ = open_filesystem(unit.base)
    if unit.span is None:
        file = fs.open_input_stream(unit.path, compression=compression_of(unit))
    else:
        file = fs.open_input_file(unit.path)
        file.seek(start)
    return io.BufferedReader(file, 1 << 20)


def compression_of(unit: Unit) -> str | None:
    """How a file of lines is compressed, by the end of its name."""
    return COMPRESSIONS.get(unit.path.lower().rpartition(".")[2])


def jsonl_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, Any, str, str]]:
    """Position, value, the line as it is, and "" or what is wrong with it; blank lines are left out."""
    for position, (line, wrong, _) in enumerate(_lines(unit, max_chars), unit.first):
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


def csv_steps(unit: Unit, max_chars: int) -> Iterator[tuple[list[str], str, int]]:
    """Fields, "" or what is wrong, and the byte behind the record; a blank line has neither of the two.

    Behind every step the reader is as fresh as at a file's start, so a piece may begin there.
    """
    csv.field_size_limit(max(MIN_LINE_BYTES, 16 * max_chars))
    cut, end = "", 0

    def feed() -> Iterator[str]:
        nonlocal cut, end
        for line, wrong, end in _lines(unit, max_chars):  # noqa: B007
            cut = cut or wrong
            yield line + "\n"

    # Strict: a stray quote breaks its own record and does not silently swallow the next ones.
    reader = csv.reader(feed(), delimiter="\t" if unit.kind == "tsv" else ",", strict=True)
    while True:
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cut = cut or str(error)
        yield fields, cut, end
        cut = ""


def csv_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, list[str], str]]:
    """Number (-1 for the header), fields, and "" or what is wrong; blank lines are left out."""
    has_header = unit.span is None or unit.span[0] == 0
    steps = ((fields, wrong) for fields, wrong, _ in csv_steps(unit, max_chars) if fields or wrong)
    for number, (fields, wrong) in enumerate(steps, -1 if has_header else unit.first):
        yield number, fields, wrong


def _csv_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    header = next(csv_records(replace(unit, span=None), source.max_chars))[1]
    column = {name: place for place, name in enumerate(header)}
    for number, fields, wrong in csv_records(unit, source.max_chars):
        if number < 0:
            continue
        if not wrong and len(fields) != len(header):
            wrong = f"{len(fields)} fields, but the header has {len(header)}"
        if wrong:
            yield RawRow(number, ",".join(fields), broken=wrong)
        elif all(_equals(fields[column[name]], wanted) for name, wanted in source.where.items()):
            gold = None if source.gold is None else fields[column[source.gold]]
            id_ = None if source.id is None else fields[column[source.id]]
            yield RawRow(number, fields[column[source.text]], gold, id_)
