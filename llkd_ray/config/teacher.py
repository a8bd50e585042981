"""The settings of a teacher: model, prompt, calibration of its confidence, price."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llkd_ray.config.base import Cache, DataUri, OptionalModel, Section, Template, ends


class Demonstration(Section):
    """One labelled example shown to the teacher in its prompt."""

    text: str = Field(min_length=1)
    label: str = Field(description="A label's name.")


class DrawnDemonstrations(Section):
    """Few-shot examples drawn from a file of labelled texts, the same number for each class."""

    uri: DataUri = Field(description="A file, a glob or a folder, in any format that the corpus may have.")
    text: str = Field("text", description="Column that holds the text.")
    label: str = Field("label", description="Column with the label (name or index).")
    per_class: int = Field(1, ge=1, description="Examples of each class.")
    seed: int = Field(0, ge=0, description="Decides which, and in what order.")
    max_chars: int = Field(600, ge=1, description="Characters; longer texts are not drawn.")


class PromptConfig(Section):
    """How the prompt is built; the text comes last, so everything before it is a cacheable prefix."""

    instruction: str = Field(
        "Classify the text into exactly one of the categories.",
        description="What the teacher is asked to do.",
    )
    answer: Literal["letters", "names"] = Field(
        "letters",
        description="letters: the prompt lists 'A. name' and the answer is a letter; "
        "names: the answer is the label's name, scored by all of its tokens.",
    )
    show_labels: bool = Field(True, description="List the labels, with their descriptions, in the prompt.")
    text_prefix: str = Field("Text: ", description="Stands before every text.")
    answer_prefix: str = Field("\nLabel:", description="Stands between a text and its label.")
    separator: str = Field("\n\n", description="Stands between instruction, demonstrations and the text.")
    template: Template = Field(
        None,
        description="A Jinja2 template of the whole prompt, or the path of one that ends in .j2; null: the "
        "default, of the settings above. It sees instruction, labels (name, key, description), "
        "demonstrations (text, label, answer), text, and the settings above; {{ text }} stands in it once.",
    )
    system: str | None = Field(None, description="The system message, for models with a chat template.")
    demonstrations: tuple[Demonstration, ...] = Field((), description="Few-shot examples, in this order.")
    draw: DrawnDemonstrations | None = Field(
        None, description="Further few-shot examples, drawn from a file, behind those above."
    )
    chat: Literal["auto", "never"] = Field(
        "auto", description="auto: use the model's chat template where its tokenizer has one."
    )
    cut: Literal["head", "tail", "middle"] = Field(
        "tail", description="What is left out of a text that is too long; never of anything else."
    )


class RecordedConfig(Section):
    """Recorded label distributions: from a parquet file, or from the labels/ folder of a run."""

    uri: DataUri = Field(description="A parquet file, a glob or a folder.")
    probs: str = Field("probs", description="Column with one list of C probabilities a row.")
    id: str = Field("id", description="Column matched with the id of the corpus and the test set.")
    prompt_tokens: str | None = Field(None, description="Column with the prompt's tokens; optional.")


class ServerConfig(Section):
    """A server with the OpenAI protocol: vLLM, SGLang, llama.cpp, TGI, or a cloud service."""

    base_url: str = Field(
        description="Up to and with the version, such as http://127.0.0.1:8000/v1.", pattern=r"^https?://\S+$"
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key, set where the teacher's actors run; none is "
        "sent where it is not set.",
    )
    tokenizer: OptionalModel = Field(
        None,
        description="Checkpoint folder or hub name of the served model's tokenizer. With it, prompts are "
        "sent as tokens and cut to max_model_len, and labels are scored by all of their tokens.",
    )
    scores: Literal["auto", "label_ids", "top_logprobs", "votes"] = Field(
        "auto",
        description="How probabilities are had. label_ids: of exactly the labels' tokens (vLLM; needs "
        "tokenizer); top_logprobs: of the server's likeliest tokens (needs one-token answers: letters); "
        "votes: shares of sampled answers, which every server has; auto: the first of these that it can.",
    )
    top_logprobs: int = Field(20, ge=1, description="Tokens asked for by top_logprobs; OpenAI gives 20.")
    concurrency: int = Field(16, ge=1, description="Requests of one actor that are under way at a time.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Of one actor; null: as many as the server takes."
    )
    back_off_s: float = Field(
        1.0, gt=0, description="Seconds before a second attempt, twice as many before each further one; a "
        "server's Retry-After goes before it."
    )  # fmt: skip


class ConfidenceConfig(Section):
    """How a teacher's answers are turned into confidence values before they are used for selection."""

    method: Literal["raw", "batch", "temperature", "votes"] = Field(
        "raw",
        description="raw: as the teacher says; batch: divided by the mean answer to what is read before the "
        "first round (arXiv 2309.17249); temperature: fitted on the texts of the hold-out whose gold is "
        "known; votes: shares of sampled answers instead of probabilities.",
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="Of batch: the power of the mean; 0 changes nothing."
    )
    samples: int = Field(10, ge=1, description="Of votes: answers sampled for a text.")
    sampling_temperature: float = Field(0.7, gt=0, description="Of votes.")


