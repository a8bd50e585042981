"""``llkd init``: looks at a file, guesses its columns, and writes a commented config for it."""

from __future__ import annotations

import argparse
import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llkd_ray.config.base import ConfigError
from llkd_ray.corpus.sampling import Preview, preview
from llkd_ray.display import Display, count
from llkd_ray.doctor.machine import nvidia_driver

LABEL_NAMES = ("label", "labels", "category", "class", "gold", "target", "topic", "sentiment", "intent", "y")
TEXT_NAMES = ("text", "body", "content", "sentence", "message", "review", "document", "abstract", "title")
ID_NAMES = ("id", "key", "uid", "uuid", "doc_id")
MAX_LABELS = 100
"""A column with more different values is not taken for labels."""
PER_LABEL = 3
"""Least mean number of rows of each value of a column of labels."""


@dataclass(frozen=True)
class Columns:
    """The columns of a file, as far as they are known."""

    text: str
    label: str | None
    id: str | None
    labels: tuple[str, ...]
    """The values of ``label`` in the preview, sorted."""


def add_init(parser: argparse.ArgumentParser) -> None:
    parser.description = "Look at a corpus, guess its columns, and write a commented config for it."
    add = parser.add_argument
    add("corpus", metavar="CORPUS", help="file, glob or folder: csv, tsv, jsonl, parquet, txt; s3://, hf://")
    add("--test", metavar="FILE", help="texts with true labels, which the student is evaluated on")
    add("--text", metavar="COLUMN", help="column of the text; default: a guess")
    add("--label", metavar="COLUMN", help="column of the true label; default: a guess")
    add("--teacher", metavar="MODEL", help="checkpoint folder or hub name of the LLM")
    add("--out", metavar="FILE", default="llkd.yaml", help="the config to write (llkd.yaml)")
    add("--force", action="store_true", help="replace an existing file")


def run_init(options: argparse.Namespace, display: Display) -> None:
    out = Path(options.out)
    if out.exists() and not options.force:
        raise ConfigError(f"--out: {str(out)!r} exists: choose another name, or replace it with --force")
    corpus = preview(options.corpus, "CORPUS")
    columns = guess_columns(corpus, options.text, options.label)
    display.result(f"corpus: {describe(corpus, columns)}")
    test = None
    if options.test:
        there = preview(options.test, "--test")
        test = guess_columns(there, options.text, options.label)
        display.result(f"test:   {describe(there, test)}")
        if test.label is None:
            raise ConfigError(
                f"--test: {options.test!r} has no column of labels that can be guessed (its columns are "
                f"{', '.join(there.columns)}): name it with --label"
            )
    names = (test or columns).labels or columns.labels
    if names:
        display.result(f"labels: {', '.join(names)}")
    else:
        display.result("labels: none found; write them into the config under labels.names")
    gpus = len(nvidia_driver()[0])
    if gpus:
        display.result(f"GPUs:   {gpus}" + (", shared by teacher and student" if gpus == 1 else ""))
    out.write_text(config_text(options, columns, test, names), encoding="utf-8")
    display.result(f"wrote {out}; next:")
    for command in (f"llkd check {shlex.quote(str(out))}", f"llkd train {shlex.quote(str(out))} --dry-run"):
        display.result(f"  {command}")


def guess_columns(found: Preview, text: str | None, label: str | None) -> Columns:
    """The columns of text, label and id; ``text`` and ``label`` are used if given.

    Text is the column of strings with one of the usual names, or with the longest values; labels are a
    column with few different values that repeat.
    """
    for flag, name in (("--text", text), ("--label", label)):
        if name is not None and name not in found.columns and found.columns:
            raise ConfigError(f"{flag}: no column {name!r}; the columns are {', '.join(found.columns)}")
    if not found.columns:  # plain text, a line each
        return Columns("text", None, None, ())
    if text is None:
        strings = {name: mean_length(found, name) for name in found.columns}
        strings = {name: length for name, length in strings.items() if length}
        if not strings:
            raise ConfigError(
                f"CORPUS: no column of {', '.join(found.columns)} holds texts: name it with --text"
            )
        usual = [name for name in strings if name.lower() in TEXT_NAMES]
        text = usual[0] if len(usual) == 1 else max(strings, key=lambda name: strings[name])
    if label is None:
        candidates = [name for name in found.columns if name != text and may_be_label(found, name)]
        usual = [name for name in candidates if name.lower() in LABEL_NAMES]
        label = usual[0] if usual else candidates[0] if len(candidates) == 1 else None
    ids = [name for name in found.columns if name.lower() in ID_NAMES and name not in (text, label)]
    key = next((name for name in ids if len(set(values(found, name))) == len(found.rows)), None)
    labels = tuple(sorted(set(map(str, values(found, label))))) if label else ()
    return Columns(text, label, key, labels)


