"""What --dry-run says: of texts, tokens, cost and hours, before anything starts."""

from __future__ import annotations

import json
import re
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toys import make_config, write_answers, write_corpus

from llkd_ray.config.base import ConfigError
from llkd_ray.corpus.cleaning import text_hash
from llkd_ray.display import Display
from llkd_ray.run.plan import plan
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore, ticket_file
from llkd_ray.storage.tables import list_column
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.cache import register
from llkd_ray.teacher.factory import cache_key
from llkd_ray.teacher.footprint import prompt_sizes

N_POOL, N_TEST = 600, 80


@pytest.fixture
def config(tmp_path, tiny_encoder, tiny_llm):
    """Makes a config; keywords change the teacher, the rest by section."""
    pool = write_corpus(tmp_path / "pool.parquet", N_POOL, seed=1)
    test = write_corpus(tmp_path / "test.parquet", N_TEST, seed=2)
    write_answers(tmp_path / "answers.parquet", [pool, test])

    def make(sections=None, **teacher):
        common = {"kind": "vllm", "model": tiny_llm, "recorded": None, "gpus": 1, "max_model_len": 512}
        teacher = common | teacher
        settings = {
            "corpus": {"uri": str(pool)},
            "test": {"uri": str(test)},
            "student": {"model": tiny_encoder},
            "run": {"dir": str(tmp_path / "runs")},
        }
        return make_config(**(settings | (sections or {})), teacher=teacher)

    return make


def said(config) -> str:
    stream = StringIO()
    plan(config, Display(Console(file=stream, soft_wrap=True, highlight=False)))
    return re.sub(r"\[ *\d+ s\] ", "", stream.getvalue())


def holds(text: str, *words: str) -> None:
    assert [one for one in words if one not in text] == [], text


def line_with(words: str, text: str) -> str:
    (line,) = [line for line in text.splitlines() if words in line]
    return line


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1].replace(",", ""))


def true_tokens(config, path, field="teacher") -> int:
    """Of all prompts that a file's texts make."""
    texts = pq.read_table(path)["text"].to_pylist()
    *_, (_, teacher) = config.teacher.members()
    return int(prompt_sizes(teacher, config.labels, texts, field).tokens_N.sum())


class TestTokens:
    def test_the_interval_holds_what_a_run_would_send(self, config, tmp_path):
        one = config()
        line = line_with("answer tokens,", said(one))
        truth = sum(true_tokens(one, tmp_path / name) for name in ("pool.parquet", "test.parquet"))
        low, high = (number(pattern, line) for pattern in (r"\(([\d,]+) to", r"to ([\d,]+)\) prompt"))
        assert low <= truth <= high
        assert high - low < 0.02 * truth
        assert line.startswith(f"teacher: {N_POOL + N_TEST} texts")
        assert f"{N_POOL + N_TEST} answer tokens, free of charge" in line

    def test_a_budget_and_no_test_set_make_it_less(self, config):
        text = said(config({"budget": {"labels": 100}, "evaluation": {"teacher_on_test": False}}))
        holds(text, "teacher: 100 texts", "teacher: prompts of the pool", "at most 100 texts")
        assert "prompts of the test set" not in text
        holds(said(config({"budget": {"labels": 9_000}})), "the teacher labels the whole pool")

    def test_the_students_part(self, config, tiny_encoder):
        line = line_with("longer than", said(config({"student": {"model": tiny_encoder, "max_tokens": 8}})))
        assert number(r"(\d+) of \d+ texts are longer", line) > 0
        holds(line, "student.max_tokens (8)", "steps", "no more than a guess")
        holds(said(config()), "start of an engine: unknown until a first run")

    def test_cost_and_hours_by_the_settings(self, config, tmp_path):
        one = config(
            {"budget": {"labels": 100}, "test": None},
            price={"currency": "EUR", "input": 1000.0, "output": 2000.0},
            tokens_per_s=0.5,
            actors=2,
        )
        text = said(one)
        tokens = number(r"([\d,]+) \(", line_with("prompt tokens", text))
        cost = number(r"answer tokens, ([\d.]+) \(", text)
        assert cost == pytest.approx((1000 * tokens + 2000 * 100) / 1e6, abs=0.01)
        assert number(r"hours: ([\d.]+)", text) == pytest.approx(tokens / 3600, abs=0.1)
        holds(text, "EUR", "at teacher.tokens_per_s")

    def test_names_of_several_tokens_are_a_range(self, config, tmp_path):
        names = ["sea", "kitchen sink", "kitchen garden"]
        corpus = {"uri": str(tmp_path / "pool.parquet"), "gold": None}
        sections = {"labels": {"names": names}, "corpus": corpus, "test": None}
        text = said(config(sections, prompt={"answer": "names"}))
        assert re.search(r"teacher: 1 to \d+ requests and 1 to \d+ answer tokens a text", text)
        assert re.search(r"[\d,]+ to [\d,]+ prompt tokens", text)

    def test_cut_texts_are_counted_and_the_first_prompt_is_shown(self, config):
        text = said(config(max_model_len=40))
        assert number(r"; (\d+) of 500 texts cut", text) > 0
        assert "B. sea" in text
        assert text.rstrip().endswith("Label:")

    def test_a_server_is_an_estimate_without_a_tokenizer_and_counted_with_one(self, config, tiny_llm):
        server = {"base_url": "http://127.0.0.1:9/v1"}
        text = said(config(kind="openai", server=server, model="gpt", gpus=0))
        holds(text, "an estimate: server.tokenizer is not set, so 4 characters are a token")
        holds(text, "by top_logprobs or votes: the first request", "hours: unknown until a first run")
        with_one = server | {"tokenizer": tiny_llm, "scores": "label_ids"}
        served = said(config(kind="openai", server=with_one, model="gpt", gpus=0))
        assert line_with("prompts of the pool", served) == line_with("prompts of the pool", said(config()))


