"""The kinds of teachers: how each is created, checked before a run, and identified for reuse."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from llkd_ray.config.base import ConfigError, member_field
from llkd_ray.config.schema import Config, LabelsConfig, SourceConfig
from llkd_ray.config.teacher import Demonstration, DrawnDemonstrations, PromptConfig, TeacherConfig
from llkd_ray.corpus import sources
from llkd_ray.corpus.cleaning import NO_GOLD, Cleaner, Refusal
from llkd_ray.corpus.readers import read_rows
from llkd_ray.storage.checkpoints import commit_of
from llkd_ray.storage.run_dir import join_uri
from llkd_ray.teacher.base import Teacher
from llkd_ray.teacher.cache import answer_key
from llkd_ray.teacher.openai.teacher import OpenAITeacher, check_server_teacher, possible_methods
from llkd_ray.teacher.prompt import inline_template
from llkd_ray.teacher.recorded import RecordedTeacher, read_recorded
from llkd_ray.teacher.vllm.teacher import VllmTeacher, check_vllm_teacher, prepare

CACHE_DIR = "teacher-cache"
MAX_LENGTH = 8192
"""More is rarely needed for a label, and an engine must hold keys and values of a text of this length."""


def make_teacher(
    teacher: TeacherConfig,
    labels: LabelsConfig,
    on_start: Callable[[float], None],
    agree: Callable[[str | None], str | None],
    prestart: bool = False,
) -> Teacher:
    """Create the teacher of the settings; ``on_start`` gets the seconds that an engine took to start.

    ``agree``: see :class:`OpenAITeacher`. ``prestart``: an engine will be needed soon, so start the
    preparations that can run in advance.
    """
    match teacher.kind:
        case "vllm":
            return VllmTeacher(teacher, labels, on_start, prestart)
        case "openai":
            return OpenAITeacher(teacher, labels, agree)
        case "recorded":
            assert teacher.recorded is not None
            return RecordedTeacher(teacher.recorded, labels.names)
        case _:
            raise AssertionError(f"a teacher of kind {teacher.kind} is asked by its members")


def check_teacher(config: Config) -> dict[str, Any]:
    """Find the errors that can be found without an engine; returns facts for the manifest."""
    facts = {name: _check(name, one, config.labels) for name, one in config.teacher.members()}
    return facts.get("teacher", {"kind": "cascade", **facts})


def _check(name: str, teacher: TeacherConfig, labels: LabelsConfig) -> dict[str, Any]:
    field = member_field(name)
    match teacher.kind:
        case "vllm":
            return check_vllm_teacher(teacher, labels, field)
        case "openai":
            return check_server_teacher(teacher, labels, field)
        case "recorded":
            assert teacher.recorded is not None
            answers = read_recorded(teacher.recorded, labels.names)
            return {"kind": "recorded", "uri": teacher.recorded.uri, "answers": len(answers)}
        case _:
            raise AssertionError(f"a teacher of kind {teacher.kind} is checked by its members")


def cache_folder(config: Config, teacher: TeacherConfig) -> str | None:
    """The folder that records which runs have answers of which teacher; None where nothing is reused."""
    if not teacher.has_prompt or teacher.cache is None:
        return None
    return join_uri(config.run.dir, CACHE_DIR) if teacher.cache == "auto" else teacher.cache


def cache_key(config: Config, teacher: TeacherConfig) -> str | None:
    """Depends on everything that determines an answer except the text; None where nothing is reused.

    Call it in the driver: on another machine, a checkpoint's files may have other times.
    """
    if cache_folder(config, teacher) is None:
        return None
    if teacher.kind == "openai":
        prompt = possible_methods(teacher, config.labels, "teacher")[1]
    else:
        prompt = prepare(teacher, config.labels, "teacher")[1]
    return answer_key(teacher, config.labels.names, prompt.hash)


def self_contained(config: Config) -> Config:
    """The config with all that files decide: prompts with their examples, a model's commit and length.

    Other machines may not have the files, and their content may change before a resume, as may the branch of
    a hub model.
    """
    members: dict[str, TeacherConfig] = {}
    for name, teacher in config.teacher.members():
        prompt = inline_template(teacher.prompt)
        prompt = with_demonstrations(prompt, config.labels, f"{member_field(name)}.prompt.draw")
        decided: dict[str, Any] = {"prompt": prompt}
        if teacher.kind == "vllm":
            commit, length = _commit_and_length(teacher)
            decided |= {"revision": commit, "max_model_len": teacher.max_model_len or length}
        members[name] = teacher.model_copy(update=decided)
    return config.model_copy(update={"teacher": config.teacher.with_members(members)})


def _commit_and_length(teacher: TeacherConfig) -> tuple[str | None, int | None]:
    """The commit of a hub model, and the tokens that a model reads, at most MAX_LENGTH.

    As far as its config.json tells: of a folder there is no commit, and a length may be unknown.
    """
    from transformers import AutoConfig

    assert teacher.model is not None
    try:
        config = AutoConfig.from_pretrained(
            teacher.model, revision=teacher.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return teacher.revision, None  # the check of the model says why
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = None if positions is None else min(positions, MAX_LENGTH)
    return commit_of(teacher.model, teacher.revision) or teacher.revision, length


def with_demonstrations(
    config: PromptConfig, labels: LabelsConfig, field: str = "teacher.prompt.draw"
) -> PromptConfig:
    """The config with the drawn examples after its own, and nothing left to draw.

    The same rows and seed give the same examples in the same order, regardless of the files and the order
    of the rows. Duplicate rows count once, and examples already in the config are excluded. Reads everything
    once and keeps only candidates. Raises :class:`ConfigError`, with ``field``'s name, where a file or a
    column is missing or a class has too few examples.
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
    """Insert the candidate, in order, if it is new and among the ``count`` smallest."""
    if (len(smallest) < count or candidate < smallest[-1]) and candidate not in smallest:
        insort(smallest, candidate)
        del smallest[count:]
