"""How fast does the student train: ours against a bare DDP loop and against transformers.Trainer, in turns.

    python benchmarks/train_speed.py --texts 256 --pairs 5

Two ranks of one thread each, started by torchrun, in which all take turns: a round as a run trains it
(``student.train_round``, without Ray Train around it, whose start is paid once a run and which does nothing
within a round); a loop as one would write it, with the same optimiser; and ``Trainer`` with its defaults, if
accelerate is installed. MiniLM with a fresh head, texts in number of words log-normal (median 40), the same
batch of texts a step; theirs are shuffled and padded to the longest of a rank's share. Tokens are those of
the texts, without padding. Tokenizing counts, building models does not.

The last lines are of texts of one length, where nothing is to be had from padding less: there it shows what
our loop itself costs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from pairs import HEADER, in_turns, ratio_line
from predict_speed import make_texts
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.student.model import Student, build_student, lengths, resolve_model
from llkd_ray.student.train import Batch, train_round

LABELS = LabelsConfig(names=("one", "two", "three", "four", "five"))
DEVICE = torch.device("cpu")

Seconds = tuple[float, float]
"""On the clock, and of processor time of all ranks, which other work on the machine disturbs less."""
Work = Callable[[], Seconds]
"""One pass over the texts."""


class Data:
    """Texts and labels, and how many tokens they have."""

    def __init__(self, texts: list[str], config: StudentConfig, student: Student) -> None:
        self.texts, self.config = texts, config
        self.label_N = np.random.default_rng(1).integers(0, len(LABELS.names), len(texts))
        self.tokens = int(lengths(student.encode(texts, config.max_tokens)).sum())

    def batch(self) -> Batch:
        p_NC = np.full((len(self.texts), len(LABELS.names)), 0.05)
        p_NC[np.arange(len(self.texts)), self.label_N] = 0.8
        return Batch(self.texts, self.label_N, np.ones(len(self.texts)), p_NC)

    def tokenized(self, tokenizer: Any) -> list[dict[str, Any]]:
        columns = tokenizer(self.texts, truncation=True, max_length=self.config.max_tokens)
        return [
            {**{name: values[i] for name, values in columns.items()}, "labels": int(label)}
            for i, label in enumerate(self.label_N)
        ]


def build(config: StudentConfig) -> Student:
    return build_student(config, LABELS, 0, DEVICE)


class Clock(transformers.TrainerCallback):
    """Between start and stop, where ranks wait for each other; as a callback, of a Trainer's training.

    That leaves out what Trainer prepares before.
    """

    def start(self) -> None:
        dist.barrier()
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        processor = torch.tensor(time.process_time() - self.began[1])
        dist.all_reduce(processor)
        self.seconds = time.perf_counter() - self.began[0], float(processor)
        return self.seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stop()


def timed(work: Callable[[], Any]) -> Seconds:
    clock = Clock()
    clock.start()
    work()
    return clock.stop()


def our_work(data: Data) -> Work:
    student = build(data.config)
    student.model = DistributedDataParallel(student.model)
    rank, world = dist.get_rank(), dist.get_world_size()
    return lambda: timed(
        lambda: train_round(student, data.batch(), data.config, rank=rank, world=world, seed=0)
    )


def bare_work(data: Data) -> Work:
    student = build(data.config)
    model = DistributedDataParallel(student.model)
    collate = transformers.DataCollatorWithPadding(student.tokenizer)

    def train() -> None:
        rows: Any = data.tokenized(student.tokenizer)
        sampler: Any = DistributedSampler(rows)
        loader = DataLoader(rows, share(data.config), sampler=sampler, collate_fn=collate)
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups,
            lr=data.config.learning_rate,
            weight_decay=data.config.weight_decay,
            fused=True,
        )
        warmup = round(data.config.warmup * len(loader))
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(loader))
        model.train()
        for inputs in loader:
            with student.precision():
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return lambda: timed(train)


def trainer_work(data: Data) -> Work:
    student = build(data.config)
    folder = tempfile.mkdtemp()

    def train() -> Seconds:
        rows: Any = []
        tokenizing = timed(lambda: rows.extend(data.tokenized(student.tokenizer)))
        clock = Clock()
        trainer = transformers.Trainer(
            model=student.module,
            args=transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=share(data.config),
                learning_rate=data.config.learning_rate,
                bf16=student.autocast,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(student.tokenizer),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return tokenizing[0] + clock.seconds[0], tokenizing[1] + clock.seconds[1]

    return train


def share(config: StudentConfig) -> int:
    """Texts of a step that a rank has."""
    return config.batch_size // dist.get_world_size()


def compare(name: str, data: Data, theirs: Callable[[Data], Work], pairs: int) -> None:
    """Print two lines of the table, one of either clock."""
    our, their = our_work(data), theirs(data)
    for warm_up in (our, their):
        warm_up()
    found = in_turns(our, their, pairs)
    for clock, title in enumerate((name, f"{name}, per processor second")):
        rates = [(data.tokens / ours[clock], data.tokens / theirs[clock]) for ours, theirs in found]
        print(ratio_line(title, rates, "tokens/s"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="texts a step, of all ranks")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--precisions", nargs="*", default=["float32", "auto"])
    options = parser.parse_args()
    if "RANK" not in os.environ:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        script = ["--local-ranks-filter=0", __file__, *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, *start, *script])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    measure(options)
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> None:
    """Torchrun lets the first rank alone speak."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, transformers {transformers.__version__}\n{HEADER}", flush=True)
    others: dict[str, Callable[[Data], Work]] = {"bare DDP": bare_work}
    if transformers.utils.is_accelerate_available():
        others["Trainer"] = trainer_work
    texts = make_texts(options.texts, resolve_model("minilm"), seed=0)
    same = [" ".join((text.split() * options.max_tokens)[: options.max_tokens]) for text in texts]
    for precision in options.precisions:
        config = StudentConfig(
            model="minilm",
            precision=precision,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            epochs=1,
            min_steps=1,
        )
        student = build(config)
        name = "bf16" if student.autocast else "float32"
        for other, work in others.items():
            compare(f"{other}, {name}", Data(texts, config, student), work, options.pairs)
        few = Data(same[: len(same) // 2], config, student)
        compare(f"bare DDP, {name}, texts of one length", few, bare_work, options.pairs)


if __name__ == "__main__":
    main()
