"""Reports of made-up runs: the numbers come from code, the texts are written for these tests."""

import numpy as np
import pyarrow as pa
import pytest
import yaml
from report_runs import ATTACK, LABELS, WARM, add_teacher, make_run, render

from llkd_ray.audit.job import estimate
from llkd_ray.display import count, duration, money, percent, shorten
from llkd_ray.evaluation.run_record import read_run_record
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import quality_of
from llkd_ray.report.pages import model_card, write_report
from llkd_ray.storage import tables as tables_module
from llkd_ray.storage.run_dir import (
    CONFIG,
    ESTIMATE,
    EXAMPLES_INDEX,
    MANIFEST,
    QUARANTINE_DIR,
    SELECTED,
    SUMMARY,
    RunStore,
    round_file,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return render(make_run(tmp_path_factory.mktemp("runs") / "llkd-monday"))


def test_heading_names_run_policy_and_models(whole):
    for name in ("llkd-monday", "llkd", "random", "models/large-teacher", "minilm"):
        assert name in whole.plain[:250]


def test_conclusion_compares_with_the_teacher_and_counts_texts(whole):
    assert "The student is right on 74.2 % of the test texts (95 % interval 71.8–76.6 %)" in whole.plain
    assert "the same as the teacher (74.2 %)" in whole.plain
    assert "trained on 800 of the 5,000 texts that the teacher labelled" in whole.plain


@pytest.mark.parametrize(
    ("student", "words", "level"),
    [
        (0.8, "5.8 points above the teacher's 74.2 %", False),
        (0.7, "4.2 points below the teacher's 74.2 %", False),
        (0.75, "0.8 points above the teacher's 74.2 %", True),
    ],
)
def test_conclusion_says_above_or_below(tmp_path, student, words, level):
    store = make_run(tmp_path / "run")
    summary = store.read_json(SUMMARY)
    summary["student"] |= {"accuracy": student, "accuracy_interval": [student - 0.02, student + 0.02]}
    store.write_json(SUMMARY, summary)
    page = render(store)
    assert words in page.plain
    assert ("take the two as level" in page.plain) == level


def test_table_has_a_row_for_each_round(whole):
    heading = next(row for row in whole.rows if row and row[0] == "Round")
    row = [" ".join(cell.split()) for cell in whole.row("4")]
    cells = dict(zip(heading, row, strict=True))
    assert cells["Trained on"] == "800"
    assert cells["Teacher tokens"] == "305,000"
    assert cells["Accuracy"] == percent(0.5 + 0.25 * (1 - 0.5**5)).replace("\u202f", " ")
    assert cells["Pseudo-labels right"] == "83.0 %"
    assert cells["Time"] == "1 min 1 s"  # 18 + 0.4 + 33.5 + 5.2 + 2.1 + 1.5 = 60.7


def test_teachers_confidence_is_held_against_its_accuracy(whole):
    assert whole.row("1 (most confident)")[1] == percent(0.93)
    assert whole.row("5 (least confident)")[1] == percent(0.52)
    assert "1.3 % of the teacher's probability went to answers that are no label" in whole.plain


def test_teachers_figures_stand_raw_beside_used(tmp_path):
    store = make_run(tmp_path / "run")
    quality = add_teacher(store, calibrator=WARM)["teacher"]["quality"]
    page = render(store)
    raw, used = quality["raw"], quality["used"]
    assert page.row("Figure") == ["Figure", "As it answers", "As it is used"]
    assert page.row("Log loss")[1:] == [f"{raw['nll']:.3f}", f"{used['nll']:.3f}"]
    assert page.row("Calibration error")[1:] == [f"{raw['ece']:.3f}", f"{used['ece']:.3f}"]
    for figures in (raw, used):
        assert "{:.3f}–{:.3f}".format(*figures["ece_interval"]) in page.text
    assert used["ece"] < raw["ece"] - 0.05, "or the test tells nothing"
    assert "On 1,200 texts with gold (test set). The temperature was fitted on 200 other texts" in page.plain
    assert page.row("1 (most confident)")[2] == percent(used["by_decile"][0]["accuracy"])
    assert len([row for row in page.rows if "confident)" in row[0]]) == 2
    for name, one in zip(LABELS, used["per_class"], strict=True):
        row = next(row for row in page.rows if row and row[0] == name and len(row) == 7)
        assert row[1:3] == [count(one["gold"]), count(one["predicted"])]
        assert row[3:5] == [percent(one["confidence"]), percent(one["precision"])]
    words = next(a["aria-label"] for a in page.all("svg") if "bins" in a.get("aria-label", ""))
    assert f"as it answers: sure of {percent(mean_confidence(raw))}" in words
    assert f"as it is used: sure of {percent(mean_confidence(used))}" in words


def mean_confidence(figures):
    bins = [one for one in figures["reliability"] if one["texts"]]
    return sum(one["texts"] * one["confidence"] for one in bins) / figures["texts"]


@pytest.mark.parametrize("method", ["raw", "votes"])
def test_answers_used_as_they_are_given_stand_once(tmp_path, method):
    store = make_run(tmp_path / "run")
    add_teacher(store, calibrator=Calibrator(method))
    page = render(store)
    assert page.row("Figure") == ["Figure", "As it answers"]
    words = next(a["aria-label"] for a in page.all("svg") if "bins" in a.get("aria-label", ""))
    assert words.count("sure of") == 1


def test_what_the_teacher_took_is_in_a_table(tmp_path):
    store = make_run(tmp_path / "run")
    add_teacher(store)
    page = render(store)
    assert page.row("Used") == ["Used", "Teacher"]
    assert page.row("Texts cut to length")[1] == "17"
    assert page.row("… of them from the prefix cache")[1] == "220,000"
    assert page.row("Texts answered in an earlier run")[1] == "700"
    assert page.row("… tokens that this saved")[1] == "49,650"
    assert page.row("Cost")[1] == "0.094\u202fEUR"
    assert "The cap" not in page.plain
    assert "Replicas lost" not in page.plain
    assert "0.094 EUR; 700 texts were answered" in model_card(store).replace("\u202f", " ")


@pytest.mark.parametrize("reached", [True, False])
def test_cap_and_lost_replicas_are_told(tmp_path, reached):
    store = make_run(tmp_path / "run")
    cap = {"texts": None, "tokens": 310_000, "cost": 2.5, "reached": reached}
    add_teacher(store, cap=cap, lost=[{"teacher": "large", "reason": "CUDA <out> of memory"}])
    page = render(store)
    cap_words = "The cap of 310,000 tokens or 2.50 EUR was "
    assert cap_words + ("reached: 250 texts were not asked for." if reached else "not reached.") in page.plain
    assert "large: CUDA <out> of memory" in page.plain
    assert ("was reached: 250 texts" in model_card(store)) == reached


def test_a_cascade_names_both_teachers_and_keeps_their_cost_apart(tmp_path):
    store = make_run(tmp_path / "run")
    summary = add_teacher(store)
    config = yaml.safe_load(store.read_bytes(CONFIG))
    members = {
        name: config["teacher"] | {"model": f"models/{name}", "confidence": {"method": method}}
        for name, method in (("small", "batch"), ("large", "raw"))
    }
    config["teacher"] |= {"kind": "cascade", "model": None, "cascade": members}
    store.write_bytes(CONFIG, yaml.safe_dump(config).encode())
    used = summary["usage"]["teacher"]
    store.write_json(SUMMARY, summary | {"usage": {"small": used, "large": used | {"texts": 310}}})
    page = render(store)
    assert "models/small and models/large" in page.plain[:300]
    assert page.row("Used") == ["Used", "Small", "Large"]
    assert page.row("Texts")[1:] == ["4,300", "310"]
    assert "The small one’s confidence is had by dividing" in page.plain
    assert "The large one’s confidence is taken as it says" in page.plain
    assert "Large: 310 texts" in model_card(store)


@pytest.mark.parametrize("method", ["raw", "batch", "votes"])
def test_without_gold_nothing_is_called_calibrated(tmp_path, method):
    store = make_run(tmp_path / "run", gold=False)
    add_teacher(store, calibrator=Calibrator(method), gold=False)
    for text in (render(store).text, model_card(store)):
        assert "calibrat" not in text.lower()
        assert "not checked: there is no gold" in text


def test_what_older_runs_do_not_tell_is_left_out(whole):
    assert not [row for row in whole.rows if row and row[0] in ("Used", "Figure", "Tenth")]
    assert "The cap" not in whole.plain
    assert "not checked" not in whole.plain
    assert whole.row("Part")


def test_a_teacher_may_be_all_right_and_a_class_unheard_of(tmp_path):
    store = make_run(tmp_path / "run")
    summary = add_teacher(store)
    figures = quality_of(np.eye(5)[[0, 1, 2]], np.arange(3), Calibrator(), np.random.default_rng(0))
    summary["teacher"]["quality"] = {"on": "pool texts with gold"} | figures
    store.write_json(SUMMARY, summary)
    page = render(store)
    assert "On 3 texts with gold (pool texts with gold)" in page.plain
    assert page.row("AUROC")[1] == "–"
    assert next(row for row in page.rows if row and row[0] == "account" and len(row) == 7)[3:] == ["–"] * 4


def test_figures_are_inline_drawings_with_words(whole):
    drawings = [a for a in whole.all("svg") if a.get("role") == "img"]
    words = [a["aria-label"].replace("\u202f", " ") for a in drawings]
    assert len(words) == 3
    assert "Student's accuracy: from 62.5 % after 160 texts to 74.2 % after 800 texts." in words[0]
    assert "Teacher's accuracy: 74.2 %." in words[0]
    assert words[1].startswith("Same answer as the teacher: from 70.0 %")
    assert "train 2 min 18 s" in words[2]
    assert all("width" not in a and "viewbox" in a for a in drawings)


def test_page_needs_nothing_from_outside(whole):
    assert not whole.all("script") + whole.all("link") + whole.all("img") + whole.all("iframe")
    used = [v for _, attributes in whole.elements for k, v in attributes.items() if k in ("href", "src")]
    assert "url(" not in whole.styles
    assert "@import" not in whole.styles
    assert not used


def test_ids_are_unique_and_references_lead_somewhere(whole):
    ids = [a["id"] for _, a in whole.elements if "id" in a]
    assert len(ids) == len(set(ids))
    references = [a[k] for _, a in whole.elements for k in ("xlink:href", "aria-labelledby") if k in a]
    assert references
    assert {one.removeprefix("#") for one in references} <= set(ids)
    clips = [a["clip-path"][5:-1] for _, a in whole.elements if "clip-path" in a]
    assert set(clips) <= set(ids)


def test_selected_texts_are_counted_by_class_and_shown_with_weight(tmp_path):
    store = make_run(tmp_path / "run")
    tables = [store.read_table(round_file(k, "batch.parquet")) for k in range(5)]
    labels = np.concatenate([table["label"].to_numpy() for table in tables])
    page = render(store)
    for number, name in enumerate(LABELS):
        assert page.row(name)[1] == str((labels == number).sum())
    assert len(page.all("blockquote")) == 3 * len(LABELS)
    assert "weight 9.00" in page.plain


def test_a_text_selected_in_two_rounds_counts_once(tmp_path):
    store = make_run(tmp_path / "run", rounds=2)
    before = read_run_record(store).selected
    store.write_bytes(round_file(2, "batch.parquet"), store.read_bytes(round_file(0, "batch.parquet")))
    assert read_run_record(store).selected == before


def test_texts_and_names_are_escaped(tmp_path):
    labels = ("<b>bold</b>", "delivery")
    store = make_run(tmp_path / "run", labels=labels)
    page = render(store)
    assert " ".join(ATTACK.split()) in page.plain
    assert not page.all("script") + page.all("b")
    assert page.row("<b>bold</b>")
    raw = store.read_bytes("report.html").decode()
    assert "<script" not in raw
    assert "<invoices>" not in raw


def test_data_quality_adds_up(tmp_path):
    store = make_run(tmp_path / "run")
    columns = {
        "source": ["teacher"] * 2,
        "position": [3, 5],
        "reason": ["prompt_refused"] * 2,
        "detail": ["ticket 1"] * 2,
        "start_of_text": ["Dear", "Sir"],
    }
    store.write_table(
        f"{QUARANTINE_DIR}/teacher-00000001.parquet", pa.table(columns, schema=tables_module.QUARANTINE)
    )
    page = render(store)
    assert page.row("Read")[1:] == ["8,352", "1,205"]
    assert page.row("Quarantined: duplicate")[1:] == ["340", "5"]
    assert page.row("Quarantined: empty_text")[1:] == ["12", "0"]
    assert page.row("Kept")[1:] == ["8,000", "1,200"]
    assert "no answer to 2 of the kept rows: prompt_refused." in page.plain


def test_configuration_and_manifest_are_there_whole(whole):
    assert "policy: llkd" in whole.text
    assert '"ray": "2.60.0"' in whole.text
    assert not any("open" in a for a in whole.all("details")[-2:])


def test_without_true_labels_accuracy_is_said_to_be_unknown(tmp_path):
    store = make_run(tmp_path / "run", gold=False)
    page = render(store)
    assert "How accurate the student is remains unknown" in page.plain
    assert "it gives the teacher's answer 79.4 % of the time" in page.plain
    assert "Student's accuracy" not in page.text
    assert len([a for a in page.all("svg") if a.get("role") == "img"]) == 2
    assert "Accuracy" not in next(row for row in page.rows if row and row[0] == "Round")
    assert page.row("Kept")[1:] == ["8,000", "0"]
    assert "On 200 held-out texts it gives" in page.plain
    assert "Pseudo-labels right" not in page.text
    card = model_card(store)
    assert "Accuracy is unknown" in card
    assert "| accuracy |" not in card


def test_teacher_may_be_unknown_where_the_student_is_known(tmp_path):
    page = render(make_run(tmp_path / "run", teacher_known=False))
    assert "The student is right on 74.2 % of the test texts (95 % interval 71.8–76.6 %)." in page.plain
    assert "Teacher's accuracy" not in page.text
    assert "confidence be trusted" not in page.text


def test_unfinished_run_shows_its_last_round(tmp_path):
    page = render(make_run(tmp_path / "run", rounds=3, finished=False))
    assert "This run has not finished" in page.plain
    assert f"right on {100 * (0.5 + 0.25 * 0.875):.1f} % of the test texts." in page.plain
    assert "trained on 480 of the 3,000 texts" in page.plain


@pytest.mark.filterwarnings("error")
def test_one_round(tmp_path):
    page = render(make_run(tmp_path / "run", rounds=1))
    assert "Student's accuracy: 62.5 % after 160 texts." in page.all("svg")[0]["aria-label"].replace(
        "\u202f", " "
    )
    assert "1 round" in page.plain
    assert "1 rounds" not in page.plain


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ingested", [True, False])
def test_no_round(tmp_path, ingested):
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


def test_many_labels_are_all_there_but_folded(tmp_path):
    labels = tuple(f"intent {number:02d}" for number in range(77))
    page = render(make_run(tmp_path / "run", labels=labels))
    assert all(page.row(name) for name in labels)
    assert not any("open" in a for a in page.all("details"))


def test_measures_that_are_not_numbers_count_as_unknown(tmp_path):
    store = make_run(tmp_path / "run", rounds=2, finished=False)
    line = store.read_metrics()[1] | {"accuracy": float("nan"), "macro_f1": float("nan"), "ece": float("nan")}
    store.append_metrics(line)
    page = render(store)
    assert "nan" not in page.text.lower()
    assert "remains unknown" in page.plain


def test_same_run_gives_the_same_page(tmp_path):
    store = make_run(tmp_path / "run")
    write_report(store)
    first = store.read_bytes("report.html")
    write_report(store)
    assert store.read_bytes("report.html") == first


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        write_report(RunStore(str(tmp_path)))


def test_model_card_says_what_the_student_reckons_with(tmp_path):
    store = make_run(tmp_path / "run", labels=("ham", "spam", "news"))
    assert "reckons with" not in model_card(store)
    for number, prior in enumerate(([0.5, 0.3, 0.2], [0.62, 0.3, 0.08])):
        store.write_json(round_file(number, SELECTED), {"prior": prior})
    line = next(line for line in model_card(store).splitlines() if "reckons with" in line)
    assert "ham 62.0 %, spam 30.0 %, news 8.0 %." in line.replace("\u202f", " "), "those of the last round"
    assert "`labels.prior`" in line


def test_model_card_says_what_how_and_how_good(tmp_path):
    labels = ("a|b", "c_d", "*e*")
    card = model_card(make_run(tmp_path / "run", labels=labels))
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "text-classification"
    assert "license" not in yaml.safe_load(header)
    assert r"0. a\|b: Money \& \<invoices\>" in body
    assert "\n1. c\\_d\n2. \\*e\\*\n" in body
    rows = {line.split("|")[1].strip(): line for line in body.splitlines() if line.startswith("| ")}
    assert [c.strip() for c in rows["accuracy"].replace("\u202f", " ").split("|")[2:5]] == [
        "74.2 %",
        "71.8–76.6 %",
        "74.2 %",
    ]
    assert "trained on 800 texts in 5 round(s)" in body
    assert "## Licence" in body
    assert "## Limits" in body


def test_numbers_read_well():
    assert percent(0.7421) == "74.2\u202f%"
    assert percent(None) == count(None) == duration(None) == "–"
    assert count(1234567) == "1,234,567"
    assert money(1234.5, "EUR") == "1,234.50\u202fEUR"
    assert money(0, "EUR") == "0.00\u202fEUR"
    assert money(0.00123, "EUR") == "0.0012\u202fEUR"
    assert money(None, "EUR") == "–"
    assert duration(0.4) == "0.4\u202fs"
    assert duration(59.99) == "1\u202fmin 0\u202fs"
    assert duration(3 * 3600 + 720) == "3\u202fh 12\u202fmin"
    assert shorten("a  b\nc") == "a b c"
    assert len(shorten("word " * 1000)) <= 401
    assert shorten("x" * 1000).endswith("x…")


class TestCardOfWhatCameLater:
    def test_calibration_audit_and_what_it_was_made_from(self, tmp_path):
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
        store.write_json(SUMMARY, store.read_json(SUMMARY) | {"calibration": calibration})
        more = {
            "teacher": {"kind": "vllm", "prompt_hash": "abc123"},
            "budget": {"labels": 4000, "train": 800},
        }
        store.write_json(MANIFEST, store.read_json(MANIFEST) | more)
        rows, none = np.arange(90), np.zeros(90, dtype=int)
        answers = {row: int(row % 9 == 0) for row in range(80)}
        why = ["random"] * 85 + ["unsure"] * 5
        store.write_json(ESTIMATE, estimate(answers, rows, rows < 85, none, none, why, rows < 10, 4000))
        card = model_card(store)
        assert "Prompt (hash): `abc123`. It labelled 5,000 texts" in card
        assert "- Data: letters/\\*.parquet; tested on test.parquet." in card
        assert "- Budget: 4,000 texts for the teacher, 800 for the student." in card
        assert "temperature of 1.630, fitted on 900 texts (gold of the test set)" in card
        assert "0.120 before and 0.031 after, on 900 texts" in card
        assert "divide the logits by it before the softmax" in card
        assert "Of a random sample of 80, which stands for all 4,000, 88.8" in card
        assert "5 more of the sample have no answer" in card
        page = render(store).plain
        assert "temperature of 1.630, fitted on 900 texts (gold of the test set)" in page
        assert "Figures on this page are without it." in page
        assert "What people say" in page
        assert "Of a random sample of 80, which stands for all 4,000, 88.8" in page

    def test_no_temperature_has_a_reason(self, tmp_path):
        store = make_run(tmp_path / "run")
        reason = {"temperature": None, "reason": "there are fewer than 20 texts"}
        store.write_json(SUMMARY, store.read_json(SUMMARY) | {"calibration": reason})
        card = model_card(store)
        assert "Its confidence is not calibrated: there are fewer than 20 texts." in card
        assert "divide the logits" not in card
        page = render(store).plain
        assert "Its confidence is not calibrated: there are fewer than 20 texts." in page
        assert "Figures on this page" not in page
        assert "What people say" not in page
