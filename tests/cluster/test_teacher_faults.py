"""Whole runs whose teachers fail, cost too much, or are two: with rows counted before and after."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from stub_server import Request, Response, StubServer, free_port, likeliest, usage
from toys import NAMES, WORDS, write_answers

from llkd_ray.cluster import Background
from llkd_ray.config.base import ConfigError
from llkd_ray.config.loading import parse_config
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.teacher import ANSWER_LETTERS
from llkd_ray.corpus.ingest import ingest
from llkd_ray.display import Display
from llkd_ray.run.loop import distill, failed_teachers, spending
from llkd_ray.run.supervisor import Run
from llkd_ray.storage.lock import hold_lock
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.teacher.base import TeacherDown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("local_ray")]

ROWS = 500 + 120
"""Texts that a run of ``toy_settings`` has labelled: 500 of the pool, 120 of the test set."""


def quick(settings: dict) -> dict:
    """A student that learns little, soon."""
    return settings["student"] | {"epochs": 4}


def run(settings: dict, folder: Path) -> dict:
    with Display() as display:
        return distill(parse_config(settings), str(folder), display)


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict, Path], dict]:
    """A run whose student learns nothing, in no time; gives the selector's counts and what teachers cost."""
    monkeypatch.setattr(
        "llkd_ray.run.supervisor.start_training", lambda *_: Background("no student", lambda: None)
    )

    def go(settings: dict, folder: Path) -> dict:
        config, store = parse_config(settings), RunStore(str(folder))
        examples = ingest(config, store, lambda line: None)
        schedule = Schedule.plan(config, examples.n_pool, examples.n_test)
        with (
            Display() as display,
            hold_lock(store, display.say) as session,
            Run(config, store, session, schedule, display) as parts,
        ):
            for k in range(parts.call("next_round"), schedule.rounds):
                parts.call("wait_labels", k)
                parts.call("select", k)
                parts.call("trained", k, {})
            parts.finish()
            stats = parts.call("stats")
        return stats | spending(config, stats) | {"lost": failed_teachers(store)}

    return go


def labels_of(run_dir: Path) -> dict[str, list]:
    tables = [pq.read_table(file) for file in sorted(run_dir.glob("labels/*.parquet"))]
    columns = ("row", "probs", "member", "prompt_tokens", "answer_tokens")
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in columns}


def quarantined(run_dir: Path) -> Counter:
    tables = [pq.read_table(file) for file in run_dir.glob("quarantine/teacher-*.parquet")]
    return Counter(reason for table in tables for reason in table["reason"].to_pylist())


def right_answer(asked: Request) -> Response:
    """The letter of the class whose words are in the text, mostly."""
    words = set(asked.text.rpartition("Text: ")[2].split())
    best = max(range(3), key=lambda i: len(words & set(WORDS[NAMES[i]].split())))
    probs = {letter: 0.9 if i == best else 0.03 for i, letter in enumerate(ANSWER_LETTERS[:3])}
    return likeliest(probs, usage=usage(50, 1))


def server_settings(settings: dict, base_url: str, **teacher: Any) -> dict:
    """One round on a server's labels."""
    server = {"base_url": base_url, "back_off_s": 0.01, "scores": "top_logprobs", "concurrency": 4}
    server |= teacher.pop("server", {})
    of_server = {"kind": "openai", "model": "some-llm", "server": server, "ticket_size": 32, "attempts": 2}
    return settings | {
        "teacher": of_server | teacher,
        "budget": {"rounds": 1, "train": 60, "labels": 500},
        "student": settings["student"] | {"epochs": 2},
        "selection": {"policy": "random"},
    }


