"""Plans a run without starting it: what it would do, and its estimated use of the teacher, from a sample.

Shapes in names: N texts of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from llkd_ray.config.base import ConfigError, member_field
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config, SourceConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.corpus import sources
from llkd_ray.corpus.cleaning import check_gold
from llkd_ray.corpus.readers import describe_format
from llkd_ray.corpus.sampling import Sample, count_rows, draw
from llkd_ray.display import Display, duration
from llkd_ray.run.estimate import (
    NOTHING,
    UTILISATION,
    Bill,
    Estimate,
    bill,
    hours,
    mean,
    tokens_per_s,
    what_caps_do,
)
from llkd_ray.run.loop import check
from llkd_ray.selection.policies import find_selection
from llkd_ray.storage.checkpoints import load_tokenizer
from llkd_ray.storage.run_dir import ENGINES_DIR, LABELS_DIR, RunStore
from llkd_ray.student.model import encode, lengths, resolve_model
from llkd_ray.student.train import count_steps
from llkd_ray.teacher.cache import AnswerCache, Speed, speed_of
from llkd_ray.teacher.factory import cache_folder, cache_key, self_contained
from llkd_ray.teacher.footprint import PromptSizes, prompt_sizes

SAMPLE_ROWS = 500
TEST_SAMPLE_ROWS = 200


def plan(config: Config, display: Display) -> None:
    """Check the config, read a sample and print what a run would do. Starts neither Ray nor an engine."""
    config = self_contained(config)
    check(config, display.say)
    budget = config.budget
    pool = read_part(config, config.corpus, "corpus", SAMPLE_ROWS, display.say)
    if budget.labels is not None:
        pool = replace(pool, taken=min(budget.labels, pool.population))
    parts = [pool]
    train = f"{budget.train} texts" if isinstance(budget.train, int) else f"{budget.train:.1%} of the pool"
    is_whole = budget.labels is None or budget.labels >= pool.population
    labels = "the whole pool" if is_whole else f"at most {budget.labels:,} texts"
    display.say(f"student: {config.student.model}, {config.student.max_workers} rank(s)")
    display.say(
        f"policy: {config.selection.policy}; {budget.rounds} rounds; the teacher labels {labels}, hold-out "
        f"included; the student trains on {train}"
    )
    if config.test is not None:
        test = read_part(config, config.test, "test", TEST_SAMPLE_ROWS, display.say)
        asked = ", and the teacher labels it once" if config.evaluation.teacher_on_test else ""
        display.say(f"test: the student is evaluated on it after every round{asked}")
        parts += [test] if config.evaluation.teacher_on_test else []
    plans = []
    for name, teacher in config.teacher.members():
        plans.append(plan_teacher(config, member_field(name), teacher, parts))
        for line in plans[-1].lines:
            display.say(f"{name}: {line}")
    display.say(f"student: {_student(config, pool)}")
    _say_totals(config, plans, display)
    for (name, _), one in zip(config.teacher.members(), plans, strict=True):
        if one.first_prompt is not None:
            display.say(f"{name}: the first prompt, as the teacher reads it:")
            display.result(one.first_prompt)


def _say_totals(config: Config, plans: Sequence[TeacherPlan], display: Display) -> None:
    """Print the totals of a cascade's two teachers, and the effect of the caps."""
    bills = [one.bill for one in plans if one.bill is not None]
    if len(bills) < len(plans):
        if not config.budget.cap.is_off:
            display.say("cap: whether it is reached is unknown, as the number of texts is")
        return
    whole = reduce(add, bills)
    *_, (_, last) = config.teacher.members()
    if len(bills) > 1:
        display.say(f"both teachers: {describe_totals(whole, last)}")
    for line in what_caps_do(config.budget.cap, whole, last.price.currency):
        display.say(f"cap: {line}")


