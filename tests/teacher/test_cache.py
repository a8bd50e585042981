"""A text that was answered once is found again; what decides an answer tells teachers apart."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.storage import tables as tables_module
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore, ticket_file
from llkd_ray.storage.tables import list_column, matrix_of
from llkd_ray.teacher import cache as cache_module
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.cache import AnswerCache, answer_key, register, registrations, speed_of

C = 3
KEY = "0123456789abcdef"


def labels(hashes, member=0, first_row=0, value=0.5) -> pa.Table:
    """LABELS of some texts; the first probability is ``value``, the others are the row number's."""
    m = len(hashes)
    rows = np.arange(first_row, first_row + m)
    probs_MC = np.column_stack([np.full(m, value), rows / 1000, rows / 2000])
    ints = [pa.array(np.full(m, n, np.int32)) for n in (30, 20, 1)]
    return pa.Table.from_arrays(
        [
            pa.array(rows),
            pa.array([f"id-{row}" for row in rows.tolist()], pa.string()),
            pa.array(np.asarray(hashes, dtype=np.uint64)),
            list_column(probs_MC),
            pa.array(np.zeros(m, np.float32)),
            *ints,
            pa.array(np.broadcast_to(np.asarray(member, np.int8), m)),
            pa.array(np.zeros(m, dtype=bool)),
        ],
        schema=tables_module.LABELS,
    )


def write_run(folder: Path, *tickets: pa.Table) -> str:
    """The labels folder of a run with some tickets' files."""
    store = RunStore(str(folder))
    for number, table in enumerate(tickets):
        store.write_table(ticket_file(LABELS_DIR, number), table)
    return str(folder / LABELS_DIR)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def values(table: pa.Table) -> list[float]:
    return matrix_of(table["probs"], C)[:, 0].tolist()


