"""Doctor's checks of inputs and outputs: corpus, test set, run directories, models, servers and labels."""

from __future__ import annotations

import json
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llkd_ray.config.base import ConfigError, member_field
from llkd_ray.config.schema import Config, SourceConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.doctor.findings import Check, Finding, describe_error, format_bytes, ok, problem, warning
from llkd_ray.doctor.machine import disk_need
from llkd_ray.storage.checkpoints import HUB_S, load_tokenizer, refuse_pickles, size_on_disk

if TYPE_CHECKING:
    from llkd_ray.storage.run_dir import RunStore


SAMPLE_ROWS = 200
RUNS_SHOWN = 5
RUNS_LOOKED_AT = 200
"""Only the last runs by name are checked, because each needs several object-store requests."""


def data_checks(config: Config) -> list[Check]:
    checks = [Check("corpus", partial(check_source, config, config.corpus, "corpus"))]
    if config.test is not None:
        checks.append(Check("test", partial(check_source, config, config.test, "test")))
    return checks


def storage_checks(config: Config) -> list[Check]:
    return [
        Check("storage", partial(check_storage, config.run.dir)),
        Check("disk", partial(check_disk, config)),
        Check("runs", partial(check_runs, config)),
    ]


# --- inputs


def check_source(config: Config, source: SourceConfig, field: str) -> Finding:
    """The same findings as ``--dry-run``: files, columns and a sample of rows; for gold, the known labels."""
    from llkd_ray.run.plan import read_part

    if source is config.test and _is_same(source, config.corpus):
        return problem(
            field,
            f"test.uri is corpus.uri, {', '.join(source.uris)}: texts of the test set are left out of the "
            "pool, which would be empty",
            "give texts of their own for the test, or divide the rows by corpus.where and test.where",
        )
    lines: list[str] = []
    part = read_part(config, source, field, SAMPLE_ROWS, lines.append)
    sample = part.sample
    found = "; ".join(line.removeprefix(f"{field}: ") for line in lines)
    if source.gold is not None:
        known = sum(example.gold >= 0 for example in sample.kept)
        found += f"; gold is known of {known} of {len(sample.kept)}"
        if not known:
            return warning(field, found, f"correct {field}.gold, or leave it out")
        there = {example.gold for example in sample.kept}
        absent = [name for label, name in enumerate(config.labels.names) if label not in there]
        if source is config.test and absent and known >= GOLD_PER_LABEL * len(config.labels.names):
            return warning(
                field,
                f"{found}; of those, none is {', '.join(absent)}",
                "add such texts: without them nobody knows how well these labels are found",
            )
    # A tenth is more than the usual share of bad rows, and less than a wrong column or label causes.
    if sample.refused.total() > sample.read / 10:
        return warning(
            field,
            found,
            f"see that {field}.text, {field}.gold and labels.names fit; a run quarantines such rows",
        )
    return ok(field, found)


def _is_same(one: SourceConfig, other: SourceConfig) -> bool:
    return set(one.uris) == set(other.uris) and one.where == other.where


# --- output


def check_storage(folder: str) -> Finding:
    """Whether a file can be written in the run folder, read back and deleted."""
    from llkd_ray.storage.run_dir import RunStore

    name, content = f".doctor-{uuid.uuid4().hex}", b"written by doctor; may be deleted"
    made = _missing_folders(folder)
    try:
        store = RunStore(folder)
        store.write_bytes(name, content)  # leaves no file if it fails
        try:
            back = store.read_bytes(name)
        finally:
            store.delete(name)
    except Exception as error:  # pyarrow raises many types, some of them ValueErrors
        return problem(
            "storage",
            f"run.dir {folder!r} cannot be used ({describe_error(error)})",
            "give a folder that you may write to, or an address with the right bucket, endpoint and keys",
        )
    finally:
        for one in made:  # innermost first; a folder that is in use by now stays
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
    if back != content:
        return problem("storage", f"run.dir {folder!r} does not return what was written", "use another place")
    return ok("storage", f"run.dir {folder!r}: a file was written, read and deleted")


