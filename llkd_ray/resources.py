"""Checks before a run starts that its resource bundles fit on the nodes of the cluster.

Ray waits silently until a node has room for an actor or a rank. A run that does not fit is therefore
rejected, with the calculation that shows why. Nothing reserves memory; the selector, Ray Train's controller
and Ray Data's own actors reserve no CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    return {"CPU": teacher.cpus, "GPU": teacher.gpus, **teacher.resources}


def of_a_rank(student: StudentConfig) -> dict[str, float]:
    """Resources that Ray reserves for a student rank."""
    return {"CPU": student.cpus, "GPU": student.gpus, **student.resources}


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