def values(found: Preview, column: str) -> list[Any]:
    """The values of a column that are not empty."""
    got = (row.get(column) for row in found.rows)
    return [one.strip() if isinstance(one, str) else one for one in got if one not in (None, "")]


def mean_length(found: Preview, column: str) -> float:
    """Mean number of characters; 0 for a column that does not hold strings, or holds numbers."""
    there = values(found, column)
    texts = [one for one in there if isinstance(one, str) and not _is_number(one)]
    return sum(map(len, texts)) / len(texts) if texts and len(texts) > len(there) / 2 else 0.0


def may_be_label(found: Preview, column: str) -> bool:
    """Whether a column has a few different short values that repeat."""
    there = values(found, column)
    if not there or any(isinstance(one, float | list | dict) for one in there):
        return False
    counted = Counter(map(str, there))
    short = max(map(len, counted)) <= 60
    return short and 2 <= len(counted) <= MAX_LABELS and len(there) >= PER_LABEL * len(counted)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe(found: Preview, columns: Columns) -> str:
    """One line: what was found in a file."""
    parts = [f"{found.kind}, first {count(len(found.rows))} rows read"]
    parts += [found.assumed] if found.assumed else []
    parts += [f"text in {columns.text!r}"] if found.columns else ["a text a line"]
    parts += [f"labels in {columns.label!r}"] if columns.label else []
    parts += [f"ids in {columns.id!r}"] if columns.id else []
    return "; ".join(parts)


def config_text(
    options: argparse.Namespace, corpus: Columns, test: Columns | None, names: tuple[str, ...]
) -> str:
    """The config as commented YAML."""
    lines = [
        "# Written by llkd init. Every setting: docs/reference/config.md",
        "corpus:",
        f"  uri: {_yaml(options.corpus)}",
        f"  text: {_yaml(corpus.text)}",
    ]
    if corpus.id:
        lines.append(f"  id: {_yaml(corpus.id)}")
    if corpus.label:
        lines.append(f"  gold: {_yaml(corpus.label)}  # only for the report; never trained on")
    if test:
        lines += [
            "test:                       # texts with true labels; the student is evaluated on them",
            f"  uri: {_yaml(options.test)}",
            f"  text: {_yaml(test.text)}",
            f"  gold: {_yaml(test.label)}",
        ]
    else:
        lines.append("# test: {uri: gold.csv, text: text, gold: label}  # without it, accuracy is unknown")
    lines += [
        "labels:",
        f"  names: {_yaml(list(names))}"
        if names
        else "  names: [first label, second label]   # write yours here, at least two",
        "  # descriptions: {first label: one line that tells the teacher what it means}",
        "teacher:",
        f"  model: {_yaml(options.teacher or 'Qwen/Qwen2.5-7B-Instruct')}   # checkpoint folder or hub name",
        "  prompt:",
        '    instruction: "Classify the text into exactly one of the categories."   # say it in your words',
        "student:",
        "  model: roberta-base       # checkpoint folder or hub name of the small model",
        "budget:",
        "  rounds: 4",
        "  labels: 20000             # texts that the teacher labels at most",
        "  train: 0.1                # texts that the student learns: a number, or a share of the corpus",
    ]
    return "\n".join(lines) + "\n"


def _yaml(value: str | list[str] | None) -> str:
    """One line of YAML, whatever a file's names hold."""
    said = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    line = said.removesuffix("...\n").rstrip("\n")
    if line.isprintable():
        return line
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf).rstrip("\n")
