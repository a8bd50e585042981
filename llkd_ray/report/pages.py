"""Renders a run as pages: report.html, from the files of its directory, and the model card.

The report is one file without scripts or external links, so it opens offline and can be sent by mail.
Corpus texts are untrusted: the template escapes everything except our own figures.
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
from llkd_ray.evaluation.measure import accuracy_difference
from llkd_ray.evaluation.round_records import read_baseline, read_round_records
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
"""The confusion matrix is shown for at most this many classes."""
MISTAKES = 12
"""Class pairs listed next to it."""
# The text after "Its confidence", by ``teacher.confidence.method``.
METHOD_WORDS = {
    "raw": "is used as given",
    "batch": "is its answers divided by their mean before the first round (batch calibration)",
    "temperature": "is scaled by a temperature that was fitted before the first round",
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


def write_pages(store: RunStore, baseline: RunStore | None = None) -> None:
    """Write the model card and the report of a run that has a model, both from the same files."""
    store.write_bytes(CARD, model_card(store).encode())
    write_report(store, baseline)


def write_report(store: RunStore, baseline: RunStore | None = None) -> str:
    """Write report.html into the run directory, from its files, and return its path.

    The learning curves of ``baseline``, a run on the same data, are drawn as dotted lines.

    Works at any stage of a run: rounds, summary, test set and gold labels may be missing. Raises
    ValueError if the directory contains no run.
    """
    record = read_run_record(store)
    rounds = read_round_records(store, record)
    compared = read_baseline(baseline) if baseline else None
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            conclusion=conclusion(record),
            verdict=against_baseline(store, baseline) if baseline and record.rounds else "",
            curve=learning_curve(record, compared),
            agreement=agreement_curve(record, held_out(record), compared),
            times=time_bars(record),
            timeline=timeline_figure(record),
            reliability=reliability_diagram(record),
            rounds=rounds,
            scatter=selected_figure(record, rounds),
            thresholds=thresholds_figure(record, rounds),
            shares=describe_shares(rounds),
            student_reliability=student_reliability(rounds.reliability),
            mistakes=rounds.mistakes(MISTAKES),
            matrix_classes=MATRIX_CLASSES,
            method_words=METHOD_WORDS,
            calibration=describe_calibration(record),
            audit=describe_audit(record),
            costs=COSTS,
            caps=caps(record),
            manifest_text=json.dumps(record.manifest, indent=2, ensure_ascii=False),
            columns=_round_columns(record),
            start=phase_seconds(record.rounds[0])["start"] if record.rounds else 0.0,
            most_selected=max((one.texts for one in record.selected), default=0),
        )
    )
    store.write_bytes(REPORT, page.encode())
    return store.uri(REPORT)


def model_card(store: RunStore) -> str:
    """Markdown for model/README.md: what the model is, how it was trained, its quality and its limits."""
    record = read_run_record(store)
    return (
        page_environment()
        .get_template("model_card.md.j2")
        .render(
            record=record,
            conclusion=conclusion(record),
            held_out=held_out(record),
            method_words=METHOD_WORDS,
            calibration=describe_calibration(record),
            audit=describe_audit(record),
            caps=caps(record),
        )
    )


def caps(record: RunRecord) -> str:
    """The budget's limits as text; '' if there are none."""
    limits = record.spent.cap or {}
    said = [f"{count(limits[unit])} {unit}" for unit in ("texts", "tokens") if limits.get(unit) is not None]
    if limits.get("cost") is not None:
        said.append(money(limits["cost"], record.spent.currency or ""))
    return " or ".join(said)


def describe_calibration(record: RunRecord) -> str:
    """The student's temperature and its effect, or why there is none; '' before the end of the run."""
    found = record.calibration
    if not found:
        return ""
    if found["temperature"] is None:
        return f"Its confidence is not calibrated: {found['reason']}."
    return (
        f"Its confidence is calibrated by a temperature of {decimals(found['temperature'])}, fitted on "
        f"{count(found['texts'])} texts ({found['fitted_on']}). The expected calibration error is "
        f"{decimals(found['ece_before'])} before and {decimals(found['ece_after'])} after, on "
        f"{count(found['measured_texts'])} texts ({found['measured_on']})."
    )


