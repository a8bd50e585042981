"""A run on one page: report.html from the files of its directory, and the model card.

The page is one file without scripts or links to elsewhere, so it opens offline and can be sent by mail.
Texts of the corpus are not to be trusted: the template escapes everything but our own figures.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llkd_ray.facts import PHASES, RunFacts, phase_seconds, read_facts
from llkd_ray.store import RunStore

REPORT = "report.html"
SAMPLE_CHARS = 400  # Of a sample text; the rest is cut off.

# Okabe & Ito's colours, which people with any common colour blindness can tell apart.
ACCURACY_COLOUR, F1_COLOUR, AGREEMENT_COLOUR = "#0072B2", "#D55E00", "#009E73"
PHASE_COLOURS = dict(
    zip(PHASES, ("#0072B2", "#CC79A7", "#D55E00", "#56B4E9", "#009E73", "#BBBBBB"), strict=True)
)
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "columnspacing": 1.2,
    "handlelength": 1.6,
    "handletextpad": 0.5,
}
MISSING = "–"

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


def write_report(store: RunStore) -> str:
    """Write report.html into the run directory, from its files alone, and return where it is.

    Works at any time of a run: rounds, summary, test set and true labels may be missing. Raises
    ValueError where the directory holds no run.
    """
    facts = read_facts(store)
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            run=facts,
            conclusion=conclusion(facts),
            held_out=held_out(facts),
            curve=_learning_curve(facts),
            agreement=_agreement_curve(facts),
            times=_time_bars(facts),
            reliability=_reliability_diagram(facts),
            method_words=METHOD_WORDS,
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
    facts = read_facts(store)
    return (
        page_environment()
        .get_template("model_card.md.j2")
        .render(
            run=facts,
            conclusion=conclusion(facts),
            held_out=held_out(facts),
            method_words=METHOD_WORDS,
            caps=caps(facts),
        )
    )


def caps(run: RunFacts) -> str:
    """The limits that the budget set, in words; '' where it set none."""
    limits = run.spent.cap or {}
    said = [f"{count(limits[unit])} {unit}" for unit in ("texts", "tokens") if limits.get(unit) is not None]
    if limits.get("cost") is not None:
        said.append(money(limits["cost"], run.spent.currency or ""))
    return " or ".join(said)


def conclusion(run: RunFacts) -> str:
    """The outcome in plain sentences."""
    if not run.rounds:
        return "No round has finished yet, so there is nothing to conclude."
    outcome = _agreement_only(run) if run.student["accuracy"] is None else _accuracy(run)
    return (
        f"{outcome} The student was trained on {count(run.totals['trained'])} of the "
        f"{count(run.totals['labelled'])} texts that the teacher labelled."
    )


def _agreement_only(run: RunFacts) -> str:
    said = "How accurate the student is remains unknown: there were no test texts with true labels."
    agreement = run.student["teacher_agreement"]
    if agreement is None:
        return said
    return (
        f"{said} On {held_out(run)} it gives the teacher's answer {percent(agreement)} of the time; "
        "that is agreement, not accuracy, for the teacher may be wrong."
    )


def held_out(run: RunFacts) -> str:
    """The texts on which student and teacher are compared."""
    number = run.manifest.get("rows", {}).get("holdout")
    return f"{count(number)} held-out texts" if number else "held-out texts"


def _accuracy(run: RunFacts) -> str:
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


# --- Numbers as people read them -----------------------------------------------------------------

NARROW = "\u202f"  # A narrow space that does not break.


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}{NARROW}%"


def percent_range(interval: Sequence[float] | None) -> str:
    return MISSING if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}{NARROW}%"


def count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def decimals(number: float | None, places: int = 3) -> str:
    return MISSING if number is None else f"{number:.{places}f}"


def money(amount: float | None, currency: str) -> str:
    """Small sums with as many digits as it takes to tell them from nothing."""
    if amount is None:
        return MISSING
    return f"{amount:,.2f}{NARROW}{currency}" if not 0 < amount < 0.1 else f"{amount:.2g}{NARROW}{currency}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.3g}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NARROW}h {minutes}{NARROW}min" if hours else f"{minutes}{NARROW}min {rest}{NARROW}s"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS].rstrip() + "…"


def markdown(text: str) -> str:
    """A name as plain text in Markdown, in tables too."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.split()))


def page_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llkd_ray"),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filter_ in (percent, percent_range, count, decimals, money, duration, shorten, markdown):
        environment.filters[filter_.__name__] = filter_
    return environment


def _round_columns(run: RunFacts) -> list[tuple[str, list[str]]]:
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


# --- Figures -------------------------------------------------------------------------------------