class PriceConfig(Section):
    """The price of a teacher, in a single currency for the whole run."""

    currency: str = "USD"
    input: float = Field(0.0, ge=0, description="For a million prompt tokens.")
    cached: float | None = Field(
        None, ge=0, description="For a million of those that were in the prefix cache; null: as input."
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
        0.6, ge=0, le=1, description="The large one is asked where the small one's confidence is below this."
    )
    review_margin: float | None = Field(
        0.8,
        ge=0.5,
        le=1,
        description="… and, before each later round, where a student whose best answer leads by more than "
        "this says another label than the small one did; null: never.",
    )
    review: int = Field(128, ge=1, description="Texts that the large one reviews in a round at most.")


class TeacherConfig(Section):
    """The large model that produces the labels."""

    kind: Literal["vllm", "openai", "recorded", "cascade"] = "vllm"
    model: OptionalModel = Field(
        None, description="Checkpoint folder or hub name (vllm), or the server's name for it (openai)."
    )
    revision: str | None = Field(None, description="Of a model from the hub: branch, tag or commit.")
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    confidence: ConfidenceConfig = Field(default_factory=ConfidenceConfig)
    price: PriceConfig = Field(default_factory=PriceConfig)
    recorded: RecordedConfig | None = Field(None, description="Source of answers (kind: recorded).")
    server: ServerConfig | None = Field(None, description="Where the model is served (kind: openai).")
    cascade: CascadeConfig | None = Field(None, description="The two teachers (kind: cascade).")
    actors: int | tuple[int, int] = Field(
        1,
        description="Teacher actors, one engine each; (min, max): more come while all are busy and room is "
        "there, and idle ones go at once, between rounds too. Each that comes starts an engine, which takes "
        "minutes for a large model: keep with min what must not wait.",
    )
    cpus: float = Field(
        0.5,
        gt=0,
        description="CPUs that Ray books for one teacher actor. On CPUs, an engine of one part computes "
        "with as many threads; below 1, with one for each physical core.",
    )
    gpus: float = Field(
        0, ge=0, description="GPUs that Ray books for one teacher actor; for each of its parts where it has."
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Ray's custom resources for one teacher actor, or for each of its parts on GPUs: keeps "
        "actors to the nodes that were started with them, as {teacher: 1}.",
    )
    tensor_parallel: int = Field(1, ge=1, description="Parts that each layer of a model is cut into.")
    pipeline_parallel: int = Field(1, ge=1, description="Parts that a model's layers are shared out to.")
    max_model_len: int = Field(2048, ge=16, description="Tokens of prompt and answer; longer texts are cut.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Weights' type.")
    quantization: str | None = Field(None, description="As vLLM names it (fp8, awq, gptq, …).")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Any further vLLM engine argument, passed on as it is."
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of key-value cache, on CPU only.")
    min_branch_prob: float = Field(
        5e-4,
        ge=0,
        lt=0.1,
        description="Probability of a branch of the label names that is not worth a request: its names share "
        "it as they are. No name is further off than that, but for one that others go on from.",
    )
    ticket_size: int = Field(128, ge=1, description="Texts a ticket stands for: the unit of labelling.")
    tickets_in_flight: int = Field(
        2, ge=1, description="Tickets one teacher actor works on at a time; 2 keep the engine busy."
    )
    attempts: int = Field(3, ge=1, description="Times that a text is tried before it goes to quarantine.")
    timeout_s: float = Field(300.0, gt=0, description="Seconds that an engine or a server has for an answer.")
    start_timeout_s: float = Field(1800.0, gt=0, description="Seconds that an engine has to start.")
    no_progress_timeout_s: float = Field(
        3600.0, gt=0, description="Seconds without any progress of the teachers after which a run is stopped."
    )
    cache: Cache = Field(
        "auto",
        description="Folder or URI that tells later runs where to find these labels, so that nothing is "
        "asked twice; auto: teacher-cache in run.dir; null: none.",
    )
    tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="Prompt tokens that one actor takes in a second, for --dry-run; null: as earlier runs "
        "measured, or a rough guess.",
    )

    @field_validator("actors")
    @classmethod
    def _actors(cls, actors: int | tuple[int, int]) -> int | tuple[int, int]:
        ends(actors)
        return actors

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        needed = {"vllm": "model", "openai": "server", "recorded": "recorded", "cascade": "cascade"}[
            self.kind
        ]
        if getattr(self, needed) is None:
            what = {
                "model": "a checkpoint folder or a hub name",
                "server": "server.base_url",
                "recorded": "recorded.uri",
                "cascade": "cascade.small and cascade.large",
            }
            raise ValueError(f"{needed} is missing: kind '{self.kind}' needs {what[needed]}")
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

    def members(self) -> Iterator[tuple[str, TeacherConfig]]:
        """The teachers by name: the two of a cascade, or the only one, named ``teacher``."""
        if self.cascade is None or self.kind != "cascade":
            yield "teacher", self
        else:
            yield from (("small", self.cascade.small), ("large", self.cascade.large))

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
        return self.parts > 1 and self.gpus > 0
