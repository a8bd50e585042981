"""What doctor says of models: in folders, on a hub and behind servers that are real, on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from toys import make_config

from llkd_ray.config.base import ConfigError
from llkd_ray.doctor.findings import carry_out
from llkd_ray.doctor.inputs import (
    _served,
    check_labels,
    check_model,
    check_server,
    check_the_student,
    is_on_the_hub,
    student_check,
    teacher_checks,
)


@dataclass
class Web:
    """A server for GET; ``said`` is what it answers by path: status, headers, JSON."""

    said: dict[str, tuple[int, dict[str, str], object]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    @contextmanager
    def running(self) -> Iterator[Web]:
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.path, dict(self.headers)))
                status, headers, content = web.said.get(self.path, (404, {}, {"error": "not here"}))
                body = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web().running() as running:
        yield running


@pytest.fixture
def hub(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Web:
    """A hub that can be reached, as transformers' libraries are told by HF_ENDPOINT."""
    monkeypatch.setattr(constants, "ENDPOINT", web.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return web


def student(model: str):
    return check_the_student(make_config(student={"model": model}))


# --- folders


def test_a_student_that_is_here(tiny_encoder):
    finding = student(tiny_encoder)
    assert finding.state == "ok"
    assert "of weights are on this machine" in finding.found


def test_a_student_without_weights(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    finding = student(str(tmp_path / "model"))
    assert finding.state == "problem"
    assert "holds no weights" in finding.found


def test_a_student_that_cannot_classify(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "vits"}))
    (finding,) = carry_out([student_check(make_config(student={"model": str(tmp_path / "model")}))])
    assert finding.state == "problem"
    assert "cannot make a sequence classifier" in finding.found


def test_a_teacher_that_is_here_and_one_that_is_not(tiny_llm, tmp_path):
    here = make_config(teacher={"kind": "vllm", "model": tiny_llm}).teacher
    assert check_model(here, "teacher").state == "ok"
    gone = make_config(teacher={"kind": "vllm", "model": str(tmp_path / "gone")}).teacher
    with pytest.raises(ConfigError, match=r"teacher\.model: no tokenizer can be loaded"):
        check_model(gone, "teacher")


# --- the hub


