"""Every setting that may hold a local path is made absolute; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import make_config

from llkd_ray.config.base import with_absolute_paths
from llkd_ray.config.loading import resolve
from llkd_ray.config.schema import Config


def test_every_path_of_a_config_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    draw = {"uri": "shots.csv"}
    small = {"model": "model", "cache": "cache", "prompt": {"template": "prompt.j2", "draw": draw}}
    large = {
        "kind": "openai",
        "model": "owner/name",
        "prompt": {"template": "{{ text }}"},
        "server": {"base_url": "http://host/v1", "tokenizer": "model"},
    }
    corpus, cascade = {"uri": ["a.csv", "hf://owner/data"]}, {"small": small, "large": large}
    teacher = {"kind": "cascade", "cascade": cascade}
    config = with_absolute_paths(make_config(corpus=corpus, teacher=teacher, student={"model": "model"}))
    here = str(tmp_path)
    assert config.corpus.uri == (f"{here}/a.csv", "hf://owner/data")
    assert config.test is not None
    assert config.test.uri == f"{here}/test.parquet"
    assert (config.student.model, config.run.dir) == (f"{here}/model", f"{here}/runs")
    assert config.teacher.recorded is not None
    assert config.teacher.recorded.uri == f"{here}/answers.parquet"
    (_, first), (_, second) = config.teacher.members()
    assert (first.model, first.cache) == (f"{here}/model", f"{here}/cache")
    assert first.prompt.template == f"{here}/prompt.j2"
    assert first.prompt.draw is not None
    assert first.prompt.draw.uri == f"{here}/shots.csv"
    assert (second.model, second.cache, second.prompt.template) == ("owner/name", "auto", "{{ text }}")
    assert second.server is not None
    assert second.server.tokenizer == f"{here}/model"
    assert with_absolute_paths(config) == config
    remote = make_config(run={"dir": "s3://bucket/a"}, student={"model": "owner/name"})
    again = with_absolute_paths(remote)
    assert (again.run.dir, again.student.model) == ("s3://bucket/a", "owner/name")


@pytest.mark.parametrize("overrides", [{}, {"budget.rounds": 3}])
def test_settings_are_checked_once(monkeypatch, overrides):
    config, calls, plain = make_config(), [], Config.model_validate
    monkeypatch.setattr(Config, "model_validate", lambda tree: calls.append(tree) or plain(tree))
    assert resolve(Config, config, overrides).budget.rounds == (3 if overrides else 4)
    assert len(calls) == len(overrides)