hashes = st.integers(0, 30) | st.just(2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.lists(st.lists(hashes, max_size=8), max_size=3), max_size=3),  # by run and ticket
    wanted=st.lists(hashes | st.integers(31, 40), max_size=20),
    limit=st.integers(1, 3),
)
def test_it_finds_what_was_answered_first_in_the_order_of_the_texts(tmp_path_factory, runs, wanted, limit):
    root = tmp_path_factory.mktemp("cache")
    cache = str(root / "cache")
    first: dict[int, str] = {}
    row = 0
    folders = []
    for number, tickets in enumerate(runs):
        tables = []
        for ticket in tickets:
            tables.append(labels(ticket, first_row=row))
            for place, one in enumerate(ticket):
                first.setdefault(one, f"id-{row + place}")
            row += len(ticket)
        folders.append(write_run(root / f"{9 - number}-run", *tables))
        register(cache, KEY, folders[-1], 0)
        for path in (root / "cache" / KEY).iterdir():  # in the order of the runs, however fast they come
            if path.stat().st_mtime > 1e9:
                os.utime(path, (1000 + number, 1000 + number))
    for folder in folders[:1]:
        register(cache, KEY, folder, 0)  # a second word changes nothing
    answers = AnswerCache.open(cache, KEY, C, None)
    assert (len(answers), answers.skipped) == (len(first), runs.count([]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "OPEN_FILES", limit)
        for _ in range(2):
            found_N, table = answers.find(np.array(wanted, dtype=np.uint64))
            assert found_N.tolist() == [one in first for one in wanted]
            assert table["id"].to_pylist() == [first[one] for one in wanted if one in first]
            assert table.schema == tables_module.LABELS
            assert len(answers._tables) <= limit


class TestFind:
    def test_only_rows_of_the_registered_member_count(self, tmp_path, cache):
        folder = write_run(tmp_path / "run", labels([1, 2, 3], member=[0, 1, 0]))
        register(cache, KEY, folder, 0)
        register(cache, "large", folder, 1)
        wanted = np.array([1, 2, 3], dtype=np.uint64)
        assert AnswerCache.open(cache, KEY, C, None).find(wanted)[0].tolist() == [True, False, True]
        assert AnswerCache.open(cache, "large", C, None).find(wanted)[0].tolist() == [False, True, False]

    def test_a_run_does_not_find_its_own(self, tmp_path, cache, monkeypatch):
        folder = write_run(tmp_path / "run", labels([1]))
        register(cache, KEY, folder, 0)
        monkeypatch.chdir(tmp_path)
        assert len(AnswerCache.open(cache, KEY, C, own="run/labels/")) == 0
        assert len(AnswerCache.open(cache, KEY, C, own="run")) == 1

    def test_a_run_that_goes_on_is_taken_as_it_stands(self, tmp_path, cache):
        folder = write_run(tmp_path / "run")
        register(cache, KEY, folder, 0)  # before there is a folder
        assert AnswerCache.open(cache, KEY, C, None).skipped == 1
        write_run(tmp_path / "run", labels([1]))
        (Path(folder) / "ticket-00000001.parquet.0a1b.tmp").write_bytes(b"half a fi")
        answers = AnswerCache.open(cache, KEY, C, None)
        assert (len(answers), answers.skipped) == (1, 0)


class TestWhatIsNotThere:
    def test_folders_and_files_that_are_unfit_are_counted(self, tmp_path, cache):
        older = labels([7]).drop_columns(["text_hash", "member", "reused"])
        folder = write_run(tmp_path / "run", labels([1]), older, labels([2]))
        (Path(folder) / "ticket-00000003.parquet").write_bytes(b"no parquet")
        (Path(folder) / "ticket-00000004.parquet").write_bytes(b"")
        register(cache, KEY, folder, 0)
        register(cache, KEY, str(tmp_path / "deleted" / "labels"), 0)
        answers = AnswerCache.open(cache, KEY, C, None)
        assert (len(answers), answers.skipped) == (2, 4)

    def test_answers_with_another_number_of_labels_are_unfit(self, tmp_path, cache):
        register(cache, KEY, write_run(tmp_path / "run", labels([1])), 0)
        answers = AnswerCache.open(cache, KEY, C + 1, None)
        assert (len(answers), answers.skipped) == (0, 1)

    def test_what_is_no_registration_is_passed_over(self, tmp_path, cache):
        register(cache, KEY, write_run(tmp_path / "run", labels([1])), 0)
        for name, content in (("x.json", b"{"), ("y.json", b"[]"), ("z.json", b"{}"), ("notes.txt", b"")):
            (Path(cache) / KEY / name).write_bytes(content)
        assert len(registrations(cache, KEY)) == 1

    def test_a_folder_deleted_after_the_start_answers_nothing_more(self, tmp_path, cache):
        folders = [write_run(tmp_path / name, labels([n], value=n / 10)) for n, name in ((1, "a"), (2, "b"))]
        for folder in folders:
            register(cache, KEY, folder, 0)
        answers = AnswerCache.open(cache, KEY, C, None)
        shutil.rmtree(folders[0])
        found_N, table = answers.find(np.array([1, 2], dtype=np.uint64))
        assert found_N.tolist() == [False, True]
        assert values(table) == pytest.approx([0.2])

    @pytest.mark.parametrize("now", [[1, 2], [2]], ids=["another text there", "fewer rows"])
    def test_a_folder_written_anew_after_the_start_gives_no_wrong_answer(self, tmp_path, cache, now):
        folder = write_run(tmp_path / "run", labels([5, 6]))
        register(cache, KEY, folder, 0)
        answers = AnswerCache.open(cache, KEY, C, None)
        write_run(tmp_path / "run", labels(now))
        found_N, table = answers.find(np.array([6, 5], dtype=np.uint64))
        assert (found_N.tolist(), len(table)) == ([False, False], 0)


def test_threads_may_look_at_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "OPEN_FILES", 2)
    tables = [labels(range(16 * t, 16 * t + 16), first_row=16 * t) for t in range(8)]
    register(cache, KEY, write_run(tmp_path / "run", *tables), 0)
    answers = AnswerCache.open(cache, KEY, C, None)
    barrier = threading.Barrier(4)

    def look(seed: int) -> bool:
        barrier.wait()
        rng = np.random.default_rng(seed)
        for _ in range(20):
            wanted = rng.integers(0, 16 * 8, 10).astype(np.uint64)
            found_N, table = answers.find(wanted)
            if not found_N.all() or table["row"].to_pylist() != wanted.tolist():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(4)))


# --- the key


def key(names=("no", "yes"), prompt="aa", cut="tail", **settings) -> str:
    tree = {"model": "org/model", "prompt": {"cut": cut}} | settings
    return answer_key(TeacherConfig.model_validate(tree), names, prompt)


def served(confidence=None, **server) -> str:
    server = {"base_url": "http://one:8000/v1", "scores": "top_logprobs"} | server
    return key(kind="openai", server=server, confidence=confidence or {})


