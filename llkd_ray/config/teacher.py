"""The settings of a teacher: model, prompt, calibration of its confidence, price."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from llkd_ray.config.base import Cache, DataUri, OptionalModel, Section, Template, ends


class Demonstration(Section):
    """One labelled example shown to the teacher in its prompt."""

    text: str = Field(min_length=1)
    label: LabelName = Field(description="A label's name.")


class DrawnDemonstrations(Section):
    """Few-shot examples drawn from a file of labelled texts, the same number for each class."""

    uri: DataUri = Field(description="A file, a glob or a folder, in any format that the corpus may have.")
    text: str = Field("text", description="Column of the text.")
    label: str = Field("label", description="Column with the label (name or index).")
    per_class: int = Field(1, ge=1, description="Examples of each class.")
    seed: int = Field(0, ge=0, description="Determines which examples, and their order.")
    max_chars: int = Field(600, ge=1, description="Characters; longer texts are not drawn.")


DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that embed, isolate or override the direction of the text behind them."""


def _shown(name: str) -> str:
    """The name; ValueError if it contains what is not shown or changes what stands around it."""
    wrong = (c for c in name if unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in DIRECTIONS)
    if (found := next(wrong, None)) is not None:
        raise ValueError(
            f"{name!r} contains U+{ord(found):04X}, a control character: leave it out, here and in the files"
        )
    return name


LabelName = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_shown)]
"""Without outer blanks, as the values of a corpus are matched; one line."""
PICKLES = ("auto", "hf", "pt", "npcache")
"""Values of vLLM's load_format that read pickled weights, or may."""
ANSWER_LETTERS = "BCDEFGHJKLMNOPQRSTUVWXYZ"
"""Without A and I, which are words: "I think …" and "A text about …" are no answers, but begin like one."""


class PromptConfig(Section):
    """How the prompt is built; the text comes last, so everything before it is a cacheable prefix."""

    instruction: str = Field(
        "Classify the text into exactly one of the categories.",
        description="What the teacher is asked to do.",
    )
    answer: Literal["letters", "names"] = Field(
        "letters",
        description="letters: the prompt lists 'B. name' and the answer is a letter, never A or I, which "
        "are words; names: the answer is the label's name, scored by all of its tokens.",
    )
    show_labels: bool = Field(True, description="List the labels, with their descriptions, in the prompt.")
    text_prefix: str = Field("Text: ", description="Text before every text.")
    answer_prefix: str = Field("\nLabel:", description="Text between a text and its label.")
    separator: str = Field("\n\n", description="Text between instruction, demonstrations and the text.")
    template: Template = Field(
        None,
        description="A Jinja2 template of the whole prompt, or the path of one that ends in .j2; null: "
        "the default. Its variables are instruction, labels (name, key, description), "
        "demonstrations (text, label, answer), text, and the settings above; it contains {{ "
        "text }} once.",
    )
    system: str | None = Field(None, description="The system message, for models with a chat template.")
    demonstrations: tuple[Demonstration, ...] = Field((), description="Few-shot examples, in this order.")
    draw: DrawnDemonstrations | None = Field(
        None, description="More few-shot examples, drawn from a file, after those above."
    )
    chat: Literal["auto", "never"] = Field(
        "auto", description="auto: use the model's chat template if its tokenizer has one."
    )
    cut: Literal["head", "tail", "middle"] = Field(
        "tail", description="The part of a text that is removed if it is too long; nothing else is truncated."
    )


class RecordedConfig(Section):
    """Recorded label distributions: from a parquet file, or from the labels/ folder of a run."""

    uri: DataUri = Field(description="A parquet file, a glob or a folder.")
    probs: str = Field("probs", description="Column with a list of C probabilities per row.")
    id: str = Field("id", description="Column matched with the id of the corpus and the test set.")
    prompt_tokens: str | None = Field(None, description="Column with the prompt's tokens; optional.")


