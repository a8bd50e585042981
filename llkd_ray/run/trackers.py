"""Logs a run's metrics to TensorBoard, MLflow or Weights & Biases, as listed in ``run.trackers``.

The packages are optional and are imported only when a tracker is used. All logged values are also in the run
directory, so a tracker that fails is disabled with a message and never ends a run.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.storage.run_dir import RunStore

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""Trackers and the modules that they need."""
INSTALL = {"tensorboard": "tensorboardX", "mlflow": "mlflow-skinny", "wandb": "wandb"}
PROJECT = "llkd-ray"
"""Name of the MLflow experiment or W&B project."""
TENSORBOARD_DIR = "tensorboard"
IDS = "trackers.json"
"""File with the trackers' ids of the run, so that a resumed run continues the same entries."""
LONGEST_PARAMETER = 250
"""Maximum characters of a setting's value; MLflow's stores accept up to 500, older versions 250."""
Say = Callable[[str], None]


class Tracker(Protocol):
    """A backend that receives a run's metrics."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...
    def close(self, succeeded: bool) -> None: ...


class Trackers:
    """Context manager for all trackers of a run; forwards each call to every tracker."""

    def __init__(self, config: Config, store: RunStore, say: Say) -> None:
        self.config, self.store, self.say = config, store, say
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        ids = self.store.read_json(IDS) if self.store.exists(IDS) else {}
        known = dict(ids)
        for name in self.config.run.trackers:
            self._try(name, lambda name=name: self._begin(name, ids))  # type: ignore[misc]
        if ids != known:
            self.store.write_json(IDS, ids)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.close(kind is None))  # type: ignore[misc]

    def log_round(self, line: Mapping[str, Any]) -> None:
        """Log the metrics of a finished round."""
        self._log(int(line["round"]), numbers_of(line))

    def log_summary(self, summary: Mapping[str, Any], last: int) -> None:
        """Log the final figures of a finished run."""
        parts = {part: summary.get(part) or {} for part in ("student", "teacher")}
        kept = {
            f"final/{part}/{key}": value
            for part, figures in parts.items()
            for key, value in figures.items()
            if _is_number(value)
        }
        costs = [one["cost"] for one in summary["usage"].values()]
        self._log(last, kept | {"final/seconds": summary["seconds"], "final/cost": float(sum(costs))})

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, figures))  # type: ignore[misc]

    def _begin(self, name: str, ids: dict[str, str]) -> None:
        run_name = self.store.root.rpartition("/")[2]
        settings = dict(flat(self.config.model_dump(mode="json")))
        if name == "tensorboard":
            self._open[name] = TensorBoard(self.store)
        elif name == "mlflow":
            self._open[name] = Mlflow(run_name, settings, ids)
        else:
            self._open[name] = Wandb(run_name, settings, ids)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Call a tracker and disable it on failure; the run continues, and its metrics are on disk."""
        try:
            call()
        except Exception as error:
            self._open.pop(name, None)
            self.say(
                f"{name} is left out from here on: {' '.join(str(error).split()) or type(error).__name__}"
            )


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, store: RunStore) -> None:
        from tensorboardX import SummaryWriter

        # A resumed run adds a file; TensorBoard reads all files of a folder as one run.
        self.writer = SummaryWriter(store.path(TENSORBOARD_DIR))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, succeeded: bool) -> None:
        self.writer.close()


class Mlflow:
    """A run of the experiment PROJECT on the server or folder in MLFLOW_TRACKING_URI."""

    def __init__(self, run_name: str, settings: Mapping[str, str], ids: dict[str, str]) -> None:
        import mlflow

        # Uses the client because the module-level functions keep one active run per process.
        self.client = mlflow.MlflowClient()
        self.id = ids.get("mlflow", "")
        if self.id:
            self.client.set_terminated(self.id, "RUNNING")
            return
        experiment = self.client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        self.id = ids["mlflow"] = self.client.create_run(place, run_name=run_name).info.run_id
        for name, value in settings.items():
            self.client.log_param(self.id, name, value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self, succeeded: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if succeeded else "FAILED")


class Wandb:
    """A run of the project PROJECT; WANDB_MODE=offline stores it on this machine only."""

    def __init__(self, run_name: str, settings: Mapping[str, str], ids: dict[str, str]) -> None:
        import wandb

        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=PROJECT, name=run_name, id=ids["wandb"], resume="allow", config=dict(settings)
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({**figures, "round": step}, step=step)

    def close(self, succeeded: bool) -> None:
        self.run.finish(exit_code=0 if succeeded else 1)


def check_trackers(config: Config) -> None:
    """Raise ConfigError for trackers that are not installed or cannot write to the run directory."""
    for name in config.run.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"run.trackers: {name!r} needs the package {PACKAGES[name]!r}, which is not installed: "
                f"pip install {INSTALL[name]}, or take it out"
            )
    if "tensorboard" in config.run.trackers and "://" in config.run.dir:
        raise ConfigError(
            f"run.trackers: 'tensorboard' writes into the run directory, which must be local for it; "
            f"run.dir is {config.run.dir!r}"
        )


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a round's metrics; nested ones are named ``part/key``."""
    found = {key: float(value) for key, value in line.items() if _is_number(value) and key != "round"}
    for part in ("seconds", "staleness"):
        for key, value in (line.get(part) or {}).items():
            if _is_number(value):
                found[f"{part}/{key}"] = float(value)
    return found


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Flattened settings: dotted names and values as text, cut to LONGEST_PARAMETER characters."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{name}.")
        elif value is not None:
            # Option names are chosen by the user, and trackers do not accept all characters.
            safe = "".join(c if c.isalnum() or c in "._-/ " else "_" for c in f"{above}{name}")
            yield safe, str(value)[:LONGEST_PARAMETER]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
