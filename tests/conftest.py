"""Fixtures that several test files use; what they are made of is in toys.py."""

from __future__ import annotations

import os

# Before anything imports transformers: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from toys import save_tiny_classifier, save_tiny_encoder, save_tiny_llm

# Machines are shared: how long an example takes says nothing of the code.
# The same examples each time, or a test run would be a lottery; `make fuzz` looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None, derandomize=False)
settings.load_profile("same")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist: files that start Ray share one process; every other file has one for itself.

    Two Rays at once would take the cores from each other. (Marks of ``xdist_group`` would say the same, but
    xdist 3.8 does not see them with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneRayAtATime(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if starts_ray(config.rootpath / file) else file

    return OneRayAtATime(config, log)


@functools.cache
def starts_ray(file: Path) -> bool:
    """Whether it is a test of clusters, or mentions the fixture ``local_ray``."""
    return "cluster" in file.parts or "local_ray" in file.read_text(encoding="utf-8")


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
