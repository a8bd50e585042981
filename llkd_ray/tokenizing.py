"""Texts as a model reads them, at a cost in proportion to what it reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tokens = dict[str, list[int]]
"""One text as the tokenizer gives it: ``input_ids`` and what else the model takes."""

CHARS_A_TOKEN = 8
"""Of a long text, so many characters are looked at first for each token that is wanted: nearly twice as many
as one has in English."""


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
    """Each text as the model reads it, cut at ``max_tokens``, without padding.

    The same as the tokenizer's own truncation, which goes through the whole of a text first.
    """
    if not _keeps_words_apart(tokenizer):
        return _encode(tokenizer, texts, max_tokens)
    heads = [_head(text, CHARS_A_TOKEN * max_tokens) for text in texts]
    found = _encode(tokenizer, heads, max_tokens)
    more = [
        i
        for i, (head, text) in enumerate(zip(heads, texts, strict=True))
        if len(head) < len(text) and len(found[i]["input_ids"]) < max_tokens
    ]
    for i, whole in zip(more, _encode(tokenizer, [texts[i] for i in more], max_tokens), strict=True):
        found[i] = whole
    return found


def _encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
    if not texts:
        return []
    columns = tokenizer(list(texts), truncation=True, max_length=max_tokens)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _head(text: str, n_chars: int) -> str:
    """Whole words of at most so many characters, or all of the text where none ends by then."""
    if len(text) <= n_chars:
        return text
    # Not at every kind of blank: some tokenizers drop the rare ones and join what is around them.
    end = max(text.rfind(" ", 0, n_chars), text.rfind("\n", 0, n_chars))
    return text[:end].rstrip(" \n") or text


def _keeps_words_apart(tokenizer: Any) -> bool:
    """Whether the start of a text has the same tokens whatever words come after it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None or tokenizer.truncation_side != "right":
        return False
    if any(" " in token or "\n" in token for token in tokenizer.added_tokens_encoder):
        return False
    return len(backend.pre_tokenizer.pre_tokenize_str("one two")) == 2
