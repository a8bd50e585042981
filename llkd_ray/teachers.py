"""The kinds of teachers there are: how one is made, checked before a run, and told from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llkd_ray.answer_cache import answer_key
from llkd_ray.answers import Labeller
from llkd_ray.config import Config, LabelsConfig, parse_config
from llkd_ray.demonstrations import with_demonstrations
from llkd_ray.prompt_template import inline_template
from llkd_ray.recorded import RecordedLabeller, read_recorded
from llkd_ray.server_teacher import ServerLabeller, check_server_teacher, possible_ways
from llkd_ray.store import join_uri
from llkd_ray.teacher_config import TeacherConfig, member_field
from llkd_ray.vllm_teacher import VllmLabeller, check_vllm_teacher, prepare

CACHE_DIR = "teacher-cache"


def make_labeller(
    teacher: TeacherConfig, labels: LabelsConfig, on_start: Callable[[float], None], begin: bool = False
) -> Labeller:
    """The teacher that the settings describe; ``on_start`` hears how long an engine took to start.

    ``begin``: an engine will be needed soon, so begin with what can be done ahead.
    """
    match teacher.kind:
        case "vllm":
            return VllmLabeller(teacher, labels, on_start, begin)
        case "openai":
            return ServerLabeller(teacher, labels)
        case "recorded":
            assert teacher.recorded is not None
            return RecordedLabeller(teacher.recorded, len(labels.names))
        case _:
            raise AssertionError(f"a teacher of kind {teacher.kind} is asked by its members")


def check_teacher(config: Config) -> dict[str, Any]:
    """Find the mistakes that can be found without an engine; returns facts for the manifest."""
    facts = {name: _check(name, one, config.labels) for name, one in config.teacher.members()}
    return facts.get("teacher", {"kind": "cascade", **facts})


def _check(name: str, teacher: TeacherConfig, labels: LabelsConfig) -> dict[str, Any]:
    field = member_field(name)
    match teacher.kind:
        case "vllm":
            return check_vllm_teacher(teacher, labels, field)
        case "openai":
            return check_server_teacher(teacher, labels, field)
        case _:
            assert teacher.recorded is not None
            answers = read_recorded(teacher.recorded, len(labels.names))
            return {"kind": "recorded", "uri": teacher.recorded.uri, "answers": len(answers)}


def cache_folder(config: Config, teacher: TeacherConfig) -> str | None:
    """Where it is said which runs have answers of which teacher; None where nothing is to be reused."""
    if teacher.kind == "recorded" or teacher.cache is None:
        return None
    return join_uri(config.run.dir, CACHE_DIR) if teacher.cache == "auto" else teacher.cache


def cache_key(config: Config, teacher: TeacherConfig) -> str | None:
    """Changes with whatever decides an answer apart from the text; None where nothing is to be reused.

    For the driver: on another machine, a checkpoint's files may have other times.
    """
    if cache_folder(config, teacher) is None:
        return None
    if teacher.kind == "openai":
        prompt = possible_ways(teacher, config.labels, "teacher")[1]
    else:
        prompt = prepare(teacher, config.labels, "teacher")[1]
    return answer_key(teacher, config.labels.names, prompt.hash)


def self_contained(config: Config) -> Config:
    """The config with what its prompts take from files: templates, and the few-shot examples that are drawn.

    Other machines may not have the files, and a run that is resumed may find others.
    """
    tree = config.model_dump()
    for name, teacher in config.teacher.members():
        section = tree["teacher"] if name == "teacher" else tree["teacher"]["cascade"][name]
        prompt = inline_template(teacher.prompt)
        prompt = with_demonstrations(prompt, config.labels, f"{member_field(name)}.prompt.draw")
        section["prompt"] = prompt.model_dump()
    return parse_config(tree)
