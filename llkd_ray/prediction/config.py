"""The settings of a prediction, with all checks that need no access to files."""

from __future__ import annotations

import argparse
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llkd_ray.config.base import ConfigError, Model, ResultDir, Section, parse
from llkd_ray.config.schema import SourceConfig

Share = Annotated[float, Field(ge=0, le=1)]


class CorpusToLabel(SourceConfig):
    """A corpus to which predictions are added."""

    keep_columns: tuple[str, ...] = Field(
        (), description="Columns that are copied into the results, as text."
    )

    @property
    def kept_columns(self) -> tuple[str, ...]:
        return self.keep_columns


class PredictConfig(Section):
    """Settings for applying a classifier to a corpus."""

    whole: ClassVar[str] = ""
    model: Model = Field(description="A run directory, a checkpoint folder (local or URI) or a hub name.")
    revision: str | None = Field(None, description="Of a hub name: branch, tag or commit.")
    corpus: CorpusToLabel
    out: ResultDir = Field(description="Folder for the results, local or on an object store.")
    format: Literal["parquet", "csv", "jsonl"] = Field("parquet", description="Of the predictions.")
    gold: SourceConfig | None = Field(None, description="Gold-labelled texts that thresholds are fitted on.")
    target_precision: float | None = Field(
        None, gt=0, lt=1, description="Share of each label's accepted answers to be right."
    )
    delta: float = Field(
        0.05, gt=0, lt=1, description="Largest probability that a label misses the target precision."
    )
    thresholds: dict[str, Share] = Field(
        default_factory=dict, description="Confidence from which on a label is accepted, by label."
    )
    min_grade: str | None = Field(
        None,
        description="Labels are grades, lowest first: accept a text that is of this one or a higher one.",
    )
    with_text: bool = Field(False, description="Whether the text goes into the results, too.")
    resume: bool = False
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens; longer texts are cut. Default: as the run trained, else all it reads.",
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one forward pass, padding and all; default by device."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="See student.precision.")
    piece_rows: int = Field(16_384, ge=1, description="Rows in one file of the results, at most.")
    workers: tuple[int, int] | None = Field(
        None, description="Actors with a copy of the model each, (min, max); default: what the nodes hold."
    )
    threads: int = Field(2, ge=1, description="CPU threads of one actor; without a GPU only.")
    gpus: float | None = Field(None, ge=0, description="GPUs of one actor; default: 1 where there is one.")
    address: str | None = Field(None, description="Ray cluster to join.")

    @model_validator(mode="after")
    def _check(self) -> PredictConfig:
        if self.target_precision is not None and self.gold is None:
            raise ValueError(
                f"--target-precision: {self.target_precision:g} is wanted, but there is no gold: "
                "add --gold URI and --label"
            )
        if self.gold is not None and self.gold.gold is None:
            raise ValueError(f"--gold: {self.gold.uri!r} has no column of true labels: name it with --label")
        if self.gold is not None and self.target_precision is None and not self.thresholds:
            raise ValueError(
                f"--gold: {self.gold.uri!r} is not used: add --target-precision, or --threshold LABEL=VALUE"
            )
        if self.min_grade is not None and self.target_precision is None and not self.thresholds:
            raise ValueError(
                f"--min-grade: {self.min_grade!r} needs a threshold: add --threshold {self.min_grade}=0.5, "
                "or --target-precision and --gold"
            )
        if self.min_grade is not None and (others := sorted(set(self.thresholds) - {self.min_grade})):
            raise ValueError(
                f"--threshold: {others[0]!r} has no meaning beside --min-grade {self.min_grade}: leave it out"
            )
        if self.workers is not None and not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError(f"--workers: {self.workers[0]},{self.workers[1]} is no range: 1 <= MIN <= MAX")
        return self


_FLAGS = {
    "model": "MODEL",
    "corpus.uri": "CORPUS_URI",
    "test.uri": "--gold",
    "gold.uri": "--gold",
    "test.gold": "--label",
    "test.text": "--gold-text",
    "gold.text": "--gold-text",
    "thresholds": "--threshold",
}


def flag(field: str) -> str:
    """The command-line flag that sets a field, as used in error messages."""
    if field.startswith("thresholds."):
        return "--threshold"
    return _FLAGS.get(field) or "--" + field.rpartition(".")[2].replace("_", "-")


def in_flags(message: str) -> str:
    """A message whose lines begin with a config field, with each field replaced by its flag."""
    return "\n".join(map(_in_flags, message.splitlines()))


def _in_flags(line: str) -> str:
    field, colon, rest = line.partition(": ")
    is_field = colon and field.partition(".")[0] in {"test", *PredictConfig.model_fields}
    return f"{flag(field)}: {rest}" if is_field else line


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The command-line options of ``llkd predict``."""
    parser.description = "Label a corpus with a model: label, probabilities and confidence for every row."
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory, a checkpoint folder or a Hugging Face hub name")
    add("corpus", metavar="CORPUS_URI", nargs="+", help="files, globs, folders; s3://, hf://; see corpus.uri")
    add("--out", required=True, metavar="URI", help="folder for the results")
    add(
        "--format",
        choices=("parquet", "csv", "jsonl"),
        help="of the files in predictions/ (parquet); csv has a column for each label's probability",
    )
    add("--resume", action="store_true", help="resume in --out where it was started; else start")

    rows = parser.add_argument_group("rows")
    rows.add_argument("--text", default="text", metavar="COLUMN", help="column of the text (text)")
    rows.add_argument("--id", metavar="COLUMN", help="column of a stable id; default: a hash of the text")
    rows.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows with this value"
    )
    rows.add_argument("--max-chars", type=int, metavar="N", help="longer texts go to quarantine (100,000)")
    rows.add_argument("--limit", type=int, metavar="N", help="rows read at most: for a first try")
    rows.add_argument("--with-text", action="store_true", help="put the text into the results, too")
    rows.add_argument(
        "--keep-columns",
        nargs="+",
        action="extend",
        metavar="COLUMN",
        help="copy these columns of the corpus into the results, as text",
    )

    limits = parser.add_argument_group("what is accepted")
    limits.add_argument(
        "--target-precision", type=float, metavar="SHARE", help="of each label's accepted answers to be right"
    )
    limits.add_argument(
        "--delta", type=float, metavar="SHARE", help="probability that this may fail for some label (0.05)"
    )
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
        "--min-grade", metavar="LABEL", help="labels are grades: accept texts of this one or a higher one"
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


def settings_of(options: argparse.Namespace) -> PredictConfig:
    """The settings given by the flags; raises :class:`ConfigError`."""
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
        **{key: given[key] for key in ("text", "id", "max_chars", "limit", "keep_columns") if key in given},
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
    return parse(PredictConfig, tree)


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
