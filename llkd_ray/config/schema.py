"""The configuration tree: every setting with its unit, its default and its checks.

A run is described by one frozen :class:`Config`. It is read from a YAML file and ``--set a.b=c``
overrides (``loading.py``). All mistakes that can be detected without data raise an error here, before
anything starts, with the field, the value and the remedy in one line.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llkd_ray.config.base import DataUris, Model, ResultDir, Section, ends, member_field
from llkd_ray.config.teacher import ANSWER_LETTERS, LabelName, TeacherConfig


class SourceConfig(Section):
    """Source of texts. Used for the corpus (the pool) and for the test set."""

    uri: DataUris = Field(
        description="Files, globs or folders (parquet, jsonl[.gz|.zst], csv, txt), local or on any "
        "pyarrow filesystem (s3://, gs://), or hf://NAME[?split=train&config=…]."
    )
    text: str = Field("text", description="Column of the text; txt files have one text per line.")
    gold: str | None = Field(None, description="Column with the true label (name or index); optional.")
    id: str | None = Field(None, description="Column with a stable id; by default a hash of the text.")
    where: dict[str, str | int | bool] = Field(
        default_factory=dict, description="Keep only rows whose columns equal these values."
    )
    max_chars: int = Field(
        100_000,
        ge=1,
        description="Characters; longer texts, which are mostly broken records, go to quarantine.",
    )
    encoding: str | None = Field(
        None, description="Encoding of csv, jsonl and txt files, such as utf-16 or latin-1; null: detected."
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between the fields of csv files; null: detected from the header.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Maximum number of rows, from the start: for a first try. They are read in one task.",
    )

    @field_validator("uri")
    @classmethod
    def _not_empty(cls, uri: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not uri or any(not one.strip() for one in ([uri] if isinstance(uri, str) else uri)):
            raise ValueError("is empty: give a file, a glob, a folder or hf://NAME")
        return uri

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, encoding: str | None) -> str | None:
        if encoding is None:
            return None
        try:
            return codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"is {encoding!r}: give an encoding that Python knows, such as utf-16") from None

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Further columns that are read and passed on unchanged."""
        return ()

    @property
    def uris(self) -> tuple[str, ...]:
        return (self.uri,) if isinstance(self.uri, str) else self.uri


class LabelsConfig(Section):
    """The classes. Their order is the order of every probability vector of the run."""

    names: tuple[LabelName, ...] = Field(description="Label names, at least two, all different.")
    descriptions: dict[LabelName, str] = Field(
        default_factory=dict, description="One line for a label, shown in the prompt; optional."
    )
    prior: dict[LabelName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="The true class shares of the corpus, if they are known: for every label, on any "
        "scale. The student's predictions then assume them instead of the teacher's counts.",
    )

    @model_validator(mode="after")
    def _check(self) -> LabelsConfig:
        if len(self.names) < 2:
            raise ValueError(f"names has {len(self.names)} label(s): a classifier needs at least two")
        seen: set[str] = set()
        for name in self.names:
            if not name.strip():
                raise ValueError("names holds an empty label: give every label a name")
            if name in seen:
                raise ValueError(f"names holds {name!r} twice: every label needs a name of its own")
            seen.add(name)
        if strangers := sorted(set(self.descriptions) - seen):
            raise ValueError(f"descriptions names {strangers[0]!r}, which is not one of names")
        if strangers := sorted(set(self.prior) - seen):
            raise ValueError(f"prior names {strangers[0]!r}, which is not one of names")
        if self.prior and (missing := sorted(seen - set(self.prior))):
            raise ValueError(f"prior has no share for {missing[0]!r}: give one for every label, or none")
        return self

    @property
    def known_prior(self) -> tuple[float, ...]:
        """``prior`` in the order of the names, normalised to sum to one; empty if unknown."""
        total = sum(self.prior.values())
        return tuple(self.prior[name] / total for name in self.names) if self.prior else ()


