"""Reports of made-up runs: the numbers come from code, the texts are written for these tests."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
import yaml
from report_runs import ATTACK, LABELS, WARM, Page, add_teacher, enrich, make_run, render

from llkd_ray.audit.job import estimate
from llkd_ray.display import count, duration, money, percent, shorten
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import quality_of
from llkd_ray.report.pages import model_card, write_pages, write_report
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    BATCH,
    CANDIDATE_SAMPLE,
    CARD,
    CONFIG,
    ENGINES_DIR,
    ESTIMATE,
    EXAMPLES_INDEX,
    MANIFEST,
    QUARANTINE_DIR,
    REPORT,
    SELECTED,
    SUMMARY,
    RunStore,
    round_file,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    """A finished run of five rounds, without figures of its teacher's confidence."""
    return make_run(tmp_path_factory.mktemp("runs") / "llkd-monday")


@pytest.fixture(scope="module")
def whole(store) -> Page:
    return render(store)


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> tuple[RunStore, Page]:
    """A run with texts to read, a calibrated teacher, a cap that was reached and a lost replica."""
    store = enrich(make_run(tmp_path_factory.mktemp("runs") / "run"))
    cap = {"texts": None, "tokens": 310_000, "cost": 2.5, "reached": True}
    add_teacher(
        store, calibrator=WARM, cap=cap, lost=[{"teacher": "large", "reason": "CUDA <out> of memory"}]
    )
    refused = {
        "source": ["teacher"] * 2,
        "position": [3, 5],
        "reason": ["prompt_refused"] * 2,
        "detail": ["ticket 1"] * 2,
        "start_of_text": ["Dear", "Sir"],
    }
    store.write_table(
        f"{QUARANTINE_DIR}/teacher-00000001.parquet", pa.table(refused, schema=tables.QUARANTINE)
    )
    return store, render(store)


def spaced(text: str) -> str:
    return text.replace("\u202f", " ")


def descriptions(page: Page) -> list[str]:
    return [spaced(a["aria-label"]) for a in page.all("svg") if a.get("role") == "img"]


def change_summary(store: RunStore, **changes) -> None:
    store.write_json(SUMMARY, store.read_json(SUMMARY) | changes)