class TestServer:
    def test_a_text_that_always_fails_goes_to_quarantine_and_the_others_are_labelled(
        self, toy_settings, tmp_path, teach
    ):
        poisoned = pq.read_table(toy_settings["test"]["uri"])["text"].to_pylist()[5]

        def answer(asked: Request) -> Response:
            return Response(b"no", status=500) if poisoned in asked.text else right_answer(asked)

        with StubServer(answer) as server:
            summary = teach(server_settings(toy_settings, server.base_url), tmp_path / "run")
            tries = sum(poisoned in asked.text for asked in server.requests)
        assert tries == 2
        assert len(set(labels_of(tmp_path / "run")["row"])) == ROWS - 1
        assert quarantined(tmp_path / "run") == {"http_500": 1}
        assert summary["usage"]["teacher"]["texts"] == ROWS
        assert summary["labelled"] == 500

    def test_an_actor_that_gives_up_is_reported_and_its_tickets_go_to_the_other(
        self, toy_settings, tmp_path, teach
    ):
        bad: list[int] = []

        def answer(asked: Request) -> Response:
            if not bad:
                bad.append(asked.connection)
            if asked.connection in bad:
                return Response({"error": {"message": "no such key"}}, status=401)
            return right_answer(asked)

        with StubServer(answer) as server:
            # One connection for each actor.
            settings = server_settings(toy_settings, server.base_url, actors=2, server={"concurrency": 1})
            settings["teacher"] |= {"cpus": 0.2}
            summary = teach(settings, tmp_path / "run")
        assert len(set(labels_of(tmp_path / "run")["row"])) == ROWS
        assert quarantined(tmp_path / "run") == {}
        ((lost),) = summary["lost"]
        assert lost["teacher"] == "teacher"
        assert "OPENAI_API_KEY" in lost["reason"]

    def test_a_server_that_is_down_stops_the_run_with_the_reason_and_resume_goes_on(
        self, toy_settings, tmp_path, teach
    ):
        port = free_port()
        settings = server_settings(toy_settings, f"http://127.0.0.1:{port}/v1")
        with pytest.raises(TeacherDown, match=rf"all 1 actor\(s\): .*127\.0\.0\.1:{port}"):
            teach(settings, tmp_path / "run")
        assert labels_of(tmp_path / "run")["row"] == []
        assert quarantined(tmp_path / "run") == {}, "a server's fault is no text's"

        answers = 0

        def dies_after_a_while(asked: Request) -> Response:
            nonlocal answers
            answers += 1
            # In the middle of a ticket, whichever of two comes first: a text that is the last of its ticket,
            # and the only one that fails, would be taken for a bad one.
            return right_answer(asked) if answers <= 208 else Response(b"", status=503)

        with StubServer(dies_after_a_while) as server:
            settings["teacher"]["server"] |= {"base_url": server.base_url}
            with pytest.raises(TeacherDown, match="http_503"):
                teach(settings, tmp_path / "run")
        there = labels_of(tmp_path / "run")["row"]
        assert 0 < len(there) <= 208
        with StubServer(right_answer) as server:
            settings["teacher"]["server"] |= {"base_url": server.base_url}
            summary = teach(settings, tmp_path / "run")
            asked = len(server.requests)
        rows = labels_of(tmp_path / "run")["row"]
        assert len(rows) == len(set(rows)) == ROWS
        assert asked == ROWS - len(there), "what was labelled is not asked again"
        assert summary["labelled"] == 500


