"""What doctor says of corpus, test set, run directory, models, the hub and servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Reply, serving
from huggingface_hub import constants
from toys import make_config, toy_texts, with_trap, write_corpus

from llkd_ray.config.base import ConfigError
from llkd_ray.doctor.findings import Finding, describe, run_checks
from llkd_ray.doctor.inputs import (
    _served,
    check_disk,
    check_labels,
    check_model,
    check_runs,
    check_server,
    check_storage,
    check_student_model,
    data_checks,
    is_hub_name,
    storage_checks,
    student_check,
    teacher_checks,
)
from llkd_ray.storage import lock
from llkd_ray.storage.checkpoints import refuse_pickles
from llkd_ray.storage.lock import hold_lock
from llkd_ray.storage.run_dir import CONFIG, REPORT, RunStore
from llkd_ray.teacher.factory import check_teacher


def told(finding: Finding | None, state: str, *words: str) -> None:
    """It is of this state, and its line holds the words."""
    assert finding is not None
    assert finding.state == state, finding
    assert [word for word in words if word not in describe(finding)] == [], finding


# --- corpus and test set


def check_data(tmp_path: Path, **sections) -> dict[str, Finding]:
    settings = {
        "corpus": {"uri": str(write_corpus(tmp_path / "pool.parquet", 300, seed=1))},
        "test": {"uri": str(write_corpus(tmp_path / "test.parquet", 60, seed=2))},
    }
    for name, section in sections.items():
        settings[name] = section if section is None else {**settings[name], **section}
    return {one.check: one for one in run_checks(data_checks(make_config(**settings)))}


def test_sources_that_are_sound(tmp_path):
    found = check_data(tmp_path)
    told(found["corpus"], "ok", "300 rows in 1 part(s)", "gold is known of 200 of 200")
    told(found["test"], "ok")
    assert list(check_data(tmp_path, test=None)) == ["corpus"]


def test_a_source_that_cannot_be_read(tmp_path):
    found = check_data(tmp_path, corpus={"text": "body"}, test={"uri": str(tmp_path / "gold-*.csv")})
    columns = "its columns are id, text, label"
    told(found["corpus"], "problem", "corpus.text: there is no column 'body'", columns)
    told(found["test"], "problem", "test.uri")


@pytest.mark.parametrize(
    ("labels", "state", "words"),
    [
        (
            ["sea", "mountain"],
            "problem",
            "50 of 100 values of column 'label' match no label",
        ),
        (["mountain", "mountain"], "problem", ""),
        ([None, None], "warning", "gold is known of 0 of 100"),
    ],
)
def test_gold_that_does_not_fit(tmp_path, labels, state, words):
    texts, _ = toy_texts(100, 3, seed=3)
    rows = {"id": list(map(str, range(100))), "text": texts, "label": pa.array(labels * 50, pa.string())}
    pq.write_table(pa.table(rows), tmp_path / "odd.parquet")
    told(check_data(tmp_path, corpus={"uri": str(tmp_path / "odd.parquet")})["corpus"], state, words)


def test_a_test_set_that_is_the_pool(tmp_path):
    same = {"uri": str(tmp_path / "pool.parquet")}
    told(check_data(tmp_path, test=same)["test"], "problem", "test.uri is corpus.uri", "test.where")
    assert check_data(tmp_path, test=same | {"where": {"label": "sea"}})["test"].state != "problem"


def test_a_test_set_without_some_labels(tmp_path):
    rows = pq.read_table(write_corpus(tmp_path / "all.parquet", 200, seed=2))
    is_sea = pa.array([label == "sea" for label in rows["label"].to_pylist()])
    pq.write_table(rows.filter(is_sea), tmp_path / "sea.parquet")
    found = check_data(tmp_path, test={"uri": str(tmp_path / "sea.parquet")})["test"]
    told(found, "warning", "of those, none is kitchen, garden")


# --- the run directory


def test_nothing_is_left_behind_and_what_was_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/kept").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert check_storage(str(tmp_path / "there")).state == "ok"
    assert check_storage(str(tmp_path / "new/deep/runs")).state == "ok"
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    finding = check_storage(str(tmp_path / "file/runs"))  # as root sees a missing right, too
    told(finding, "problem", f"run.dir {str(tmp_path / 'file/runs')!r} cannot be used", "to do")
    assert "Cannot delete" not in finding.found, "why it was not written is what matters"
    told(check_storage("nofs://bucket/runs"), "problem")


def test_a_disk_that_is_too_small(tmp_path):
    """For a sparse file: it takes nothing, but a run's copies of it would."""
    pool = tmp_path / "pool.txt"
    with pool.open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free)
    run = {"dir": str(tmp_path / "not/there/yet")}
    large = make_config(corpus={"uri": str(pool), "gold": None, "id": None}, test=None, run=run)
    assert check_disk(large).state == "problem"
    pool.write_text("small")
    assert check_disk(large).state != "problem"
    unknown = make_config(corpus={"uri": "hf://org/data"}, test=None, run={"dir": str(tmp_path)})
    assert "the size of the corpus is unknown" in check_disk(unknown).found
    assert check_disk(make_config(run={"dir": "s3://bucket/runs"})) is None