class ServerConfig(Section):
    """A server with the OpenAI protocol: vLLM, SGLang, llama.cpp, TGI, or a cloud service."""

    base_url: str = Field(
        description="Up to and including the version, such as http://127.0.0.1:8000/v1.",
        pattern=r"^https?://\S+$",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the key, set where the teacher's actors run; without it no"
        " key is sent.",
    )
    cache_as: str | None = Field(
        None,
        min_length=1,
        description="Name of the server for the cache of answers; null: its base_url. Give one if the same "
        "model is served at changing addresses.",
    )
    tokenizer: OptionalModel = Field(
        None,
        description="Checkpoint folder or hub name of the served model's tokenizer. With it, prompts are "
        "sent as tokens, truncated to max_model_len, and labels are scored by all of their "
        "tokens.",
    )
    scores: Literal["auto", "label_ids", "top_logprobs", "votes"] = Field(
        "auto",
        description="Source of the probabilities. label_ids: exactly the labels' tokens (vLLM; needs "
        "tokenizer); top_logprobs: the server's most likely tokens (needs one-token answers: "
        "letters); votes: shares of sampled answers, possible with every server; auto: the "
        "first of these that works.",
    )
    top_logprobs: int = Field(
        20, ge=1, description="Tokens requested by top_logprobs; OpenAI's maximum is 20."
    )
    concurrency: int = Field(16, ge=1, description="Concurrent requests of one actor.")
    requests_per_minute: float | None = Field(None, gt=0, description="Limit for one actor; null: none.")
    back_off_s: float = Field(
        1.0,
        gt=0,
        description="Seconds before the second attempt, doubled before each further one; a server's "
        "Retry-After takes precedence.",
    )


class ConfidenceConfig(Section):
    """How a teacher's answers are turned into confidence values before they are used for selection."""

    method: Literal["raw", "batch", "temperature", "votes"] = Field(
        "raw",
        description="raw: the teacher's probabilities; batch: divided by the mean answer before the first"
        " round (arXiv 2309.17249); temperature: fitted on the hold-out's gold; votes: shares"
        " of sampled answers instead of probabilities.",
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="For batch: the power of the mean; 0 changes nothing."
    )
    samples: int = Field(10, ge=1, description="For votes: answers sampled per text.")
    sampling_temperature: float = Field(0.7, gt=0, description="For votes.")


class PriceConfig(Section):
    """The price of a teacher, in a single currency for the whole run."""

    currency: str = "USD"
    input: float = Field(0.0, ge=0, description="For a million prompt tokens.")
    cached: float | None = Field(
        None, ge=0, description="For a million prompt tokens in the prefix cache; null: as input."
    )
    output: float = Field(0.0, ge=0, description="For a million answer tokens.")

    @property
    def is_free(self) -> bool:
        return not (self.input or self.cached or self.output)

    def cost(self, prompt_tokens: int, cached_tokens: int, answer_tokens: int) -> Decimal:
        """Cost in the currency; ``prompt_tokens`` include ``cached_tokens``.

        Exact decimal arithmetic, so that rounding errors of many small costs cannot exceed a cap.
        """
        cached = self.input if self.cached is None else self.cached
        parts = (
            (prompt_tokens - cached_tokens, self.input),
            (cached_tokens, cached),
            (answer_tokens, self.output),
        )
        return sum((tokens * Decimal(str(rate)) for tokens, rate in parts), Decimal()) / 1_000_000


class CascadeConfig(Section):
    """Two teachers: the small one labels every text, the large one only the doubtful ones."""

    small: TeacherConfig
    large: TeacherConfig
    escalate_below: float = Field(
        0.6,
        ge=0,
        le=1,
        description="The large teacher labels texts for which the small one's confidence is below this.",
    )
    review_margin: float | None = Field(
        0.8,
        ge=0.5,
        le=1,
        description="Before each later round, it also reviews texts for which the student predicts "
        "another label than the small teacher with a margin above this; null: never.",
    )
    review: int = Field(
        128, ge=1, description="Maximum number of texts that the large teacher reviews in a round."
    )


