"""The functions that notebooks call: light to import, the same settings in every form, typed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys import config_tree, make_config

import llkd_ray
from llkd_ray import api
from llkd_ray.config.base import ConfigError
from llkd_ray.run import loop


def test_importing_the_package_imports_neither_ray_nor_torch():
    program = (
        "import sys, llkd_ray, llkd_ray.config.schema\n"
        "assert not {'ray', 'torch', 'transformers', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
        "assert 'distill' in dir(llkd_ray)\n"
        "assert callable(llkd_ray.predict) and 'ray' in sys.modules\n"
        "import llkd_ray.prediction.job, llkd_ray.comparison.job\n"
        "assert callable(llkd_ray.predict) and callable(llkd_ray.compare)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_no_module_hides_a_function_and_unknown_names_are_refused():
    """A module of the name would take the function's place in the package once it is imported."""
    folder = Path(llkd_ray.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(llkd_ray.__all__)
    assert (folder / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        llkd_ray.train  # noqa: B018


@pytest.fixture
def started(monkeypatch) -> list:
    """Instead of a run: the config that it would have had."""
    configs: list = []

    def start(config, display):
        configs.append(config)
        raise ConfigError("stop here")

    monkeypatch.setattr(loop, "start_run", start)
    return configs


@pytest.mark.parametrize(
    "overrides", [{"budget.rounds": 4, "run.name": "x=y"}, ["budget.rounds=4", "run.name=x=y"]]
)
@pytest.mark.parametrize("form", ["config", "tree", "path"])
def test_settings_in_every_form(started, tmp_path, form, overrides):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree()))
    config = {"config": make_config(), "tree": config_tree(), "path": path}[form]
    with pytest.raises(ConfigError, match="stop here"):
        llkd_ray.distill(config, overrides)
    (checked,) = started
    assert checked.budget.rounds == 4
    assert checked.run.name == "x=y"
    assert Path(checked.corpus.uris[0]).is_absolute()


def test_a_mistake_names_its_field():
    with pytest.raises(ConfigError, match=r"budget\.rounds"):
        llkd_ray.distill(config_tree(), {"budget.rounds": 0})
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        llkd_ray.resume("no-such-run")
    with pytest.raises(ConfigError, match="no folder is given"):
        llkd_ray.compare({"base": "run.yaml", "teachers": {"t": {}}, "lines": {"l": {}}, "sizes": [0.5]})


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_predictions_come_as_a_table(local_ray, tiny_classifier, tmp_path):
    (tmp_path / "corpus.txt").write_text("a whale at the shore\nbread and butter\n")
    settings = {"model": tiny_classifier, "corpus": {"uri": str(tmp_path / "corpus.txt")}}
    result = llkd_ray.predict(settings, {"out": str(tmp_path / "out")})
    assert isinstance(result, api.Predicted)
    assert result.summary["predicted"] == result.table().num_rows == 2
    assert result.thresholds is None
    assert Path(result.predictions).is_dir()