def of_run(tmp_path: Path, name: str | None = "run"):
    return check_runs(make_config(run={"dir": str(tmp_path), "name": name}))


def begin(tmp_path: Path, name: str = "run", finished: bool = False) -> RunStore:
    store = RunStore(str(tmp_path / name))
    store.write_bytes(CONFIG, b"{}")
    if finished:
        store.write_bytes(REPORT, b"")
    return store


def test_a_runs_name_is_free_unfinished_or_taken(tmp_path):
    told(of_run(tmp_path), "ok")
    begin(tmp_path)
    told(of_run(tmp_path), "problem", "is not finished", f"llkd resume {tmp_path / 'run'}")
    begin(tmp_path, finished=True)
    told(of_run(tmp_path), "problem", "; to do: choose another run.name")


def test_a_driver_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "TAKEOVER_S", 5.0)
    config = make_config(run={"dir": str(tmp_path), "name": "run"})
    with hold_lock(begin(tmp_path)):
        (finding,) = [one for one in run_checks(storage_checks(config)) if one.check == "runs"]
    told(finding, "problem", "another driver is at work on this run")
    told(of_run(tmp_path), "problem", "is not finished")  # once it has gone


def test_unfinished_runs_are_named(tmp_path):
    assert of_run(tmp_path / "not/there", None).found == "run.dir holds 0 run(s)"
    begin(tmp_path, "a", finished=True)
    (tmp_path / "teacher-cache").mkdir()
    assert of_run(tmp_path, None).found == "run.dir holds 1 run(s)"
    begin(tmp_path, "b")
    told(of_run(tmp_path, None), "ok", "not finished: b", f"llkd resume {tmp_path / 'b'}")


# --- checkpoints


def student(model: str) -> Finding:
    return check_student_model(make_config(student={"model": model}))


def teacher(model: str, **more):
    return make_config(teacher={"kind": "vllm", "model": model, **more}).teacher


def test_checkpoints_that_are_here(tiny_encoder, tiny_llm):
    for finding in (student(tiny_encoder), check_model(teacher(tiny_llm), "teacher")):
        told(finding, "ok", "of weights are on this machine")