def read_part(config: Config, source: SourceConfig, field: str, n: int, say: Callable[[str], None]) -> Part:
    """Count a source's rows and draw a sample; reports both through ``say``.

    Raises :class:`ConfigError` if none of the sampled rows is usable.
    """
    units = sources.plan(source, field)
    if assumed := describe_format(units):
        say(f"{field}: {assumed}")
    sample = draw(units, source, field, config.labels.names, n)
    check_gold(field, source.gold, config.labels.names, sample.unknown_gold, sample.read)
    if not sample.read:
        raise ConfigError(f"{field}.uri: there is no row in {', '.join(source.uris)}; see {field}.where")
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
        Schedule.plan(config, rows.count, 0)  # a budget that does not fit all rows fits no subset
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


@dataclass(frozen=True)
class Part:
    """Texts that teachers label: those of the pool or of the test set."""

    name: str
    sample: Sample
    population: float
    """Approximate number of texts; infinite if unknown."""
    taken: float | None
    """Maximum number of texts that are labelled; None if unknown."""

    @property
    def texts(self) -> list[str]:
        return [example.text for example in self.sample.kept]

    def hashes(self) -> np.ndarray:
        """uint64[N]"""
        return np.array([example.hash for example in self.sample.kept], dtype=np.uint64)


@dataclass(frozen=True)
class TeacherPlan:
    lines: list[str]
    bill: Bill | None
    """Estimated requests to the teacher; None if the number of texts is unknown."""
    first_prompt: str | None = None


def plan_teacher(config: Config, field: str, teacher: TeacherConfig, parts: Sequence[Part]) -> TeacherPlan:
    """Plan the requests to ``teacher``, one of the config's members, whose settings are at ``field``.

    Its prompt and demonstrations must already be loaded from files. Raises ConfigError as a check does.
    """
    taken = [part.taken for part in parts if part.taken is not None]
    is_known = len(taken) == len(parts)
    if not teacher.has_prompt:
        texts = Estimate.exactly(sum(taken))
        answers = Bill(texts, NOTHING, NOTHING, NOTHING) if is_known else None
        return TeacherPlan([f"{teacher.kind} answers; nothing is asked of an LLM"], answers)
    sizes = [prompt_sizes(teacher, config.labels, part.texts, field) for part in parts]
    lines = [f"{teacher.model}, {_ends((teacher.min_actors, teacher.max_actors))} actor(s)"]
    lines += [f"prompts of the {part.name}: {_prompts(part, sizes[i])}" for i, part in enumerate(parts)]
    lines.append(_requests(sizes[0]))
    folder, key = cache_folder(config, teacher), cache_key(config, teacher)
    found, said = _answered(folder, key, len(config.labels.names), parts)
    lines += said
    if not is_known:
        lines.append("what it takes in all is unknown, as the number of texts is: set budget.labels")
        return TeacherPlan(lines, None, sizes[0].first)
    need = _needed(teacher, parts, sizes, found)
    if field.endswith(".large"):
        lines.append("which texts it is asked is unknown before the small one has answered: from none to all")
        need = need.from_none_up()
    lines.append(f"{need.bill.texts.words()} texts, {describe_totals(need.bill, teacher)}")
    if any(one.any() for one in found):
        without = _needed(teacher, parts, sizes, [np.zeros_like(one) for one in found])
        lines.append(_saved(need.bill, without.bill, teacher))
    earlier = None if folder is None or key is None else speed_of(folder, key)
    if teacher.kind == "vllm":
        lines.append(_start(earlier))
    lines.append(_time(teacher, need, earlier))
    return TeacherPlan(lines, need.bill, sizes[0].first)


