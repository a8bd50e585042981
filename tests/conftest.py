"""Fixtures that several test files use; what they are made of is in toys.py."""

from __future__ import annotations

import os

# Before anything imports transformers: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings
from toys import save_tiny_classifier, save_tiny_encoder, save_tiny_llm

# Machines are shared: how long an example takes says nothing of the code.
# The same examples each time, or a test run would be a lottery; `make fuzz` looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None, derandomize=False)
settings.load_profile("same")


STARTS_RAY = {"local_ray", "own_cluster_env"}
"""Fixtures of tests that start Ray, or programs that do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist: tests that start Ray share a process, as do those of one file.

    Two Rays at once would take the cores from each other, and each of them takes seconds to start.
    """
    for item in items:
        starts_ray = STARTS_RAY & set(getattr(item, "fixturenames", ())) or "tests/cluster" in item.nodeid
        item.add_marker(pytest.mark.xdist_group("ray" if starts_ray else item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer Llama (float32) with a BPE tokenizer."""
    return save_tiny_llm(tmp_path_factory.mktemp("tiny-llm"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer BERT (float32) with a WordPiece tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> str:
    """Folder of the tiny encoder with a random head for three labels."""
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny-classifier"), tiny_encoder)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all tests that run in this process; nobody else's is touched."""
    import ray

    folder = tempfile.mkdtemp(prefix="llkd-")  # Ray's sockets need a short path
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, _temp_dir=folder
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