class TestCap:
    @pytest.mark.parametrize("tokens", [1, 1_000, 10_000])
    def test_tokens_never_exceed_it_and_the_run_ends_cleanly(self, toy_settings, tmp_path, tokens, teach):
        budget = {"rounds": 2, "train": 60, "labels": 500, "cap": {"tokens": tokens}}
        teacher = toy_settings["teacher"] | {"ticket_size": 16, "actors": 2, "cpus": 0.2}
        answers = teacher["recorded"] | {"prompt_tokens": "prompt_tokens"}
        settings = toy_settings | {"budget": budget, "teacher": teacher | {"recorded": answers}}
        run_dir = tmp_path / "run"
        if tokens == 1:
            with pytest.raises(ConfigError, match=r"budget\.cap .* raise it, or lower .* the 40 texts"):
                run(settings, run_dir)
            assert labels_of(run_dir)["row"] == []
            return
        summary = teach(settings, run_dir)
        labels = labels_of(run_dir)
        used = sum(labels["prompt_tokens"]) + sum(labels["answer_tokens"])
        assert used == summary["teacher_tokens"]
        assert tokens - 40 < used <= tokens, "as far as the next text, of 40 tokens at most, does not fit"
        assert summary["cap"] == {"texts": None, "tokens": tokens, "cost": None, "reached": True}
        assert summary["unasked"] == ROWS - len(labels["row"])
        assert quarantined(run_dir) == {}

    def test_the_student_learns_from_what_a_cap_leaves(self, toy_settings, tmp_path):
        """The cap leaves 30 texts or so, of which the hold-out, which is read first, takes few."""
        budget = {"rounds": 2, "train": 60, "labels": 500, "cap": {"tokens": 1_000}}
        answers = toy_settings["teacher"]["recorded"] | {"prompt_tokens": "prompt_tokens"}
        teacher = toy_settings["teacher"] | {"ticket_size": 16, "recorded": answers}
        changed = {"budget": budget, "teacher": teacher, "student": quick(toy_settings)}
        changed["evaluation"] = {"holdout": 8}
        summary = run(toy_settings | changed, tmp_path / "run")
        assert summary["trained"] >= 10
        assert 960 < summary["teacher_tokens"] <= 1_000
        assert (tmp_path / "run/model/config.json").exists()

    @pytest.mark.parametrize(("cap", "texts"), [({"texts": 100}, 100), ({"cost": 0.0021}, 105)])
    def test_texts_and_money(self, toy_settings, tmp_path, cap, texts, teach):
        """A request costs 50 × 0.2 + 1 × 10 = 20 millionths."""
        price = {"input": 0.2, "output": 10.0, "currency": "EUR"}
        with StubServer(right_answer) as server:
            # Claims are upper bounds in bytes here; what is left of them is given back by the ticket.
            settings = server_settings(toy_settings, server.base_url, price=price, ticket_size=8)
            settings["budget"] |= {"cap": cap}
            summary = teach(settings, tmp_path / "run")
            asked = len(server.requests)
        used = summary["usage"]["teacher"]
        assert used["texts"] == used["requests"] == asked <= texts
        assert asked > 0.8 * texts
        assert used["cost"] == pytest.approx(20e-6 * asked)
        assert used["cost"] <= cap.get("cost", 1)
        assert summary["currency"] == "EUR"
        assert summary["cap"]["reached"]


