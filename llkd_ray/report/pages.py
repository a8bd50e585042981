"""A run on one page: report.html from the files of its directory, and the model card.

The page is one file without scripts or links to elsewhere, so it opens offline and can be sent by mail.
Texts of the corpus are not to be trusted: the template escapes everything but our own figures.
"""

from __future__ import annotations

import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from llkd_ray.display import (
    NARROW,
    count,
    decimals,
    duration,
    markdown,
    money,
    percent,
    percent_range,
    shorten,
)
from llkd_ray.evaluation.round_records import find_reference, read_round_records
from llkd_ray.evaluation.run_record import RunRecord, phase_seconds, read_run_record
from llkd_ray.report.figures import (
    agreement_curve,
    learning_curve,
    reliability_diagram,
    student_reliability,
    time_bars,
)
from llkd_ray.report.round_figures import describe_shares, selected_figure, thresholds_figure, timeline_figure
from llkd_ray.storage.run_dir import CARD, REPORT, RunStore

MATRIX_CLASSES = 16
"""Up to so many classes, who is taken for whom is shown as a whole table."""
MISTAKES = 12
"""Pairs of classes that are shown beside it."""
# What follows "Its confidence", by ``teacher.confidence.method``.
METHOD_WORDS = {
    "raw": "is taken as it says",
    "batch": "is had by dividing its answers by their mean before the first round",
    "temperature": "is set by a temperature that was fitted before the first round",
    "votes": "is the share of its sampled answers that agree",
}
COSTS = (
    ("Texts", "texts"),
    ("Requests", "requests"),
    ("Prompt tokens", "prompt_tokens"),
    ("… of them from the prefix cache", "cached_tokens"),
    ("Answer tokens", "answer_tokens"),
    ("Texts cut to length", "cut_texts"),
    ("Texts answered in an earlier run", "reused_texts"),
    ("… tokens that this saved", "reused_tokens"),
)


def write_pages(store: RunStore) -> None:
    """The card and the report of a run that has a model, together, so that they say the same."""
    store.write_bytes(CARD, model_card(store).encode())
    write_report(store)


def write_report(store: RunStore) -> str:
    """Write report.html into the run directory, from its files, and return where it is.

    A run by random selection on the same data that lies beside it is drawn in as a reference.

    Works at any time of a run: rounds, summary, test set and true labels may be missing. Raises
    ValueError where the directory holds no run.
    """
    facts = read_run_record(store)
    details, reference = read_round_records(store, facts), find_reference(store, facts.config)
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            run=facts,
            conclusion=conclusion(facts),
            held_out=held_out(facts),
            curve=learning_curve(facts, reference),
            agreement=agreement_curve(facts, reference),
            reference=reference,
            times=time_bars(facts),
            timeline=timeline_figure(facts),
            reliability=reliability_diagram(facts),
            details=details,
            scatter=selected_figure(facts, details),
            thresholds=thresholds_figure(facts, details),
            leaning=describe_shares(details),
            student_reliability=student_reliability(details.reliability),
            mistakes=details.mistakes(MISTAKES),
            matrix_classes=MATRIX_CLASSES,
            method_words=METHOD_WORDS,
            calibration=describe_calibration(facts),
            audit=describe_audit(facts),
            costs=COSTS,
            caps=caps(facts),
            manifest_text=json.dumps(facts.manifest, indent=2, ensure_ascii=False),
            columns=_round_columns(facts),
            most_selected=max((one.texts for one in facts.selected), default=0),
        )
    )
    store.write_bytes(REPORT, page.encode())
    return store.uri(REPORT)


def model_card(store: RunStore) -> str:
    """Markdown for model/README.md: what the model is, how it was made, how good it is, its limits."""
    facts = read_run_record(store)
    return (
        page_environment()
        .get_template("model_card.md.j2")
        .render(
            run=facts,
            conclusion=conclusion(facts),
            held_out=held_out(facts),
            method_words=METHOD_WORDS,
            calibration=describe_calibration(facts),
            audit=describe_audit(facts),
            caps=caps(facts),
        )
    )


def caps(run: RunRecord) -> str:
    """The limits that the budget set, in words; '' where it set none."""
    limits = run.spent.cap or {}
    said = [f"{count(limits[unit])} {unit}" for unit in ("texts", "tokens") if limits.get(unit) is not None]
    if limits.get("cost") is not None:
        said.append(money(limits["cost"], run.spent.currency or ""))
    return " or ".join(said)


