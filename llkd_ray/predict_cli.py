"""The command line of jobs/predict.py: flags to settings to one call; mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llkd_ray.api import predict
from llkd_ray.config import ConfigError
from llkd_ray.console import Display
from llkd_ray.ending import status_of
from llkd_ray.predict_config import PredictConfig, in_flags, parse_predict


def predict_main(arguments: Sequence[str] | None = None) -> int:
    """Predict what the command line asks for; returns the exit status."""
    options = predict_parser().parse_args(arguments)

    def work(display: Display) -> None:
        done = predict(settings_of(options), display=display)
        display.console.print(f"predictions: {done.predictions}")

    return status_of(work, in_flags)


def predict_parser() -> argparse.ArgumentParser:
    """What jobs/predict.py takes."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description="A classifier over any corpus: label, probabilities, confidence."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory, a checkpoint folder or a Hugging Face hub name")
    add("corpus", metavar="CORPUS_URI", nargs="+", help="files, globs, folders; s3://, hf://; see corpus.uri")
    add("--out", required=True, metavar="URI", help="folder for the results")
    add("--resume", action="store_true", help="go on in --out where it was begun; else begin")

    rows = parser.add_argument_group("rows")
    rows.add_argument("--text", default="text", metavar="COLUMN", help="column of the text (text)")
    rows.add_argument("--id", metavar="COLUMN", help="column of a stable id; default: a hash of the text")
    rows.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows with this value"
    )
    rows.add_argument("--max-chars", type=int, metavar="N", help="longer texts go to quarantine (100,000)")
    rows.add_argument("--limit", type=int, metavar="N", help="rows read at most: for a first try")
    rows.add_argument("--with-text", action="store_true", help="put the text into the results, too")

    limits = parser.add_argument_group("what is accepted")
    limits.add_argument("--precision", type=float, metavar="SHARE", help="of accepted answers to be right")
    limits.add_argument("--gold", metavar="URI", help="gold-labelled texts to fit thresholds on")
    limits.add_argument("--label", metavar="COLUMN", help="column of the true label in --gold")
    limits.add_argument("--gold-text", metavar="COLUMN", help="column of the text in --gold; default: --text")
    limits.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="LABEL=SHARE",
        help="confidence to be accepted from",
    )
    limits.add_argument(
        "--at-least", metavar="LABEL", help="labels are grades: accept texts of this one or a higher one"
    )

    speed = parser.add_argument_group("model and machine")
    speed.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub name")
    speed.add_argument("--max-tokens", type=int, metavar="N", help="longer texts are cut")
    speed.add_argument("--batch-tokens", type=int, metavar="N", help="tokens in one forward pass")
    speed.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    speed.add_argument("--piece-rows", type=int, metavar="N", help="rows in a file of the results (16,384)")
    speed.add_argument("--workers", metavar="MIN[,MAX]", help="copies of the model; default: what has room")
    speed.add_argument("--threads", type=int, metavar="N", help="CPU threads of a copy (2)")
    speed.add_argument(
        "--gpus", type=float, metavar="N", help="GPUs of a copy; default: 1 where there is one"
    )
    speed.add_argument("--address", help="Ray cluster to join")
    return parser


def settings_of(options: argparse.Namespace) -> PredictConfig:
    """The settings that the flags stand for; raises :class:`ConfigError`."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    tree: dict[str, Any] = {
        key: given[key] for key in PredictConfig.model_fields.keys() & given.keys() - {"corpus", "gold"}
    }
    tree["model"] = options.model
    tree["out"] = options.out
    tree["thresholds"] = dict(_threshold(one) for one in options.threshold)
    tree["corpus"] = {
        "uri": tuple(options.corpus),
        "where": dict(_pair("--where", one) for one in options.where),
        **{key: given[key] for key in ("text", "id", "max_chars", "limit") if key in given},
    }
    if options.gold is not None:
        tree["gold"] = {
            "uri": options.gold,
            "text": options.gold_text or options.text,
            "gold": options.label,
            **({"max_chars": options.max_chars} if options.max_chars is not None else {}),
        }
    elif stray := next((name for name in ("label", "gold_text") if name in given), None):
        name = "--" + stray.replace("_", "-")
        raise ConfigError(f"{name}: {given[stray]!r} is a column of --gold, which is not given: add it")
    if options.workers is not None:
        tree["workers"] = _workers(options.workers)
    return parse_predict(tree)


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise ConfigError(f"{flag}: {text!r} is no pair: write NAME=VALUE")
    return name, value


def _threshold(text: str) -> tuple[str, float]:
    label, value = _pair("--threshold", text)
    try:
        return label, float(value)
    except ValueError:
        raise ConfigError(f"--threshold: {value!r} of {text!r} is no number: write LABEL=0.8") from None


def _workers(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(",")
    try:
        return int(fewest), int(most or fewest)
    except ValueError:
        raise ConfigError(f"--workers: {text!r} is no range: write MIN,MAX, or one number") from None
