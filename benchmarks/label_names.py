"""Labels of one or many tokens: are their probabilities right, and what do they cost the engine?

A small teacher is made on the spot, once: a Llama of two layers that reads BANKING77 and answers with a
label, by name or by letter. A vLLM engine then gives the label probabilities of test texts for several label
sets, each from an empty prefix cache. They are held against plain forward passes of transformers in float32
over the tokens of every label, without trie or engine; and the tokens that the engine computed are set beside
the naive way: one prompt for each label. Prints a Markdown table.

    python benchmarks/label_names.py

Shapes: N texts, C labels, T tokens that go on from H others, A tokens asked for, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig, TeacherConfig
from llkd_ray.quickstart.teacher import train_tokenizer
from llkd_ray.teacher.base import Answers, Unlimited
from llkd_ray.teacher.prompt import build_prompt, encode_prompts, label_sequences
from llkd_ray.teacher.vllm.backends import AsyncEngine
from llkd_ray.teacher.vllm.engine import Engine
from llkd_ray.teacher.vllm.requests import CPU_BLOCK_SIZE
from llkd_ray.teacher.vllm.teacher import VllmTeacher

MODEL_LEN = 2048
UNRESOLVED = TeacherConfig.model_fields["min_branch_prob"].default
VLLM_BLOCK_SIZE = 128  # vLLM's own default on CPU
PAD, END = 2, 1  # tokens of quickstart's tokenizer
PREFIXES = (
    *("card", "card payment", "card payment fee", "cash", "cash withdrawal", "exchange", "exchange rate"),
    *("pending", "pending transfer", "top up", "top up by card", "transfer"),
)
"""Names of our own that go on from one another, and that names of BANKING77 begin with."""
_THINGS = ["card", "account", "savings", "loan", "overdraft", "cheque", "statement", "insurance", "branch"]
_MATTERS = (
    *("repair fee", "opening hours", "renewal date", "closing letter", "interest earned"),
    *("joint holder", "monthly limit", "paper copy", "security question"),
)
MADE_UP = tuple(f"{thing} {matter}" for thing, matter in product(_THINGS, _MATTERS))


@dataclass(frozen=True)
class LabelSet:
    """Labels as the teacher is asked for them."""

    title: str
    names: tuple[str, ...]
    prompt: PromptConfig

    @property
    def is_long(self) -> bool:
        """Whether many names stand in the prompt."""
        return self.prompt.show_labels and len(self.names) > 26

    def encode(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
    ) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Token ids of each text's prompt, and of each label."""
        labels = LabelsConfig(names=self.names)
        prompt = build_prompt(self.prompt, labels, tokenizer)
        prompts, cut_N = encode_prompts(prompt, texts, tokenizer, MODEL_LEN, self.prompt.cut)
        assert not cut_N.any(), "a text that is longer than the model"
        return prompts, label_sequences(prompt, labels, tokenizer)


@dataclass(frozen=True)
class Split:
    """Texts with the names of their labels, one for one."""

    texts: list[str]
    golds: list[str]

    def __getitem__(self, rows: Any) -> Split:
        return Split(np.array(self.texts, dtype=object)[rows].tolist(), np.array(self.golds)[rows].tolist())


