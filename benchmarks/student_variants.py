"""What student_gpu.py compares: two sizes of encoder with random weights, and ways to run their forward pass.

Shapes in names: B texts of a batch, T tokens of packed texts, H heads, D width of one, F width of a layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

MEASURES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
PACKED = "packed"
"""The name under which transformers knows :func:`packed_attention`."""


@dataclass(frozen=True)
class Size:
    """A model's measures, as transformers names them."""

    config: type
    model: type
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    special: tuple[str, str, str, str, str]
    """Its first words: what pads, begins and ends a text, stands for the unknown and hides one."""

    def operations(self, length_N: np.ndarray) -> float:
        """Of a forward pass over texts of these lengths."""
        d, f = self.hidden_size, self.intermediate_size
        per_token_N = self.num_hidden_layers * (2 * (4 * d * d + 2 * d * f) + 4 * length_N * d)
        return float((per_token_N * length_N).sum())

    def tiny(self) -> Size:
        """One that runs anywhere in no time."""
        return replace(
            self,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=400,
        )


SIZES = {
    "minilm": Size(
        BertConfig, BertModel, 384, 6, 12, 1536, 30_522, ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    ),
    "roberta-base": Size(
        RobertaConfig, RobertaModel, 768, 12, 12, 3072, 50_265, ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
    ),
}


def save_checkpoint(folder: str, size: Size, longest: int) -> list[str]:
    """Write an encoder of random weights with a WordPiece tokenizer; returns words that are a token each.

    The tokenizer does BERT's work on every text, so it takes about BERT's time.
    """
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < size.vocab_size - len(size.special):
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 8)).astype(np.uint8)
        words[letters.tobytes().decode()] = None
    pad, cls, sep, unknown, mask = size.special
    pieces = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate([*size.special, *words])}, unk_token=unknown)
    )
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=[(cls, 1), (sep, 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token=pad,
        cls_token=cls,
        sep_token=sep,
        unk_token=unknown,
        mask_token=mask,
        model_max_length=longest,
    )
    config = size.config(
        **{name: getattr(size, name) for name in MEASURES},
        max_position_embeddings=longest + 2,  # RoBERTa's first two places are not used
        pad_token_id=0,
        initializer_range=0.05,  # with the usual 0.02 a random model gives all texts nearly the same answer
    )
    torch.manual_seed(0)
    size.model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return list(words)


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights are bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


@dataclass(frozen=True)
class ScoringMethod:
    """A way to run the model."""

    name: str
    bf16: bool = False
    """Weights in bfloat16; else in float32, under autocast."""
    attention: str = "sdpa"
    kernel: SDPBackend | None = None
    """What scaled_dot_product_attention must use; None: as it chooses."""
    compiled: bool = False
    """Each layer by torch.compile: they are alike, so it compiles one."""
    masked: bool = False
    all_budgets: bool = False

    @contextlib.contextmanager
    def model(self, first: Any) -> Iterator[Any]:
        """A copy of the first model, made ready for :meth:`logits`."""
        model = copy.deepcopy(first)
        if self.bf16:
            model = model.to(torch.bfloat16)
        model.set_attn_implementation(self.attention)
        if self.compiled:
            torch._dynamo.reset()
            for layer in model.base_model.encoder.layer:
                layer.compile(dynamic=True)
        with contextlib.nullcontext() if self.kernel is None else sdpa_kernel([self.kernel]):
            yield model

    def logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, C]. Autocast casts all weights in every call, as it must in training."""
        with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16, enabled=not self.bf16):
            return model(**inputs).logits


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, T, H, D] of [1, H, T, D] each: every token looks at those of its own text."""
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out_THD = varlen_attn(q_THD, k_THD, v_THD, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return out_THD[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    alone = [nn.functional.scaled_dot_product_attention(*part) for part in parts]
    return torch.cat(alone, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(PACKED, packed_attention)


def packed_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """[B, C] of packed texts, whose first tokens decide, as in the models themselves."""
    hidden_1TF = model.base_model(**inputs).last_hidden_state
    first_B1F = hidden_1TF[0, inputs["cu_seq_lens_q"][:-1].long()][:, None]
    pooler = getattr(model.base_model, "pooler", None)
    return model.classifier(first_B1F if pooler is None else pooler(first_B1F))