class TestReport:
    def test_heading_conclusion_and_configuration(self, whole):
        for name in ("llkd-monday", "llkd", "random", "models/large-teacher", "minilm"):
            assert name in whole.plain[:250]
        assert "right on 74.2 % of the test texts (95 % interval 71.8–76.6 %)" in whole.plain
        assert "the same as the teacher (74.2 %)" in whole.plain
        assert "trained on 800 of the 5,000 texts that the teacher labelled" in whole.plain
        assert "policy: llkd" in whole.text
        assert '"ray": "2.60.0"' in whole.text
        assert not any("open" in a for a in whole.all("details")[-2:])

    @pytest.mark.parametrize(
        ("student", "words", "level"),
        [
            (0.8, "5.8 points above the teacher's 74.2 %", False),
            (0.7, "4.2 points below the teacher's 74.2 %", False),
            (0.75, "0.8 points above the teacher's 74.2 %", True),
        ],
    )
    def test_conclusion_compares_with_the_teacher(self, tmp_path, student, words, level):
        store = make_run(tmp_path / "run", rounds=1)
        interval = [student - 0.02, student + 0.02]
        figures = store.read_json(SUMMARY)["student"]
        change_summary(store, student=figures | {"accuracy": student, "accuracy_interval": interval})
        card = spaced(model_card(store))
        assert words in card
        assert ("the difference may be chance" in card) == level

    def test_table_has_a_row_for_each_round(self, whole):
        heading = next(row for row in whole.rows if row and row[0] == "Round")
        cells = dict(zip(heading, (" ".join(cell.split()) for cell in whole.row("4")), strict=True))
        assert cells["Trained on"] == "800"
        assert cells["Teacher tokens"] == "305,000"
        assert cells["Accuracy"] == spaced(percent(0.5 + 0.25 * (1 - 0.5**5)))
        assert cells["Pseudo-labels right"] == "83.0 %"
        assert cells["Time"] == "1 min 1 s"  # 18 + 0.4 + 33.5 + 5.2 + 2.1 + 1.5 = 60.7

    def test_the_teachers_figures_as_given_and_as_used(self, rich):
        store, page = rich
        quality = store.read_json(SUMMARY)["teacher"]["quality"]
        raw, used = quality["raw"], quality["used"]
        assert page.row("Figure") == ["Figure", "As given", "As used"]
        assert page.row("Log loss")[1:] == [f"{raw['nll']:.3f}", f"{used['nll']:.3f}"]
        assert page.row("Calibration error")[1:] == [f"{raw['ece']:.3f}", f"{used['ece']:.3f}"]
        for figures in (raw, used):
            assert "{:.3f}–{:.3f}".format(*figures["ece_interval"]) in page.text
        assert used["ece"] < raw["ece"] - 0.05, "or the test tells nothing"
        assert "On 1,200 texts with gold (test set). The temperature was fitted on 200 other" in page.plain
        assert page.row("1 (most confident)")[2] == percent(used["by_decile"][0]["accuracy"])
        assert len([row for row in page.rows if "confident)" in row[0]]) == 2
        for name, one in zip(LABELS, used["per_class"], strict=True):
            row = next(row for row in page.rows if row and row[0] == name and len(row) == 7)
            assert row[1:3] == [count(one["gold"]), count(one["predicted"])]
            assert row[3:5] == [percent(one["confidence"]), percent(one["precision"])]
        words = next(words for words in descriptions(page) if "15 bins" in words)
        for kind, figures in (("as given", raw), ("as used", used)):
            bins = [one for one in figures["reliability"] if one["texts"]]
            mean = sum(one["texts"] * one["confidence"] for one in bins) / figures["texts"]
            assert f"{kind}: confidence {spaced(percent(mean))}" in words

    def test_a_teacher_may_be_all_right_and_a_class_unheard_of(self, tmp_path):
        """Its answers are used as given, so they stand once."""
        store = make_run(tmp_path / "run", rounds=1)
        summary = add_teacher(store)
        figures = quality_of(np.eye(5)[[0, 1, 2]], np.arange(3), Calibrator(), np.random.default_rng(0))
        summary["teacher"]["quality"] = {"on": "pool texts with gold"} | figures
        store.write_json(SUMMARY, summary)
        page = render(store)
        assert "On 3 texts with gold (pool texts with gold)" in page.plain
        assert page.row("Figure") == ["Figure", "As given"]
        assert page.row("AUROC")[1] == "–"
        assert next(row for row in page.rows if row[0] == "account" and len(row) == 7)[3:] == ["–"] * 4

    def test_usage_cap_and_lost_replicas(self, rich, whole):
        store, page = rich
        for heading, value in (
            ("Used", "Teacher"),
            ("Texts cut to length", "17"),
            ("… of them from the prefix cache", "220,000"),
            ("Texts answered in an earlier run", "700"),
            ("… tokens that this saved", "49,650"),
            ("Cost", "0.094\u202fEUR"),
        ):
            assert page.row(heading)[1] == value
        reached = "The cap of 310,000 tokens or 2.50 EUR was reached: 250 texts were not asked for."
        assert reached in page.plain
        assert "large: CUDA <out> of memory" in page.plain
        assert "no answer to 2 of the kept rows: prompt_refused." in page.plain
        assert "The cap" not in whole.plain
        assert "were lost" not in whole.plain
        card = spaced(model_card(store))
        assert "0.094 EUR; 700 texts were answered" in card
        assert "was reached: 250 texts" in card

    def test_a_cascade_names_both_teachers_and_keeps_their_cost_apart(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=1)
        used = add_teacher(store)["usage"]["teacher"]
        config = yaml.safe_load(store.read_bytes(CONFIG))
        members = {
            name: config["teacher"] | {"model": f"models/{name}", "confidence": {"method": method}}
            for name, method in (("small", "batch"), ("large", "raw"))
        }
        config["teacher"] |= {"kind": "cascade", "model": None, "cascade": members}
        store.write_bytes(CONFIG, yaml.safe_dump(config).encode())
        change_summary(store, usage={"small": used, "large": used | {"texts": 310}})
        page = render(store)
        assert "models/small and models/large" in page.plain[:300]
        assert page.row("Used") == ["Used", "Small", "Large"]
        assert page.row("Texts")[1:] == ["4,300", "310"]
        assert "The small teacher’s confidence is its answers divided by" in page.plain
        assert "The large teacher’s confidence is used as given" in page.plain
        assert "Large: 310 texts" in model_card(store)

    def test_selected_texts_are_counted_by_class_and_shown_with_weight(self, store, whole):
        batches = [store.read_table(round_file(k, "batch.parquet")) for k in range(5)]
        label_N = np.concatenate([batch["label"].to_numpy() for batch in batches])
        for number, name in enumerate(LABELS):
            assert whole.row(name)[1] == str((label_N == number).sum())
        assert len(whole.all("blockquote")) == 3 * len(LABELS)
        assert "weight 9.00" in whole.plain

    def test_equal_weights_are_not_listed(self, tmp_path, whole):
        assert "Mean weight" in whole.text
        store = make_run(tmp_path / "run", rounds=2)
        for file in (round_file(k, BATCH) for k in range(2)):
            batch = store.read_table(file).drop_columns("weight")
            ones = pa.array(np.ones(len(batch)), tables.ROUND.field("weight").type)
            store.write_table(file, batch.append_column("weight", ones))
        page = render(store)
        assert len(page.row("billing")) == 3, "class, texts, bar"
        assert "weight" not in page.text.lower().split("samples")[1].split("data quality")[0]

    def test_data_quality_adds_up(self, whole):
        assert whole.row("Read")[1:] == ["8,352", "1,205"]
        assert whole.row("Quarantined: duplicate")[1:] == ["340", "5"]
        assert whole.row("Quarantined: empty_text")[1:] == ["12", "0"]
        assert whole.row("Kept")[1:] == ["8,000", "1,200"]

    def test_mistakes_and_texts_to_read(self, rich):
        page = rich[1]
        matrix = next(row for row in page.rows if row[:2] == ["billing", "120"])
        assert matrix[2:4] == ["75", "25"]
        assert "student: delivery, confidence 88.0 %; gold: delivery" in spaced(page.plain)
        assert "student's uncertainty –" in page.plain
        assert "bad_id: a list (letters/a.parquet, row 9)" in page.plain
        assert page.plain.count("empty_text (letters/a.parquet") == 2, "some of each reason"

    def test_the_baselines_curves_are_drawn_where_one_is_given(self, tmp_path, whole):
        store, other = make_run(tmp_path / "mine"), make_run(tmp_path / "other", rounds=3)
        write_pages(store, other)
        page = Page(store.read_bytes(REPORT).decode())
        words = "Baseline's accuracy: from 62.5 % after 160 texts to 71.9 % after 480 texts."
        assert words in descriptions(page)[0]
        assert "Dotted: the run other as a baseline." in page.plain
        assert store.exists(CARD)
        assert "Dotted" not in whole.plain