class TestCascade:
    def settings(self, toy_settings: dict, tmp_path: Path, **cascade: Any) -> dict:
        """A small teacher that is right in 70 % of cases, and a large one that always is."""
        corpora = [Path(toy_settings[part]["uri"]) for part in ("corpus", "test")]
        members = {}
        for name, accuracy, price in (("small", 0.7, 1.0), ("large", 1.0, 10.0)):
            answers = write_answers(tmp_path / f"{name}.parquet", corpora, accuracy=accuracy, seed=len(name))
            members[name] = {
                "kind": "recorded",
                "recorded": {"uri": str(answers), "prompt_tokens": "prompt_tokens"},
                "price": {"input": price},
                "cpus": 0.2,
            }
        teacher = {"kind": "cascade", "cascade": {**members, **cascade}, "ticket_size": 32}
        return toy_settings | {
            "teacher": teacher,
            "student": quick(toy_settings) | {"epochs": 8},
            "budget": {"rounds": 3, "train": 180, "labels": 500, "growth": 1.0, "first_labels": 1.0},
        }

    def test_the_large_one_reads_only_what_is_in_doubt(self, toy_settings, tmp_path, teach):
        settings = self.settings(toy_settings, tmp_path, escalate_below=0.75, review_margin=None)
        summary = teach(settings, tmp_path / "run")
        labels = labels_of(tmp_path / "run")
        assert len(set(labels["row"])) == ROWS
        small, large = summary["usage"]["small"], summary["usage"]["large"]
        assert small["texts"] == ROWS
        assert large["texts"] == Counter(labels["member"])[1]
        assert 0.3 * ROWS < large["texts"] < 0.8 * ROWS, "toy confidences are spread over 0.5 to 0.95"
        assert large["cost"] == pytest.approx(10 * large["prompt_tokens"] / 1e6)
        assert small["cost"] == pytest.approx(small["prompt_tokens"] / 1e6)
        assert summary["teacher_tokens"] == small["prompt_tokens"] + large["prompt_tokens"]
        parts = [pq.read_table(toy_settings[part]["uri"])["label"].to_pylist() for part in ("corpus", "test")]
        gold = [NAMES.index(name) for part in parts for name in part]
        said = zip(labels["row"], labels["probs"], strict=True)
        right = [np.argmax(probs) == gold[row] for row, probs in said]
        assert np.mean(right) > 0.75, "better than the small one alone"

    def test_a_confident_student_sends_labels_to_review(self, toy_settings, tmp_path):
        settings = self.settings(toy_settings, tmp_path, escalate_below=0.0, review_margin=0.5, review=40)
        # Enough in the first round for a student that is sure of itself when the second review is planned.
        settings["budget"] |= {"train": 360}
        settings["student"] |= {"epochs": 16}
        summary = run(settings, tmp_path / "run")
        run_dir = tmp_path / "run"
        reviews = [pq.read_table(file) for file in sorted(run_dir.glob("leases/review-*.parquet"))]
        assert len(reviews[0]) == 0, "no student had looked before the first of them"
        reviewed = [row for table in reviews for row in table["row"].to_pylist()]
        assert 0 < len(reviewed) <= 40
        assert summary["usage"]["large"]["texts"] == len(set(reviewed)) == len(reviewed)
        # What the student trains on after a review carries the large one's label.
        gold = dict(enumerate(pq.read_table(toy_settings["corpus"]["uri"])["label"].to_pylist()))
        trained = [pq.read_table(file) for file in sorted(run_dir.glob("rounds/*/batch.parquet"))]
        label_of = {
            row: label
            for table in trained
            for row, label in zip(table["row"].to_pylist(), table["label"].to_pylist(), strict=True)
        }
        both = set(reviewed) & set(label_of)
        assert both
        assert all(NAMES[label_of[row]] == gold[row] for row in both), "the large one is always right"
        again = run(settings, run_dir)
        assert again["usage"] == summary["usage"], "a run that is over asks nobody"


class TestConfidence:
    def test_what_is_fitted_is_in_its_file_and_used_everywhere(self, toy_settings, tmp_path):
        method = "temperature"
        teacher = toy_settings["teacher"] | {"confidence": {"method": method}}
        run_dir = tmp_path / "run"
        settings = toy_settings | {"teacher": teacher, "student": quick(toy_settings)}
        summary = run(settings | {"budget": {"rounds": 1, "train": 60, "labels": 500}}, run_dir)
        fitted = json.loads((run_dir / "calibration.json").read_text())
        assert fitted["method"] == method
        quality = summary["teacher"]["quality"]
        assert quality["on"] == "test set"
        assert quality["raw"]["accuracy"] == pytest.approx(quality["used"]["accuracy"], abs=0.05)
        assert quality["used"]["ece"] != quality["raw"]["ece"]
        assert summary["teacher"]["ece"] == pytest.approx(quality["used"]["ece"])
        assert fitted["fitted_on"] == 40, "the hold-out, all of it with gold"
        batch = pq.read_table(next(iter(sorted(run_dir.glob("rounds/*/batch.parquet")))))
        raw = {
            row: np.array(probs) / sum(probs)
            for file in run_dir.glob("labels/*.parquet")
            for row, probs in zip(
                pq.read_table(file)["row"].to_pylist(), pq.read_table(file)["probs"].to_pylist(), strict=True
            )
        }
        apart = [
            np.abs(np.array(probs) - raw[row]).max()
            for row, probs in zip(batch["row"].to_pylist(), batch["probs"].to_pylist(), strict=True)
        ]
        assert max(apart) > 0.01