def _axes() -> tuple[Figure, Axes]:
    # A Figure of its own, not pyplot's: nothing is registered globally and no display is needed.
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg_element(figure: Figure, prefix: str, description: str) -> Markup:
    """The figure as an <svg> element that takes the width it is given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names of elements must differ between the figures of a page, and be the same on every rendering.
    ids = {old: f"{prefix}-{n}" for n, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'(\bid="|#)([^"\s;)]+)(?=["\)])', lambda m: m[1] + ids.get(m[2], m[2]), svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = Markup(' role="img" aria-label="{}"').format(description)
    return Markup(svg.replace("<svg", f"<svg{label}", 1))


def _curve(axes: Axes, run: RunFacts, key: str, name: str, colour: str) -> str:
    """Draw one measure against the texts trained on, and say in words how it went; '' if unknown."""
    points = [
        (line["trained"], line[key])
        for line in run.rounds
        if line.get("trained") is not None and line.get(key) is not None
    ]
    if not points:
        return ""
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4.5, label=name)
    (first_x, first), (last_x, last) = points[0], points[-1]
    start = f"from {percent(first)} after {count(first_x)} texts to " if len(points) > 1 else ""
    return f"{name}: {start}{percent(last)} after {count(last_x)} texts."


def _finish_curve(figure: Figure, axes: Axes, run: RunFacts, prefix: str, said: Sequence[str]) -> Markup:
    axes.set_xlabel("texts trained on")
    axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 4):g}{NARROW}%")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    _tick_at(axes, run, "trained", at_most=6)
    axes.margins(x=0.06, y=0.12)
    figure.legend(loc="outside upper left", ncols=2, **LEGEND)
    return svg_element(figure, prefix, " ".join(part for part in said if part))


def _tick_at(axes: Axes, run: RunFacts, key: str, at_most: int) -> None:
    """Ticks where the rounds are, or at round numbers where they are too many."""
    places = [line[key] for line in run.rounds if line.get(key) is not None]
    if len(places) <= at_most:
        axes.set_xticks(places)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=at_most, integer=True))


def _learning_curve(run: RunFacts) -> Markup | None:
    figure, axes = _axes()
    said = []
    for key, name, colour in (
        ("accuracy", "Student's accuracy", ACCURACY_COLOUR),
        ("macro_f1", "Student's macro-F1", F1_COLOUR),
    ):
        said.append(_curve(axes, run, key, name, colour))
        if said[-1] and (level := run.teacher[key]) is not None:
            teachers = name.replace("Student", "Teacher")
            axes.axhline(level, color=colour, linestyle="--", linewidth=1.2, label=teachers)
            said.append(f"{teachers}: {percent(level)}.")
    return _finish_curve(figure, axes, run, "curve", said) if any(said) else None


def _agreement_curve(run: RunFacts) -> Markup | None:
    figure, axes = _axes()
    said = _curve(axes, run, "teacher_agreement", "Same answer as the teacher", AGREEMENT_COLOUR)
    return _finish_curve(figure, axes, run, "agreement", [said]) if said else None


def _time_bars(run: RunFacts) -> Markup | None:
    spent = [phase_seconds(line) for line in run.rounds]
    if not any(sum(one.values()) for one in spent):
        return None
    figure, axes = _axes()
    rounds = [line["round"] for line in run.rounds]
    below = np.zeros(len(rounds))
    for phase in PHASES:
        height = np.array([one[phase] for one in spent])
        if height.any():
            axes.bar(rounds, height, 0.7, bottom=below, color=PHASE_COLOURS[phase], label=phase)
            below += height
    axes.set_xlabel("round")
    axes.set_ylabel("seconds")
    _tick_at(axes, run, "round", at_most=12)
    axes.set_xlim(rounds[0] - 1, rounds[-1] + 1)
    figure.legend(loc="outside upper left", ncols=6, **LEGEND)
    totals = ", ".join(f"{phase} {duration(sum(one[phase] for one in spent))}" for phase in PHASES)
    return svg_element(figure, "time", f"Time of each phase, over all rounds: {totals}.")


def _reliability_diagram(run: RunFacts) -> Markup | None:
    """Accuracy against confidence in bins (Guo et al. 2017, fig. 1), as points whose area is the texts."""
    quality = run.teacher["quality"]
    if not quality:
        return None
    figure, axes = _axes()
    figure.set_size_inches(4.8, 4.2)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.plot([0, 1], [0, 1], color="#777777", linewidth=1.2, linestyle="--", label="as sure as right")
    said = []
    for key, name, colour, marker in (
        ("raw", "as it answers", F1_COLOUR, "s"),
        ("used", "as it is used", ACCURACY_COLOUR, "o"),
    ):
        if key == "raw" and not is_changed(run):
            continue
        filled = [one for one in quality[key]["reliability"] if one["texts"]]
        sure, right, texts = (
            np.array([one[k] for one in filled]) for k in ("confidence", "accuracy", "texts")
        )
        axes.plot(sure, right, color=colour, linewidth=1, alpha=0.6)
        area = 12 + 260 * texts / texts.sum()
        axes.scatter(sure, right, area, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name)
        mean = float((texts * sure).sum() / texts.sum())
        said.append(f"{name}: sure of {percent(mean)} and right on {percent(quality[key]['accuracy'])}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{round(100 * value):d}{NARROW}%")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
    legend = figure.legend(loc="outside upper left", ncols=3, **LEGEND)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([36])
    bins = len(quality["used"]["reliability"])
    words = f"Accuracy against confidence in {bins} bins. On average, {'; '.join(said)}."
    return svg_element(figure, "reliability", words)


def is_changed(run: RunFacts) -> bool:
    """Whether the teacher's answers are used otherwise than they were given."""
    return run.teacher["quality"]["method"] not in ("raw", "votes")