def describe_audit(record: RunRecord) -> list[str]:
    """Sentences on the results of an audit; empty without one."""
    if not record.audit or not record.audit["pseudo_labels"]["texts"]:
        return []
    sample, student, missing = (record.audit[n] for n in ("pseudo_labels", "student", "unanswered_in_sample"))
    said = (
        f"People looked at {count(record.audit['answered'])} of the teacher's labels. Of a random sample of "
        f"{count(sample['texts'])}, which represents {count(record.audit['labelled'])}, "
        f"{percent(sample['share'])} are right (95 % interval {percent_range(sample['interval'])})"
    )
    since = record.audit["labelled_since"]
    said += f"; {count(since)} labelled since it was drawn are not represented" if since else ""
    said += f"; {count(missing)} more of the sample have no answer" if missing else ""
    found = [f"{said}. The others were chosen because they are doubtful and are not counted here."]
    if student["texts"]:
        found.append(
            f"On {count(student['texts'])} of the sample that the student was not trained on, it is right on "
            f"{percent(student['share'])} ({percent_range(student['interval'])})."
        )
    return found


def conclusion(record: RunRecord) -> str:
    """The outcome in plain sentences."""
    if not record.rounds:
        return "No round has finished yet, so there are no results."
    outcome = _agreement_only(record) if record.student["accuracy"] is None else _accuracy(record)
    return (
        f"{outcome} The student was trained on {count(record.totals['trained'])} of the "
        f"{count(record.totals['labelled'])} texts that the teacher labelled."
    )


def against_baseline(store: RunStore, baseline: RunStore) -> str:
    """Which of two students is better on the test set that they share, in a sentence."""
    records = [read_run_record(one) for one in (store, baseline)]
    name, other = (record.config["selection"]["policy"] for record in records)
    found = accuracy_difference(store, baseline, len(records[0].labels))
    if found is None:
        return "Which student is better is unknown: they share no test texts with true labels."
    points, low, high = (100 * value for value in found)
    said = (
        f"The student by {name} is {abs(points):.1f} points of accuracy "
        f"{'above' if points >= 0 else 'below'} that by {other} (95 % interval {low:+.1f} to {high:+.1f})"
    )
    return f"{said}." if low > 0 or high < 0 else f"{said}: chance may explain the difference."


def _agreement_only(record: RunRecord) -> str:
    said = "The student's accuracy is unknown: there are no test texts with true labels."
    agreement = record.student["teacher_agreement"]
    if agreement is None:
        return said
    return (
        f"{said} On {held_out(record)} it predicts the teacher's label {percent(agreement)} of the time; "
        "that is agreement, not accuracy, for the teacher may be wrong."
    )


def held_out(record: RunRecord) -> str:
    """Describes the texts on which student and teacher are compared."""
    number = record.manifest.get("rows", {}).get("holdout")
    return f"{count(number)} held-out texts" if number else "held-out texts"


def _accuracy(record: RunRecord) -> str:
    student, teacher = record.student["accuracy"], record.teacher["accuracy"]
    interval = record.student["accuracy_interval"]
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
        return f"{said} The teacher's figure lies inside the interval: the difference may be chance."
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


def _round_columns(record: RunRecord) -> list[tuple[str, list[str]]]:
    """Heading and cells of each column of the table of rounds; columns without any value are left out."""
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
        (heading, [show(line.get(key)) for line in record.rounds])
        for heading, key, show in kinds
        if any(line.get(key) is not None for line in record.rounds)
    ]
    return [*columns, ("Time", [duration(sum(phase_seconds(line).values())) for line in record.rounds])]
