"""The quickstart: creates a real corpus and a small real teacher without any download.

The corpus consists of sentences from the docstrings of installed packages; the class is the subject area.
One slice of it trains the teacher, a causal language model with one Llama layer that answers a prompt with a
label, as a large model would. Its accuracy on sentences of unseen modules is about 60 %, and its confidence
is informative about which answers are correct.

Shapes: N texts, B texts of a batch, T tokens, V vocabulary, C labels, D width, H heads.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import logging as transformers_logging

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.quickstart.corpus import AREAS, CAPS, Sentence, read_corpus
from llkd_ray.teacher.prompt import Prompt, build_prompt, encode_prompts, label_sequences

MARKER = "ready.json"
MAX_TOKENS = 256  # of a prompt; the longest sentences have about 150 tokens
PROMPT = PromptConfig(
    instruction="",
    answer="names",
    show_labels=False,
    text_prefix="Text: ",
    answer_prefix="\nSubject:",
    chat="never",
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the teacher and its training."""

    vocabulary: int = 8000
    width: int = 128
    heads: int = 2  # head size 64, the smallest that all attention kernels of vLLM support
    epochs: float = 4.0
    batch: int = 128
    learning_rate: float = 2.5e-3
    hidden_tokens: float = 0.3  # share of a text's tokens that are masked in a training step
    smoothing: float = 0.1  # label smoothing, against over-confidence
    seconds: float = 100.0  # time limit: training is shortened on a busy machine


def prepare(folder: Path, seed: int = 0, say: Say = print) -> dict[str, Any]:
    """Create corpus and teacher in ``folder`` unless they exist; return the settings of a run on them.

    Writes pool.parquet and test.parquet (id, text, label, module) and teacher/, a checkpoint folder. The
    settings are a tree for ``config.loading.parse_config``, with absolute paths. Takes half a minute on
    two cores. Raises RuntimeError if the installed packages have too few docstrings for a corpus.
    """
    folder = Path(folder).resolve()
    recipe = Recipe()
    made_as = {"seed": seed, "recipe": asdict(recipe), "areas": AREAS, "caps": CAPS}
    made_as = json.loads(json.dumps(made_as))  # in the form that is read back: lists instead of tuples
    marker = folder / MARKER
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == made_as:
        say(f"quickstart: corpus and teacher are ready in {folder}")
        return settings(folder, seed)
    marker.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    say("quickstart: reading the docstrings of installed packages, to make a corpus")
    corpus = read_corpus(say=say)
    for split in ("pool", "test"):
        _write_split(folder / f"{split}.parquet", [one for one in corpus if one.split == split])
    _tell_counts(corpus, say)
    make_teacher(folder / "teacher", corpus, tuple(AREAS), recipe, seed, say)
    # Written last and atomically: a folder without the marker is created again.
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps(made_as, indent=1), encoding="utf-8")
    os.replace(temporary, marker)
    say(f"quickstart: corpus and teacher made in {time.monotonic() - begun:.0f} s, kept in {folder}")
    return settings(folder, seed)


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """The settings tree of a run on a finished folder."""
    columns = {"text": "text", "gold": "label", "id": "id"}
    return {
        "corpus": {"uri": str(folder / "pool.parquet"), **columns},
        "test": {"uri": str(folder / "test.parquet"), **columns},
        "labels": {"names": list(AREAS)},
        "teacher": {
            "model": str(folder / "teacher"),
            "prompt": PROMPT.model_dump(mode="json"),
            "max_model_len": MAX_TOKENS,
            "dtype": "float32",
        },
        "student": {"model": "minilm", "max_tokens": 64, "min_steps": 60},
        "budget": {"rounds": 2, "labels": 2000, "train": 400},
        "run": {"seed": seed},
    }


def _write_split(path: Path, sentences: Sequence[Sentence]) -> None:
    columns = ("id", "text", "label", "module")
    table = pa.table({name: [getattr(one, name) for one in sentences] for name in columns})
    pq.write_table(table, path, compression="zstd")


