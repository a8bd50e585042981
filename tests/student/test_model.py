"""The student as it is built from a checkpoint, how it reads texts, and which checkpoints are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from small_students import CPU, LABELS, UNEVEN, make_config, make_student, same, weights
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from toys import NAMES, training_sentences, with_trap
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.student.inference import predict
from llkd_ray.student.model import (
    CHARS_A_TOKEN,
    bfloat16_pays,
    build_student,
    check_student,
    encode,
    lengths,
    resolve_model,
)


class TestBuild:
    def test_labels_are_in_the_model_and_a_pipeline_answers_with_them(self, tiny_encoder, tmp_path):
        student = make_student(tiny_encoder)
        assert student.module.config.id2label == {0: "sea", 1: "kitchen", 2: "garden"}
        assert student.module.config.label2id == {"sea": 0, "kitchen": 1, "garden": 2}
        student.module.save_pretrained(tmp_path)
        student.tokenizer.save_pretrained(tmp_path)
        (answer,) = pipeline("text-classification", model=str(tmp_path), device="cpu")(["the anchor"])
        p_C = predict(student, ["the anchor"], make_config())[0]
        assert answer == {"label": NAMES[p_C.argmax()], "score": pytest.approx(p_C.max(), abs=1e-5)}

    def test_the_body_is_the_checkpoints_and_the_head_is_new(self, tiny_encoder):
        first, again, other = (weights(make_student(tiny_encoder, seed)) for seed in (0, 0, 1))
        assert same(first, again)
        embeddings = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(first[embeddings], other[embeddings])
        assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
        assert first["classifier.weight"].shape[0] == 3

    def test_classifier_for_other_labels_gets_a_new_head(self, tiny_encoder, tmp_path):
        earlier = build_student(make_config(tiny_encoder), LabelsConfig(names=NAMES[:5]), 0, CPU)
        earlier.module.save_pretrained(tmp_path)
        earlier.tokenizer.save_pretrained(tmp_path)
        student = make_student(str(tmp_path))
        assert predict(student, ["x"], make_config()).shape == (1, 3)
        assert list(student.module.config.id2label.values()) == list(LABELS.names)

    def test_decoder_without_a_pad_token(self, tiny_llm, tmp_path):
        model = LlamaForCausalLM.from_pretrained(tiny_llm)
        model.config.pad_token_id = None
        model.generation_config.pad_token_id = None
        model.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).pad_token_id is None
        student = make_student(str(tmp_path))
        each = np.concatenate([predict(student, [text], make_config()) for text in UNEVEN])
        assert predict(student, UNEVEN, make_config()) == pytest.approx(each, abs=1e-5)


class TestPrecision:
    @pytest.mark.parametrize(("precision", "autocast"), [("float32", False), ("bfloat16", True)])
    def test_weights_and_logits_stay_in_float32(self, tiny_encoder, precision, autocast):
        student = make_student(tiny_encoder, precision=precision)
        assert student.autocast == autocast
        assert all(p.dtype == torch.float32 for p in student.model.parameters())
        assert student.logits(student.encode(["the sea"], 32)).dtype == torch.float32

    @pytest.mark.parametrize(
        ("supported", "pays", "on_other_ranks"),
        [
            (True, True, None),
            (True, False, None),
            (False, True, None),
            (True, True, True),
            (True, True, False),
        ],
    )
    def test_auto_is_bf16_where_it_pays_on_all_ranks(
        self, tiny_encoder, monkeypatch, supported, pays, on_other_ranks
    ):
        """Where ranks measured differently, each took its own, and steps waited for those in float32."""

        def all_reduce(answer, op):
            assert op == dist.ReduceOp.MIN
            answer.fill_(min(int(answer), on_other_ranks))

        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
        monkeypatch.setattr("llkd_ray.student.model.bfloat16_pays", lambda device: pays)
        monkeypatch.setattr(dist, "is_initialized", lambda: on_other_ranks is not None)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        student = make_student(tiny_encoder, precision="auto")
        assert student.autocast == (supported and pays and on_other_ranks is not False)

    @pytest.mark.parametrize("seconds", [{"float32": 2, "bfloat16": 1}, {"float32": 1, "bfloat16": 2}])
    def test_bf16_pays_where_it_is_faster(self, monkeypatch, seconds):
        """One product in seven is enough to tell; the others met a busy core."""
        clock, calls = [0.0], []

        def linear(x, w):
            calls.append(x.dtype)
            busy = 0 if len(calls) > 6 else 10 * len(calls)
            clock[0] += seconds[str(x.dtype).removeprefix("torch.")] + busy

        monkeypatch.setattr("llkd_ray.student.model.time.perf_counter", lambda: clock[0])
        monkeypatch.setattr(nn.functional, "linear", linear)
        assert bfloat16_pays.__wrapped__(CPU) == (seconds["bfloat16"] < seconds["float32"])


BLANKS = (" ", "  ", "\n", "\t", " \n ", "\xa0", "\x1c", "\u2028", "\u3000", "\u200b")
"""Ordinary and odd: some tokenizers split at some of them, drop others, and keep the rest."""


def wrap(pieces: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    marks = [("<s>", pieces.token_to_id("<s>"))]
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", **more)


def byte_level(**more: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<unk>", *alphabet, "Ġa", "th", "ĠĠ", "Ġth"])}
    pieces = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("t", "h"), ("Ġ", "Ġ"), ("Ġ", "th")]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return wrap(pieces, **more)


def unigram(split: bool = True) -> PreTrainedTokenizerFast:
    scores = {"▁a": -2.0, "▁": -3.0, "the": -2.5, "a▁the": -0.1}
    letters = sorted({letter for text in training_sentences() for letter in text} - {" "})
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), *scores.items(), *((letter, -4.0) for letter in letters)]
    pieces = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return wrap(pieces)


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


class Counted:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chars = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.chars += sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


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


class TestTokens:
    @pytest.mark.parametrize("kind", KINDS)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=3), max_tokens=st.integers(3, 12))
    @example(texts=["語" * 1000], max_tokens=4)
    @example(texts=["a " + "x" * 1000], max_tokens=8)
    @example(texts=["a" + " " * 1000 + "the"], max_tokens=5)
    @example(texts=["a the " * 100, ""], max_tokens=5)
    def test_the_same_as_the_tokenizers_own_truncation(self, tokenizers, kind, texts, max_tokens):
        tokenizer = tokenizers[kind]
        columns = tokenizer(texts, truncation=True, max_length=max_tokens, split_special_tokens=True)
        found = encode(tokenizer, texts, max_tokens)
        assert {name: [one[name] for one in found] for name in columns} == dict(columns)
        assert lengths(found).tolist() == [len(row) for row in columns["input_ids"]]
        assert encode(tokenizer, [], max_tokens) == []

    @pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "unigram"])
    def test_only_the_part_of_a_long_text_that_is_read_is_tokenized(self, tokenizers, kind):
        counted = Counted(tokenizers[kind])
        texts = ["that the other a " * n for n in (1, 10, 1_000, 10_000)]
        encode(counted, texts, 16)
        assert counted.chars <= len(texts) * 16 * CHARS_A_TOKEN

    def test_special_tokens_in_a_text_are_only_characters(self, tiny_encoder, tmp_path):
        """As tokens they end a text early, or fail: BART refuses a batch with uneven numbers of them."""
        student = make_student(tiny_encoder)
        tokenizer = student.tokenizer
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
        text = f"a {' '.join(tokenizer.all_special_tokens)} boat"
        (tokens,) = student.encode([text], 64)
        first, *ids, last = tokens["input_ids"]
        assert [first, last] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
        assert not special & set(ids)
        tokenizer.save_pretrained(tmp_path)
        saved = AutoTokenizer.from_pretrained(tmp_path)
        assert saved(text)["input_ids"] == tokens["input_ids"], "as a pipeline reads it"

    def test_a_text_of_long_tokens_is_tokenized_twice_at_most(self, tokenizers):
        counted = Counted(tokenizers["WordPiece"])
        text = ("q" * 200 + " ") * 100  # each word is one unknown
        assert len(encode(counted, [text], 16)[0]["input_ids"]) == 16
        assert counted.chars <= len(text) + 16 * CHARS_A_TOKEN

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_the_tokenizers(self, tiny_encoder, side):
        student = make_student(tiny_encoder)
        student.tokenizer.padding_side = side
        student.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        student.tokenizer._pad_token_type_id = 1
        tokens_B = student.encode([*UNEVEN, ""], 32)
        expected = student.tokenizer.pad(tokens_B, return_tensors="pt")
        padded = student.pad(tokens_B)
        assert padded.keys() == expected.keys() == set(student.tokenizer.model_input_names)
        assert all(torch.equal(padded[name], expected[name]) for name in padded)
        assert (padded["token_type_ids"] == 1).any()
        assert padded["input_ids"].dtype == torch.int64


class TestCheck:
    def test_good_checkpoints_pass_without_their_weights(self, tiny_encoder, tiny_llm, tmp_path):
        check_student(make_config(tiny_llm))
        AutoConfig.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        check_student(make_config(str(tmp_path)))

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("missing", "cannot be loaded"),
            ("empty", "cannot be loaded"),
            ("no tokenizer", "no tokenizer files"),  # transformers makes an empty one, without a word
            ("no classifier", "of type 'mamba'"),
            ("pickled", r"only as a pickle \(pytorch_model\.bin\).*AutoModel\.from_pretrained"),
        ],
    )
    def test_others_are_refused_with_field_and_value(self, tiny_encoder, tmp_path, kind, reason):
        folder = tmp_path / kind
        if kind == "pickled":
            with_trap(tiny_encoder, folder, tmp_path / "it ran")
        elif kind != "missing":
            folder.mkdir()
        if kind == "no tokenizer":
            AutoConfig.from_pretrained(tiny_encoder).save_pretrained(folder)
        if kind == "no classifier":
            MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1).save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
        with pytest.raises(ConfigError, match=reason) as caught:
            check_student(make_config(str(folder)))
        assert str(caught.value).startswith(f"student.model: {str(folder)!r} ")
        assert "\n" not in str(caught.value)

    def test_minilm_without_its_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"student\.model.*llkd-ray\[quickstart\]"):
            resolve_model("minilm")
        assert resolve_model("some/folder") == "some/folder"