def _missing_folders(folder: str) -> list[Path]:
    """Folders of a local path that do not exist yet, innermost first."""
    if "://" in folder:
        return []
    path = Path(folder).expanduser().resolve()
    return [one for one in (path, *path.parents) if not one.exists()]


def check_disk(config: Config) -> Finding | None:
    """Whether there is enough space for a run's files; checked for local disks only."""
    if "://" in config.run.dir:
        return None
    path = Path(config.run.dir).expanduser().resolve()
    place = next(one for one in (path, *path.parents) if one.is_dir())
    corpus, is_known = _corpus_bytes(config)
    need = disk_need(config, corpus)
    usage = shutil.disk_usage(place)
    share = "the corpus twice, the student's weights four times, 1 GiB for the rest"
    unknown = "" if is_known else "; the size of the corpus is unknown"
    takes = f"a run takes about {format_bytes(need)} ({share}){unknown}"
    found = f"run.dir's disk has {format_bytes(usage.free)} free; {takes}"
    remedy = "make room, or set run.dir to another disk or an object store"
    if usage.free < need:
        return problem("disk", found, remedy)
    if usage.free < 2 * need:
        return warning("disk", f"{found}: for no second one", remedy)
    return ok("disk", found)


def _corpus_bytes(config: Config) -> tuple[int, bool]:
    """Stored size of the files of corpus and test set, and whether it is known."""
    from llkd_ray.corpus.sources import expand

    total, is_known = 0, True
    for field, source in (("corpus", config.corpus), ("test", config.test)):
        for uri in () if source is None else source.uris:
            if uri.startswith("hf://"):
                is_known = False
                continue
            try:
                total += sum(unit.size for unit in expand(uri, field))
            except ConfigError:
                is_known = False  # reported by check_source
    return total, is_known


# --- runs


def check_runs(config: Config) -> Finding:
    """Whether the run's directory is free, and which runs can be resumed."""
    from llkd_ray.storage.lock import wait_until_free
    from llkd_ray.storage.run_dir import CONFIG, RunStore, join_uri

    if config.run.name is None:
        return _list_unfinished(config)
    run_dir = join_uri(config.run.dir, config.run.name)
    store = RunStore(run_dir)
    if not store.exists(CONFIG):
        return ok("runs", f"run.name {config.run.name!r} is free")
    wait_until_free(store, lambda line: None)  # raises ConfigError if a driver is active there
    if _is_finished(store):
        return problem("runs", f"run.name: {run_dir} holds a finished run", "choose another run.name")
    return problem(
        "runs",
        f"run.name: {run_dir} holds a run that is not finished",
        f"resume it: llkd resume {run_dir}; or choose another run.name",
    )


def _list_unfinished(config: Config) -> Finding:
    from llkd_ray.storage.run_dir import CONFIG, RunStore, join_uri

    names = RunStore(config.run.dir).folders("")[-RUNS_LOOKED_AT:]
    stores = ((name, RunStore(join_uri(config.run.dir, name))) for name in names)
    runs = {name: _is_finished(store) for name, store in stores if store.exists(CONFIG)}
    left = [name for name, is_finished in runs.items() if not is_finished]
    found = f"run.dir holds {len(runs)} run(s)"
    if not left:
        return ok("runs", found)
    more = ", …" if len(left) > RUNS_SHOWN else ""
    return ok(
        "runs",
        f"{found}; not finished: {', '.join(left[-RUNS_SHOWN:])}{more}; where no driver is at work, "
        f"resume it: llkd resume {join_uri(config.run.dir, left[-1])}",
    )


def _is_finished(store: RunStore) -> bool:
    """Whether the run has its report, which is written last."""
    from llkd_ray.storage.run_dir import REPORT

    return store.exists(REPORT)


GOLD_PER_LABEL = 10
"""Texts per label with which a label without any is no coincidence."""
SERVER_S = 15.0
"""Time limit for one answer."""
MODELS_SHOWN = 10


def student_check(config: Config) -> Check:
    return Check("student", partial(check_student_model, config))


