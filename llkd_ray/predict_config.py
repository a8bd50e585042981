"""What a prediction is asked to do, checked as far as that can be done without looking at any file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from llkd_ray.config import SourceConfig
from llkd_ray.sections import ConfigError, Section

Share = Annotated[float, Field(ge=0, le=1)]


class PredictConfig(Section):
    """A classifier over a corpus."""

    model: str = Field(description="A run directory, a checkpoint folder (local or URI) or a hub name.")
    revision: str | None = Field(None, description="Of a hub name: branch, tag or commit.")
    corpus: SourceConfig
    out: str = Field(description="Folder for the results, local or on an object store.")
    gold: SourceConfig | None = Field(None, description="Gold-labelled texts that thresholds are fitted on.")
    precision: float | None = Field(None, gt=0, le=1, description="Share of accepted answers to be right.")
    thresholds: dict[str, Share] = Field(
        default_factory=dict, description="Confidence from which on a label is accepted, by label."
    )
    at_least: str | None = Field(
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
        if self.precision is not None and self.gold is None:
            raise ValueError(
                f"--precision: {self.precision:g} is wanted, but there is no gold: add --gold URI and --label"
            )
        if self.gold is not None and self.gold.gold is None:
            raise ValueError(f"--gold: {self.gold.uri!r} has no column of true labels: name it with --label")
        if self.gold is not None and self.precision is None and not self.thresholds:
            raise ValueError(
                f"--gold: {self.gold.uri!r} is given for nothing: add --precision, or --threshold LABEL=VALUE"
            )
        if self.at_least is not None and self.precision is None and not self.thresholds:
            raise ValueError(
                f"--at-least: {self.at_least!r} needs a threshold: add --threshold {self.at_least}=0.5, or "
                "--precision and --gold"
            )
        if self.at_least is not None and (others := sorted(set(self.thresholds) - {self.at_least})):
            raise ValueError(
                f"--threshold: {others[0]!r} has no meaning beside --at-least {self.at_least}: leave it out"
            )
        if self.workers is not None and not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError(f"--workers: {self.workers[0]},{self.workers[1]} is no range: 1 <= MIN <= MAX")
        return self


def parse_predict(tree: dict[str, object]) -> PredictConfig:
    """The checked settings; raises :class:`ConfigError`, one line, for the first mistake."""
    try:
        return PredictConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        where = [str(part) for part in first["loc"]]
        if not where:
            raise ConfigError(message) from None
        raise ConfigError(
            f"{flag('.'.join(where))}: {first['input']!r}: {message[:1].lower()}{message[1:]}"
        ) from None


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
    """The flag that sets a field, as the messages of readers and checks know it."""
    if field.startswith("thresholds."):
        return "--threshold"
    return _FLAGS.get(field) or "--" + field.rpartition(".")[2].replace("_", "-")


def in_flags(message: str) -> str:
    """A message that begins with a field of a config, with the flag in its place."""
    field, colon, rest = message.partition(": ")
    is_field = colon and field.partition(".")[0] in ("corpus", "test", "gold", "model")
    return f"{flag(field)}: {rest}" if is_field else message