def test_checkpoints_that_cannot_be_used(tiny_encoder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    told(student(str(folder)), "problem", "holds no weights")
    (folder / "training_args.bin").write_bytes(b"")  # no weights
    told(student(str(folder)), "problem", "holds no weights")
    (folder / "config.json").write_text(json.dumps({"model_type": "vits"}))
    (finding,) = run_checks([student_check(make_config(student={"model": str(folder)}))])
    told(finding, "problem", "cannot make a sequence classifier")
    with pytest.raises(ConfigError, match=r"teacher\.model: there is no folder '.*gone'"):
        check_model(teacher(str(tmp_path / "gone")), "teacher")


def test_pickled_weights_are_refused_here_and_on_the_hub(hub, tiny_llm, tmp_path):
    config = make_config(
        teacher={"kind": "vllm", "model": with_trap(tiny_llm, tmp_path / "bin", tmp_path / "it ran")}
    )
    refused = (
        r"^teacher\.model: '.*bin' has its weights only as a pickle.*AutoModelForCausalLM\.from_pretrained"
    )
    for check in (lambda: check_model(config.teacher, "teacher"), lambda: check_teacher(config)):
        with pytest.raises(ConfigError, match=refused):
            check()
    assert check_labels(config) is None, "said once"
    assert not (tmp_path / "it ran").exists()
    files = [
        {"rfilename": name}
        for name in ("config.json", "pytorch_model-00001-of-00002.bin", "training_args.bin")
    ]
    hub.said[MODEL] = (200, {}, {"id": "org/model", "siblings": files})
    with pytest.raises(ConfigError, match=r"a pickle \(pytorch_model-00001-of-00002\.bin\)"):
        refuse_pickles("student.model", "org/model", "org/model")
    files.append({"rfilename": "model.safetensors"})
    refuse_pickles("student.model", "org/model", "org/model")
    refuse_pickles("student.model", "org/other", "org/other")  # the hub knows none: others say so


# --- the hub


@dataclass
class Web:
    """A server for GET; ``said`` is what it answers by path: status, headers, JSON."""

    said: dict[str, Reply] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Paths and headers."""
    url: str = ""

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        self.asked.append((path, headers))
        return self.said.get(path, (404, {}, {"error": "not here"}))


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(Web()) as running:
        yield running


@pytest.fixture
def hub(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Web:
    """A hub that can be reached, as transformers' libraries are told by HF_ENDPOINT."""
    monkeypatch.setattr(constants, "ENDPOINT", web.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return web


def test_names_of_the_hub_are_told_from_paths():
    names = ["roberta-base", "org/model", "minilm", "/models/mine", "./mine", "a/b/c"]
    assert [name for name in names if is_hub_name(name)] == ["roberta-base", "org/model"]


MODEL = "/api/models/org/model"


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        (f"{MODEL}/auth-check", 403, "GatedRepo", ("who has not been granted access", "HF_TOKEN is not set")),
        (MODEL, 404, "RepoNotFound", ("shows us no 'org/model'", "correct the name")),
        (f"{MODEL}/revision/v9", 404, "RevisionNotFound", ("has no revision 'v9'",)),
    ],
)
def test_a_model_that_the_hub_refuses(hub, path, status, code, words):
    hub.said[MODEL] = (200, {}, {"id": "org/model", "gated": "manual"})
    hub.said[path] = (status, {"X-Error-Code": code}, {})
    of_teacher = check_model(teacher("org/model", revision="v9"), "teacher") if "v9" in path else None
    told(of_teacher or student("org/model"), "problem", *words)


