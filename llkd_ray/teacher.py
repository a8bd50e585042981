"""The teacher: the stream of tickets, and the actors that label what a ticket stands for.

One Ray Data execution lives as long as the run, so every engine starts once:

    tickets → Leaser (asks the selector for rows, reads their texts) → pool of teacher actors → receipts

A teacher stage takes the texts of one ticket, writes their label file and then tells the selector.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from llkd_ray import schemas
from llkd_ray.cluster import LEASER_CPUS, Background
from llkd_ray.config import Config, ConfigError
from llkd_ray.prompts import Prompt, build_prompt, encode_prompts, label_token_ids, room_for_text
from llkd_ray.recorded import read_recorded
from llkd_ray.store import (
    ENGINES_DIR,
    LABELS_DIR,
    QUARANTINE_DIR,
    SENT_DIR,
    Examples,
    RunStore,
    list_column,
    matrix_of,
    ticket_file,
)

logger = logging.getLogger(__name__)

_LEASED = pa.schema([pa.field("ticket", pa.int32()), *schemas.NUMBERED_EXAMPLES])
_RECEIPT = pa.schema([pa.field("ticket", pa.int32()), pa.field("rows", pa.int32())])


@dataclass(frozen=True)
class Answers:
    """What a teacher says to the texts of a ticket. ``answered_N`` is false where it said nothing."""

    probs_NC: np.ndarray
    off_label_N: np.ndarray
    prompt_tokens_N: np.ndarray
    answered_N: np.ndarray
    reason: str = ""
    """Why the rest has no answer, for the quarantine."""


class Leaser:
    """Turns a ticket into the texts that are worth labelling now."""

    def __init__(self, store_uri: str, selector: Any) -> None:
        self.examples = Examples.open(RunStore(store_uri))
        self.selector = selector

    async def __call__(self, tickets: pa.Table) -> AsyncIterator[pa.Table]:
        for ticket in tickets["ticket"].to_pylist():
            rows = await self.selector.lease.remote(ticket)
            texts = await asyncio.to_thread(self.examples.read, rows, ["id", "text"])
            column = pa.array(np.full(len(texts), ticket, dtype=np.int32))
            leased = texts.add_column(0, "ticket", column)
            yield leased.cast(pa.schema([_LEASED.field(name) for name in leased.column_names]))


class Teacher(ABC):
    """What all teacher stages share: files first, then the selector."""

    def __init__(self, config: Config, store_uri: str, selector: Any) -> None:
        self.config = config
        self.store = RunStore(store_uri)
        self.selector = selector

    @abstractmethod
    async def answer(self, ids: Sequence[str], texts: Sequence[str]) -> Answers:
        """Label distributions of some texts."""

    async def __call__(self, leased: pa.Table) -> AsyncIterator[pa.Table]:
        if not len(leased):
            yield _RECEIPT.empty_table()
            return
        ticket = leased["ticket"][0].as_py()
        assert leased["ticket"].unique().to_pylist() == [ticket], "a block holds one ticket"
        if self.store.exists(ticket_file(LABELS_DIR, ticket)):
            # An earlier attempt died between its file and its word to the selector.
            done = self.store.read_table(ticket_file(LABELS_DIR, ticket))
        else:
            done = await self._label(ticket, leased)
        await self.selector.put_labels.remote(
            ticket,
            done["row"].to_numpy(),
            matrix_of(done["probs"], len(self.config.labels.names)),
            int(done["prompt_tokens"].to_numpy().sum()),
        )
        yield pa.table({"ticket": [ticket], "rows": [len(done)]}, schema=_RECEIPT)

    async def _label(self, ticket: int, leased: pa.Table) -> pa.Table:
        # The mark tells, after a kill, which texts were sent and never answered.
        mark = f"{SENT_DIR}/ticket-{ticket:08d}.{uuid.uuid4().hex}"
        await asyncio.to_thread(self.store.write_bytes, mark, str(len(leased)).encode())
        answers = await self.answer(leased["id"].to_pylist(), leased["text"].to_pylist())
        labels = pa.Table.from_arrays(
            [
                leased["row"].combine_chunks(),
                leased["id"].combine_chunks(),
                list_column(answers.probs_NC),
                pa.array(answers.off_label_N.astype(np.float32)),
                pa.array(answers.prompt_tokens_N.astype(np.int32)),
            ],
            schema=schemas.LABELS,
        ).filter(pa.array(answers.answered_N))
        if not answers.answered_N.all():
            self._quarantine(ticket, leased.filter(pa.array(~answers.answered_N)), answers.reason)
        await asyncio.to_thread(self.store.write_table, ticket_file(LABELS_DIR, ticket), labels)
        await asyncio.to_thread(self.store.delete, mark)
        return labels

    def _quarantine(self, ticket: int, refused: pa.Table, reason: str) -> None:
        n = len(refused)
        columns = {
            "source": ["teacher"] * n,
            "position": refused["row"],
            "reason": [reason] * n,
            "detail": [f"ticket {ticket}"] * n,
            "start_of_text": [text[:200] for text in refused["text"].to_pylist()],
        }
        table = pa.table(columns, schema=schemas.QUARANTINE)
        self.store.write_table(f"{QUARANTINE_DIR}/teacher-{ticket:08d}.parquet", table)


class RecordedTeacher(Teacher):
    """Answers from a parquet file: for benchmarks, and for runs that use an earlier run's labels."""

    def __init__(self, config: Config, store_uri: str, selector: Any) -> None:
        super().__init__(config, store_uri, selector)
        assert config.teacher.recorded is not None
        self.recorded = read_recorded(config.teacher.recorded, len(config.labels.names))

    async def answer(self, ids: Sequence[str], texts: Sequence[str]) -> Answers:
        place_N = np.array([self.recorded.place.get(text_id, -1) for text_id in ids], dtype=np.int64)
        probs_NC = self.recorded.probs_RC[place_N]
        return Answers(
            probs_NC=probs_NC,
            off_label_N=np.clip(1.0 - probs_NC.sum(axis=1), 0.0, 1.0),
            prompt_tokens_N=self.recorded.prompt_tokens_R[place_N],
            answered_N=place_N >= 0,
            reason="no_recorded_answer",
        )


