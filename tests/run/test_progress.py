"""Where a run stands, in words and in numbers."""

from __future__ import annotations

from dataclasses import replace

from llkd_ray.run.progress import RunStatus, budget_left, seconds_left

START = RunStatus(
    labelled=0,
    to_label=8000,
    trained=0,
    to_train=400,
    labels_a_second=0.0,
    tokens=0,
    tokens_a_second=0.0,
    round_number=0,
    rounds=4,
    note="",
    last={},
    seconds_left=None,
    budget_left="",
)
LATER = replace(
    START,
    labelled=2000,
    trained=100,
    labels_a_second=512.3,
    tokens=81_049,
    tokens_a_second=20_700.0,
    round_number=1,
    note="round 1: training, step 20 of 60",
    last={"loss": 0.5312, "macro_f1": 0.606, "accuracy": None, "teacher_agreement": 0.645},
    seconds_left=193.0,
    budget_left="1,200 texts",
)


def test_a_line_at_the_start_says_what_is_known():
    assert START.line() == "labelled 0 of 8000, trained on 0 of 400; starting"


def test_a_line_in_the_midst_says_all():
    assert LATER.line() == (
        "labelled 2000 of 8000, 512/s, trained on 100 of 400; round 1: training, step 20 of 60; "
        "left: 1,200 texts; about 3 min 10 s to go"
    )


def test_rows_say_the_same_to_a_terminal():
    rows = dict(LATER.rows())
    assert rows["round"] == "1 (2 of 4): training, step 20 of 60"
    assert "2,000 of 8,000 labelled, 512 a second; 81,049 tokens, 20,700 a second" in rows["teacher"]
    assert rows["teacher"].startswith("━━━━━━╌")
    assert "last round: loss 0.531, macro-F1 60.6 %, agreement 64.5 %" in rows["student"]
    assert rows["budget"] == "1,200 texts left"
    assert rows["to go"] == "about 3 min 10 s"
    assert "budget" not in dict(START.rows())
    assert dict(START.rows())["to go"] == "not known before the end of a round"


def test_numbers_leave_out_what_is_not_known():
    assert "accuracy" not in LATER.numbers()
    assert LATER.numbers()["macro_f1"] == 0.606
    assert "seconds_left" not in START.numbers()


def test_time_left_is_that_of_the_last_round_for_each_to_come():
    assert seconds_left([], 4, 10.0) is None
    lines = [{"seconds": {"train": 90.0}}, {"seconds": {"train": 20.0, "idle": 10.0, "teach": None}}]
    assert seconds_left(lines, 4, 5.0) == 55.0
    assert seconds_left(lines, 2, 5.0) == 0.0
    assert seconds_left([{}], 4, 5.0) == 0.0


def test_budget_left_is_never_less_than_nothing():
    cap = {"texts": 100, "tokens": None, "cost": 2.0}
    assert budget_left(cap, {"texts": 120.0, "tokens": 5.0, "cost": 0.5}, "EUR") == "0 texts, 1.50 EUR"