def label_sets(names: Sequence[str]) -> list[LabelSet]:
    """All that are measured, from the names of BANKING77."""
    by_name = PromptConfig(instruction="", answer="names", show_labels=False, chat="never")
    shown = by_name.model_copy(update={"show_labels": True})
    letters = shown.model_copy(update={"answer": "letters"})
    known = tuple(names)
    more = (*known, *[name for name in MADE_UP if name not in known][: 150 - len(known)])
    every_13th = known[::13]
    return [
        LabelSet(f"{len(every_13th)} letters, legend shown", every_13th, letters),
        LabelSet(f"{len(PREFIXES)} names, prefixes of one another", PREFIXES, by_name),
        LabelSet(f"{len(known)} names", known, by_name),
        LabelSet(f"{len(known)} names, shown", known, shown),
        LabelSet(f"{len(more)} names", more, by_name),
        LabelSet(f"{len(more)} names, shown", more, shown),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the label probabilities of a vLLM teacher.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/banking77.parquet"))
    parser.add_argument("--folder", type=Path, default=Path("runs/label-names"), help="keeps the teacher")
    parser.add_argument("--texts", type=int, default=500, help="of the test split")
    parser.add_argument("--shown", type=int, default=200, help="of those, where all names are in the prompt")
    parser.add_argument("--exact", type=int, default=50, help="of those, asked with nothing left open, too")
    parser.add_argument("--epochs", type=float, default=5.0)
    options = parser.parse_args(arguments)
    if not options.data.exists():
        print(f"label_names: there is no {options.data}; give BANKING77 (text, label, split) with --data")
        return
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # small matrices: see quickstart.py
    train, test = read_splits(options.data)
    sets = label_sets(sorted(set(train.golds)))
    teacher = options.folder / "teacher"
    make_teacher(teacher, train, sets, options.epochs)
    test = test[np.random.default_rng(0).permutation(len(test.texts))[: options.texts]]
    truths = [Truth.of(teacher, labels, test[: options.shown if labels.is_long else None]) for labels in sets]
    for truth in truths:
        tell(truth.summary())
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    asyncio.run(measure(teacher, truths, options.exact, CPU_BLOCK_SIZE))
    asyncio.run(measure(teacher, truths[2:4], 0, VLLM_BLOCK_SIZE))


def tell(line: str) -> None:
    print(f"label_names: {line}", flush=True)


def read_splits(path: Path) -> tuple[Split, Split]:
    table = pq.read_table(path, columns=["text", "label", "split"])
    columns = zip(*(table[name].to_pylist() for name in ("text", "label", "split")), strict=True)
    rows = [(text, label.replace("_", " "), split) for text, label, split in columns]
    train, test = ([row for row in rows if row[2] == split] for split in ("train", "test"))
    return tuple(Split([row[0] for row in part], [row[1] for row in part]) for part in (train, test))


# --- the teacher -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A label set's training examples: whole prompts with their answers, that begin with the same tokens."""

    head: list[int]
    examples: list[tuple[list[int], int]]
    """What goes on from the head, up to an end mark; and where in it the answer starts."""
    share: float
    """Of all steps."""


def make_teacher(folder: Path, train: Split, sets: Sequence[LabelSet], epochs: float) -> None:
    """Train the teacher in every layout that it will be asked in, or find it finished."""
    marker = folder / "made.json"
    made_as = {"epochs": epochs, "sets": [labels.title for labels in sets]}
    if marker.exists() and json.loads(marker.read_text()) == made_as:
        return tell(f"the teacher is ready in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = train_tokenizer(list(zip(train.texts, train.golds, strict=True)), vocabulary=2000)
    tokenizer.model_max_length = MODEL_LEN
    # The prompt of names that are not shown is the same for all sets of them.
    shares = {sets[0]: 0.1, sets[2]: 0.6, sets[3]: 0.15, sets[5]: 0.15}
    layouts = [layout_of(labels, train, tokenizer, share) for labels, share in shares.items()]
    model = train_teacher(layouts, len(tokenizer), steps=round(epochs * len(train.texts) / 64))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    marker.write_text(json.dumps(made_as))  # last of all: a folder without it is made anew
    return None


def layout_of(labels: LabelSet, train: Split, tokenizer: PreTrainedTokenizerFast, share: float) -> Layout:
    mine = [row for row, gold in enumerate(train.golds) if gold in labels.names]
    prompts, sequences = labels.encode([train.texts[row] for row in mine], tokenizer)
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    answers = [sequences[labels.names.index(train.golds[row])] for row in mine]
    examples = [
        ([*ids[shared:], *answer, END], len(ids) - shared)
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    return Layout(prompts[0][:shared], examples, share)


def train_teacher(layouts: Sequence[Layout], vocabulary: int, steps: int) -> LlamaForCausalLM:
    """Train a small Llama on the answers, by the cross-entropy of their tokens alone."""
    rng, begun, losses = np.random.default_rng(0), time.monotonic(), []
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,  # of 64: the smallest head that every attention kernel of vLLM has
            max_position_embeddings=MODEL_LEN,
            bos_token_id=0,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            dtype="float32",
        )
    ).train()
    tell(f"training a teacher of {model.num_parameters() / 1e6:.1f}M parameters for {steps:,} steps")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    batches = [batches_of(layout, 64, rng) for layout in layouts]
    for step in range(steps):
        which = int(rng.choice(len(layouts), p=[layout.share for layout in layouts]))
        layout, rows = layouts[which], next(batches[which])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rests, answers = zip(*(layout.examples[row] for row in rows), strict=True)
        # What a step does not see of its texts keeps the teacher from learning them by heart.
        loss = -token_log_probs(model, layout.head, rests, answers, hidden=rng).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 200 == 199:
            tell(f"step {step + 1:,}, loss {np.mean(losses[-100:]):.3f}, {time.monotonic() - begun:.0f} s")
    return model.eval()


def batches_of(layout: Layout, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Numbers of examples, epoch after epoch without end."""
    while True:
        order = rng.permutation(len(layout.examples))
        yield from np.array_split(order, math.ceil(len(order) / batch))


def token_log_probs(
    model: LlamaForCausalLM,
    head: Sequence[int],
    rests: Sequence[Sequence[int]],
    first_asked: Sequence[int],
    hidden: np.random.Generator | None = None,
) -> torch.Tensor:
    """float[A]: log-probability of the tokens of each rest from its ``first_asked`` on.

    All rests go on from ``head``, which is computed once, and lie one behind the other in one row; each sees
    the head and itself. With ``hidden``, one token in five that is not asked for is not seen.
    """
    n_head, lengths = len(head), torch.tensor([len(ids) for ids in rests])
    ids_T = torch.tensor([token for ids in rests for token in ids])
    rest_T = torch.arange(len(rests)).repeat_interleave(lengths)
    place_T = torch.cat([torch.arange(len(ids)) for ids in rests])
    asked_T = place_T >= torch.tensor(first_asked)[rest_T]
    seen_T = ids_T
    if hidden is not None:
        seen_T = ids_T.where(asked_T | torch.from_numpy(hidden.random(len(ids_T)) >= 0.2), PAD)
    sees_TT = (rest_T[:, None] == rest_T) & (place_T[:, None] >= place_T)
    sees_TS = torch.cat([torch.ones(len(ids_T), n_head, dtype=torch.bool), sees_TT], dim=1)
    cache = DynamicCache(config=model.config)
    head_D = model.model(torch.tensor([list(head)]), past_key_values=cache).last_hidden_state[0, -1]
    states_TD = model.model(
        seen_T[None],
        attention_mask=sees_TS[None, None],
        position_ids=n_head + place_T[None],
        past_key_values=cache,
    ).last_hidden_state[0]
    # What a token follows from: the state one place before it.
    before_TD = torch.where(place_T[:, None] > 0, states_TD.roll(1, dims=0), head_D)
    logits_AV = model.lm_head(before_TD[asked_T])
    return -functional.cross_entropy(logits_AV, ids_T[asked_T], reduction="none")


# --- what is true ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What plain forward passes say, and what the naive way would cost."""

    labels: LabelSet
    prompts: list[list[int]]
    sequences: list[tuple[int, ...]]
    probs_NC: np.ndarray
    test: Split

    @classmethod
    def of(cls, teacher: Path, labels: LabelSet, test: Split) -> Truth:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
        model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        prompts, sequences = labels.encode(test.texts, tokenizer)
        sequence_NC = np.array([sequence_probs(model, ids, sequences) for ids in prompts])
        for i in range(3):
            off = np.abs(sequence_NC[i] - whole_sequence_probs(model, prompts[i], sequences)).max()
            assert off < 1e-5, f"one pass for all labels is {off} away from a pass for each"
        return cls(labels, prompts, sequences, shared_out(sequence_NC, sequences), test)

    def summary(self) -> str:
        names = self.labels.names
        known = [i for i, gold in enumerate(self.test.golds) if gold in names]
        golds = [names.index(self.test.golds[i]) for i in known]
        right = np.mean(self.probs_NC[known].argmax(1) == golds) if known else math.nan
        confidence = (self.probs_NC.max(1) / self.probs_NC.sum(1)).mean()
        tokens = np.array([len(own) for own in self.sequences])
        firsts = len({own[0] for own in self.sequences})
        return (
            f"{self.labels.title}: {tokens.min()} to {tokens.max()} tokens (mean {tokens.mean():.1f}), "
            f"{firsts} first ones; prompts of {np.mean([len(ids) for ids in self.prompts]):.0f} tokens; "
            f"right on {right:.1%} of {len(known)} texts of these classes; mean confidence {confidence:.2f}; "
            f"off-label {1 - self.probs_NC.sum(1).mean():.3f}"
        )

    def naive_tokens(self, n_texts: int, block_size: int | None = None) -> float:
        """Tokens computed for each of the first texts with one prompt a label; in a cache if that has blocks.

        As in vLLM, only whole blocks are found again, and the last token is always computed.
        """
        computed, known = 0, set()
        for ids, own in product(self.prompts[:n_texts], self.sequences):
            whole = [*ids, *own]
            found = block = 0
            for end in range(block_size, len(whole) + 1, block_size) if block_size else ():
                block = hash((block, *whole[end - block_size : end]))
                if block in known and found == end - block_size and end < len(whole):
                    found = end
                known.add(block)
            computed += len(whole) - found
        return computed / n_texts


@torch.inference_mode()
def sequence_probs(
    model: LlamaForCausalLM, before: Sequence[int], sequences: Sequence[Sequence[int]]
) -> np.ndarray:
    """float64[C]: probability of each whole sequence after some tokens."""
    log_p_A = token_log_probs(model, before, sequences, [0] * len(sequences)).double()
    return np.array([float(own.sum().exp()) for own in log_p_A.split([len(own) for own in sequences])])


@torch.inference_mode()
def whole_sequence_probs(
    model: LlamaForCausalLM, before: Sequence[int], sequences: Sequence[Sequence[int]]
) -> np.ndarray:
    """The same by one pass over everything for each sequence, with nothing kept."""

    def one(own: Sequence[int]) -> float:
        log_p_TV = model(torch.tensor([[*before, *own]])).logits[0].log_softmax(-1)
        places = torch.arange(len(before) - 1, len(before) + len(own) - 1)
        return float(log_p_TV[places, torch.tensor(own)].double().sum().exp())

    return np.array([one(own) for own in sequences])


def shared_out(sequence_NC: np.ndarray, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
    """float64[N, C]: each answer is its longest label's, so nearest longer labels are taken off."""
    probs_NC = sequence_NC.copy()
    for longer, own in enumerate(sequences):
        shorter = [i for i, other in enumerate(sequences) if other != own and own[: len(other)] == other]
        if shorter:
            probs_NC[:, max(shorter, key=lambda i: len(sequences[i]))] -= sequence_NC[:, longer]
    return probs_NC


# --- what the engine says --------------------------------------------------------------------------------

HEADINGS = (
    *("labels", "block", "left open", "texts", "largest difference", "sum is off by", "requests a text"),
    *("tokens sent", "computed", "naive", "naive, cached", "texts/s"),
)


async def measure(teacher: Path, truths: Sequence[Truth], n_exact: int, block_size: int) -> None:
    """Ask one engine for all label sets and print a line for each: by default, and for some texts exactly."""
    started: list[AsyncEngine] = []

    def start() -> AsyncEngine:
        started.append(AsyncEngine.start(vllm_teacher.teacher))
        return started[-1]

    engine: Engine | None = None
    for truth, (min_branch_prob, most) in product(truths, ((UNRESOLVED, None), (0.0, n_exact))):
        asked = truth.test.texts[:most]
        if not asked:
            continue
        vllm_teacher = vllm_teacher_of(teacher, truth.labels, min_branch_prob, block_size)
        engine = vllm_teacher.engine = engine or Engine(vllm_teacher.teacher, tell_start, start)
        await vllm_teacher.label(["warm-up"], ["x"], Unlimited())
        assert await started[0].vllm.reset_prefix_cache()
        begun = time.monotonic()
        answers = await vllm_teacher.label([str(i) for i in range(len(asked))], asked, Unlimited())
        seconds = time.monotonic() - begun
        print(f"| {' | '.join(cells(truth, answers, min_branch_prob, block_size, seconds))} |", flush=True)
    if engine is not None:
        engine.close()
    started.clear()
    gc.collect()  # vLLM's own clean-up fails where it comes only at the end of the process


def tell_start(seconds: float) -> None:
    tell(f"engine up in {seconds:.0f} s")


def vllm_teacher_of(teacher: Path, labels: LabelSet, min_branch_prob: float, block_size: int) -> VllmTeacher:
    settings = TeacherConfig(
        model=str(teacher),
        prompt=labels.prompt,
        max_model_len=MODEL_LEN,
        dtype="float32",
        min_branch_prob=min_branch_prob,
        engine={"block_size": block_size},
    )
    return VllmTeacher(settings, LabelsConfig(names=labels.names), lambda seconds: None)


def cells(
    truth: Truth, answers: Answers, min_branch_prob: float, block_size: int, seconds: float
) -> tuple[str, ...]:
    assert answers.answered_N.all(), f"texts without an answer: {set(answers.outcome_N)}"
    n = len(answers.probs_NC)
    usage, off_N = answers.usage, answers.probs_NC.sum(1) + answers.off_label_N - 1
    return (
        truth.labels.title,
        str(block_size),
        f"{min_branch_prob:g}",
        str(n),
        f"{np.abs(answers.probs_NC - truth.probs_NC[:n]).max():.1e}",
        f"{np.abs(off_N).max():.0e}",
        f"{usage.requests / n:.1f}",
        f"{usage.prompt_tokens / n:,.0f}",
        f"{(usage.prompt_tokens - usage.cached_tokens) / n:,.0f}",
        f"{truth.naive_tokens(n):,.0f}",
        f"{truth.naive_tokens(n, block_size):,.0f}",
        f"{n / seconds:.1f}",
    )


if __name__ == "__main__":
    main()
