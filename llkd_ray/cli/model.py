"""``llkd predict``, ``llkd evaluate`` and ``llkd export``: what one does with a finished model."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llkd_ray.config.base import ConfigError, absolute, absolute_folder
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus import sources
from llkd_ray.corpus.cleaning import UNKNOWN_GOLD, Cleaner, Example, Refusal, check_gold, show_gold
from llkd_ray.corpus.readers import read_rows
from llkd_ray.display import Display, count, decimals, percent, percent_range
from llkd_ray.metrics.quality import accuracy_interval, macro_f1_interval, teacher_quality
from llkd_ray.prediction.config import add_predict_options, in_flags, settings_of
from llkd_ray.storage.checkpoints import inspect


def add_predict(parser: argparse.ArgumentParser) -> None:
    add_predict_options(parser)


def run_predict(options: argparse.Namespace, display: Display) -> None:
    try:
        settings = settings_of(options)
        from llkd_ray.api import predict

        done = predict(settings, display=display)
    except ConfigError as error:
        raise ConfigError(in_flags(str(error))) from None
    total, counted = done.summary["predicted"], done.summary["labels"]
    rows = [
        [name, count(one["predicted"]), percent(one["predicted"] / max(1, total)), count(one["accepted"])]
        for name, one in sorted(counted.items(), key=lambda item: -item[1]["predicted"])
    ]
    display.table("Predictions", ("label", "texts", "share", "accepted"), rows)
    display.result(f"accepted: {percent(done.summary['accepted'] / max(1, total))} of {count(total)} texts")
    display.result(f"predictions: {done.predictions}")


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a run's model ready for use elsewhere: calibrate it again with all gold labels known by now, "
        "write its model card, and on request write an ONNX file and upload it to the hub."
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a finished run, or a checkpoint folder")
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx, checked against torch")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as this model")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: visible to you alone")


def run_export(options: argparse.Namespace, display: Display) -> None:
    if options.private and options.push_to_hub is None:
        raise ConfigError("--private: needs --push-to-hub, which is not given: add it, or leave it out")
    from llkd_ray.export import export_model

    done = export_model(
        absolute_folder(options.model),
        onnx=options.onnx,
        push_to_hub=options.push_to_hub,
        private=options.private,
        say=display.say,
    )
    display.result(f"model: {done.model}")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure a model on texts with known labels, with 95 % intervals, in this process."
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory, a checkpoint folder or a Hugging Face hub name")
    add("data", metavar="DATA", nargs="+", help="files, globs, folders; s3://, hf://")
    add("--text", default="text", metavar="COLUMN", help="column of the text (text)")
    add("--label", default="label", metavar="COLUMN", help="column of the true label (label)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub name")
    add("--max-tokens", type=int, metavar="N", help="longer texts are cut")
    add("--out", metavar="FILE", help="write all figures to this JSON file, too")


def run_evaluate(options: argparse.Namespace, display: Display) -> None:
    checkpoint = inspect(options.model, options.revision, options.max_tokens)
    examples, refused = read_labelled(options.data, options.text, options.label, checkpoint.labels)
    display.say(
        f"{count(len(examples))} texts with a label" + (f"; refused: {_counts(refused)}" if refused else "")
    )
    import torch

    from llkd_ray.student.inference import load, score

    student = load(checkpoint, "auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    texts = [example.text for example in examples]
    p_NC = score(student, texts, checkpoint.max_tokens)
    figures = evaluation(np.array([example.gold for example in examples]), p_NC)
    names = checkpoint.labels
    rows = [
        [
            name,
            count(one["gold"]),
            count(one["predicted"]),
            *(decimals(one[key]) for key in ("precision", "recall", "f1")),
        ]
        for name, one in zip(names, figures["per_class"], strict=True)
    ]
    display.table("By label", ("label", "texts", "predicted", "precision", "recall", "F1"), rows)
    for line in describe_evaluation(figures, len(names)):
        display.result(line)
    if options.out:
        figures |= {
            "model": options.model,
            "data": options.data,
            "labels": list(names),
            "refused": dict(refused),
        }
        Path(options.out).write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")


def read_labelled(
    uris: Sequence[str], text: str, label: str, names: Sequence[str]
) -> tuple[list[Example], Counter[str]]:
    """All texts that have a label, and the numbers of refused rows by reason.

    Raises :class:`ConfigError` if there is no such text, or if values of the column match no label.
    """
    source = SourceConfig(uri=tuple(map(absolute, uris)), text=text, gold=label)
    clean = Cleaner(source, "test", names)
    examples: list[Example] = []
    refused: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for unit in sources.plan(source, "DATA"):
        for row in read_rows(unit, source, "DATA", names):
            cleaned = clean(row)
            if isinstance(cleaned, Refusal):
                refused[cleaned.reason] += 1
                unknown.update([show_gold(row.gold)] if cleaned.reason == UNKNOWN_GOLD else [])
            else:
                examples.append(cleaned)
    check_gold("DATA", label, names, unknown, refused.total() + len(examples))
    if not examples:
        raise ConfigError(f"DATA: no row has a text and a label ({_counts(refused) or 'no rows'})")
    return examples, refused


def evaluation(gold_N: np.ndarray, p_NC: np.ndarray) -> dict[str, Any]:
    """All metrics on gold, with 95 % intervals: exact for accuracy, bootstrap for macro-F1."""
    rng = np.random.default_rng(0)
    predicted_N = p_NC.argmax(axis=1)
    figures = teacher_quality(gold_N, p_NC, rng)
    figures["accuracy_interval"] = accuracy_interval(gold_N, predicted_N)
    figures["macro_f1_interval"] = macro_f1_interval(gold_N, predicted_N, rng)
    return figures


def describe_evaluation(figures: dict[str, Any], n_labels: int) -> list[str]:
    """The overall metrics as lines of text."""
    scored = sum(one["f1"] is not None for one in figures["per_class"])
    over = "" if scored == n_labels else f" over {scored} of {n_labels} labels (the others do not occur)"
    return [
        f"accuracy: {_with_interval(figures, 'accuracy')}",
        f"macro-F1: {_with_interval(figures, 'macro_f1')}{over}",
        f"expected calibration error: {decimals(figures['ece'])}",
    ]


def _with_interval(figures: dict[str, Any], name: str) -> str:
    return f"{percent(figures[name])} (95 % interval {percent_range(figures[f'{name}_interval'])})"


def _counts(counted: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counted.most_common())