def describe_calibration(run: RunRecord) -> str:
    """The student's temperature and what it does, or why there is none; '' before the end of the run."""
    found = run.calibration
    if not found:
        return ""
    if found["temperature"] is None:
        return f"Its confidence is not calibrated: {found['reason']}."
    return (
        f"Its confidence is set by a temperature of {decimals(found['temperature'])}, fitted on "
        f"{count(found['texts'])} texts ({found['fitted_on']}). The expected calibration error is "
        f"{decimals(found['ece_before'])} before and {decimals(found['ece_after'])} after, on "
        f"{count(found['measured_texts'])} texts ({found['measured_on']})."
    )


def describe_audit(run: RunRecord) -> list[str]:
    """Sentences on what people who looked at labels have found; none where nobody did."""
    if not run.audit or not run.audit["pseudo_labels"]["texts"]:
        return []
    sample, student, missing = (run.audit[n] for n in ("pseudo_labels", "student", "unanswered_in_sample"))
    said = (
        f"People looked at {count(run.audit['answered'])} of the teacher's labels. Of a random sample of "
        f"{count(sample['texts'])}, which stands for all {count(run.audit['labelled'])}, "
        f"{percent(sample['share'])} are right (95 % interval {percent_range(sample['interval'])})"
    )
    said += f"; {count(missing)} more of the sample have no answer" if missing else ""
    found = [f"{said}. The others were chosen for being doubtful and count nothing in this."]
    if student["texts"]:
        found.append(
            f"On {count(student['texts'])} of the sample that the student was not trained on, it is right on "
            f"{percent(student['share'])} ({percent_range(student['interval'])})."
        )
    return found


def conclusion(run: RunRecord) -> str:
    """The outcome in plain sentences."""
    if not run.rounds:
        return "No round has finished yet, so there is nothing to conclude."
    outcome = _agreement_only(run) if run.student["accuracy"] is None else _accuracy(run)
    return (
        f"{outcome} The student was trained on {count(run.totals['trained'])} of the "
        f"{count(run.totals['labelled'])} texts that the teacher labelled."
    )


def _agreement_only(run: RunRecord) -> str:
    said = "How accurate the student is remains unknown: there were no test texts with true labels."
    agreement = run.student["teacher_agreement"]
    if agreement is None:
        return said
    return (
        f"{said} On {held_out(run)} it gives the teacher's answer {percent(agreement)} of the time; "
        "that is agreement, not accuracy, for the teacher may be wrong."
    )


def held_out(run: RunRecord) -> str:
    """The texts on which student and teacher are compared."""
    number = run.manifest.get("rows", {}).get("holdout")
    return f"{count(number)} held-out texts" if number else "held-out texts"


def _accuracy(run: RunRecord) -> str:
    student, teacher = run.student["accuracy"], run.teacher["accuracy"]
    interval = run.student["accuracy_interval"]
    sure = f" (95{NARROW}% interval {percent_range(interval)})" if interval else ""
    said = f"The student is right on {percent(student)} of the test texts{sure}"
    if teacher is None:
        return f"{said}."
    points = round(100 * student, 1) - round(100 * teacher, 1)
    if abs(points) < 0.05:
        return f"{said}, the same as the teacher ({percent(teacher)})."
    word = "above" if points > 0 else "below"
    said = f"{said}, {abs(points):.1f} points {word} the teacher's {percent(teacher)}."
    if interval and interval[0] <= teacher <= interval[1]:
        return f"{said} The teacher's figure lies inside the interval: take the two as level."
    return said


def page_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llkd_ray.report"),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filter_ in (percent, percent_range, count, decimals, money, duration, shorten, markdown):
        environment.filters[filter_.__name__] = filter_
    return environment


def _round_columns(run: RunRecord) -> list[tuple[str, list[str]]]:
    """Heading and cells of each column of the table of rounds; columns that know nothing are left out."""
    kinds = [
        ("Round", "round", count),
        ("Labelled", "labelled", count),
        ("Trained on", "trained", count),
        ("Teacher tokens", "teacher_tokens", count),
        ("Accuracy", "accuracy", percent),
        ("Macro-F1", "macro_f1", percent),
        ("Calibration error", "ece", decimals),
        ("Agreement", "teacher_agreement", percent),
        ("Pseudo-labels right", "pseudo_label_accuracy", percent),
    ]
    columns = [
        (heading, [show(line.get(key)) for line in run.rounds])
        for heading, key, show in kinds
        if any(line.get(key) is not None for line in run.rounds)
    ]
    return [*columns, ("Time", [duration(sum(phase_seconds(line).values())) for line in run.rounds])]