def _student(config: Config, pool: Part) -> str:
    """How many texts are cut, and the time for training and scoring, as text."""
    student = config.student
    checkpoint = resolve_model(student.model)
    encoded = encode(load_tokenizer(checkpoint, None, "student.model"), pool.texts, student.max_tokens + 1)
    tokens_N = lengths(encoded)
    cut = int(np.count_nonzero(tokens_N > student.max_tokens))
    said = f"{cut} of {len(tokens_N)} texts are longer than student.max_tokens ({student.max_tokens}) and cut"
    if not math.isfinite(pool.population):
        return said
    schedule = Schedule.plan(config, round(pool.population), 0)
    targets = [schedule.train_target(k) for k in range(schedule.rounds)]
    steps = sum(count_steps(n, student)[1] for n in targets)
    scored = schedule.rounds * schedule.holdout
    if find_selection(config.selection).uses_student:
        scored += (schedule.rounds - 1) * round(config.selection.refresh_share * schedule.labels)
    # A step costs about three forward passes: J. Kaplan et al., arXiv 2001.08361, section 2.1.
    texts = Estimate.exactly(3 * steps * student.batch_size + scored)
    mean_tokens = float(np.minimum(tokens_N, student.max_tokens).mean())
    on_gpu = student.n_gpus > 0
    # Some CPUs are a hundred times slower in bf16, and training avoids it there.
    kind = "bfloat16" if on_gpu and student.precision != "float32" else "float32"
    guess = tokens_per_s(checkpoint, kind, on_gpu)
    if guess is None:
        return said
    low, high = (speed * (student.max_workers if on_gpu else 1) for speed in guess)
    return f"{said}; {steps:,} steps; {_guessed(texts.times(mean_tokens), low, high)}"


@dataclass(frozen=True)
class _Need:
    """The requests that one teacher must answer."""

    bill: Bill
    new_tokens: Estimate
    """Prompt tokens that are never in the prefix cache: each text once, without the common prefix."""

    @classmethod
    def of(cls, part: Part, size: PromptSizes, found_N: np.ndarray, teacher: TeacherConfig) -> _Need:
        assert part.taken is not None
        asked_N = (~found_N).astype(float)  # texts with an answer in the cache cost nothing

        def in_all(value_N: np.ndarray, most: float) -> Estimate:
            assert part.taken is not None
            return mean(value_N * asked_N, part.population, part.taken, most).times(part.taken)

        texts, tokens = in_all(asked_N, 1.0), in_all(size.tokens_N, teacher.context)
        new = in_all(size.tokens_N - size.shared, teacher.context)
        return cls(bill(texts, tokens, size.requests, teacher.price), new)

    def __add__(self, other: _Need) -> _Need:
        return _Need(self.bill + other.bill, self.new_tokens + other.new_tokens)

    def from_none_up(self) -> _Need:
        return _Need(self.bill.from_none_up(), Estimate.between(0.0, self.new_tokens.high))


def _needed(
    teacher: TeacherConfig, parts: Sequence[Part], sizes: Sequence[PromptSizes], found: Sequence[np.ndarray]
) -> _Need:
    """The requests for all parts together."""
    return reduce(add, (_Need.of(*one, teacher) for one in zip(parts, sizes, found, strict=True)))


# --- as text


def describe_totals(whole: Bill, teacher: TeacherConfig) -> str:
    """Tokens and cost as text, in the currency of ``teacher``."""
    digits = 2 if whole.cost.high >= 1 else 4
    cost = f"{whole.cost.words(digits)} {teacher.price.currency}" if whole.cost.high else "free of charge"
    return (
        f"{whole.prompt_tokens.words()} prompt tokens, {whole.answer_tokens.words()} answer tokens, {cost}"
        " (95 % intervals)"
    )


def _prompts(part: Part, size: PromptSizes) -> str:
    average = mean(size.tokens_N, part.population, part.population)
    cut = int(np.count_nonzero(size.cut_N))
    return (
        f"{average.words(1)} tokens on average, {size.tokens_N.max():,} at most"
        + ("" if size.counted else " (an estimate: server.tokenizer is not set, so 4 characters are a token)")
        + f"; {cut} of {len(size.cut_N)} texts cut"
    )