def test_a_token_that_may_not_is_told_from_none(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.said[MODEL] = (403, {"X-Error-Code": "GatedRepo"}, {})
    finding = student("org/model")
    assert "replace the HF_TOKEN here" in finding.remedy
    assert "hf_secret" not in finding.found + finding.remedy
    assert any(headers.get("authorization") == "Bearer hf_secret" for _, headers in hub.asked)


def test_a_hub_that_cannot_be_asked(hub, monkeypatch, tmp_path, tiny_encoder):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told(student("org/model"), "problem", "HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told(student("org/model"), "problem", "not in the hub's cache, and HF_HUB_OFFLINE is set")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model, commit = tmp_path / "cache/models--org--model", "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    shutil.copytree(tiny_encoder, model / "snapshots" / commit)
    told(student("org/model"), "warning", "set HF_HUB_OFFLINE=1")


# --- servers


def ask_server(web: Web, model: str = "served", base: str = "/v1") -> Finding:
    server = {"base_url": web.url + base, "api_key_env": "MY_KEY"}
    config = make_config(teacher={"kind": "openai", "model": model, "server": server})
    return check_server(config.teacher, "teacher")


MODELS = (200, {}, {"object": "list", "data": [{"id": "served"}, {"id": "other"}]})


@pytest.mark.parametrize(
    ("asked", "said", "state", "words"),
    [
        ({}, MODELS, "ok", "MY_KEY is not set here"),
        ({"model": "server"}, MODELS, "problem", "it lists 'served', 'other'; to do: correct teacher.model"),
        ({}, (401, {}, {"error": "no key"}), "problem", "HTTP 401, and MY_KEY is not set here"),
        ({"base": ""}, MODELS, "warning", "up to and with the version"),
    ],
)
def test_a_server_is_asked_for_its_models(web, monkeypatch, asked, said, state, words):
    monkeypatch.delenv("MY_KEY", raising=False)
    web.said["/v1/models"] = said
    told(ask_server(web, **asked), state, words)
    assert [path for path, _ in web.asked] == [asked.get("base", "/v1") + "/models"], "no text is asked"


def test_the_key_is_sent_and_not_shown(web, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    web.said["/v1/models"] = (403, {}, {"error": "sk-secret may not"})
    finding = ask_server(web)
    told(finding, "problem", "answers HTTP 403, and MY_KEY is set here")
    assert "sk-secret" not in finding.found + finding.remedy
    assert web.asked.pop()[1]["authorization"] == "Bearer sk-secret"
    monkeypatch.setenv("MY_KEY", "sk-\u00e9")  # which no header can hold
    finding = ask_server(web)
    told(finding, "problem")
    assert (web.asked, "sk-" in finding.found) == ([], False)
    monkeypatch.delenv("MY_KEY")
    told(ask_server(Web(url="http://127.0.0.1:9")), "problem", "does not answer")


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"data": 3}', b'{"data": [{}]}', b"\xff"])
def test_what_is_no_list_of_models_holds_none(content):
    assert _served(content) == []


# --- labels


def test_labels_that_this_tokenizer_cannot_tell_apart(tiny_llm, tmp_path):
    def sea_twice(model: str):
        section = {"kind": "vllm", "model": model, "prompt": {"answer": "names"}}
        return make_config(teacher=section, labels={"names": ["Sea", "sea"]})

    told(check_labels(sea_twice(tiny_llm)), "ok")
    file = shutil.copytree(tiny_llm, tmp_path / "lower") / "tokenizer.json"  # does not see case
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    (_, finding) = run_checks(teacher_checks(sea_twice(str(tmp_path / "lower"))))
    told(finding, "problem", "labels: ", "'Sea' and 'sea' are the same tokens for this teacher", "rename it")
    # Without a teacher there is nothing to judge them by.
    (finding,) = run_checks(teacher_checks(sea_twice(str(tmp_path / "gone"))))
    told(finding, "problem", "teacher: ")


def test_both_teachers_of_a_cascade_are_checked(web, tiny_llm):
    web.said["/v1/models"] = MODELS
    small = {"kind": "vllm", "model": tiny_llm}
    large = {"kind": "openai", "model": "nobody", "server": {"base_url": web.url + "/v1"}}
    cascade = {"kind": "cascade", "recorded": None, "cascade": {"small": small, "large": large}}
    findings = list(run_checks(teacher_checks(make_config(teacher=cascade))))
    assert [(one.check, one.state) for one in findings] == [
        ("small", "ok"), ("large", "problem"), ("labels", "ok"),
    ]  # fmt: skip
    assert findings[1].remedy == "correct teacher.cascade.large.model"
