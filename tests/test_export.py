"""Models for use elsewhere: the command export, on checkpoints that were made here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import FakeHub, serving
from huggingface_hub import constants

from llkd_ray import export
from llkd_ray.cli.main import main
from llkd_ray.config.base import ConfigError
from llkd_ray.storage.checkpoints import inspect
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.student.inference import load

TOKEN = "not-a-real-token"


@pytest.fixture
def checkpoint(tiny_classifier, tmp_path) -> Path:
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_classifier, folder)
    return folder


# --- ONNX


@pytest.fixture
def with_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra onnx is not installed")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("with_onnx")
def test_an_onnx_file_answers_as_torch_does_whatever_the_shape(checkpoint, capfd):
    import onnxruntime

    assert main(["export", str(checkpoint), "--onnx"]) == 0
    assert "within 0.0001 of torch" in capfd.readouterr().out
    file = checkpoint / "onnx" / "model.onnx"
    student = load(inspect(str(checkpoint)), "float32", torch.device("cpu"))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for texts in (["a whale"], ["a", "the oven and the pan in the old kitchen"], ["tide"] * 9):
        inputs = student.pad(student.encode(texts, 32))
        with torch.inference_mode():
            expected = student.module(**inputs).logits.numpy()
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
    found = export.differences(student, 32, file)
    assert len({(one.texts, one.tokens) for one in found}) > 4
    assert max(one.largest for one in found) < 1e-4


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("with_onnx")
@pytest.mark.parametrize("largest", [2e-4, float("nan")])
@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_left(checkpoint, monkeypatch, largest):
    found = [export.Difference(1, 3, 1e-7), export.Difference(4, 32, largest)]
    monkeypatch.setattr(export, "differences", lambda *arguments: found)
    student = load(inspect(str(checkpoint)), "float32", torch.device("cpu"))
    with pytest.raises(ConfigError, match="4 texts of 32 tokens differ from torch by"):
        export.export_onnx(student, 32, RunStore(str(checkpoint)))
    assert not (checkpoint / "onnx").exists()


def test_a_missing_extra_is_named(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--onnx: onnx is not installed: pip install 'llkd-ray\[onnx\]'"):
        export._require_extra()


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that takes our token."""
    with serving(FakeHub(TOKEN)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_the_folder_is_on_the_hub(hub, checkpoint, capfd):
    (checkpoint / "README.md").write_text("---\ntags: [x]\n---\n# A card\n")
    (checkpoint / "model.safetensors.0af.tmp").write_text("left by a killed writer")
    assert main(["export", str(checkpoint), "--push-to-hub", "ann/toys", "--private"]) == 0
    assert f"hub: {hub.url}/ann/toys" in capfd.readouterr().out
    assert hub.repos == {"ann/toys": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert not any(name.endswith(".tmp") for name in hub.files)
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert "llkd-ray" in hub.messages[0]


@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        ("", "ann/toys", "--push-to-hub: there is no token for the hub: run `hf auth login`"),
        ("wrong", "ann/toys", "'ann/toys' cannot be written (401"),
        (TOKEN, "ann/to ys", "'ann/to ys' cannot be written"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, checkpoint, capfd, monkeypatch, token, name, says):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["export", str(checkpoint), "--push-to-hub", name]) == 2
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert says in line.replace("Client error '401", "401")
    assert "Traceback" not in said.err
    assert TOKEN not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["{tmp}/nothing"], "does not exist"), (["{tmp}/classifier", "--private"], "needs --push-to-hub")],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capfd, arguments, says):
    assert main(["export", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    assert says in capfd.readouterr().err