def _tell_counts(corpus: Sequence[Sentence], say: Say) -> None:
    counts = Counter((one.label, one.split) for one in corpus)
    say(f"corpus: {len(corpus):,} sentences; teacher's slice / pool / test by subject:")
    for area in sorted({one.label for one in corpus}):
        say("corpus:   {:10}{:7,}{:7,}{:7,}".format(area, *(counts[area, split] for split in CAPS)))


# --- the teacher -----------------------------------------------------------------------------------------


def make_teacher(
    folder: Path, corpus: Sequence[Sentence], names: Sequence[str], recipe: Recipe, seed: int, say: Say
) -> None:
    """Train a teacher on the corpus's teacher slice, report its quality on the test split, and save it."""
    labels = LabelsConfig(names=tuple(names))
    index = {name: i for i, name in enumerate(names)}
    slice_, test = ([one for one in corpus if one.split == split] for split in ("teacher", "test"))
    say(f"teacher: training a tokenizer on {len(slice_):,} sentences")
    tokenizer = train_tokenizer([(one.text, one.label) for one in slice_], recipe.vocabulary)
    prompt = build_prompt(PROMPT, labels, tokenizer)
    label_tokens_C = torch.tensor([token for (token,) in label_sequences(prompt, labels, tokenizer)])
    gold_N = np.array([index[one.label] for one in slice_])
    tokens = _encode(prompt, [one.text for one in slice_], tokenizer)
    model = train_teacher(tokens, gold_N, label_tokens_C, len(tokenizer), recipe, seed, say)
    p_NC = label_probs(model, _encode(prompt, [one.text for one in test], tokenizer), label_tokens_C)
    report_teacher(p_NC, np.array([index[one.label] for one in test]), say)
    if folder.exists():
        shutil.rmtree(folder)
    with _no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def train_tokenizer(examples: Sequence[tuple[str, str]], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE, trained on whole prompts with their (text, label) filled in.

    The labels are part of the training text, so each becomes a single token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    around = (PROMPT.text_prefix, PROMPT.answer_prefix)
    bpe.train_from_iterator((f"{around[0]}{text}{around[1]} {label}" for text, label in examples), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
        padding_side="left",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread.

    The matrices are small, and in one measurement on a busy machine two threads that waited for each other
    took about ten times the CPU time of one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def train_teacher(
    tokens: Sequence[np.ndarray],
    gold_N: np.ndarray,
    label_tokens_C: torch.Tensor,
    vocabulary: int,
    recipe: Recipe,
    seed: int,
    say: Say,
) -> LlamaForCausalLM:
    """Train a one-layer Llama to continue each prompt (int[T] token ids) with its label's token.

    The loss is the cross-entropy over the whole vocabulary at the last position only: this teacher predicts
    nothing else, and it costs a small fraction of a full language-model loss.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    model = _new_model(vocabulary, recipe, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    steps = planned = max(1, round(recipe.epochs * math.ceil(len(tokens) / recipe.batch)))
    say(f"teacher: training {model.num_parameters() / 1e6:.1f}M parameters for {steps:,} steps")
    target_BC = functional.one_hot(torch.from_numpy(gold_N), len(label_tokens_C)).float()
    target_BC = (1 - recipe.smoothing) * target_BC + recipe.smoothing / len(label_tokens_C)
    losses: list[float] = []
    begun = told = time.monotonic()
    for step, rows in enumerate(_batches([len(ids) for ids in tokens], recipe.batch, rng)):
        elapsed = time.monotonic() - begun
        if step >= 20:  # fewer steps only if the machine is too slow; otherwise reproducible
            steps = min(steps, int(step * recipe.seconds / elapsed))
        if step >= steps:
            break
        warmup, progress = (step + 1) / (0.05 * planned), step / steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        ids_BT, real_BT = _pad_left([tokens[row] for row in rows])
        seen_BT = torch.rand(ids_BT.shape, generator=generator) >= recipe.hidden_tokens
        seen_BT[:, -1] = True
        log_p_BV = last_logits(model, ids_BT, real_BT & seen_BT).log_softmax(-1)
        loss = -(target_BC[torch.from_numpy(rows)] * log_p_BV[:, label_tokens_C]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if time.monotonic() - told > 3:
            told = time.monotonic()
            say(f"teacher: step {step + 1:,} of {steps:,}, loss {np.mean(losses[-50:]):.2f}, {elapsed:.0f} s")
    if len(losses) < planned:
        say(f"teacher: this machine is busy; stopped after {len(losses):,} of {planned:,} steps")
    return model.eval()


def _new_model(vocabulary: int, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=1,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def last_logits(model: LlamaForCausalLM, ids_BT: torch.Tensor, seen_BT: torch.Tensor) -> torch.Tensor:
    """float[B, V]: logits of a one-layer model after the last token, attending only to tokens seen.

    Equal to the model's own forward pass, but takes less than half the time in a training step, because
    query, output and feed-forward are computed for the last position only. Texts are padded on the left;
    padding counts as not seen.
    """
    (layer,) = model.model.layers
    attention = layer.self_attn

    def heads(x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    x_BTD = model.model.embed_tokens(ids_BT)
    cos, sin = model.model.rotary_emb(x_BTD, torch.arange(ids_BT.shape[1])[None])
    normed_BTD = layer.input_layernorm(x_BTD)
    key, value = heads(attention.k_proj(normed_BTD)), heads(attention.v_proj(normed_BTD))
    query = heads(attention.q_proj(normed_BTD[:, -1:]))
    query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_BT[:, None, None])
    last_BD = x_BTD[:, -1] + attention.o_proj(mixed.transpose(1, 2).flatten(1))
    last_BD = last_BD + layer.mlp(layer.post_attention_layernorm(last_BD))
    return model.lm_head(model.model.norm(last_BD))


def _batches(lengths: Sequence[int], batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of row numbers, over endless epochs; texts of similar length are batched to reduce padding."""
    lengths_N = np.array(lengths)
    while True:
        # Ties in length are shuffled here, the order of the batches below.
        order = np.lexsort((rng.random(len(lengths_N)), lengths_N))
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def _encode(prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    return [np.array(ids) for ids in encode_prompts(prompt, texts, tokenizer, MAX_TOKENS, PROMPT.cut)[0]]


def _pad_left(tokens: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int[B, T] token ids, and bool[B, T]: False for padding."""
    longest = max(map(len, tokens))
    ids_BT = np.zeros((len(tokens), longest), dtype=np.int64)
    real_BT = np.zeros((len(tokens), longest), dtype=bool)
    for row, ids in enumerate(tokens):
        ids_BT[row, longest - len(ids) :] = ids
        real_BT[row, longest - len(ids) :] = True
    return torch.from_numpy(ids_BT), torch.from_numpy(real_BT)


@_one_thread()
@torch.inference_mode()
def label_probs(
    model: LlamaForCausalLM, tokens: Sequence[np.ndarray], label_tokens_C: torch.Tensor
) -> np.ndarray:
    """float32[N, C]: probability of each label's token, over the whole vocabulary, after each prompt."""
    p_NC = np.zeros((len(tokens), len(label_tokens_C)), dtype=np.float32)
    for start in range(0, len(tokens), 256):
        p_BV = last_logits(model, *_pad_left(tokens[start : start + 256])).softmax(-1)
        p_NC[start : start + 256] = p_BV[:, label_tokens_C].numpy()
    return p_NC


def report_teacher(p_NC: np.ndarray, gold_N: np.ndarray, say: Say) -> None:
    """Report the teacher's accuracy on held-out sentences, and accuracy by confidence."""
    right_N, confidence_N = p_NC.argmax(1) == gold_N, p_NC.max(1)
    say(f"teacher: right on {right_N.mean():.1%} of {len(gold_N):,} sentences that it has not seen")
    fifths = np.array_split(np.argsort(-confidence_N, kind="stable"), 5)
    shown = ", ".join(f"{right_N[fifth].mean():.0%}" for fifth in fifths)
    said = ", ".join(f"{confidence_N[fifth].mean():.0%}" for fifth in fifths)
    say(f"teacher: by fifths, most confident first: right {shown}; its own confidence {said}")
