"""jobs/predict.py as its users start it: every row once, killed and gone on with, thresholds, mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chaos import title_of
from toys import NAMES, save_tiny_classifier, write_corpus

from llkd_ray.cli.main import main
from llkd_ray.prediction.results import read
from llkd_ray.storage.checkpoints import inspect
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.student.inference import load, score

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(300)]


def results(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("predictions/*.parquet"))])


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs the job with these flags and returns its one line of error."""

    def run(*flags: object) -> str:
        assert main(["predict", *map(str, flags)]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_every_row_is_predicted_or_in_quarantine(local_ray, tiny_classifier, tmp_path):
    records = [{"key": n, "body": f"text {n % 7}", "kind": "a" if n % 2 else "b"} for n in range(60)]
    records[5]["body"], records[9]["body"], records[11] = "", None, {"key": 11, "kind": "a"}
    lines = [json.dumps(record) for record in records] + ["{broken"]
    for number, part in enumerate((lines[:30], lines[30:])):
        (tmp_path / f"corpus-{number}.jsonl").write_text("\n".join(part) + "\n")
    out = tmp_path / "out"
    corpus, flags = str(tmp_path / "corpus-*.jsonl"), ["--text", "body", "--id", "key", "--out", str(out)]
    assert main(["predict", tiny_classifier, corpus, *flags, "--piece-rows", "7", "--with-text"]) == 0

    found = results(out)
    assert sorted(map(int, found["id"].to_pylist())) == [n for n in range(60) if n not in (5, 9, 11)]
    assert summary(out)["rows_in"] == 61
    assert summary(out)["predicted"] == found.num_rows == 57
    assert summary(out)["quarantined"] == {"broken_line": 1, "empty": 1, "missing": 2}
    assert json.loads(found.schema.metadata[b"labels"]) == list(NAMES[:3])
    p_NC = np.array(found["probs"].to_pylist())
    np.testing.assert_allclose(p_NC.sum(axis=1), 1, atol=1e-5)
    assert found["label"].to_pylist() == [NAMES[c] for c in p_NC.argmax(axis=1)]
    np.testing.assert_array_equal(found["confidence"].to_numpy(), p_NC.max(axis=1).astype(np.float32))
    assert all(found["accepted"].to_pylist())
    # The same text gets the same answer, wherever it stands.
    of_text: dict[str, float] = {}
    for text, confidence in zip(found["text"].to_pylist(), found["confidence"].to_pylist(), strict=True):
        assert of_text.setdefault(text, confidence) == pytest.approx(confidence, abs=1e-5)
    assert len(of_text) == 7


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_other_formats_keep_columns_and_resume(ending, local_ray, tiny_classifier, tmp_path, capfd):
    rows = [{"body": f"text {n % 7}", "label": f"{n:03}", "tags": ["a", n]} for n in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    job = ["predict", tiny_classifier, str(tmp_path / "corpus.jsonl"), "--text", "body", "--piece-rows", "10"]
    job += ["--format", ending, "--keep-columns", "label", "tags", "--out", str(tmp_path / "out")]
    assert main(job) == 0
    first = summary(tmp_path / "out")
    (tmp_path / f"out/predictions/piece-000000-00001.{ending}").unlink()
    assert main([*job, "--resume"]) == 0
    again = summary(tmp_path / "out")
    assert again["scored_now"] == 10
    assert again["labels"] == first["labels"], "rows that were there are counted, too"
    assert again["accepted"] == 30
    assert "accepted: 100.0" in capfd.readouterr().out

    store = RunStore(str(tmp_path / "out"))
    files = store.names("predictions")
    assert [Path(name).suffix for name in files] == [f".{ending}"] * 3
    found = pa.concat_tables([read(store, f"predictions/{name}") for name in files])
    assert sorted(found["position"].to_pylist()) == list(range(30))
    told = {name: one["predicted"] for name, one in again["labels"].items() if one["predicted"]}
    assert told == Counter(found["label"].to_pylist())
    for row in found.to_pylist():
        assert int(row["corpus_label"]) == row["position"]
        assert json.loads(row["tags"]) == ["a", row["position"]]
        p_C = row["probs"] if ending == "jsonl" else [row[f"p_{name}"] for name in NAMES[:3]]
        assert NAMES[int(np.argmax(p_C))] == row["label"]


@pytest.mark.slow
def test_only_rows_that_are_asked_for(local_ray, tiny_classifier, tmp_path):
    corpus = write_corpus(tmp_path / "pool.parquet", 40)
    out = tmp_path / "out"
    assert (
        main(["predict", tiny_classifier, str(corpus), "--id=id", "--where", "label=sea", "--out", str(out)])
        == 0
    )
    table = pq.read_table(corpus)
    wanted = [
        i for i, name in zip(*(table[c].to_pylist() for c in ("id", "label")), strict=True) if name == "sea"
    ]
    assert results(out)["id"].to_pylist() == wanted
    assert summary(out)["rows_in"] == len(wanted)


@pytest.mark.slow
class TestThresholds:
    @pytest.fixture
    def corpora(self, tmp_path) -> tuple[Path, Path]:
        return (
            write_corpus(tmp_path / "pool.parquet", 120, seed=1),
            write_corpus(tmp_path / "gold.parquet", 90, seed=2),
        )

    def test_what_is_fitted_on_gold_is_what_accepts(self, local_ray, tiny_classifier, corpora, tmp_path):
        pool, gold = corpora
        out = tmp_path / "out"
        flags = ["--target-precision", "0.1", "--gold", str(gold), "--label", "label", "--out", str(out)]
        assert main(["predict", tiny_classifier, str(pool), *flags, "--dtype", "float32"]) == 0
        facts = json.loads((out / "thresholds.json").read_text())
        assert facts["gold_texts"] == 90
        assert sum(one["gold_texts"] for one in facts["labels"].values()) == 90
        assert any(one["threshold"] is not None for one in facts["labels"].values())
        found = results(out)
        for label, confidence, accepted in zip(
            *(found[name].to_pylist() for name in ("label", "confidence", "accepted")), strict=True
        ):
            threshold = facts["labels"][label]["threshold"]
            assert accepted == (threshold is not None and confidence >= threshold)
        assert any(found["accepted"].to_pylist())
        for one in facts["labels"].values():
            assert one["threshold"] is None or one["precision"] >= 0.1

    def test_grades(self, local_ray, tiny_encoder, tmp_path):
        model = save_tiny_classifier(tmp_path / "grades", tiny_encoder, ("0", "1", "2", "3"))
        pool = write_corpus(tmp_path / "pool.parquet", 50)
        out = tmp_path / "out"
        texts = pq.read_table(pool)["text"].to_pylist()
        expected_NC = score(load(inspect(model), "float32", torch.device("cpu")), texts, 128, None)
        middle = float(np.median(expected_NC[:, 2:].sum(axis=1)))
        flags = ["--min-grade", "2", "--threshold", f"2={middle}", "--dtype", "float32", "--out", str(out)]
        assert main(["predict", model, str(pool), *flags]) == 0
        found = results(out)
        p_N = np.array(found["probs"].to_pylist())[:, 2:].sum(axis=1)
        np.testing.assert_allclose(found["p_min_grade"].to_numpy(), p_N, atol=1e-6)
        assert found["accepted"].to_pylist() == (p_N >= middle).tolist()
        assert len(set(found["accepted"].to_pylist())) == 2


@pytest.mark.slow
class TestGoingOn:
    def test_killed_and_gone_on_with_nothing_is_scored_twice(
        self, tiny_classifier, own_cluster_env, tmp_path
    ):
        corpus = write_corpus(tmp_path / "pool.parquet", 10_000, n_classes=6)
        out, log = tmp_path / "out", tmp_path / "log.txt"
        # Small pieces and batches, so that it takes a while.
        command = [sys.executable, str(ROOT / "jobs/predict.py"), tiny_classifier, str(corpus), "--id", "id"]
        command += [
            "--out",
            str(out),
            "--piece-rows",
            "100",
            "--batch-tokens",
            "32",
            "--workers",
            "1",
            "--resume",
        ]

        def start() -> subprocess.Popen:
            with log.open("ab") as said:
                return subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path, env=own_cluster_env)

        driver = start()
        while len(list(out.glob("predictions/*.parquet"))) < 5:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.02)
        below = psutil.Process(driver.pid).children(recursive=True)
        actors = [process for process in below if "MapWorker" in title_of(process)]
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        _, alive = psutil.wait_procs(actors, timeout=60)  # they may still finish what they have
        assert actors
        assert not alive
        kept = self.times(out)
        assert 5 <= len(kept) < 100, "it was too fast to be killed"

        assert start().wait(timeout=200) == 0, log.read_text()
        assert {file: at for file, at in self.times(out).items() if file in kept} == kept
        assert len(self.times(out)) == 100
        assert summary(out)["predicted"] == 10_000
        assert summary(out)["scored_now"] == 10_000 - 100 * len(kept)
        assert results(out)["id"].to_pylist() == pq.read_table(corpus)["id"].to_pylist()

    @staticmethod
    def times(out: Path) -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in out.glob("predictions/*.parquet")}

    @pytest.fixture
    def begun(self, local_ray, tiny_classifier, tmp_path) -> list[str]:
        """The flags of a prediction that is finished."""
        corpus = write_corpus(tmp_path / "pool.parquet", 30)
        flags = [tiny_classifier, str(corpus), "--out", str(tmp_path / "out"), "--piece-rows", "10"]
        assert main(["predict", *flags]) == 0
        return flags

    def test_what_is_finished_is_not_done_again(self, begun, tmp_path):
        before = self.times(tmp_path / "out")
        assert main(["predict", *begun, "--resume", "--batch-tokens", "100", "--workers", "1,2"]) == 0
        assert self.times(tmp_path / "out") == before
        assert summary(tmp_path / "out")["scored_now"] == 0
        assert summary(tmp_path / "out")["predicted"] == 30

    def test_only_what_is_missing_is_done(self, begun, tmp_path):
        lost = tmp_path / "out/predictions/piece-000000-00001.parquet"
        content = pq.read_table(lost)
        lost.unlink()
        assert main(["predict", *begun, "--resume"]) == 0
        assert summary(tmp_path / "out")["scored_now"] == 10
        assert pq.read_table(lost)["id"].equals(content["id"])

    def test_without_the_flag_it_is_refused(self, begun, refused):
        assert "holds predictions: resume with --resume, or give another folder" in refused(*begun)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--threshold", "sea=0.5"], "--threshold: {'sea': 0.5} now, but"),
            (["--max-tokens", "16"], "--max-tokens: 16 now, but"),
            (["--piece-rows", "20"], "--piece-rows: 20 now, but"),
            (["--id", "id"], "--id: 'id' now, but"),
        ],
    )
    def test_other_options_are_refused(self, begun, refused, flags, said):
        message = refused(*begun, "--resume", *flags)
        assert said in message
        assert message.endswith("give what it was started with, or another --out")

    def test_another_model_or_corpus_is_refused(self, begun, refused, tiny_encoder, tmp_path):
        other = save_tiny_classifier(tmp_path / "other", tiny_encoder, NAMES[:4])
        assert "MODEL (its files): " in refused(other, *begun[1:], "--resume")
        write_corpus(tmp_path / "pool.parquet", 31)
        assert "CORPUS_URI (its files): " in refused(*begun, "--resume")