def teacher_checks(config: Config) -> list[Check]:
    """Checks of each teacher, and of the labels under its tokenizer."""
    checks = []
    for name, teacher in config.teacher.members():
        field = member_field(name)
        if teacher.kind == "vllm":
            checks.append(Check(name, partial(check_model, teacher, field)))
        elif teacher.kind == "openai":
            checks.append(Check(name, partial(check_server, teacher, field)))
    return [*checks, Check("labels", partial(check_labels, config))]


# --- checkpoints


def check_student_model(config: Config) -> Finding:
    """Whether the student can be loaded and can be used as a classifier."""
    from llkd_ray.student.model import check_student, resolve_model

    model = config.student.model
    if trouble := check_hub("student", "student.model", model, None):
        return trouble
    check_student(config.student)
    return check_weights("student", "student.model", model, resolve_model(model))


def check_model(teacher: TeacherConfig, field: str) -> Finding:
    """Whether the model of a teacher that runs in our own engine is available locally or on the hub."""
    assert teacher.model is not None
    name = field.rpartition(".")[2]
    if trouble := check_hub(name, f"{field}.model", teacher.model, teacher.revision):
        return trouble
    refuse_pickles(f"{field}.model", teacher.model, teacher.model, teacher.revision, "ForCausalLM")
    load_tokenizer(teacher.model, teacher.revision, f"{field}.model")
    return check_weights(name, f"{field}.model", teacher.model, teacher.model)


def check_weights(check: str, setting: str, name: str, checkpoint: str) -> Finding:
    """Whether weights exist for a checkpoint whose other files exist."""
    size = size_on_disk(checkpoint)
    if size is not None:
        return ok(check, f"{setting} {name!r}: {format_bytes(size)} of weights are on this machine")
    if Path(checkpoint).is_dir():
        return problem(
            check,
            f"{setting}: {name!r} holds no weights (*.safetensors)",
            "save the model there, or name a whole checkpoint",
        )
    return ok(check, f"{setting} {name!r}: the hub lets us read it; the first run downloads its weights")


# --- hub


def is_hub_name(model: str) -> bool:
    """Whether a name can only refer to a model on the hub."""
    is_path = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    return model != "minilm" and not is_path


def check_hub(check: str, setting: str, model: str, revision: str | None) -> Finding | None:
    """The reason why a model on the hub cannot be used; None if it can, or if it is not a hub model.

    Checked before anything is loaded, because the libraries retry for half a minute and report few details.
    """
    from huggingface_hub import constants

    if not is_hub_name(model):
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
    return _ask_hub(check, setting, model, revision, is_cached)


def _ask_hub(check: str, setting: str, model: str, revision: str | None, is_cached: bool) -> Finding | None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    token = "HF_TOKEN is not set here; set it to" if get_token() is None else "replace the HF_TOKEN here by"
    try:
        HfApi().model_info(model, revision=revision, timeout=HUB_S)
        HfApi().auth_check(model)  # a gated model can be seen without access
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
    except Exception as error:  # the hub's HTTP library varies by version
        found = f"{setting}: the hub does not answer ({describe_error(error, 120)})"
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
    """Whether an OpenAI-protocol server answers, accepts our key and serves the model; sends no text."""
    import httpx

    from llkd_ray.teacher.base import TeacherDown
    from llkd_ray.teacher.openai.client import api_key

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
        reason = describe_error(error).replace(key, "***") if key else describe_error(error)
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
    """The model names in a reply of the models endpoint; empty if it has none."""
    try:
        listed = json.loads(content)["data"]
        return [str(one["id"]) for one in listed]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


# --- labels


def check_labels(config: Config) -> Finding | None:
    """Whether each teacher's tokenizer distinguishes the labels, and the other checks made before a run."""
    from llkd_ray.teacher.factory import check_teacher, self_contained

    for name, teacher in config.teacher.members():
        if teacher.kind == "vllm" and teacher.model is not None:
            if check_hub(name, "", teacher.model, teacher.revision):
                return None  # reported by the teacher's check
            try:
                check_model(teacher, member_field(name))
            except ConfigError:
                return None  # reported by the teacher's check
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
