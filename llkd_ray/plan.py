"""What a run would do and what it would ask of the teacher, from a sample, before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from llkd_ray import sources
from llkd_ray.cleaning import Cleaner, Example
from llkd_ray.config import Config, ConfigError
from llkd_ray.console import Display
from llkd_ray.loop import check
from llkd_ray.prompts import encode_prompts
from llkd_ray.readers import RawRow, Unit, read_rows
from llkd_ray.teacher import load_tokenizer, prepare_prompt

SAMPLE_ROWS = 500
"""Rows that are read, from the front of the corpus."""


def plan(config: Config, display: Display) -> None:
    """Check the config, read a sample and say what a run would do. Starts neither Ray nor an engine."""
    check(config)
    units = sources.plan(config.corpus, "corpus")
    kept, refused = _sample(config, units)
    if not kept:
        raise ConfigError(f"corpus.uri: none of the first {SAMPLE_ROWS} rows can be used ({dict(refused)})")
    display.say(f"corpus: {len(units)} part(s), {sum(unit.size for unit in units) / 2**20:.1f} MiB to read")
    display.say(
        f"sample: {len(kept)} of the first {len(kept) + refused.total()} rows are usable"
        + "".join(f"; {count} {reason}" for reason, count in refused.most_common())
    )
    budget = config.budget
    train = f"{budget.train} texts" if isinstance(budget.train, int) else f"{budget.train:.1%} of the pool"
    labels = f"{budget.labels} texts" if budget.labels else "the whole pool"
    display.say(f"student: {config.student.model}, {config.student.max_workers} rank(s)")
    display.say(
        f"policy: {config.selection.policy}; {budget.rounds} rounds; the teacher labels {labels}, "
        f"the student trains on {train}"
    )
    if config.test is not None:
        sources.plan(config.test, "test")
        asked = " and the teacher labels it too" if config.evaluation.teacher_on_test else ""
        display.say(f"test: the student is evaluated on it after every round{asked}")
    if config.teacher.kind == "recorded":
        display.say("teacher: recorded answers; nothing is asked of an LLM")
        return
    _say_teacher(config, [example.text for example in kept], display)


def _say_teacher(config: Config, texts: list[str], display: Display) -> None:
    """The prompt as the teacher sees it, and how many tokens it comes to."""
    tokenizer = load_tokenizer(config)
    prompt, _ = prepare_prompt(config, tokenizer)
    encoded, cut = encode_prompts(prompt, texts, tokenizer, config.teacher.max_model_len - 1)
    tokens_N = np.array([len(ids) for ids in encoded])
    half_width = 1.96 * tokens_N.std() / np.sqrt(tokens_N.size)
    display.say(f"teacher: {config.teacher.model}, {config.teacher.actors} actor(s)")
    display.say(
        f"tokens: {tokens_N.mean():.0f} ± {half_width:.0f} a prompt (95 % interval of the sample's mean), "
        f"{tokens_N.max()} at most; {cut} of {len(texts)} texts cut"
    )
    if config.budget.labels:
        total, margin = tokens_N.mean() * config.budget.labels, half_width * config.budget.labels
        display.say(f"tokens in all: {total:,.0f} ± {margin:,.0f} for the pool")
    display.say("the first prompt, as the teacher reads it:")
    display.console.print(prompt.render(texts[0]), markup=False)


def _sample(config: Config, units: list[Unit]) -> tuple[list[Example], Counter[str]]:
    """The usable rows among the first, and the others by reason."""
    clean = Cleaner(config.corpus, "corpus", config.labels.names)
    kept: list[Example] = []
    refused: Counter[str] = Counter()
    for row in islice(_rows(config, units), SAMPLE_ROWS):
        cleaned = clean(row)
        if isinstance(cleaned, Example):
            kept.append(cleaned)
        else:
            refused[cleaned.reason] += 1
    return kept, refused


def _rows(config: Config, units: list[Unit]) -> Iterator[RawRow]:
    for unit in units:
        yield from read_rows(unit, config.corpus, "corpus", config.labels.names)