class TestMistakes:
    """One line with the field, the value and the remedy; Ray is not even started."""

    @pytest.fixture(autouse=True)
    def no_ray(self, monkeypatch):
        import ray

        def start(*_: object, **__: object) -> None:
            raise AssertionError("Ray was started")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", start)

    @pytest.fixture
    def job(self, tiny_classifier, tmp_path) -> list[str]:
        corpus = write_corpus(tmp_path / "pool.parquet", 10)
        return [tiny_classifier, str(corpus), "--out", str(tmp_path / "out")]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--text", "body"], "--text: there is no column 'body' in"),
            (["--id", "key"], "--id: there is no column 'key' in"),
            (["--where", "lang=en"], "--where: there is no column 'lang' in"),
            (["--where", "lang"], "--where: 'lang' is no pair: write NAME=VALUE"),
            (["--max-tokens", "1000"], "--max-tokens: 1000 is too long"),
            (
                ["--batch-tokens", "0"],
                "--batch-tokens: 0 is refused: Input should be greater than or equal to 1",
            ),
            (["--workers", "3,2"], "--workers: 3,2 is no range: 1 <= MIN <= MAX"),
            (["--workers", "many"], "--workers: 'many' is no range"),
            (["--target-precision", "0.9"], "--target-precision: 0.9 is wanted, but there is no gold"),
            (
                ["--target-precision", "90"],
                "--target-precision: 90.0 is refused: Input should be less than 1",
            ),
            (["--label", "label"], "--label: 'label' is a column of --gold, which is not given"),
            (["--threshold", "sea"], "--threshold: 'sea' is no pair"),
            (["--threshold", "sea=high"], "--threshold: 'high' of 'sea=high' is no number"),
            (
                ["--threshold", "sea=7"],
                "--threshold: 7.0 is refused: Input should be less than or equal to 1",
            ),
            (["--threshold", "moon=0.5"], "--threshold: 'moon' is no label of the model: take sea, kitchen"),
            (
                ["--min-grade", "moon", "--threshold", "moon=0.5"],
                "--min-grade: 'moon' is no label of the model",
            ),
            (["--min-grade", "sea"], "--min-grade: 'sea' needs a threshold"),
            (
                ["--min-grade", "sea", "--threshold", "kitchen=1"],
                "--threshold: 'kitchen' has no meaning beside",
            ),
            (
                ["--gold", "no.parquet", "--target-precision", "0.9"],
                "has no column of true labels: name it with --label",
            ),
            (["--gold", "no.parquet", "--label", "x", "--target-precision", "0.9"], "--gold: "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_flags(self, refused, job, flags, said, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert said in refused(*job, *flags)
        assert not (tmp_path / "out").exists()

    def test_corpus_and_model(self, refused, job, tmp_path):
        assert "CORPUS_URI: " in (said := refused(job[0], tmp_path / "no/*.parquet", *job[2:]))
        assert "matches no file" in said
        assert "MODEL: " in refused(tmp_path / "no-model", *job[1:])

    def test_a_folder_of_something_else(self, refused, job, tmp_path):
        (tmp_path / "out/predictions").mkdir(parents=True)
        (tmp_path / "out/predictions/mine.parquet").touch()
        assert "holds predictions/ of something else: give another folder" in refused(*job)

    def test_a_place_that_cannot_be_written(self, refused, job, tmp_path):
        (tmp_path / "out").write_text("a file")
        assert "--out: " in (said := refused(*job))
        assert "cannot be used" in said


@pytest.mark.slow
def test_more_workers_than_there_is_room_for_are_refused_with_the_sum(
    local_ray, tiny_classifier, tmp_path, refused
):
    corpus = write_corpus(tmp_path / "pool.parquet", 10)
    said = refused(tiny_classifier, corpus, "--out", tmp_path / "out", "--workers", "9")
    assert "--workers: 9 actors of 0.9 CPUs" in said
    assert "no room for 8 of them on 1 node(s) with 2 CPUs" in said


@pytest.mark.slow
def test_weights_that_are_missing_end_in_one_line(local_ray, tiny_classifier, tmp_path, refused):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_classifier, tmp_path / "headless")
    weights = load_file(tmp_path / "headless/model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "headless/model.safetensors", metadata={"format": "pt"})
    corpus = write_corpus(tmp_path / "pool.parquet", 10)
    said = refused(tmp_path / "headless", corpus, "--out", tmp_path / "out")
    assert "lacks the weights classifier.bias" in said


@pytest.mark.slow
def test_gold_without_a_usable_label_is_refused(local_ray, tiny_classifier, tmp_path, refused):
    corpus = write_corpus(tmp_path / "pool.parquet", 10)
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"text": "a", "label": "moon"}\n')
    flags = ["--gold", gold, "--label", "label", "--target-precision", "0.9", "--out", tmp_path / "out"]
    assert "has no usable text with a true label" in refused(tiny_classifier, corpus, *flags)