NEEDED = {
    "vllm": ("model", "a checkpoint folder or a hub name"),
    "openai": ("server", "server.base_url"),
    "recorded": ("recorded", "recorded.uri"),
    "cascade": ("cascade", "cascade.small and cascade.large"),
}
"""For each kind of teacher: the setting without which it cannot work, and what to give for it."""


class TeacherConfig(Section):
    """The large model that produces the labels."""

    kind: Literal["vllm", "openai", "recorded", "cascade"] = "vllm"
    model: OptionalModel = Field(
        None, description="Checkpoint folder or hub name (vllm), or the server's name for it (openai)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    confidence: ConfidenceConfig = Field(default_factory=ConfidenceConfig)
    price: PriceConfig = Field(default_factory=PriceConfig)
    recorded: RecordedConfig | None = Field(None, description="Source of answers (kind: recorded).")
    server: ServerConfig | None = Field(None, description="Where the model is served (kind: openai).")
    cascade: CascadeConfig | None = Field(None, description="The two teachers (kind: cascade).")
    actors: int | tuple[int, int] = Field(
        1,
        description="Teacher actors, one engine each; (min, max): more are started while all are busy and"
        " resources are free, and idle ones are stopped at once, also between rounds. "
        "Starting an engine takes minutes for a large model, so set min to what must be "
        "ready.",
    )
    cpus: float = Field(
        0.5,
        gt=0,
        description="CPUs that Ray reserves for one teacher actor. On CPUs, an engine in one part uses as"
        " many threads; below 1, one per physical core.",
    )
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for one teacher actor, or for each of its parts; may be a "
        "fraction for one part. null: as many as are there when a run starts: for an engine a whole one "
        "if that leaves one for the student, else 0.7 of one, with an engine.gpu_memory_utilization of "
        "0.65; none if vLLM is the build for CPUs.",
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Ray's custom resources for one teacher actor, or for each of its parts on GPUs, such"
        " as {teacher: 1}: restricts actors to nodes that offer them.",
    )
    tensor_parallel: int = Field(1, ge=1, description="Parts into which each layer of a model is divided.")
    pipeline_parallel: int = Field(1, ge=1, description="Parts among which a model's layers are divided.")
    max_model_len: int | None = Field(
        None,
        ge=16,
        description="Tokens of prompt and answer; longer texts are truncated. null: what a vllm model "
        "reads, at most 8,192; 2,048 for a server.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the weights."
    )
    quantization: str | None = Field(None, description="vLLM's name for it (fp8, awq, gptq, …).")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other vLLM engine arguments, passed on unchanged; none by which a "
        "checkpoint can run code.",
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of key-value cache, on CPU only.")
    min_branch_prob: float = Field(
        5e-4,
        ge=0,
        lt=0.1,
        description="A branch of the label names with less probability than this is not followed further:"
        " its names share the probability. It bounds the error of a name, except for a name "
        "that is the beginning of others.",
    )
    max_off_label: float = Field(
        0.99,
        gt=0,
        le=1,
        description="Largest probability on answers that are no label, such as a refusal; a text with more "
        "goes to quarantine as no_label. 1: only a text without any probability on a label.",
    )
    ticket_size: int = Field(128, ge=1, description="Texts in a ticket, the unit of labelling.")
    tickets_in_flight: int = Field(
        2, ge=1, description="Tickets that one teacher actor works on concurrently; 2 keep the engine busy."
    )
    attempts: int = Field(3, ge=1, description="Attempts for a text before it goes to quarantine.")
    timeout_s: float = Field(
        300.0, gt=0, description="Time limit for an answer of an engine or server, in seconds."
    )
    start_timeout_s: float = Field(
        1800.0, gt=0, description="Time limit for the start of an engine, in seconds."
    )
    no_progress_timeout_s: float = Field(
        3600.0, gt=0, description="Seconds without progress of any teacher after which a run is stopped."
    )
    cache: Cache = Field(
        "auto",
        description="Folder or URI of the index by which later runs find these labels, so that no text is"
        " sent twice; auto: teacher-cache in run.dir; null: none.",
    )
    tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="Prompt tokens per second of one actor, for --dry-run; null: as measured by earlier "
        "runs, or a rough guess.",
    )

    @field_validator("actors")
    @classmethod
    def _actors(cls, actors: int | tuple[int, int]) -> int | tuple[int, int]:
        ends(actors)
        return actors

    @field_validator("engine")
    @classmethod
    def _no_code(cls, engine: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint must not run code; by default vLLM reads a pickle where there is nothing else."""
        if engine.get("trust_remote_code"):
            raise ValueError("trust_remote_code would run a checkpoint's own code: leave it out")
        if str(engine.get("load_format")).lower() in PICKLES:
            raise ValueError(
                f"load_format {engine['load_format']!r} may load a pickle, which can run code: leave it out, "
                "and give a checkpoint with *.safetensors"
            )
        return engine

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        needed, what = NEEDED[self.kind]
        if getattr(self, needed) is None:
            raise ValueError(f"{needed} is missing: kind '{self.kind}' needs {what}")
        if self.kind == "openai" and not self.model:
            raise ValueError("model is missing: kind 'openai' needs the server's name for it")
        for name, member in self.members():
            if member is not self and member.kind == "cascade":
                raise ValueError(
                    f"cascade.{name} is a cascade itself: name a vllm, openai or recorded teacher"
                )
        currencies = dict.fromkeys(member.price.currency for _, member in self.members())
        if len(currencies) > 1:
            raise ValueError(
                f"price.currency is {' and '.join(currencies)} for the two teachers of a cascade: give "
                "both in one"
            )
        if self.kind == "cascade" and self.confidence.method != "raw":
            raise ValueError(
                f"confidence.method is {self.confidence.method!r}, but the answers of a cascade's two "
                "teachers have no common scale to be fitted: leave it 'raw'"
            )
        if self.kind == "recorded" and self.confidence.method == "votes":
            raise ValueError(
                "confidence.method 'votes' samples answers, which recorded ones cannot: name the column of "
                "the votes as recorded.probs"
            )
        return self

    @property
    def context(self) -> int:
        """Tokens of prompt and answer; without a setting, the default of a model that is not known."""
        return self.max_model_len or 2048

    @property
    def has_prompt(self) -> bool:
        """Whether an LLM is prompted: its answers cost something, and later runs reuse them."""
        return self.kind in ("vllm", "openai")

    def members(self) -> Iterator[tuple[str, TeacherConfig]]:
        """The teachers by name: the two of a cascade, or the only one, named ``teacher``."""
        if self.cascade is None or self.kind != "cascade":
            yield "teacher", self
        else:
            yield from (("small", self.cascade.small), ("large", self.cascade.large))

    def with_members(self, members: Mapping[str, TeacherConfig]) -> TeacherConfig:
        """These settings with other ones for the teachers, by the names of :meth:`members`."""
        if self.cascade is None or self.kind != "cascade":
            return members["teacher"]
        return self.model_copy(update={"cascade": self.cascade.model_copy(update=dict(members))})

    @property
    def n_gpus(self) -> float:
        """GPUs of one actor or part; 0 while undecided."""
        return self.gpus or 0.0

    @property
    def min_actors(self) -> int:
        return ends(self.actors)[0]

    @property
    def max_actors(self) -> int:
        return ends(self.actors)[1]

    @property
    def reviews(self) -> bool:
        """Whether a large teacher relabels texts whose label a confident student contradicts."""
        return self.kind == "cascade" and self.cascade is not None and self.cascade.review_margin is not None

    @property
    def parts(self) -> int:
        """Number of processes of one engine."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def is_placed_in_parts(self) -> bool:
        """Whether Ray places each part of an engine separately; parts on CPUs are processes of one actor."""
        return self.parts > 1 and self.n_gpus > 0
