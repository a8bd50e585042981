"""Turns a raw row into an example or a refusal with its reason. Pure functions, one row at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.readers import RawRow, Unreadable

START_CHARS = 200  # characters of a refused text that the quarantine keeps
NO_GOLD = -1
UNKNOWN_GOLD = "unknown_gold"
MAX_UNKNOWN_GOLD = 0.01  # share of rows
VALUES_SHOWN = 5
# Line breaks that are control characters become line feeds; removing them would join two words.
_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# Lists and objects may be too deeply nested for Python's own repr, and as large as a line.
_IN_SHORT = reprlib.Repr()
_IN_SHORT.maxstring = _IN_SHORT.maxother = START_CHARS


class Refusal(NamedTuple):
    """Why a row is not used. ``reason`` is a one-word key that is counted, ``detail`` is for people."""

    reason: str
    detail: str = ""


def text_hash(text: str) -> int:
    """A 64-bit hash that identifies equal texts: duplicates, and texts that earlier runs labelled."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Example(NamedTuple):
    """A row of EXAMPLES."""

    id: str
    text: str
    gold: int
    hash: int
    """The :func:`text_hash` of the text."""


def clean_text(value: object, max_chars: int, field: str = "corpus") -> str | Refusal:
    """Remove control characters (except tab and line feed), normalise to NFC and strip outer white space.

    ``value`` may be of any type; bytes are read as UTF-8, and surrogates count as bytes that are not UTF-8.
    Refusal reasons: missing, not_text, undecodable, empty, too_long. The function is idempotent.
    """
    if value is None:
        return Refusal("missing")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        return Refusal("not_text", f"a value of type {type(value).__name__}")
    text = value
    if not text.isascii() and (wrong := _undecodable(text)):
        return Refusal("undecodable", wrong)
    if _CONTROLS.search(text):
        text = _CONTROLS.sub("", _BREAKS.sub("\n", text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = text.strip()
    if not text:
        return Refusal("empty")
    if len(text) > max_chars:
        return Refusal("too_long", f"{len(text)} characters; {field}.max_chars is {max_chars}")
    return text


def _undecodable(text: str) -> str:
    """Describe the first character that cannot be encoded as UTF-8; "" if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        return f"{what} at character {error.start}"
    return ""


def start_of_text(value: object) -> str:
    """The first START_CHARS characters of the value that was read, as valid UTF-8."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value[: 4 * START_CHARS].decode("utf-8", "replace")
    text = value if isinstance(value, str) else _IN_SHORT.repr(value)
    return text[:START_CHARS].encode("utf-8", "replace").decode()


def as_text(value: object) -> str | None:
    """A value of any column as valid text; None for null. Lists and objects become JSON."""
    if value is None or isinstance(value, Unreadable) or value != value:
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return str(value).encode("utf-8", "replace").decode()


class GoldNames:
    """Maps a gold value to a class index.

    A string is a label name, without outer white space and, where that is unambiguous, in any case. A
    number, or a string of digits, is a 0-based index. If some label names are numbers themselves, it is a
    name instead, so that a rating from 1 to 5 is never read as an index.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: index for index, name in enumerate(names)}
        folded = Counter(map(_fold, names))
        self._folded = {_fold(name): index for index, name in enumerate(names) if folded[_fold(name)] == 1}
        self._numbers_are_names = any(name.strip().isdecimal() for name in names)

    def index(self, value: object) -> int | Refusal | None:
        """The index of the class; None for null, NaN and blank values; a Refusal for unknown values."""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        name = ""
        if isinstance(value, str):
            name = value.strip()
            if not name:
                return None
        elif (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()  # pandas: integers with missing values
        ):
            name = str(int(value)) if abs(value) < 1e9 else ""
        found = self._index.get(value) if isinstance(value, str) else None
        if found is None and (isinstance(value, str) or self._numbers_are_names):
            found = self._index.get(name, self._folded.get(_fold(name)))
        if found is None and not self._numbers_are_names and name.isdecimal() and len(name) < 10:
            found = int(name) if int(name) < len(self._index) else None
        if found is None:
            return Refusal(UNKNOWN_GOLD, f"{show_gold(value)} is neither a name nor an index of labels.names")
        return found


def _fold(name: str) -> str:
    return name.strip().casefold()


def show_gold(value: object) -> str:
    """A gold value as it is shown in messages."""
    return start_of_text(repr(start_of_text(value)) if isinstance(value, str) else value)


def check_gold(
    field: str, column: str | None, labels: Sequence[str], unknown: Counter[str], rows: int
) -> None:
    """Raise :class:`ConfigError` if so many of ``rows`` rows have an unknown label that it is no accident.

    ``unknown``: the values as :func:`show_gold` shows them. Fewer such rows only go to quarantine.
    """
    if unknown.total() <= MAX_UNKNOWN_GOLD * rows:
        return
    shown = ", ".join(f"{value} ({count:,})" for value, count in unknown.most_common(VALUES_SHOWN))
    raise ConfigError(
        f"{field}.gold: {unknown.total():,} of {rows:,} values of column {column!r} match no label: {shown}; "
        f"labels.names are {', '.join(labels)}: correct the values, or add the missing labels"
    )


class Cleaner:
    """Turns the raw rows of one source into examples."""

    def __init__(self, source: SourceConfig, field: str, labels: Sequence[str]) -> None:
        self._source = source
        self._field = field
        self._golds = GoldNames(labels)
        self._gold_required = field == "test"

    def __call__(self, row: RawRow) -> Example | Refusal:
        """The example, or the first reason to refuse the row.

        Reasons in addition to those of :func:`clean_text`: broken_line, unknown_gold, missing_gold (test
        set only), bad_id.
        """
        if row.broken:
            return Refusal("broken_line", row.broken)
        text = clean_text(row.text, self._source.max_chars, self._field)
        if isinstance(text, Refusal):
            return text
        gold = self._golds.index(row.gold)
        if isinstance(gold, Refusal):
            return gold
        if gold is None and self._gold_required:
            return Refusal("missing_gold", f"{self._field}.gold is {self._source.gold!r}")
        hash_ = text_hash(text)
        given = row.id.decode("utf-8", "surrogateescape") if isinstance(row.id, bytes) else row.id
        if given is None or given == "" or given != given:  # NaN is not an id
            id_ = f"{hash_:016x}"
        elif isinstance(given, (list, dict, Unreadable)):
            return Refusal("bad_id", f"{self._field}.id: a value of type {type(given).__name__}")
        else:
            id_ = str(given)
            if wrong := _undecodable(id_):
                return Refusal("undecodable", f"{self._field}.id: {wrong}")
        return Example(id_, text, NO_GOLD if gold is None else gold, hash_)