class StudentConfig(Section):
    """The small model to train; any Hugging Face checkpoint usable for sequence classification."""

    model: Model = Field(
        description="Checkpoint folder, hub name, or 'minilm': the all-MiniLM-L6-v2 weights of the "
        "quickstart extra."
    )
    workers: int | tuple[int, int] | None = Field(
        None,
        description="DDP ranks; (min, max): as many as fit when the run starts, when one is lost and when"
        " nodes are added. Ray Train assumes empty nodes, so give the ranks nodes of their "
        "own (resources). null: one for each GPU that teachers leave; 1 on CPUs, with all their "
        "threads.",
    )
    resize_s: float = Field(
        60.0,
        gt=0,
        description="Seconds between two checks whether more or fewer of (min, max) ranks fit. A change "
        "restarts the current round.",
    )
    cpus: float = Field(0.5, gt=0, description="CPUs that Ray reserves for one rank.")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for one rank; may be a fraction. null: as many as are there "
        "when a run starts: a whole one, or what teachers leave of one, 0.3 as a rule.",
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Ray's custom resources for one rank, such as {student: 1}: restricts ranks to nodes "
        "that offer them.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one rank; default: cores/ranks.")
    max_tokens: int = Field(128, ge=8, description="Tokens; longer texts are truncated at the end.")
    epochs: int = Field(3, ge=1, description="Passes over the texts selected so far, in every round.")
    min_steps: int = Field(
        240,
        ge=1,
        description="Minimum number of optimiser steps in a round; a small round makes more passes.",
    )
    batch_size: int = Field(16, ge=1, description="Texts in one optimiser step, over all ranks.")
    score_batch_size: int = Field(64, ge=1, description="Texts in one forward pass when scoring, per rank.")
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Of AdamW, after warm-up; auto: by the model's size, 1.5e-4 for MiniLM, 2e-5 for "
        "base-size encoders, 1e-5 for larger ones.",
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a round's steps spent warming up.")
    weight_decay: float = Field(0.01, ge=0)
    loss: Literal["cross_entropy", "soft"] = Field(
        "cross_entropy",
        description="Training target: cross_entropy: the teacher's label; soft: its distribution.",
    )
    step_thresholds: Literal["none", "mask", "weight"] = Field(
        "none",
        description="LLKD's moving thresholds within a step, from its own forward pass. mask: only texts "
        "above both thresholds count; weight: texts count by confidence × uncertainty; none: "
        "all count equally.",
    )
    start: Literal["fresh", "warm"] = Field(
        "fresh",
        description="fresh: every round starts from the pre-trained weights; warm: from the previous "
        "round's.",
    )
    replay: Literal["all", "new"] = Field(
        "all", description="all: train on all texts selected so far; new: on this round's texts only."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bf16 autocast on a GPU that supports it, and on a CPU if a short measurement "
        "finds it faster.",
    )
    max_failures: int = Field(
        3, ge=0, description="Lost ranks that training tolerates without finishing a round in between."
    )

    @field_validator("workers")
    @classmethod
    def _workers(cls, workers: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if workers is not None:
            ends(workers)
        return workers

    @property
    def n_gpus(self) -> float:
        """GPUs of one rank; 0 while undecided."""
        return self.gpus or 0.0

    @property
    def max_workers(self) -> int:
        return ends(self.workers or 1)[1]

    @property
    def min_workers(self) -> int:
        return ends(self.workers or 1)[0]


class SelectionConfig(Section):
    """Which labelled texts the student trains on next."""

    policy: str = Field("llkd_sample", description="A name from llkd_ray/selection/policies.py.")
    options: dict[str, str | bool | float] = Field(
        default_factory=dict, description="The policy's own options, by name; see the guide Policies."
    )
    quota: Annotated[float, Field(ge=0, le=1)] | Literal["off"] | None = Field(
        None,
        description="Divide a round's texts among the pseudo-classes in proportion to their counts to "
        "this power. 1: as the teacher labels; 0: equally; off: no quotas; null: the policy's"
        " default.",
    )
    prior: Annotated[float, Field(ge=0, le=1)] | Literal["off"] | None = Field(
        None,
        description="Class shares that the student's predictions assume: in proportion to the pseudo-"
        "classes' counts to this power, whatever the quotas. 1: as the teacher labels; 0: "
        "equal; off: those of its training texts; null: the policy's default. See "
        "labels.prior.",
    )

    @field_validator("quota", "prior", mode="before")
    @classmethod
    def _off(cls, exponent: Any) -> Any:
        """YAML parses a bare ``off`` as false, which would be read as the exponent 0."""
        if exponent is True:
            raise ValueError("is true: give an exponent from 0 to 1, or off")
        return "off" if exponent is False else exponent

    refresh_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the candidates for selection (and for labelling, if the acquisition policy "
        "uses the student) that the student scores before each selection. Below 1, it scores "
        "those that the policy would take first if the student were maximally uncertain: "
        "texts not scored for long, or never, and texts close to being selected.",
    )


class AcquisitionConfig(Section):
    """Which texts the teacher labels next."""

    policy: str = Field("random", description="A name from llkd_ray/selection/acquisition.py.")
    explore: float = Field(
        0.1, ge=0, le=1, description="Share of the texts to label that is drawn at random in any case."
    )


class CapConfig(Section):
    """Hard limit on the usage of all teachers of a run together, including the test set and retries."""

    texts: int | None = Field(None, ge=1, description="Texts that teachers label.")
    tokens: int | None = Field(
        None, ge=1, description="Prompt and answer tokens, including those in the prefix cache."
    )
    cost: float | None = Field(None, gt=0, description="In the currency of teacher.price.")

    @property
    def is_off(self) -> bool:
        return self.texts is None and self.tokens is None and self.cost is None


class BudgetConfig(Section):
    """When the run ends: at the first limit reached."""

    cap: CapConfig = Field(default_factory=CapConfig)

    rounds: int = Field(4, ge=1, description="Rounds of select, train, refresh.")
    growth: float = Field(
        2.0,
        ge=1,
        le=10,
        description="Ratio of a round's new texts to those of the previous round; 1: all rounds have the "
        "same number.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop when agreement with the teacher on the hold-out has not grown by min_gain for "
        "so many rounds; null: never. Saves training, and the labels of later rounds.",
    )
    min_gain: float = Field(
        0.005, ge=0, description="Smallest increase of the agreement (a share) that counts as growth."
    )
    labels: int | None = Field(
        None,
        ge=1,
        description="Maximum number of pool texts that the teacher labels; default: the whole pool, up to"
        " 50,000.",
    )
    first_labels: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the labels that are needed before the first round; the rest is spread "
        "evenly over the later rounds. 1: label all, then select; 0: an even share before "
        "each round.",
    )
    train: int | float = Field(
        0.1,
        gt=0,
        description="Maximum number of texts trained on, over all rounds: a number (int) or a share of "
        "the pool (float <= 1).",
    )

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if isinstance(self.train, float) and self.train > 1:
            raise ValueError(f"train is {self.train}: give a whole number of texts, or a share up to 1.0")
        if isinstance(self.train, int) and self.train < self.rounds:
            raise ValueError(f"train is {self.train}, less than one text for each of {self.rounds} rounds")
        if self.labels is not None and isinstance(self.train, int) and self.labels < self.train:
            raise ValueError(
                f"labels is {self.labels}, less than train ({self.train}): "
                "only labelled texts can be trained on"
            )
        return self


