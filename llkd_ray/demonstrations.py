"""Few-shot examples for the teacher's prompt, drawn from a file: as many of each class, by a seed."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections import Counter

import numpy as np

from llkd_ray import sources
from llkd_ray.cleaning import NO_GOLD, Cleaner, Refusal
from llkd_ray.config import LabelsConfig, SourceConfig
from llkd_ray.readers import read_rows
from llkd_ray.sections import ConfigError
from llkd_ray.teacher_config import Demonstration, DrawnDemonstrations, PromptConfig


def with_demonstrations(
    config: PromptConfig, labels: LabelsConfig, field: str = "teacher.prompt.draw"
) -> PromptConfig:
    """The config with the drawn examples behind its own, and nothing left to be drawn.

    The same rows and the same seed give the same examples in the same order, in whatever files and order
    the rows stand; of rows that are the same, one counts, and none that the config shows already. Reads
    everything once and keeps only what may be drawn. Raises :class:`ConfigError`, with ``field``'s name,
    where a file or a column is missing or a class has too few examples.
    """
    if config.draw is None:
        return config
    drawn = _draw(config.draw, config.demonstrations, labels, field)
    return config.model_copy(update={"demonstrations": (*config.demonstrations, *drawn), "draw": None})


def _draw(
    draw: DrawnDemonstrations, shown: tuple[Demonstration, ...], labels: LabelsConfig, field: str
) -> list[Demonstration]:
    source = SourceConfig(uri=draw.uri, text=draw.text, gold=draw.label, max_chars=draw.max_chars)
    clean = Cleaner(source, field, labels.names)
    known = {shot.text.strip() for shot in shown}
    # Of each class, the texts of smallest hash: a random sample that does not depend on the order of rows.
    smallest: list[list[tuple[bytes, str]]] = [[] for _ in labels.names]
    refused: Counter[str] = Counter()
    try:
        for unit in sources.plan(source, field):
            for row in read_rows(unit, source, field, labels.names):
                example = clean(row)
                if isinstance(example, Refusal) or example.gold == NO_GOLD:
                    refused[example.reason if isinstance(example, Refusal) else "missing_gold"] += 1
                elif example.text not in known:
                    key = _key(draw.seed, labels.names[example.gold], example.text)
                    _keep(smallest[example.gold], (key, example.text), draw.per_class)
    except ConfigError as error:
        # Sources call the column of the true label "gold".
        raise ConfigError(str(error).replace(f"{field}.gold", f"{field}.label")) from error
    for name, found in zip(labels.names, smallest, strict=True):
        if len(found) < draw.per_class:
            why = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
            raise ConfigError(
                f"{field}.per_class is {draw.per_class}, but {draw.uri!r} has {len(found)} usable example(s) "
                f"of {name!r}{f' (rows refused: {why})' if why else ''}; lower it, raise {field}.max_chars, "
                "or name a larger file"
            )
    drawn = [
        Demonstration(text=text, label=name)
        for name, found in zip(labels.names, smallest, strict=True)
        for _, text in found
    ]
    return [drawn[i] for i in np.random.default_rng(draw.seed).permutation(len(drawn))]


def _key(seed: int, name: str, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\x00{name}\x00{text}".encode(), digest_size=16).digest()


def _keep(smallest: list[tuple[bytes, str]], candidate: tuple[bytes, str], count: int) -> None:
    """Put the candidate among the ``count`` smallest, in order, if it is one of them and not there yet."""
    if (len(smallest) < count or candidate < smallest[-1]) and candidate not in smallest:
        insort(smallest, candidate)
        del smallest[count:]
