"""Doctor's checks of models: student and teachers, on disk, on the hub or behind a server. No weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from llkd_ray.checkpoints import load_tokenizer, size_on_disk
from llkd_ray.config import Config, ConfigError
from llkd_ray.findings import Check, Finding, in_one_line, ok, problem, readable, warning
from llkd_ray.teacher_config import TeacherConfig, member_field

HUB_S = SERVER_S = 15.0
"""For one answer."""
MODELS_SHOWN = 10


def student_check(config: Config) -> Check:
    return Check("student", partial(check_the_student, config))


def teacher_checks(config: Config) -> list[Check]:
    """Of each teacher that is asked, and of the labels as its tokenizer has them."""
    checks = []
    for name, teacher in config.teacher.members():
        field = member_field(name)
        if teacher.kind == "vllm":
            checks.append(Check(name, partial(check_model, teacher, field)))
        elif teacher.kind == "openai":
            checks.append(Check(name, partial(check_server, teacher, field)))
    return [*checks, Check("labels", partial(check_labels, config))]


# --- checkpoints


def check_the_student(config: Config) -> Finding:
    """Whether the student can be loaded and can become a classifier."""
    from llkd_ray.student import check_student, resolve_model

    model = config.student.model
    if trouble := hub_trouble("student", "student.model", model, None):
        return trouble
    check_student(config.student)
    return of_weights("student", "student.model", model, resolve_model(model))


def check_model(teacher: TeacherConfig, field: str) -> Finding:
    """Whether a teacher for our own engine is here, or can be had."""
    assert teacher.model is not None
    name = field.rpartition(".")[2]
    if trouble := hub_trouble(name, f"{field}.model", teacher.model, teacher.revision):
        return trouble
    load_tokenizer(teacher.model, teacher.revision, f"{field}.model")
    return of_weights(name, f"{field}.model", teacher.model, teacher.model)


def of_weights(check: str, setting: str, name: str, checkpoint: str) -> Finding:
    """Whether the weights of a checkpoint whose other files are there will be found."""
    size = size_on_disk(checkpoint)
    if size is not None:
        return ok(check, f"{setting} {name!r}: {readable(size)} of weights are on this machine")
    if Path(checkpoint).is_dir():
        return problem(
            check,
            f"{setting}: {name!r} holds no weights (*.safetensors, *.bin)",
            "save the model there, or name a whole checkpoint",
        )
    return ok(check, f"{setting} {name!r}: the hub lets us read it; the first run downloads its weights")


# --- the hub


def is_on_the_hub(model: str) -> bool:
    """Whether a name can only mean a model of the hub."""
    is_path = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    return model != "minilm" and not is_path


def hub_trouble(check: str, setting: str, model: str, revision: str | None) -> Finding | None:
    """What keeps us from a model of the hub; None where nothing does, or where it is none.

    Asked before anything is loaded, as the libraries try for half a minute and then say little.
    """
    from huggingface_hub import constants

    if not is_on_the_hub(model):
        return None
    is_cached = size_on_disk(model) is not None
    if constants.HF_HUB_OFFLINE:
        if is_cached:
            return None
        return problem(
            check,
            f"{setting}: {model!r} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set",
            "unset it for the first run, copy the cache (HF_HOME) from a machine that has the model, or give "
            "a checkpoint folder",
        )
    return _asked_of_the_hub(check, setting, model, revision, is_cached)


def _asked_of_the_hub(
    check: str, setting: str, model: str, revision: str | None, is_cached: bool
) -> Finding | None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    token = "HF_TOKEN is not set here; set it to" if get_token() is None else "replace the HF_TOKEN here by"
    try:
        HfApi().model_info(model, revision=revision, timeout=HUB_S)
        HfApi().auth_check(model)  # a gated model tells of itself to everybody
    except GatedRepoError:
        return problem(
            check,
            f"{setting}: the hub lets nobody read {model!r} who has not been granted access",
            f"ask for it on the model's page; {token} a token of the account that has it",
        )
    except RepositoryNotFoundError:
        return problem(
            check,
            f"{setting}: the hub shows us no {model!r}, and it is no folder here",
            f"correct the name; if the model is private: {token} a token that may read it",
        )
    except RevisionNotFoundError:
        return problem(check, f"{setting}: {model!r} has no revision {revision!r} on the hub", "correct it")
    except Exception as error:  # the errors of the hub's HTTP library, whichever it is in a version
        found = f"{setting}: the hub does not answer ({in_one_line(error, 120)})"
        if is_cached:
            return warning(
                check, f"{found}; {model!r} is in its cache", "set HF_HUB_OFFLINE=1 to save waiting"
            )
        return problem(
            check, found, "see the network, HF_ENDPOINT and proxies, or give a checkpoint folder instead"
        )
    return None


# --- servers


def check_server(teacher: TeacherConfig, field: str) -> Finding:
    """Whether a server of the OpenAI protocol answers, takes our key and serves the model; asks no text."""
    import httpx

    from llkd_ray.answers import TeacherDown
    from llkd_ray.http_client import api_key

    server = teacher.server
    assert server is not None
    name = field.rpartition(".")[2]
    setting = f"{field}.server.base_url {server.base_url!r}"
    variable = server.api_key_env
    try:
        key = api_key(variable)
    except TeacherDown as error:
        return problem(name, str(error))
    said = f"{variable} is {'set' if key else 'not set'} here"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(server.base_url.rstrip("/") + "/models", headers=headers, timeout=SERVER_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = in_one_line(error).replace(key, "***") if key else in_one_line(error)
        return problem(
            name, f"{setting} does not answer ({reason})", "start the server, or correct the address"
        )
    if reply.status_code in (401, 403):
        return problem(
            name,
            f"{setting} answers HTTP {reply.status_code}, and {said}",
            f"set {variable} to a key that may use {teacher.model!r}, here and where the actors run",
        )
    served = _served(reply.content)
    if not served:
        return warning(
            name,
            f"{setting} answers, but does not list its models (HTTP {reply.status_code}); {said}",
            "see that the address goes up to and with the version, such as /v1, and that the model's name is "
            "the server's",
        )
    if teacher.model not in served:
        more = ", …" if len(served) > MODELS_SHOWN else ""
        return problem(
            name,
            f"{setting} does not list the model {teacher.model!r}; it lists "
            f"{', '.join(map(repr, served[:MODELS_SHOWN]))}{more}",
            f"correct {field}.model",
        )
    return ok(name, f"{setting} serves {teacher.model!r}; {said}")


def _served(content: bytes) -> list[str]:
    """The models' names in a reply of the models' endpoint; empty where it holds none."""
    try:
        listed = json.loads(content)["data"]
        return [str(one["id"]) for one in listed]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


# --- labels


def check_labels(config: Config) -> Finding | None:
    """Whether each teacher's tokenizer tells the labels apart, and all else that a run asks it before."""
    from llkd_ray.teachers import check_teacher, self_contained

    for name, teacher in config.teacher.members():
        if teacher.kind == "vllm" and teacher.model is not None:
            if hub_trouble(name, "", teacher.model, teacher.revision):
                return None  # said by the check of the teacher
            try:
                load_tokenizer(teacher.model, teacher.revision, f"{member_field(name)}.model")
            except ConfigError:
                return None  # said by the check of the teacher
    facts = check_teacher(self_contained(config))
    names = config.labels.names
    hashes = [
        one["prompt_hash"]
        for one in (facts, *facts.values())
        if isinstance(one, dict) and "prompt_hash" in one
    ]
    if not hashes:
        return ok("labels", f"the {len(names)} labels are those of the recorded answers")
    return ok(
        "labels",
        f"the {len(names)} labels can be told apart, and the prompt leaves room for a text (prompt "
        f"{', '.join(hashes)})",
    )