class TestFigures:
    def test_each_says_in_words_what_it_shows(self, rich, whole):
        assert [words.split(":")[0].split(".")[0] for words in descriptions(rich[1])] == [
            "Student's accuracy",
            "Same answer as the teacher",
            "Accuracy against confidence in 15 bins",
            "The teacher's confidence against the student's uncertainty of a sample of texts",
            "Thresholds of the classes",
            "Accuracy against confidence in 3 bins",
            "Teacher and student side by side over 4 min 31 s",
            "Time of each phase, over all rounds",
        ]
        assert "student: confidence 77.5 %, accuracy 70.0 %" in descriptions(rich[1])[5]
        words = descriptions(whole)
        assert "Student's accuracy: from 62.5 % after 160 texts to 74.2 % after 800 texts." in words[0]
        assert "Teacher's accuracy: 74.2 %." in words[0]
        assert words[1].startswith("Same answer as the teacher: from 70.0 %")
        assert "train 2 min 18 s" in words[-1]

    def test_the_engines_start_is_not_teaching(self, tmp_path, whole):
        assert "start" not in descriptions(whole)[-1]
        store = make_run(tmp_path / "run", rounds=2)
        store.write_json(f"{ENGINES_DIR}/a.json", {"seconds_to_start": 4.5})
        page = render(store)
        assert "start 4.5 s, teach 24.5 s" in descriptions(page)[-1]
        assert "first round includes 4.5 s in which the teacher's engine started." in page.plain
        assert "“start”" in page.plain

    def test_axes_of_shares_end_at_100_percent(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=3)
        for line in store.read_metrics():
            store.append_metrics(line | {"accuracy": 1.0, "macro_f1": 0.99, "teacher_agreement": 1.0})
        write_report(store)
        svg = store.read_bytes(REPORT).decode().replace("\u202f", " ")
        ticks = [float(tick) for tick in re.findall(r"<!-- ([\d.]+) % -->", svg)]
        assert ticks.count(100) == 2, "of the learning curve and of the agreement"
        assert 0 <= min(ticks) <= max(ticks) == 100

    @pytest.mark.parametrize(("classes", "rounds"), [(6, 3), (7, 14)])
    def test_captions_are_true_of_what_is_drawn(self, tmp_path, classes, rounds):
        labels = tuple(f"intent {number}" for number in range(classes))
        store = make_run(tmp_path / "run", labels=labels, rounds=rounds)
        page = render(store).plain
        for words in ("Colours and markers", "of each class that", "that each round could", "Grey lines"):
            assert (words in page) == (classes == 6)
        for words in ("With more than 6 classes, all", "median (line)", "6 of the 14 rounds"):
            assert (words in page) == (classes == 7)
        assert "“none”" in page
        scored = store.read_bytes(round_file(1, CANDIDATE_SAMPLE))
        store.write_bytes(round_file(0, CANDIDATE_SAMPLE), scored)
        assert "“none”" not in render(store).plain

    def test_a_baseline_that_is_not_drawn_is_not_captioned(self, tmp_path):
        store, other = make_run(tmp_path / "mine"), make_run(tmp_path / "other", gold=False)
        write_report(store, other)
        page = Page(store.read_bytes(REPORT).decode())
        assert page.plain.count("Dotted: the run other") == 1, "its agreement"

    def test_labels_of_an_earlier_driver_are_not_counted_again(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=2)
        paces = ([[0.2, 0], [9.0, 600]], [[0.2, 900], [8.0, 950]])
        for line, pace in zip(store.read_metrics(), paces, strict=True):
            store.append_metrics(line | {"pace": pace})
        assert any("650 texts were labelled" in words for words in descriptions(render(store)))

    def test_ids_are_unique_and_references_lead_somewhere(self, rich):
        page = rich[1]
        ids = [a["id"] for _, a in page.elements if "id" in a]
        assert len(ids) == len(set(ids))
        references = [a[k] for _, a in page.elements for k in ("xlink:href", "aria-labelledby") if k in a]
        assert references
        assert {one.removeprefix("#") for one in references} <= set(ids)
        assert {a["clip-path"][5:-1] for _, a in page.elements if "clip-path" in a} <= set(ids)
        drawings = [a for a in page.all("svg") if a.get("role") == "img"]
        assert all("width" not in a and "viewbox" in a for a in drawings)