class TestKey:
    def test_what_decides_an_answer_makes_another_teacher(self):
        keys = [
            key(),
            key(names=("yes", "no")),
            key(prompt="ab"),
            key(model="org/other"),
            key(revision="v2"),
            key(dtype="bfloat16"),
            key(quantization="fp8"),
            key(max_model_len=1024),
            key(min_branch_prob=0.0),
            key(cut="head"),
            key(engine={"hf_overrides": {"rope_theta": 5}}),
            *(
                key(confidence={"method": "votes", "samples": n, "sampling_temperature": t})
                for n, t in ((10, 0.7), (20, 0.7), (10, 1.0))
            ),
            served(),
            served(base_url="http://two:8000/v1"),  # another model may have the same name there
            served(base_url="http://one:8001/v1"),
            served(cache_as="ours"),
            served(scores="label_ids"),
            served(top_logprobs=5),
            served(tokenizer="org/t"),
            *(served({"samples": n}, scores=scores) for scores in ("votes", "auto") for n in (5, 50)),
        ]
        assert len(set(keys)) == len(keys)

    @pytest.mark.parametrize(
        "changes",
        [
            {"actors": 4, "gpus": 1, "cpus": 2, "tensor_parallel": 2, "pipeline_parallel": 2},
            {"ticket_size": 8, "tickets_in_flight": 5, "attempts": 9, "timeout_s": 1},
            {"engine": {"gpu_memory_utilization": 0.5, "max_num_seqs": 8, "enforce_eager": True, "seed": 3}},
            {"price": {"input": 3.0}, "tokens_per_s": 100, "cache": None},
            {"confidence": {"method": "batch", "samples": 3}},
            {"confidence": {"method": "temperature", "strength": 0.5}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_does_not_decide_it_changes_nothing(self, changes):
        assert key(**changes) == key()

    def test_a_served_model_is_the_same_as_one_that_is_called_so(self):
        assert served(base_url="http://ONE:8000/v1/", concurrency=3, api_key_env="X") == served()
        assert served(cache_as="ours") == served({"samples": 50}, cache_as="ours", base_url="http://two/v1")

    def test_a_checkpoint_trained_anew_is_another_teacher(self, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        before = key(model=str(folder))
        (folder / "README.md").write_text("notes")
        monkeypatch.chdir(tmp_path)
        assert key(model="model") == before
        os.utime(folder / "model.safetensors", (5, 5))
        assert key(model=str(folder)) != before

    def test_a_recorded_teacher_has_none(self):
        with pytest.raises(ValueError, match="'recorded'"):
            key(kind="recorded", recorded={"uri": "x.parquet"})


# --- speed


def measured(hashes, used: dict[str, Usage], in_flight: int) -> pa.Table:
    usage = json.dumps({name: one.as_dict() for name, one in used.items()})
    return labels(hashes).replace_schema_metadata({"usage": usage, "tickets_in_flight": str(in_flight)})


class TestSpeed:
    def test_it_is_the_median_ticket_with_those_beside_it(self, tmp_path, cache):
        used = [Usage(prompt_tokens=n, seconds=2.0) for n in (10, 100, 300)]
        tables = [measured([n], {"teacher": one}, in_flight=4) for n, one in enumerate(used)]
        folder = write_run(tmp_path / "run", *tables)
        register(cache, KEY, folder, 0)
        speed = speed_of(cache, KEY)
        assert (speed.tokens_per_s, speed.tickets, speed.labels) == (200.0, 3, folder)

    def test_each_teacher_of_a_cascade_has_its_own(self, tmp_path, cache):
        used = {"small": Usage(prompt_tokens=80, seconds=1), "large": Usage(prompt_tokens=6, seconds=2)}
        folder = write_run(tmp_path / "run", measured([1], used, in_flight=1))
        register(cache, "small", folder, 0)
        register(cache, "large", folder, 1)
        assert [speed_of(cache, one).tokens_per_s for one in ("small", "large")] == [80.0, 3.0]

    def test_only_the_newest_count(self, tmp_path, cache, monkeypatch):
        monkeypatch.setattr(cache_module, "RECENT_FILES", 1)
        tables = [measured([n], {"teacher": Usage(prompt_tokens=n, seconds=1)}, 1) for n in (5, 7)]
        folder = write_run(tmp_path / "run", *tables)
        os.utime(Path(folder) / "ticket-00000001.parquet", (5, 5))
        register(cache, KEY, folder, 0)
        assert speed_of(cache, KEY).tokens_per_s == 5.0

    def test_nothing_is_known_of_tickets_that_asked_nothing(self, tmp_path, cache):
        idle = measured([1], {"teacher": Usage(reused_texts=1)}, 2)
        folder = write_run(tmp_path / "run", idle, labels([2]))
        pq.write_table(
            labels([3]).replace_schema_metadata({"usage": "{"}), f"{folder}/ticket-00000009.parquet"
        )
        register(cache, KEY, folder, 0)
        assert speed_of(cache, KEY) is None
        assert speed_of(cache, "unknown") is None