class EvaluationConfig(Section):
    """What is measured after each round."""

    holdout: int = Field(
        200,
        ge=0,
        description="Pool texts that the teacher labels and the student never trains on, to measure "
        "agreement with the teacher. At most a tenth of budget.labels.",
    )
    teacher_on_test: bool = Field(
        True, description="Let the teacher label the test set too (once), to report its accuracy."
    )


class RunConfig(Section):
    """Output location, random seed, trackers and Ray cluster."""

    dir: ResultDir = Field(
        "runs",
        description="Folder, or URI on any pyarrow filesystem, that holds the runs; a relative path is below "
        "the working directory.",
    )
    name: str | None = Field(None, description="The run's own folder; default: policy and time.")
    seed: int = Field(0, ge=0)
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (),
        description="Trackers that receive settings and figures; each needs its package on the driver's "
        "machine.",
    )
    strict: bool = Field(
        False, description="Stop, instead of warning, if the teacher's first labels look useless."
    )
    address: str | None = Field(
        None, description="Ray cluster to join; default: the job's own, RAY_ADDRESS, or a local one."
    )


class Config(Section):
    """All settings of one run."""

    corpus: SourceConfig
    test: SourceConfig | None = Field(None, description="Gold-labelled texts for evaluation; optional.")
    labels: LabelsConfig
    teacher: TeacherConfig
    student: StudentConfig
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    acquisition: AcquisitionConfig = Field(default_factory=AcquisitionConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        for name, teacher in self.teacher.members():
            self._check_teacher(member_field(name), teacher)
        if self.budget.patience and not self.evaluation.holdout:
            raise ValueError(
                f"budget.patience is {self.budget.patience}, but evaluation.holdout is 0: "
                "agreement is measured on the hold-out, so give it some texts"
            )
        if self.test is not None and self.test.gold is None:
            raise ValueError("test.gold is missing: a test set needs the column of its true labels")
        if self.budget.cap.cost is not None and all(one.price.is_free for _, one in self.teacher.members()):
            raise ValueError(
                f"budget.cap.cost is {self.budget.cap.cost}, but teacher.price says that nothing costs "
                "anything: give teacher.price.input and teacher.price.output, or cap tokens"
            )
        is_fitted_on_gold = self.teacher.confidence.method == "temperature"
        if is_fitted_on_gold and (self.corpus.gold is None or not self.evaluation.holdout):
            raise ValueError(
                "teacher.confidence.method 'temperature' is fitted on texts of the hold-out with known gold: "
                "give corpus.gold (it may be empty for most texts) and evaluation.holdout"
            )
        return self

    def _check_teacher(self, field: str, teacher: TeacherConfig) -> None:
        names = self.labels.names
        for shot in teacher.prompt.demonstrations:
            if shot.label not in names:
                raise ValueError(
                    f"{field}.prompt.demonstrations uses the label {shot.label!r}, "
                    f"which is not in labels.names"
                )
        most = len(ANSWER_LETTERS)
        if teacher.has_prompt and teacher.prompt.answer == "letters" and len(names) > most:
            raise ValueError(
                f"labels.names has {len(names)} labels, but {field}.prompt.answer 'letters' has {most}: "
                "use 'names'"
            )