class TestCascade:
    def test_the_large_one_reads_from_none_to_all_and_recorded_answers_take_nothing(
        self, config, tiny_llm, tmp_path
    ):
        small = {"kind": "vllm", "model": tiny_llm, "gpus": 1, "price": {"input": 10.0}}
        members = {"small": small, "large": small | {"price": {"input": 1000.0}}}
        text = said(config({"test": None}, kind="cascade", model=None, cascade=members))
        small, large = line_with("small: 600 texts", text), line_with("large: 0 to 600 texts", text)
        most = number(r"to ([\d,]+)\) prompt", small)
        assert f"0 to {most:,.0f} prompt tokens" in large
        assert re.search(r"0\.00 to [\d.]+ USD", large)
        both = line_with("both teachers", text)
        assert number(r"to ([\d,]+) prompt tokens", both) == pytest.approx(2 * most, abs=1)

        recorded = {"kind": "recorded", "recorded": {"uri": str(tmp_path / "answers.parquet")}}
        nothing = "recorded answers; nothing is asked of an LLM"
        text = said(config({"test": None}, kind="cascade", model=None, cascade=members | {"small": recorded}))
        holds(text, f"small: {nothing}", "large: 0 to 600 texts")
        text = said(config(model=None, **recorded))
        holds(text, f"teacher: {nothing}")
        assert "first prompt" not in text


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        ({"tokens": 10_000_000}, "cap: budget.cap.tokens of 10,000,000 tokens is enough for all labels"),
        ({"texts": 340}, "after about 50.0% of them"),
        ({"cost": 0.01}, "cap: budget.cap.cost of 0.01 USD will end the run"),
    ],
)
def test_it_says_whether_the_cap_ends_the_run(config, cap, words):
    holds(said(config({"budget": {"cap": cap}}, price={"input": 100.0})), words)


def answer(config, tmp_path, n: int, usage: Usage | None = None) -> str:
    """Let an earlier run have answered the first ``n`` texts of pool and test set; returns its folder."""
    files = [tmp_path / name for name in ("pool.parquet", "test.parquet")]
    texts = pa.concat_tables([pq.read_table(path) for path in files])["text"].to_pylist()[:n]
    columns = [
        pa.array(np.arange(n)),
        pa.array([str(i) for i in range(n)], pa.string()),
        pa.array(np.array([text_hash(text) for text in texts], dtype=np.uint64)),
        list_column(np.full((n, 3), 0.3)),
        pa.array(np.full(n, 0.1, np.float32)),
        *(pa.array(np.ones(n, np.int32)) for _ in range(3)),
        pa.array(np.zeros(n, np.int8)),
        pa.array(np.zeros(n, dtype=bool)),
    ]
    table = pa.Table.from_arrays(columns, schema=tables.LABELS)
    if usage is not None:
        facts = {"usage": json.dumps({"teacher": usage.as_dict()}), "tickets_in_flight": "2"}
        table = table.replace_schema_metadata(facts)
    run = RunStore(str(tmp_path / "runs" / "earlier"))
    run.write_table(ticket_file(LABELS_DIR, 0), table)
    key = cache_key(config, config.teacher)
    register(f"{config.run.dir}/teacher-cache", key, run.path(LABELS_DIR), 0)
    return run.path(LABELS_DIR)