class VllmTeacher(Teacher):
    """A vLLM engine in an actor: one forward pass a text gives the distribution over the labels."""

    def __init__(self, config: Config, store_uri: str, selector: Any) -> None:
        super().__init__(config, store_uri, selector)
        began = time.monotonic()
        # Read by vLLM when it is imported.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.teacher.kv_cache_gib))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.tokenizer = load_tokenizer(config)
        self.prompt, self.label_ids = prepare_prompt(config, self.tokenizer)
        settings = {"enforce_eager": config.teacher.gpus == 0, "enable_prefix_caching": True}
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(config.teacher.model),
                dtype=config.teacher.dtype,
                max_model_len=config.teacher.max_model_len,
                **(settings | config.teacher.engine),
            )
        )
        self.sampling = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=self.label_ids, detokenize=False
        )
        self._note_start(time.monotonic() - began)

    def __del__(self) -> None:
        # Ray Data drops the stage when the stream ends; an engine that is left to die with the actor
        # prints errors instead.
        if engine := getattr(self, "engine", None):
            engine.shutdown()

    async def answer(self, ids: Sequence[str], texts: Sequence[str]) -> Answers:
        room = self.config.teacher.max_model_len - 1  # the answer's token
        encoded, _ = await asyncio.to_thread(encode_prompts, self.prompt, texts, self.tokenizer, room)
        probs_NC = np.array(await asyncio.gather(*(self._label_probs(ids) for ids in encoded)))
        return Answers(
            probs_NC=probs_NC,
            off_label_N=np.clip(1.0 - probs_NC.sum(axis=1), 0.0, 1.0),
            prompt_tokens_N=np.array([len(ids) for ids in encoded]),
            answered_N=np.ones(len(texts), dtype=bool),
        )

    async def _label_probs(self, token_ids: list[int]) -> list[float]:
        """float[C]: probability of each label's token as the next one, over the whole vocabulary."""
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        request = TokensPrompt(prompt_token_ids=token_ids)
        try:
            async for output in self.engine.generate(request, self.sampling, uuid.uuid4().hex):
                last = output
        except EngineDeadError:
            # The engine does not come back in this process. Ray starts a new actor and retries there;
            # raising instead would send the retries to the same dead engine.
            logger.exception("the engine died; this teacher actor ends so that Ray starts a new one")
            os._exit(1)
        logprobs: Any = last.outputs[0].logprobs
        return [float(np.exp(logprobs[0][token].logprob)) for token in self.label_ids]

    def _note_start(self, seconds: float) -> None:
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        facts = {"model": self.config.teacher.model, "seconds_to_start": seconds, **where}
        self.store.write_json(f"{ENGINES_DIR}/{uuid.uuid4().hex}.json", facts)


