"""Small things made on the spot for tests: a corpus, its recorded answers, two checkpoints, a run.

A toy text holds words of its class among common ones, so a small student can learn it in seconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import ANSWER_LETTERS
from llkd_ray.corpus.cleaning import text_hash
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import EXAMPLES_INDEX, LABELS_DIR, RunStore
from llkd_ray.teacher.base import Answers, Usage
from llkd_ray.teacher.labels import labels_table, write_ticket

WORDS: Mapping[str, str] = {
    "sea": "anchor boat captain deck harbour island lighthouse sail shore tide wave whale",
    "kitchen": "apron bake bread butter fry kettle oven pan recipe soup spoon stove",
    "garden": "bee blossom fence flower gate hedge lawn pond rake seed soil tulip",
    "street": "bridge bus corner crossing lamp market pavement shop tram traffic tunnel wheel",
    "music": "choir concert drum flute melody note orchestra piano rhythm song tune violin",
    "winter": "blizzard coat cold frost glove ice scarf sledge sleet slope snow stocking",
}
"""The classes, in label order, and the words that give each of them away."""
NAMES = tuple(WORDS)
COMMON = (
    "a again and at before behind but by came each every few found from had he in it its last left long "
    "many near never of old on once one our she some still that the then there they three to two under "
    "was we went were when with year young"
)


def toy_texts(n: int, n_classes: int, seed: int) -> tuple[list[str], np.ndarray]:
    """``n`` different texts and int[n], the class of each; classes are about equally frequent."""
    rng = np.random.default_rng(seed)
    gold_N = rng.integers(0, n_classes, n)
    texts: dict[str, None] = {}
    for label in gold_N:
        own = rng.choice(WORDS[NAMES[label]].split(), 3, replace=False)
        words = rng.permutation([*own, *rng.choice(COMMON.split(), rng.integers(4, 9))])
        texts[" ".join(words)] = None
    assert len(texts) == n, "two toy texts are the same; take another seed"
    return list(texts), gold_N


def write_corpus(path: Path, n: int, n_classes: int = 3, seed: int = 0) -> Path:
    """A parquet file with ``id``, ``text`` and ``label`` (a class's name); returns the path."""
    texts, gold_N = toy_texts(n, n_classes, seed)
    ids = [f"toy-{seed}-{i:05d}" for i in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "text": texts, "label": [NAMES[label] for label in gold_N]}), path)
    return path