class TestPage:
    def test_needs_nothing_from_outside_and_is_the_same_again(self, store, whole):
        assert not whole.all("script") + whole.all("link") + whole.all("img") + whole.all("iframe")
        assert not [
            v for _, attributes in whole.elements for k, v in attributes.items() if k in ("href", "src")
        ]
        assert "url(" not in whole.styles
        assert "@import" not in whole.styles
        first = store.read_bytes(REPORT)
        write_report(store)
        assert store.read_bytes(REPORT) == first

    def test_texts_and_names_are_escaped(self, tmp_path, rich):
        assert rich[1].plain.count(" ".join(ATTACK.split())) >= 2
        assert not rich[1].all("script") + rich[1].all("b")
        store = make_run(tmp_path / "run", rounds=1, labels=("<b>bold</b>", "delivery"))
        page = render(store)
        assert page.row("<b>bold</b>")
        assert not page.all("script") + page.all("b")
        assert "<invoices>" not in store.read_bytes(REPORT).decode()

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("sure", [0.3, 0.999999])
    def test_many_rounds_and_classes_keep_it_small_and_folded(self, tmp_path, sure):
        labels = tuple(f"intent {number:02d}" for number in range(77))
        store = enrich(make_run(tmp_path / "run", labels=labels, rounds=30), labels, rounds=30, sure=sure)
        page = render(store)
        assert len(store.read_bytes(REPORT)) < 1_000_000
        assert all(page.row(name) for name in labels)
        assert not any(row[:1] == ["True class"] and "intent 05" in row for row in page.rows), (
            "no 77 × 77 table"
        )
        assert sum("open" in a for a in page.all("details")) == 1, "the texts that were most useful"