def load_tokenizer(config: Config) -> Any:
    """The teacher's tokenizer; raises :class:`ConfigError` where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.teacher.model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"teacher.model: no tokenizer can be loaded from {config.teacher.model!r}; give a checkpoint "
            f"folder or a hub name ({_first_line(error)})"
        ) from None
    if len(tokenizer) < len(tokenizer.all_special_ids) + 10:
        # For some types, transformers makes an empty tokenizer where there are no files for it.
        raise ConfigError(
            f"teacher.model: {config.teacher.model!r} has no tokenizer files (its tokenizer knows "
            f"{len(tokenizer)} tokens); save the tokenizer beside the weights"
        )
    return tokenizer


def prepare_prompt(config: Config, tokenizer: Any) -> tuple[Prompt, list[int]]:
    """The prompt and the label tokens; raises :class:`ConfigError` where labels collide."""
    prompt = build_prompt(config.teacher.prompt, config.labels, tokenizer)
    return prompt, label_token_ids(prompt, config.labels, tokenizer)


def check_teacher(config: Config) -> dict[str, Any]:
    """Find the mistakes that can be found without an engine; returns facts for the manifest."""
    if config.teacher.kind == "recorded":
        assert config.teacher.recorded is not None
        answers = read_recorded(config.teacher.recorded, len(config.labels.names))
        return {"kind": "recorded", "uri": config.teacher.recorded.uri, "answers": len(answers)}
    tokenizer = load_tokenizer(config)
    prompt, _ = prepare_prompt(config, tokenizer)
    room_for_text(prompt, tokenizer, config.teacher.max_model_len - 1)
    return {"kind": "vllm", "model": config.teacher.model, "prompt_hash": prompt.hash}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def start_stream(config: Config, store_uri: str, selector: Any, tickets: Sequence[int]) -> Background:
    """Start the Ray Data execution that labels the tickets."""
    stream = _build_stream(config, store_uri, selector, tickets)

    def consume() -> None:
        for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass

    return Background("ticket-stream", consume)


def _build_stream(config: Config, store_uri: str, selector: Any, tickets: Sequence[int]) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # It warns of every actor that holds a model without booking memory, twice a minute.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    # No read task: one would ask for a whole CPU, which the student's ranks may hold for good.
    source = ray.data.from_items([{"ticket": t} for t in tickets], override_num_blocks=len(tickets))
    teacher = config.teacher
    common: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    leased = source.map_batches(
        Leaser,
        fn_constructor_args=(store_uri, selector),
        compute=_pool(1, 2 * teacher.actors + 2),
        num_cpus=LEASER_CPUS,
        **common,
    )
    return leased.map_batches(
        VllmTeacher if teacher.kind == "vllm" else RecordedTeacher,
        fn_constructor_args=(config, store_uri, selector),
        compute=_pool(teacher.actors, teacher.tickets_in_flight),
        num_cpus=teacher.cpus,
        num_gpus=teacher.gpus or None,
        **common,
    )


def _pool(actors: int, tickets: int) -> ActorPoolStrategy:
    """Some actors, each at work on some tickets at a time."""
    return ActorPoolStrategy(
        size=actors, max_tasks_in_flight_per_actor=tickets, max_concurrent_calls_per_actor=tickets
    )