@pytest.mark.parametrize(
    ("model", "is_name"),
    [
        ("roberta-base", True),
        ("org/model", True),
        ("minilm", False),
        ("/models/mine", False),
        ("./mine", False),
        ("a/b/c", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(model, is_name):
    assert is_on_the_hub(model) == is_name


def test_nothing_in_the_cache_and_no_network_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    finding = student("org/model")
    assert finding.state == "problem"
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in finding.found


def test_a_gated_model(hub):
    hub.said["/api/models/org/model"] = (200, {}, {"id": "org/model", "gated": "manual"})
    hub.said["/api/models/org/model/auth-check"] = (403, {"X-Error-Code": "GatedRepo"}, {})
    finding = student("org/model")
    assert finding.state == "problem"
    assert "who has not been granted access" in finding.found
    assert "HF_TOKEN is not set here" in finding.remedy


def test_a_token_that_may_not_is_told_from_none(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.said["/api/models/org/model"] = (403, {"X-Error-Code": "GatedRepo"}, {})
    finding = student("org/model")
    assert "replace the HF_TOKEN here" in finding.remedy
    assert "hf_secret" not in finding.found + finding.remedy
    assert any(headers.get("authorization") == "Bearer hf_secret" for _, headers in lower(hub.asked))


def lower(asked):
    return [(path, {name.lower(): value for name, value in headers.items()}) for path, headers in asked]


def test_a_name_that_the_hub_does_not_know(hub):
    hub.said["/api/models/org/model"] = (404, {"X-Error-Code": "RepoNotFound"}, {})
    finding = student("org/model")
    assert (finding.state, "correct the name" in finding.remedy) == ("problem", True)


def test_a_revision_that_the_hub_does_not_know(hub):
    hub.said["/api/models/org/model/revision/v9"] = (404, {"X-Error-Code": "RevisionNotFound"}, {})
    teacher = make_config(teacher={"kind": "vllm", "model": "org/model", "revision": "v9"}).teacher
    assert "has no revision 'v9'" in check_model(teacher, "teacher").found


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = student("org/model")
    assert finding.state == "problem"
    assert "the hub does not answer" in finding.found
    assert "HF_ENDPOINT" in finding.remedy


def test_a_hub_that_does_not_answer_where_the_cache_does(hub, monkeypatch, tmp_path, tiny_encoder):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    model = tmp_path / "cache/models--org--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    shutil.copytree(tiny_encoder, model / "snapshots" / commit)
    finding = student("org/model")
    assert finding.state == "warning"
    assert "set HF_HUB_OFFLINE=1" in finding.remedy


# --- servers


def ask_server(web: Web, model: str = "served", base: str = "/v1"):
    server = {"base_url": web.address + base, "api_key_env": "MY_KEY"}
    teacher = make_config(teacher={"kind": "openai", "model": model, "server": server}).teacher
    return check_server(teacher, "teacher")


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)


MODELS = (200, {}, {"object": "list", "data": [{"id": "served"}, {"id": "other"}]})


@pytest.mark.usefixtures("no_key")
class TestServer:
    def test_it_serves_the_model(self, web):
        web.said["/v1/models"] = MODELS
        finding = ask_server(web)
        assert finding.state == "ok"
        assert "MY_KEY is not set here" in finding.found
        assert [path for path, _ in web.asked] == ["/v1/models"], "no text is asked"

    def test_it_serves_others(self, web):
        web.said["/v1/models"] = MODELS
        finding = ask_server(web, "server")
        assert finding.state == "problem"
        assert "does not list the model 'server'; it lists 'served', 'other'" in finding.found
        assert finding.remedy == "correct teacher.model"

    def test_it_asks_for_a_key(self, web):
        web.said["/v1/models"] = (401, {}, {"error": "no key"})
        finding = ask_server(web)
        assert finding.state == "problem"
        assert "HTTP 401, and MY_KEY is not set here" in finding.found

    def test_the_key_is_sent_and_not_shown(self, web, monkeypatch):
        monkeypatch.setenv("MY_KEY", "sk-secret")
        web.said["/v1/models"] = (403, {}, {"error": "sk-secret may not"})
        finding = ask_server(web)
        assert "MY_KEY is set here" in finding.found
        assert "sk-secret" not in finding.found + finding.remedy
        assert lower(web.asked)[0][1]["authorization"] == "Bearer sk-secret"

    def test_a_key_that_cannot_be_sent(self, web, monkeypatch):
        monkeypatch.setenv("MY_KEY", "sk-\u00e9")
        finding = ask_server(web)
        assert (finding.state, web.asked) == ("problem", [])
        assert "sk-" not in finding.found

    def test_an_address_that_goes_not_far_enough(self, web):
        web.said["/v1/models"] = MODELS
        finding = ask_server(web, base="")
        assert finding.state == "warning"
        assert "up to and with the version" in finding.remedy

    def test_nobody_is_there(self):
        finding = ask_server(Web(address="http://127.0.0.1:9"))
        assert finding.state == "problem"
        assert "does not answer" in finding.found


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"data": 3}', b'{"data": [{}]}', b"\xff"])
def test_what_is_no_list_of_models_holds_none(content):
    assert _served(content) == []


# --- labels


@pytest.fixture
def lower_case_llm(tiny_llm: str, tmp_path: Path) -> str:
    """A teacher whose tokenizer does not see case."""
    folder = tmp_path / "lower"
    shutil.copytree(tiny_llm, folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    return str(folder)


def with_labels(model: str, *names: str):
    teacher = {"kind": "vllm", "model": model, "prompt": {"answer": "names"}}
    return make_config(teacher=teacher, labels={"names": list(names)})


def test_labels_that_this_tokenizer_cannot_tell_apart(lower_case_llm, tiny_llm):
    assert check_labels(with_labels(tiny_llm, "Sea", "sea")).state == "ok"
    (_, finding) = carry_out(teacher_checks(with_labels(lower_case_llm, "Sea", "sea")))
    assert (finding.check, finding.state) == ("labels", "problem")
    assert "'Sea' and 'sea' are the same tokens for this teacher" in finding.found


def test_labels_of_a_teacher_that_is_not_there_are_not_judged(tmp_path):
    (finding,) = carry_out(teacher_checks(with_labels(str(tmp_path / "gone"), "Sea", "sea")))
    assert (finding.check, finding.state) == ("teacher", "problem")


def test_both_teachers_of_a_cascade_are_looked_at(web, tiny_llm):
    web.said["/v1/models"] = MODELS
    small = {"kind": "vllm", "model": tiny_llm}
    large = {"kind": "openai", "model": "nobody", "server": {"base_url": web.address + "/v1"}}
    cascade = {"kind": "cascade", "recorded": None, "cascade": {"small": small, "large": large}}
    findings = list(carry_out(teacher_checks(make_config(teacher=cascade))))
    assert [(one.check, one.state) for one in findings] == [
        ("small", "ok"),
        ("large", "problem"),
        ("labels", "ok"),
    ]
    assert findings[1].remedy == "correct teacher.cascade.large.model"