def toy_probs(gold_N: np.ndarray, n_classes: int, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """float32[N, C]: a teacher's mass on the labels, most of it on the right one ``accuracy`` of the time.

    A row sums to less than one, as the mass of labels over a vocabulary does.
    """
    wrong_N = (gold_N + rng.integers(1, n_classes, gold_N.size)) % n_classes
    label_N = np.where(rng.uniform(size=gold_N.size) < accuracy, gold_N, wrong_N)
    top_N = rng.uniform(0.5, 0.95, gold_N.size)
    probs_NC = np.repeat((1 - top_N)[:, None] / n_classes, n_classes, axis=1)
    probs_NC[np.arange(gold_N.size), label_N] += top_N - 0.04
    return probs_NC.astype(np.float32)


def write_answers(
    path: Path, corpora: Sequence[Path], n_classes: int = 3, accuracy: float = 0.9, seed: int = 0
) -> Path:
    """Recorded answers (``id``, ``probs``, ``prompt_tokens``) to all texts of some toy corpora."""
    rng = np.random.default_rng(seed)
    table = pa.concat_tables([pq.read_table(corpus) for corpus in corpora])
    gold_N = np.array([NAMES.index(name) for name in table["label"].to_pylist()])
    probs_NC = toy_probs(gold_N, n_classes, accuracy, rng)
    tokens = pa.array(rng.integers(20, 40, gold_N.size), pa.int32())
    pq.write_table(pa.table({"id": table["id"], "probs": list(probs_NC), "prompt_tokens": tokens}), path)
    return path


def config_tree(**sections: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of :func:`make_config`, as they would come from a YAML file."""
    tree: dict[str, Any] = {
        "corpus": {"uri": "pool.parquet", "id": "id", "gold": "label"},
        "test": {"uri": "test.parquet", "id": "id", "gold": "label"},
        "labels": {"names": list(NAMES[:3])},
        "teacher": {
            "kind": "recorded",
            "recorded": {"uri": "answers.parquet", "prompt_tokens": "prompt_tokens"},
            "ticket_size": 16,
        },
        "student": {"model": "student", "workers": 1, "max_tokens": 32, "precision": "float32"},
        "evaluation": {"holdout": 20},
    }
    for name, section in sections.items():
        tree[name] = section if section is None else _merged(tree.get(name) or {}, section)
    return tree


def make_config(**sections: Mapping[str, Any] | None) -> Config:
    """A valid config with a recorded teacher; each keyword's settings go over those of that section."""
    return parse_config(config_tree(**sections))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(under[key], over[key]) for key in over if isinstance(over[key], Mapping)
            and isinstance(under.get(key), Mapping)}  # fmt: skip
    return {**under, **over, **both}


def make_run(
    folder: Path,
    n_pool: int,
    n_test: int = 0,
    n_classes: int = 3,
    seed: int = 0,
    shard_rows: int = 64,
    group_rows: int = 16,
) -> RunStore:
    """A run directory in ``folder`` with EXAMPLES of toy texts, in several shards of several row groups.

    Texts are :func:`toy_texts` of ``n_pool + n_test``, in row order; ids are ``toy-ROW``.
    """
    store = RunStore(str(folder))
    texts, gold_N = toy_texts(n_pool + n_test, n_classes, seed)
    ids = [f"toy-{row}" for row in range(n_pool + n_test)]
    hashes = pa.array([text_hash(text) for text in texts], pa.uint64())
    columns = [pa.array(ids), pa.array(texts), pa.array(gold_N.astype(np.int16)), hashes]
    examples = pa.Table.from_arrays(columns, schema=tables.EXAMPLES)
    index: dict[str, list[dict[str, Any]]] = {"pool": [], "test": []}
    for part, first, end in (("pool", 0, n_pool), ("test", n_pool, n_pool + n_test)):
        for start in range(first, end, shard_rows):
            shard = examples.slice(start, min(shard_rows, end - start))
            file = f"examples/{part}-{len(index[part]):05d}.parquet"
            store.write_table(file, shard, row_group_size=group_rows)
            index[part].append({"file": file, "rows": len(shard)})
    store.write_json(EXAMPLES_INDEX, index)
    return store


def put_label_file(
    store: RunStore,
    ticket: int,
    row_M: np.ndarray,
    probs_MC: np.ndarray,
    tokens: int = 7,
    off_label_N: np.ndarray | None = None,
) -> None:
    """LABELS of a ticket, ``tokens`` of prompt a text, as the one teacher of a run would write them."""
    n = len(row_M)
    answers = Answers(
        probs_NC=probs_MC,
        off_label_N=1 - probs_MC.sum(axis=1) if off_label_N is None else off_label_N,
        prompt_tokens_N=np.full(n, tokens),
        cached_tokens_N=np.zeros(n, dtype=int),
        answer_tokens_N=np.zeros(n, dtype=int),
        outcome_N=[""] * n,
        usage=Usage(texts=n, requests=n, prompt_tokens=tokens * n),
    )
    asked = pa.table(
        {"row": pa.array(row_M, pa.int64()), "id": pa.array([f"toy-{row}" for row in row_M], pa.string())}
    )
    labels = labels_table(asked, np.asarray(row_M, dtype=np.uint64), answers, member=0)
    write_ticket(
        store,
        LABELS_DIR,
        ticket,
        labels,
        {"teacher": answers.usage},
        0,
        tickets_in_flight=1,
        names=NAMES[: answers.probs_NC.shape[1]],
    )


def training_sentences() -> list[str]:
    """What the tokenizers of the toy checkpoints are trained on: toy texts, labels and prompt words."""
    texts, _ = toy_texts(400, len(NAMES), seed=77)
    letters = [
        f"Label: {letter}\n\nText: {letter}. {name}"
        for letter, name in zip(ANSWER_LETTERS, NAMES, strict=False)
    ]
    names = [f"Label: {name}\n\nText: the {name}\n- {name}" for name in NAMES]
    return texts + 20 * (letters + names + ["Classify the text into exactly one of the categories."])


def save_tiny_llm(folder: Path) -> str:
    """A random Llama of two layers with a byte-level BPE, in float32; returns the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(training_sentences(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,  # so that its opinions differ from text to text
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_encoder(folder: Path) -> str:
    """A random BERT of two layers with a WordPiece tokenizer, in float32; returns the folder."""
    import torch
    from tokenizers import BertWordPieceTokenizer, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    # Not trained: that orders pieces of the same frequency by chance, and each session would have another
    # student.
    plain = BertWordPieceTokenizer()._tokenizer
    words = {
        word
        for text in training_sentences()
        for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
    }
    letters = sorted({letter for word in words for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *sorted(words)])
    pieces = BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})
    marks = [(mark, pieces.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    pieces._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=marks
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=128,
    )
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,  # a narrow random model with the usual 0.02 hardly learns
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def with_trap(source: str, folder: Path, mark: Path, *, keep_safe: bool = False) -> str:
    """A copy of a checkpoint whose pickled weights make the file ``mark`` when they are read."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    torch.save(load_file(folder / "model.safetensors") | {"trap": _Trap(mark)}, folder / "pytorch_model.bin")
    if not keep_safe:
        (folder / "model.safetensors").unlink()
    return str(folder)


def save_tiny_classifier(folder: Path, encoder: str, names: Sequence[str] = NAMES[:3]) -> str:
    """The encoder with a random classification head, which answers differently from text to text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(names), id2label=dict(enumerate(names)), dtype=torch.float32
    )
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts, _ = toy_texts(60, len(NAMES), seed=9)
    with torch.inference_mode():
        logits_NC = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    with torch.no_grad():
        model.classifier.bias -= logits_NC.mean(0)  # else one label is likeliest for all texts
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