class TestEarlierRuns:
    def test_what_they_have_answered_is_saved(self, config, tmp_path):
        one = config({"test": None}, price={"input": 1000.0})
        whole = number(r"([\d,]+) \([\d,]+ to [\d,]+\) prompt", said(one))
        answer(one, tmp_path, N_POOL // 2)
        text = said(one)
        holds(text, "teacher: earlier runs have answered 250 of the 500 texts")  # 500 are the sample
        assert number(r"\) prompt tokens, ([\d,]+) \(", text) == pytest.approx(300, abs=5)
        assert number(r"([\d,]+) \([\d,]+ to [\d,]+\) prompt", text) == pytest.approx(whole / 2, rel=0.02)
        assert number(r"saves about ([\d,]+) tokens and", text) == pytest.approx(whole / 2, rel=0.15)

    def test_when_all_is_answered_nothing_is_asked_but_by_another_prompt(self, config, tmp_path):
        one = config({"budget": {"cap": {"texts": 340}}})
        answer(one, tmp_path, N_POOL + N_TEST)
        text = said(one)
        holds(text, "teacher: 0 texts, 0 prompt tokens, 0 answer tokens, free of charge")
        holds(text, "cap: budget.cap.texts of 340 texts is enough")
        holds(said(config(prompt={"instruction": "Which topic?"})), "have answered 0 of")
        assert "earlier runs" not in said(config(cache=None))

    def test_their_speed_is_taken(self, config, tmp_path):
        one = config({"test": None}, actors=2)
        folder = answer(one, tmp_path, 1, Usage(prompt_tokens=100, seconds=50.0))
        text = said(one)
        holds(text, "at 4 prompt tokens a second and actor, as 1 earlier ticket(s) took", folder)
        tokens = number(r"([\d,]+) \([\d,]+ to [\d,]+\) prompt", text)
        minutes = number(r"hours: less than one, ([\d.]+)", text)
        assert minutes == pytest.approx(tokens / 8 / 60, abs=0.1)


class TestHours:
    def test_a_local_model_on_a_cpu_is_guessed_but_no_quantised_one(self, config):
        holds(line_with("teacher: hours", said(config(gpus=0))), "no more than a guess", "10% to 50%")
        holds(said(config(gpus=0, quantization="fp8")), "hours: unknown")

    def test_a_pool_that_may_grow_takes_from_its_largest_to_its_smallest(self, config):
        text = said(config({"test": None}, actors=(1, 4), tokens_per_s=2.0))
        assert "1 to 4 actor(s)" in text
        fewest, most = re.findall(r"([\d,]+) to ([\d,]+)\) prompt tokens", text)[0]
        fast, slow = re.findall(r"hours: ([\d.]+) to ([\d.]+), at teacher.tokens_per_s", text)[0]
        in_hours = [float(tokens.replace(",", "")) / 2.0 / 3600 for tokens in (fewest, most)]
        assert (float(fast), float(slow)) == pytest.approx((in_hours[0] / 4, in_hours[1]), abs=0.06)


class TestPool:
    def test_rows_of_lines_are_an_estimate(self, config, tmp_path):
        one = config()
        texts = pq.read_table(tmp_path / "pool.parquet")["text"].to_pylist()
        lines = tmp_path / "pool.jsonl"
        lines.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in texts))
        corpus = one.corpus.model_copy(update={"uri": str(lines), "gold": None})
        text = said(one.model_copy(update={"corpus": corpus}))
        assert f"corpus: about {N_POOL} rows (estimated from bytes)" in text

    def test_refused_rows_are_named(self, config):
        sections = {"corpus": {"uri": config().corpus.uri, "max_chars": 50}}
        text = said(config(sections))
        assert re.search(r"corpus: \d+ of 500 rows .* are usable, \d+ too_long; about \d+ texts", text)

    @pytest.mark.parametrize(
        ("sections", "mistake"),
        [
            (
                {"labels": {"names": ["x", "y"]}},
                "corpus.gold: 500 of 500 values of column 'label' match no",
            ),
            ({"budget": {"train": 0.001}}, "budget.train: 0.001 of a pool of 600"),
        ],
    )
    def test_what_cannot_run_is_refused(self, config, sections, mistake):
        with pytest.raises(ConfigError, match=f"^{mistake}"):
            said(config(sections))