class TestUnknown:
    def test_without_gold_accuracy_is_unknown(self, tmp_path):
        store = make_run(tmp_path / "run", gold=False)
        page, card = render(store), model_card(store)
        assert "accuracy is unknown" in page.plain
        assert "On 200 held-out texts it predicts the teacher's label 79.4 % of the time" in page.plain
        assert "Student's accuracy" not in page.text
        assert "Accuracy" not in next(row for row in page.rows if row and row[0] == "Round")
        assert page.row("Kept")[1:] == ["8,000", "0"]
        assert "Pseudo-labels right" not in page.text
        assert "Accuracy is unknown" in card
        assert "| accuracy |" not in card

    @pytest.mark.parametrize("method", ["raw", "batch", "votes"])
    def test_without_gold_nothing_is_called_calibrated(self, tmp_path, method):
        store = make_run(tmp_path / "run", rounds=1, gold=False)
        add_teacher(store, calibrator=Calibrator(method), gold=False)
        for text in (render(store).text, model_card(store)):
            assert "calibrated" not in text.lower()
            assert "not checked: there is no gold" in text

    def test_teacher_may_be_unknown_where_the_student_is_known(self, tmp_path):
        page = render(make_run(tmp_path / "run", rounds=1, teacher_known=False))
        assert "right on 74.2 % of the test texts (95 % interval 71.8–76.6 %)." in page.plain
        assert "Teacher's accuracy" not in page.text

    def test_unfinished_run_shows_its_last_round_and_nan_is_unknown(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=3, finished=False)
        page = render(store)
        assert "This run has not finished" in page.plain
        assert f"right on {100 * (0.5 + 0.25 * 0.875):.1f} % of the test texts." in page.plain
        assert "trained on 480 of the 3,000 texts" in page.plain
        store.append_metrics(
            store.read_metrics()[2] | dict.fromkeys(("accuracy", "macro_f1", "ece"), float("nan"))
        )
        page = render(store)
        assert "nan" not in page.text.lower()
        assert "accuracy is unknown" in page.plain

    @pytest.mark.filterwarnings("error")
    def test_one_round_with_an_empty_sample(self, tmp_path):
        page = render(enrich(make_run(tmp_path / "run", rounds=1), rounds=1, per_round=0))
        assert "Student's accuracy: 62.5 % after 160 texts." in descriptions(page)[0]
        assert "1 round" in page.plain
        assert "1 rounds" not in page.plain
        assert "round 0" not in page.plain

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("ingested", [True, False])
    def test_no_round(self, tmp_path, ingested):
        store = make_run(tmp_path / "run", rounds=0)
        if not ingested:
            store.delete(EXAMPLES_INDEX)
            store.delete(MANIFEST)
        page = render(store)
        assert "No round has finished yet" in page.plain
        assert "Nothing has been selected yet." in page.plain
        assert ("8,000" in page.text) == ingested
        assert not page.all("svg")
        assert "No round has finished yet" in model_card(store)

    def test_a_folder_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"config\.yaml"):
            write_report(RunStore(str(tmp_path)))