def _requests(size: PromptSizes) -> str:
    prompts, answers = size.requests.prompts, size.requests.answers
    asked = "1 request" if prompts == (1, 1) else f"{_ends(prompts)} requests"
    said = "1 answer token" if answers == (1, 1) else f"{_ends(answers)} answer tokens"
    if len(size.methods) > 1:
        return f"{asked} and {said} a text, by {' or '.join(size.methods)}: the first request finds out"
    if size.requests.is_known:
        return f"{asked} and {said} a text"
    return f"{asked} and {said} a text: how many is unknown until answers are there"


def _ends(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _answered(
    folder: str | None, key: str | None, n_classes: int, parts: Sequence[Part]
) -> tuple[list[np.ndarray], list[str]]:
    """bool[N] for each part: texts of its sample that earlier runs answered; and lines that report it."""
    if folder is None or key is None:
        return [np.zeros(len(part.texts), dtype=bool) for part in parts], []
    cache = AnswerCache.open(folder, key, n_classes, own=None)
    found = [cache.find(part.hashes())[0] for part in parts]
    line = (
        f"earlier runs have answered {sum(map(np.count_nonzero, found))} of the {sum(map(len, found))} texts"
    )
    if cache.skipped:
        line += f"; {cache.skipped} of their folders or files are gone or cannot be read"
    return found, [line]


def _saved(need: Bill, without: Bill, teacher: TeacherConfig) -> str:
    tokens = without.tokens.high - need.tokens.high
    line = f"what earlier runs have answered saves about {tokens:,.0f} tokens"
    if teacher.price.is_free:
        return line
    return f"{line} and {without.cost.high - need.cost.high:,.2f} {teacher.price.currency}"


def _time(teacher: TeacherConfig, need: _Need, earlier: Speed | None) -> str:
    """Hours of labelling, and the source of the speed."""
    tokens, fewest, most = need.bill.prompt_tokens, teacher.min_actors, teacher.max_actors
    if (speed := teacher.tokens_per_s) is not None:
        return f"{_hours(hours(tokens, speed * fewest, speed * most))}, at teacher.tokens_per_s"
    if earlier is not None:
        speed = earlier.tokens_per_s
        return (
            f"{_hours(hours(tokens, speed * fewest, speed * most))}, at {speed:,.0f} prompt tokens a second "
            f"and actor, as {earlier.tickets} earlier ticket(s) took, the newest in {earlier.labels}"
        )
    on_gpu = teacher.n_gpus > 0
    guess = None
    if teacher.kind == "vllm" and teacher.model and teacher.quantization is None:
        guess = tokens_per_s(teacher.model, teacher.dtype, on_gpu)
    if guess is None:
        return "hours: unknown until a first run has measured it; set teacher.tokens_per_s where you know it"
    # On CPUs, all actors share the measured throughput.
    slowest, fastest = (n * teacher.parts if on_gpu else 1 for n in (fewest, most))
    return _guessed(need.new_tokens, guess[0] * slowest, guess[1] * fastest)


def _guessed(tokens: Estimate, slowest: float, fastest: float) -> str:
    low, high = UTILISATION
    return (
        f"{_hours(hours(tokens, slowest, fastest))}; no more than a guess: matrix products on this machine, "
        f"{low:.0%} to {high:.0%} of them used"
    )


def _start(earlier: Speed | None) -> str:
    """Seconds until an engine answers, as earlier runs with the same answers took."""
    if earlier is not None:
        run = RunStore(earlier.labels.removesuffix(f"/{LABELS_DIR}"))
        engines = [run.read_json(f"{ENGINES_DIR}/{name}") for name in run.names(ENGINES_DIR)]
        if engines:
            seconds = float(np.median([one["seconds_to_start"] for one in engines]))
            return f"start of an engine: {duration(seconds)}, as in {run.uri()}"
    return "start of an engine: unknown until a first run has measured it, usually one to several minutes"


def _hours(time: Estimate) -> str:
    if time.high < 1:
        return f"hours: less than one, {time.times(60).words(1)} minutes"
    return f"hours: {time.words(1 if time.high < 100 else 0)}"
