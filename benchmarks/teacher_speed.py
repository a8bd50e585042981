"""How near the teacher's stream comes to the bare engine, and how far ahead it is of what one would write.

    python benchmarks/teacher_speed.py steady --pairs 5     # against LLM.generate on all prompts at once
    python benchmarks/teacher_speed.py one_process --pairs 5    # the same, told to be one process
    python benchmarks/teacher_speed.py rounds --pairs 5     # five rounds, against an engine pool a round
    python benchmarks/teacher_speed.py forward --pairs 5    # against plain forward passes of transformers
    python benchmarks/teacher_speed.py start --pairs 5      # from the job's start to its first label
    python benchmarks/teacher_speed.py steady --size 6B --teacher '{"gpus": 1, "dtype": "bfloat16"}'

The teacher is a Llama with random weights and a BPE made on the spot, asked for letters behind a legend and
ten demonstrations; texts are made-up words, in number log-normal (median 40). Each measurement has a process
of its own, with engines, caches and Ray of its own, and all engines have the same settings. Prompts are made
from texts and probabilities are read from answers within the time, everywhere. They run in turns; the ratio
is the median of the pairs' own.

Shapes in names: N texts, C labels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pairs import HEADER, in_turns, ratio_line

from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import Config

NAMES = ("sport", "health", "money", "travel", "music", "science", "weather")
LETTERS = "ABCDEFG"
SIZES = {"small": (4, 256), "large": (12, 512), "1B": (16, 2048), "6B": (32, 4096)}
"""Layers and width."""
IS_WIDE = 2048
"""From this width on, heads are 128 wide, and engines make the weights: files would take minutes."""
ROUNDS = 5
RAY: dict[str, Any] = {
    "num_cpus": max(2, os.cpu_count() or 2),
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": 40,
}
RESULT = "result: "
Pair = tuple[tuple[float, ...], tuple[float, ...]]
"""Figures of one measurement of ours and one of theirs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("steady", "one_process", "rounds", "forward", "start"))
    parser.add_argument("--prompts", type=int, default=8_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument(
        "--theirs", choices=("ray_llm", "map_batches"), default="map_batches", help="of rounds"
    )
    parser.add_argument("--teacher", type=json.loads, default={}, help="its further settings, as JSON")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        seconds = WAYS[options.way](options.place, options.prompts)
        print(f"{RESULT}{json.dumps(seconds)}", flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()  # engines and Ray: what they say at their end is nobody's concern
        os._exit(0)
    # Ray makes its workers nice; beside other work on the machine, theirs that need no Ray would win by that.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    with tempfile.TemporaryDirectory(prefix="teacher-speed-") as folder:
        place = Path(folder)
        make_teacher(place / "teacher", *SIZES[options.size])
        write_settings(place, SIZES[options.size][1], options.teacher)
        write_texts(place, options.prompts)
        print("\n".join([HEADER, *compare(options, place)]))


def compare(options: argparse.Namespace, place: Path) -> list[str]:
    def in_turns_of(ours: str, theirs: str, *keys: str, few: int = options.prompts) -> list[Pair]:
        our = partial(in_own_process, ours, place, options.prompts, keys)
        return in_turns(our, partial(in_own_process, theirs, place, few, keys), options.pairs)

    if options.what == "rounds":
        pairs = in_turns_of("ours_rounds", options.theirs, "whole")
        return [seconds_line(f"five rounds against {options.theirs}, {options.size}", pairs)]
    if options.what == "start":
        pairs = in_turns_of("ours_start", "bare", "first")
        return [seconds_line(f"start to first label, {options.size}", pairs)]
    if options.what == "forward":
        few = min(options.prompts, 500)
        pairs = in_turns_of("ours", "forward", "steady", few=few)
        return [rate_line(f"against forward passes, {options.size}", pairs, options.prompts, few)]
    theirs = "bare" if options.what == "steady" else "one_process"
    pairs = in_turns_of("ours", theirs, "steady")
    return [rate_line(f"{options.what}, {options.size}", pairs, options.prompts, options.prompts)]


def seconds_line(title: str, pairs: Sequence[Pair]) -> str:
    return ratio_line(title, [(ours[0], theirs[0]) for ours, theirs in pairs], "s")


def rate_line(title: str, pairs: Sequence[Pair], our_n: int, their_n: int) -> str:
    return ratio_line(title, [(our_n / ours[0], their_n / theirs[0]) for ours, theirs in pairs], "texts/s")


def in_own_process(way: str, place: Path, prompts: int, keys: Sequence[str]) -> tuple[float, ...]:
    command = [sys.executable, __file__, "steady", "--way", way, "--place", place, "--prompts", prompts]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
            return tuple(found[key] for key in keys)
    raise SystemExit(f"{way} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")


# --- what all are given ------------------------------------------------------------------------------------


def make_teacher(folder: Path, layers: int, width: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llkd_ray.quickstart.teacher import train_tokenizer

    # Whoever asks for one token gets a whole answer only where each letter is one.
    answered = [(text, LETTERS[i % len(LETTERS)]) for i, text in enumerate(made_texts(2_000, 1))]
    tokenizer = train_tokenizer(answered, 4_000)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    head = 128 if width >= IS_WIDE else 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if width >= IS_WIDE:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        return
    model = LlamaForCausalLM(config)
    print(f"a teacher of {model.num_parameters() / 1e6:.1f}M parameters")
    model.save_pretrained(folder)


def write_settings(place: Path, width: int, further: dict[str, Any]) -> None:
    """The teacher's, for all processes that measure."""
    settings: dict[str, Any] = {
        "model": str(place / "teacher"),
        "dtype": "float32",
        "max_model_len": 2048,
        "cache": None,
        **further,
    }
    if width >= IS_WIDE:
        settings["engine"] = {"load_format": "dummy", **settings.get("engine", {})}
    (place / "teacher.json").write_text(json.dumps(settings))


def made_texts(n: int, seed: int) -> list[str]:
    """Frequent words of English-like spelling, drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    syllables = ["ba", "con", "de", "ex", "for", "in", "lo", "ment", "ner", "per", "re", "ser", "ti", "ver"]
    words = ["".join(np.random.default_rng(i).choice(syllables, 1 + i % 3)) for i in range(1_000)]
    p = 1 / np.arange(1, len(words) + 1)
    length_N = np.clip(np.exp(rng.normal(np.log(40), 0.5, n)), 3, 200).astype(int)
    return [
        f"{i} " + " ".join(words[w] for w in rng.choice(len(words), length, p=p / p.sum()))
        for i, length in enumerate(length_N)
    ]


def write_texts(place: Path, n: int) -> None:
    pq.write_table(pa.table({"text": made_texts(n, 0)}), place / "texts.parquet")


def read_texts(place: Path, n: int) -> list[str]:
    texts: list[str] = pq.read_table(place / "texts.parquet")["text"].to_pylist()
    return texts[:n]


def config_tree(place: Path, rounds: int) -> dict[str, Any]:
    demonstrations = [
        {"text": text, "label": NAMES[i % len(NAMES)]} for i, text in enumerate(made_texts(10, 2))
    ]
    return {
        "corpus": {"uri": str(place / "texts.parquet"), "text": "text"},
        "labels": {"names": NAMES},
        "teacher": {
            **json.loads((place / "teacher.json").read_text()),
            "prompt": {"demonstrations": demonstrations, "chat": "never"},
        },
        "student": {"model": "none"},
        "selection": {"policy": "random"},
        "evaluation": {"holdout": 0},
        "budget": {"rounds": rounds, "train": 100},
        "run": {"dir": str(place / "runs")},
    }


def prompts_of(config: Config, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Tokens of every prompt, and of the labels, which are one token each."""
    from llkd_ray.teacher.prompt import encode_prompts, label_sequences
    from llkd_ray.teacher.vllm.teacher import prepare, room_for_prompt

    tokenizer, prompt, trie = prepare(config.teacher, config.labels, "teacher")
    room = room_for_prompt(config.teacher, trie)
    ids, _ = encode_prompts(prompt, texts, tokenizer, room, config.teacher.prompt.cut)
    return ids, [token for (token,) in label_sequences(prompt, config.labels, tokenizer)]


# --- ways to label -----------------------------------------------------------------------------------------


def label_ours(place: Path, n: int, rounds: int = 1) -> dict[str, float]:
    """Tickets, selector, one teacher actor, label files: all of a run but its student."""
    began = time.time()
    import ray

    from llkd_ray.config.schedule import Schedule
    from llkd_ray.corpus.ingest import ingest
    from llkd_ray.run.supervisor import open_tickets
    from llkd_ray.selection.selector import start_selector
    from llkd_ray.storage.run_dir import ENGINES_DIR, LABELS_DIR, RunStore
    from llkd_ray.teacher.stream import spare_tickets, start_stream

    config = parse_config(config_tree(place, rounds))
    with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
        ray.init(**RAY, _temp_dir=folder)
        store = RunStore(f"{folder}/run")
        examples = ingest(config, store, lambda said: None)
        assert examples.n_pool == n
        schedule = Schedule.plan(config, examples.n_pool, 0)
        selector = start_selector(config, store.root, "benchmark")
        tickets = [*spare_tickets(config), *open_tickets(store, schedule, over=False)]
        stream = start_stream(config, store.root, selector, tickets)
        while not store.names(ENGINES_DIR):
            assert not stream.ended, stream.error
            time.sleep(0.05)
        ready = time.time()
        for k in range(rounds):
            answer = selector.wait_labels.remote(k)
            while not ray.wait([answer], timeout=0.5)[0]:
                assert not stream.ended, stream.error
            ray.get(selector.select.remote(k))
        told = time.time()
        ray.get(selector.finish.remote())
        while not stream.ended:
            time.sleep(0.05)
        whole = time.time() - began
        assert len(store.names(LABELS_DIR, ".parquet")) == schedule.n_tickets
    return {"steady": told - ready, "whole": whole}


def start_ours(place: Path, n: int) -> dict[str, float]:
    """A job, until its first label's file is in place."""
    with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
        tree = config_tree(place, 1)
        tree["run"] = {"dir": f"{folder}/runs"}
        tree["student"] = {"model": "minilm"}
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
        job = Path(__file__).parents[1] / "jobs" / "distill.py"
        began = time.time()
        process = subprocess.Popen([sys.executable, job, path], stdout=subprocess.DEVNULL)
        try:
            while not (files := list(Path(folder).glob("runs/*/labels/*.parquet"))):
                assert process.poll() is None, "the job ended"
                time.sleep(0.05)
            first = min(file.stat().st_mtime for file in files) - began
        finally:
            process.terminate()
            process.wait()
    return {"first": first}


def label_bare(place: Path, n: int) -> dict[str, float]:
    """The engine alone: all prompts at once. Its first label is that of a ticket's first texts."""
    began = time.time()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    from llkd_ray.teacher.vllm.requests import engine_arguments

    config = parse_config(config_tree(place, 1))
    llm = LLM(**engine_arguments(config.teacher))
    texts = read_texts(place, n)
    ready = time.time()
    few = config.teacher.ticket_size
    generate(llm, config, texts[:few])
    first = time.time() - began
    generate(llm, config, texts[few:])
    return {"steady": time.time() - ready, "first": first}


def label_in_one_process(place: Path, n: int) -> dict[str, float]:
    """The engine alone, in the caller's own process and on all cores: the fastest that it can be on few."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return label_bare(place, n)


def generate(llm: Any, config: Config, texts: Sequence[str]) -> np.ndarray:
    """float[N, C]"""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    ids, tokens = prompts_of(config, texts)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=tokens, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in ids], sampling, use_tqdm=False)
    logprobs = [one.outputs[0].logprobs[0] for one in outputs]
    return np.exp([[one[token].logprob for token in tokens] for one in logprobs])


class EngineActor:
    """As in Ray's examples: an engine in the constructor of an actor of a pool."""

    def __init__(self, tree: dict[str, Any]) -> None:
        from vllm import LLM

        from llkd_ray.teacher.vllm.requests import engine_arguments

        self.config = parse_config(tree)
        self.llm = LLM(**engine_arguments(self.config.teacher))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {**batch, "probs": generate(self.llm, self.config, batch["text"].tolist())}


def label_by_map_batches(place: Path, n: int) -> dict[str, float]:
    """A pool for each round, of one actor with an engine."""
    began = time.time()
    import ray

    tree = config_tree(place, 1)
    texts = read_texts(place, n)
    with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
        ray.init(**RAY, _temp_dir=folder)
        for k in range(ROUNDS):
            mine = pa.table({"text": texts[k::ROUNDS]})
            ray.data.from_arrow(mine).map_batches(
                EngineActor,
                fn_constructor_args=(tree,),
                batch_size=len(mine),  # None is refused with a GPU
                num_cpus=0.5,
                num_gpus=tree["teacher"].get("gpus"),
                compute=ray.data.ActorPoolStrategy(size=1),
            ).write_parquet(f"{folder}/round-{k}")
            assert pq.read_table(f"{folder}/round-{k}").num_rows == len(mine)
        return {"whole": time.time() - began}


def label_by_ray_llm(place: Path, n: int) -> dict[str, float]:
    """Ray's own processor for vLLM, called for each round."""
    began = time.time()
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from llkd_ray.teacher.vllm.requests import engine_arguments

    config = parse_config(config_tree(place, 1))
    arguments, gpus = engine_arguments(config.teacher), config.teacher.n_gpus
    settings = vLLMEngineProcessorConfig(
        model_source=arguments.pop("model"),
        engine_kwargs=arguments,
        batch_size=256,
        concurrency=1,
        placement_group_config={"bundles": [{"CPU": 1, **({"GPU": gpus} if gpus else {})}]},
        log_engine_metrics=False,
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )
    texts = read_texts(place, n)
    with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
        ray.init(**RAY, _temp_dir=folder)
        for k in range(ROUNDS):
            mine = texts[k::ROUNDS]
            ids, tokens = prompts_of(config, mine)
            sampling = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": tokens, "detokenize": False}
            processor = build_processor(
                settings,
                preprocess=lambda row, sampling=sampling: {
                    "prompt": "",
                    "tokenized_prompt": row["ids"],
                    "sampling_params": sampling,
                },
                postprocess=lambda row: {"logprobs": str(row.get("generated_tokens"))},
            )
            found = processor(ray.data.from_items([{"ids": one} for one in ids])).materialize()
            assert found.count() == len(mine)
        return {"whole": time.time() - began}


def label_by_forward(place: Path, n: int) -> dict[str, float]:
    """Whole prompts, in batches of 32 of like length, through the model of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    config = parse_config(config_tree(place, 1))
    model = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.float32).eval()
    began = time.time()
    ids, tokens = prompts_of(config, read_texts(place, n))
    ids.sort(key=len)
    with torch.inference_mode():
        for start in range(0, len(ids), 32):
            batch = ids[start : start + 32]
            longest = max(map(len, batch))
            padded = torch.tensor([[0] * (longest - len(one)) + one for one in batch])
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch])
            logits = model(input_ids=padded, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            logits.softmax(-1)[:, tokens].numpy()
    return {"steady": time.time() - began}


WAYS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "ours": label_ours,
    "ours_rounds": partial(label_ours, rounds=ROUNDS),
    "ours_start": start_ours,
    "bare": label_bare,
    "one_process": label_in_one_process,
    "map_batches": label_by_map_batches,
    "ray_llm": label_by_ray_llm,
    "forward": label_by_forward,
}

if __name__ == "__main__":
    main()
