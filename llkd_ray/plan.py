"""What a run would do, and what it would take of the teacher, from a sample, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add

from llkd_ray import sources
from llkd_ray.config import Config, ConfigError, SourceConfig
from llkd_ray.console import Display
from llkd_ray.estimate import what_caps_do
from llkd_ray.loop import check
from llkd_ray.plan_teacher import Part, TeacherPlan, plan_teacher, totals_in_words
from llkd_ray.pool_sample import count_rows, draw
from llkd_ray.schedule import Schedule
from llkd_ray.teacher_config import member_field
from llkd_ray.teachers import self_contained

SAMPLE_ROWS = 500
TEST_SAMPLE_ROWS = 200


def plan(config: Config, display: Display) -> None:
    """Check the config, read a sample and say what a run would do. Starts neither Ray nor an engine."""
    config = self_contained(config)
    check(config)
    budget = config.budget
    pool = look_at(config, config.corpus, "corpus", SAMPLE_ROWS, display.say)
    if budget.labels is not None:
        pool = replace(pool, taken=min(budget.labels, pool.population))
    parts = [pool]
    train = f"{budget.train} texts" if isinstance(budget.train, int) else f"{budget.train:.1%} of the pool"
    labels = f"at most {budget.labels:,} texts" if budget.labels else "the whole pool"
    display.say(f"student: {config.student.model}, {config.student.max_workers} rank(s)")
    display.say(
        f"policy: {config.selection.policy}; {budget.rounds} rounds; the teacher labels {labels}, hold-out "
        f"included; the student trains on {train}"
    )
    if config.test is not None:
        test = look_at(config, config.test, "test", TEST_SAMPLE_ROWS, display.say)
        asked = ", and the teacher labels it once" if config.evaluation.teacher_on_test else ""
        display.say(f"test: the student is evaluated on it after every round{asked}")
        parts += [test] if config.evaluation.teacher_on_test else []
    plans = []
    for name, teacher in config.teacher.members():
        plans.append(plan_teacher(config, member_field(name), teacher, parts))
        for line in plans[-1].lines:
            display.say(f"{name}: {line}")
    _say_totals(config, plans, display)
    for (name, _), one in zip(config.teacher.members(), plans, strict=True):
        if one.first_prompt is not None:
            display.say(f"{name}: the first prompt, as the teacher reads it:")
            display.console.print(one.first_prompt, markup=False)


def _say_totals(config: Config, plans: Sequence[TeacherPlan], display: Display) -> None:
    """Both teachers of a cascade together, and what the caps make of it."""
    bills = [one.bill for one in plans if one.bill is not None]
    if len(bills) < len(plans):
        if not config.budget.cap.is_off:
            display.say("cap: whether it is reached is unknown, as the number of texts is")
        return
    whole = reduce(add, bills)
    *_, (_, last) = config.teacher.members()
    if len(bills) > 1:
        display.say(f"both teachers: {totals_in_words(whole, last)}")
    for line in what_caps_do(config.budget.cap, whole, last.price.currency):
        display.say(f"cap: {line}")


def look_at(config: Config, source: SourceConfig, field: str, n: int, say: Callable[[str], None]) -> Part:
    """Count a source's rows and draw a sample, which ``say`` hears of.

    Raises :class:`ConfigError` where none of its rows can be used.
    """
    units = sources.plan(source, field)
    sample = draw(units, source, field, config.labels.names, n)
    if not sample.kept:
        raise ConfigError(
            f"{field}.uri: none of the {sample.read} rows looked at can be used ({dict(sample.refused)}); "
            f"check {field}.text and {field}.where"
        )
    rows = count_rows(units, source, field)
    if rows is None:
        count, texts = "an unknown number of rows", None
    else:
        count = (
            f"{rows.count:,} rows" if rows.is_exact else f"about {rows.count:,} rows (estimated from bytes)"
        )
        texts = max(len(sample.kept), round(rows.count * sample.usable))
    if rows is not None and rows.is_exact and field == "corpus":
        Schedule.plan(config, rows.count, 0)  # a budget that does not fit all rows fits no part of them
    size = sum(unit.size for unit in units) / 2**20
    say(f"{field}: {count} in {len(units)} part(s), {size:,.1f} MiB to read")
    refused = "".join(f", {count} {reason}" for reason, count in sample.refused.most_common())
    passed = f"; {field}.where lets {sample.passed:.1%} of the rows through" if source.where else ""
    say(
        f"{field}: {len(sample.kept)} of {sample.read} rows of a sample from {sample.parts} place(s) are "
        f"usable{refused}{passed}" + ("" if texts is None else f"; about {texts:,} texts in all")
    )
    name = "pool" if field == "corpus" else "test set"
    return Part(name, sample, math.inf if texts is None else texts, texts)
