"""What the report knows of rounds, classes and texts, and what it does not have to know."""

from __future__ import annotations

import pytest
from report_runs import ATTACK, Page, enrich, make_run, render

from llkd_ray.evaluation.round_records import POINTS, find_reference, read_round_records
from llkd_ray.evaluation.run_record import read_run_record
from llkd_ray.report.pages import write_report
from llkd_ray.report.round_figures import describe_shares
from llkd_ray.storage.run_dir import CANDIDATE_SAMPLE, INSIGHT, QUARANTINE_DIR, SELECTED, RunStore, round_file


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return enrich(make_run(tmp_path_factory.mktemp("runs") / "llkd-monday"))


@pytest.fixture(scope="module")
def page(store) -> Page:
    return render(store)


def words_of(page: Page) -> list[str]:
    return [a["aria-label"].replace("\u202f", " ") for a in page.all("svg") if a.get("role") == "img"]


def test_every_figure_says_in_words_what_it_shows(page):
    starts = [words.split(":")[0].split(".")[0] for words in words_of(page)]
    assert starts == [
        "Student's accuracy",
        "Same answer as the teacher",
        "The teacher's confidence against the student's uncertainty of a sample of texts",
        "Thresholds of the classes",
        "Accuracy against confidence in 3 bins",
        "Teacher and student side by side over 4 min 31 s",
        "Time of each phase, over all rounds",
    ]
    assert "student: sure of 77.5 % and right on 70.0 %" in words_of(page)[4]


def test_ids_stay_unique_with_all_figures(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_texts_to_read_are_all_escaped_and_carry_labels(page, store):
    assert page.plain.count(" ".join(ATTACK.split())) >= 2
    assert not page.all("script") + page.all("b")
    assert "student: delivery, sure of 88.0 %; truly delivery" in page.plain.replace("\u202f", " ")
    assert "student's uncertainty –" in page.plain
    assert "bad_id: a list (letters/a.parquet, row 9)" in page.plain
    assert page.plain.count("empty_text (letters/a.parquet") == 2, "some of each reason"


def test_mistakes_are_counted(store, page):
    details = read_round_records(store, read_run_record(store))
    assert details.mistakes(5) == [(0, 1, 30), (1, 0, 10)]
    assert details.mistakes(1) == [(0, 1, 30)]
    matrix = next(row for row in page.rows if row[:2] == ["billing", "120"])
    assert matrix[2:4] == ["75", "25"]


def test_classes_are_held_against_the_pool(store, page):
    details = read_round_records(store, read_run_record(store))
    assert [one.pool for one in details.balance] == [0.2] * 5
    assert [one.labelled for one in details.balance] == [0.2] * 5
    assert sum(one.trained for one in details.balance) == pytest.approx(1)
    assert describe_shares(details).startswith("“billing” is ")


def test_points_are_few_however_many_there_are(store):
    details = read_round_records(store, read_run_record(store))
    assert sum(len(candidate_sample.label_N) for candidate_sample in details.glances) <= POINTS
    assert [candidate_sample.round_number for candidate_sample in details.glances] == [0, 1, 2, 3, 4]
    assert all(0 < candidate_sample.selected_N.mean() < 1 for candidate_sample in details.glances)


def test_labels_that_an_earlier_driver_brought_are_no_work_of_the_next(tmp_path):
    store = make_run(tmp_path / "run", rounds=2)
    for line, pace in zip(
        store.read_metrics(), ([[0.2, 0], [9.0, 600]], [[0.2, 900], [8.0, 950]]), strict=True
    ):
        store.append_metrics(line | {"pace": pace})
    assert "650 texts were labelled" in words_of(render(store))[2]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sure", [0.3, 0.999999])
def test_many_rounds_and_classes_keep_the_page_small(tmp_path, sure):
    labels = tuple(f"intent {number:02d}" for number in range(77))
    store = enrich(make_run(tmp_path / "run", labels=labels, rounds=30), labels, rounds=30, sure=sure)
    page = render(store)
    glances = read_round_records(store, read_run_record(store)).glances
    assert [candidate_sample.round_number for candidate_sample in glances] == [0, 6, 12, 17, 23, 29]
    assert len(store.read_bytes("report.html")) < 1_000_000
    assert not any(row[:1] == ["True class"] and "intent 05" in row for row in page.rows), "no 77 × 77 table"
    assert page.row("intent 00")[1]


@pytest.mark.parametrize("missing", ["glance", "insight", "selected", "quarantine"])
def test_any_part_may_be_missing(tmp_path, missing):
    store = enrich(make_run(tmp_path / "run", rounds=2), rounds=2, per_round=40)
    files = {
        "glance": [round_file(k, CANDIDATE_SAMPLE) for k in range(2)],
        "insight": [INSIGHT],
        "selected": [round_file(k, SELECTED) for k in range(2)],
        "quarantine": [f"{QUARANTINE_DIR}/pool-00000001.parquet"],
    }
    for file in files[missing]:
        store.delete(file)
    page = render(store)
    assert "Learning curve" in page.plain
    assert ("Most useful" in page.plain) == (missing != "insight")
    assert ("Class balance" in page.plain) == (missing != "selected")


def test_a_glance_may_be_empty(tmp_path):
    store = enrich(make_run(tmp_path / "run", rounds=1), rounds=1, per_round=0)
    assert "round 0" not in render(store).plain


class TestReference:
    def pair(self, tmp_path, **changes) -> RunStore:
        """A run, and one beside it by random selection."""
        store, other = make_run(tmp_path / "mine"), make_run(tmp_path / "other", rounds=3)
        config = other.read_bytes("config.yaml").decode().replace("policy: llkd_sample", "policy: random")
        for old, new in changes.items():
            assert f"{old}:" in config
            config = config.replace(f"{old}:", f"{old}: {new} #")
        other.write_bytes("config.yaml", config.encode())
        return store

    def test_a_run_by_random_beside_this_one_is_drawn(self, tmp_path):
        page = render(self.pair(tmp_path))
        assert (
            "Random's accuracy: from 62.5 % after 160 texts to 71.9 % after 480 texts." in words_of(page)[0]
        )
        assert "Dotted: the run other, which selects at random." in page.plain

    def test_the_random_run_itself_has_none(self, tmp_path):
        self.pair(tmp_path)
        assert "Dotted" not in render(RunStore(str(tmp_path / "other"))).plain

    @pytest.mark.parametrize("change", [{"rounds": 7}, {"epochs": 9}, {"first_labels": 0.5}])
    def test_a_run_of_other_settings_is_none(self, tmp_path, change):
        assert "Dotted" not in render(self.pair(tmp_path, **change)).plain

    def test_a_run_of_the_same_seed_comes_first(self, tmp_path):
        store = self.pair(tmp_path)
        later = RunStore(str(tmp_path / "zz"))
        config = RunStore(str(tmp_path / "other")).read_bytes("config.yaml")
        later.write_bytes("config.yaml", config.replace(b"seed: 0", b"seed: 4"))
        later.append_metrics({"round": 0, "trained": 1})
        assert find_reference(store, read_run_record(store).config).name == "other"

    def test_what_else_lies_there_does_no_harm(self, tmp_path):
        store = self.pair(tmp_path)
        (tmp_path / "quickstart-data").mkdir()
        (tmp_path / "notes.txt").write_text("policy: random")
        assert find_reference(store, read_run_record(store).config).name == "other"


def test_same_files_give_the_same_page(store):
    write_report(store)
    first = store.read_bytes("report.html")
    write_report(store)
    assert store.read_bytes("report.html") == first
