"""Of a text only as much is tokenized as is read, and what comes of it is what the tokenizer would cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from toys import training_sentences
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llkd_ray.student.model import CHARS_A_TOKEN, encode

BLANKS = (" ", "  ", "\n", "\t", " \n ", "\xa0", "\x1c", "\u2028", "\u3000", "\u200b")
"""Ordinary and odd: some tokenizers split at some of them, drop others, and keep the rest."""


def around(pieces: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    marks = [("<s>", pieces.token_to_id("<s>"))]
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", **more)


def byte_level(**more: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<unk>", *alphabet, "Ġa", "th", "ĠĠ", "Ġth"])}
    pieces = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("t", "h"), ("Ġ", "Ġ"), ("Ġ", "th")]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return around(pieces, **more)


def unigram(split: bool = True) -> PreTrainedTokenizerFast:
    scores = {"▁a": -2.0, "▁": -3.0, "the": -2.5, "a▁the": -0.1}
    letters = sorted({letter for text in training_sentences() for letter in text} - {" "})
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), *scores.items(), *((letter, -4.0) for letter in letters)]
    pieces = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return around(pieces)


@pytest.fixture(scope="module")
def tokenizers(tiny_encoder):
    spanning = byte_level()
    spanning.add_tokens([AddedToken("a the")])
    return {
        "WordPiece": AutoTokenizer.from_pretrained(tiny_encoder),
        "byte-level BPE": byte_level(),
        "cut on the left": byte_level(truncation_side="left"),
        "a token with a blank": spanning,
        "unigram": unigram(),
        "unigram across words": unigram(split=False),
    }


KINDS = (
    *("WordPiece", "byte-level BPE", "cut on the left", "a token with a blank"),
    *("unigram", "unigram across words"),
)
WORDS = st.one_of(
    st.sampled_from(
        ["a", "the", "that", "<s>", "[SEP]", "x" * 40, "é", "e\u0301", "語" * 30, "\U0001f44d\U0001f3fd"]
    ),
    st.text(max_size=12),
)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from(BLANKS)), max_size=60).map(
    lambda parts: "".join(word + blank for word, blank in parts)
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), max_tokens=st.integers(3, 12))
@example(texts=["語" * 1000], max_tokens=4)
@example(texts=["a " + "x" * 1000], max_tokens=8)
@example(texts=["a" + " " * 1000 + "the"], max_tokens=5)
@example(texts=["a the " * 100, ""], max_tokens=5)
def test_the_same_as_the_tokenizer_cuts(tokenizers, kind, texts, max_tokens):
    tokenizer = tokenizers[kind]
    columns = tokenizer(texts, truncation=True, max_length=max_tokens)
    found = encode(tokenizer, texts, max_tokens)
    assert {name: [one[name] for one in found] for name in columns} == dict(columns)


class Watched:
    """A tokenizer that notes how much it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chars = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.chars += sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "unigram"])
def test_of_a_long_text_only_what_is_read_is_looked_at(tokenizers, kind):
    watched = Watched(tokenizers[kind])
    texts = ["that the other a " * n for n in (1, 10, 1_000, 10_000)]
    encode(watched, texts, 16)
    assert watched.chars <= len(texts) * 16 * CHARS_A_TOKEN


def test_a_text_of_long_tokens_is_gone_through_twice_at_most(tokenizers):
    watched = Watched(tokenizers["WordPiece"])
    text = ("q" * 200 + " ") * 100  # each word is one unknown
    assert len(encode(watched, [text], 16)[0]["input_ids"]) == 16
    assert watched.chars <= len(text) + 16 * CHARS_A_TOKEN


def test_no_texts(tokenizers):
    assert encode(tokenizers["WordPiece"], [], 16) == []
