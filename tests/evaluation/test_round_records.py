"""What the report knows of rounds, classes and texts."""

from __future__ import annotations

import pytest
from report_runs import enrich, make_run

from llkd_ray.evaluation.round_records import POINTS, read_baseline, read_round_records
from llkd_ray.evaluation.run_record import phase_seconds, read_run_record
from llkd_ray.report.round_figures import describe_shares
from llkd_ray.storage.run_dir import ENGINES_DIR, RunStore, round_file


def read(store: RunStore):
    return read_round_records(store, read_run_record(store))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return enrich(make_run(tmp_path_factory.mktemp("runs") / "llkd-monday"))


def test_mistakes_are_counted(store):
    assert read(store).mistakes(5) == [(0, 1, 30), (1, 0, 10)]
    assert read(store).mistakes(1) == [(0, 1, 30)]


def test_class_shares_are_compared_with_the_pool(store):
    records = read(store)
    assert [one.pool for one in records.balance] == [one.labelled for one in records.balance] == [0.2] * 5
    assert sum(one.trained for one in records.balance) == pytest.approx(1)
    assert describe_shares(records).startswith("“billing” is ")


def test_points_are_few_however_many_texts_and_rounds_there_are(store, tmp_path):
    samples = read(store).samples
    assert sum(len(sample.label_N) for sample in samples) <= POINTS
    assert all(0 < sample.selected_N.mean() < 1 for sample in samples)
    assert [sample.round_number for sample in samples] == [0, 1, 2, 3, 4]
    many = read(make_run(tmp_path / "run", rounds=30)).samples
    assert [sample.round_number for sample in many] == [0, 6, 12, 17, 23, 29]


def test_some_quarantined_rows_of_each_reason_are_kept(store):
    assert [one["reason"] for one in read(store).quarantined] == ["bad_id", "empty_text", "empty_text"]


def test_a_text_selected_in_two_rounds_counts_once(tmp_path):
    store = make_run(tmp_path / "run", rounds=2)
    before = read_run_record(store).selected
    store.write_bytes(round_file(2, "batch.parquet"), store.read_bytes(round_file(0, "batch.parquet")))
    assert read_run_record(store).selected == before


@pytest.mark.parametrize(
    ("starts", "pace", "start"),
    [
        ((30.0, 41.5), [[0.0, 0], [49.8, 0], [50.0, 8], [60.0, 1000]], 41.5),
        ((55.0, 41.5), [[0.0, 0], [50.0, 8], [60.0, 1000]], 50.0),
        ((90.0,), [[0.0, 0]], 60.0),
        ((90.0,), [], 60.0),
        ((), [[0.0, 0], [50.0, 8]], 0.0),
    ],
    ids=["slowest", "started again later", "longer than the wait", "no pace", "no engine"],
)
def test_the_engines_start_is_a_phase_of_the_first_round(tmp_path, starts, pace, start):
    store = make_run(tmp_path / "run", rounds=2)
    first, second = store.read_metrics()
    store.append_metrics(first | {"pace": pace, "seconds": first["seconds"] | {"teach": 60.0}})
    for number, seconds in enumerate(starts):
        store.write_json(f"{ENGINES_DIR}/{number}.json", {"seconds_to_start": seconds})
    found = [phase_seconds(line) for line in read_run_record(store).rounds]
    assert (found[0]["start"], found[0]["teach"]) == (start, 60.0 - start)
    assert found[1] == phase_seconds(second)


def test_a_baseline_has_the_name_and_the_metrics_of_its_run(store):
    baseline = read_baseline(store)
    assert baseline.name == "llkd-monday"
    assert [line["round"] for line in baseline.rounds] == [0, 1, 2, 3, 4]