class TestCard:
    def test_names_the_prior_of_the_last_round(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=2, labels=("ham", "spam", "news"))
        assert "labels.prior" not in model_card(store)
        for number, prior in enumerate(([0.5, 0.3, 0.2], [0.62, 0.3, 0.08])):
            store.write_json(round_file(number, SELECTED), {"prior": prior})
        line = next(line for line in model_card(store).splitlines() if "labels.prior" in line)
        assert "ham 62.0 %, spam 30.0 %, news 8.0 %." in spaced(line)

    def test_says_what_how_and_how_good(self, tmp_path):
        card = model_card(make_run(tmp_path / "run", labels=("a|b", "c_d", "*e*")))
        _, header, body = card.split("---\n", 2)
        assert yaml.safe_load(header)["pipeline_tag"] == "text-classification"
        assert "license" not in yaml.safe_load(header)
        assert r"0. a\|b: Money \& \<invoices\>" in body
        assert "\n1. c\\_d\n2. \\*e\\*\n" in body
        rows = {line.split("|")[1].strip(): spaced(line) for line in body.splitlines() if line[:2] == "| "}
        cells = [cell.strip() for cell in rows["accuracy"].split("|")[2:5]]
        assert cells == ["74.2 %", "71.8–76.6 %", "74.2 %"]
        assert "trained on 800 texts in 5 round(s)" in body
        assert "## Licence" in body
        assert "## Limits" in body

    def test_calibration_audit_and_sources(self, tmp_path):
        store = make_run(tmp_path / "run")
        calibration = {
            "temperature": 1.63,
            "fitted_on": "gold of the test set",
            "texts": 900,
            "measured_on": "gold of the test set, in folds",
            "measured_texts": 900,
            "ece_before": 0.12,
            "ece_after": 0.031,
        }
        change_summary(store, calibration=calibration)
        teacher, budget = {"kind": "vllm", "prompt_hash": "abc123"}, {"labels": 4000, "train": 800}
        store.write_json(MANIFEST, store.read_json(MANIFEST) | {"teacher": teacher, "budget": budget})
        rows, none = np.arange(90), np.zeros(90, dtype=int)
        answers = {row: int(row % 9 == 0) for row in range(80)}
        why = ["random"] * 85 + ["unsure"] * 5
        store.write_json(ESTIMATE, estimate(answers, rows, rows < 85, none, none, why, rows < 10, 4000))
        card, page = model_card(store), render(store).plain
        assert "Prompt (hash): `abc123`. It labelled 5,000 texts" in card
        assert "- Data: letters/\\*.parquet; tested on test.parquet." in card
        assert "- Budget: 4,000 texts for the teacher, 800 for the student." in card
        assert "0.120 before and 0.031 after, on 900 texts" in card
        assert "a temperature is part of the last layer" in card
        assert "5 more of the sample have no answer" in card
        for text in (card, page):
            assert "temperature of 1.630, fitted on 900 texts (gold of the test set)" in text
            assert "Of a random sample of 80, which represents 4,000, 88.8" in text
        assert "The figures of the rounds are without it." in page

    def test_a_missing_temperature_has_a_reason(self, tmp_path):
        store = make_run(tmp_path / "run", rounds=1)
        change_summary(store, calibration={"temperature": None, "reason": "there are fewer than 20 texts"})
        card, page = model_card(store), render(store).plain
        for text in (card, page):
            assert "Its confidence is not calibrated: there are fewer than 20 texts." in text
        assert "divide the logits" not in card
        assert "Figures on this page" not in page


def test_numbers_and_long_texts_are_shortened():
    assert [spaced(percent(0.7421)), count(1234567), spaced(money(1234.5, "EUR"))] == [
        "74.2 %",
        "1,234,567",
        "1,234.50 EUR",
    ]
    assert percent(None) == count(None) == duration(None) == money(None, "EUR") == "–"
    assert [spaced(money(amount, "EUR")) for amount in (0, 0.00123)] == ["0.00 EUR", "0.0012 EUR"]
    assert [spaced(duration(t)) for t in (0.4, 59.99, 11_520)] == ["0.4 s", "1 min 0 s", "3 h 12 min"]
    assert shorten("a  b\nc") == "a b c"
    assert len(shorten("word " * 1000)) <= 401
    assert shorten("x" * 1000).endswith("x…")
