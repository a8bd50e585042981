"""Trials on toy texts with a tiny student: figures, files, and that nothing is done twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import NAMES, make_config, toy_probs, toy_texts

from llkd_ray.comparison import trial as trial_module
from llkd_ray.comparison.trial import Labels, Texts, Trial, against_gold, finished, run_trial
from llkd_ray.metrics.uncertainty import entropy, normalise, support
from llkd_ray.selection.policies import SelectionPolicy
from llkd_ray.selection.table import to_16_bits
from llkd_ray.student.inference import predict

N_POOL, N_TEST, N_CLASSES = 120, 40, 3
KNOWN = {"names": NAMES[:N_CLASSES], "prior": dict(zip(NAMES, [1, 1, 2], strict=False))}
"""Labels whose true shares are known."""
HALF = {"labels": 60, "first_labels": 0.0}
"""A budget for half of the pool, spread evenly over the rounds."""
FIGURES = {"accuracy", "macro_f1", "ece", "f1_by_class"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads than free cores make the tiny models a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts() -> Texts:
    words, gold = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)
    return Texts(words[:N_POOL], gold[:N_POOL], words[N_POOL:], gold[N_POOL:], NAMES[:N_CLASSES])


@pytest.fixture(scope="module")
def labels(texts) -> Labels:
    p_NC = normalise(toy_probs(texts.gold_N, N_CLASSES, 0.9, np.random.default_rng(1)))
    return Labels(p_NC, np.arange(N_POOL) + 10, "toy")


@pytest.fixture
def make_trial(tiny_encoder, tmp_path):
    def make(policy="random", sizes=(10, 20, 30), reported=None, folder="trials", **sections) -> Trial:
        student = {"model": tiny_encoder, "batch_size": 10, "epochs": 1, "min_steps": 2}
        own = {"student": student, "selection": {"policy": policy}, "budget": {"first_labels": 1.0}}
        merged = {name: section | sections.get(name, {}) for name, section in own.items()}
        return Trial(make_config(**sections | merged), sizes, reported or sizes, tmp_path / folder)

    return make


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The sizes that anything is trained on, as they come."""
    sizes = []

    def train_round(student, batch, *arguments, **more):
        sizes.append(len(batch.texts))
        return real(student, batch, *arguments, **more)

    real = trial_module.train_round
    monkeypatch.setattr(trial_module, "train_round", train_round)
    return sizes


def without_time(figures):
    return [{name: value for name, value in facts.items() if name != "seconds"} for facts in figures]


def saved(trial: Trial, labels: Labels, k: int) -> dict[str, np.ndarray]:
    """What the file of a round holds."""
    with np.load(trial.folder / f"{trial.key(labels.digest, k)}.npz") as arrays:
        return dict(arrays)


def rows(trial: Trial, labels: Labels, k: int) -> list[int]:
    return saved(trial, labels, k)["row"].tolist()


class TestFigures:
    @pytest.mark.parametrize("policy", ["random", "llkd_sample"])
    def test_of_every_reported_size(self, make_trial, texts, labels, policy):
        trial, said = make_trial(policy), []
        figures = run_trial(trial, texts, labels, said.append)
        assert [(facts["size"], facts["trained"]) for facts in figures] == [(10, 10), (20, 20), (30, 30)]
        assert said == ["10 texts", "20 texts", "30 texts"]
        for k, facts in enumerate(figures):
            assert facts.keys() >= FIGURES | {"seconds", "loss", "steps"}
            assert 0 <= facts["macro_f1"] <= 1
            assert facts["macro_f1"] == pytest.approx(np.mean(facts["f1_by_class"]))
            assert facts["labelled"] == N_POOL
            assert facts["teacher_tokens"] == labels.tokens_N.sum()
            chosen = rows(trial, labels, k)
            right = labels.p_NC[chosen].argmax(axis=1) == texts.gold_N[chosen]
            assert facts["pseudo_label_accuracy"] == pytest.approx(right.mean())
        assert rows(trial, labels, 2)[:10] == rows(trial, labels, 0), "what is selected stays selected"
        assert np.unique(rows(trial, labels, 2)).size == 30

    def test_agreement_is_with_the_teacher_on_the_test_set(self, make_trial, texts, labels, monkeypatch):
        """A student that is always right and a teacher that is wrong on every fourth text."""
        right_TC = np.eye(N_CLASSES)[texts.gold_T]
        monkeypatch.setattr(trial_module, "predict", lambda *_: right_TC)
        says_T = (texts.gold_T + (np.arange(N_TEST) % 4 == 0)) % N_CLASSES
        trial = make_trial(sizes=(10,))
        (figures,) = run_trial(trial, texts, replace(labels, test_label_T=says_T))
        assert (figures["accuracy"], figures["agreement"]) == (1.0, 0.75)
        (figures,) = run_trial(trial, texts, replace(labels, digest="gold"))
        assert "agreement" not in figures, "the truth is no teacher"

    def test_against_gold(self, texts):
        assert against_gold(texts, np.eye(N_CLASSES)[texts.gold_T])["f1_by_class"] == [1, 1, 1]
        always_0 = against_gold(texts, np.eye(N_CLASSES)[np.zeros(N_TEST, dtype=int)])
        share = np.mean(texts.gold_T == 0)
        assert always_0["accuracy"] == pytest.approx(share)
        assert always_0["f1_by_class"] == pytest.approx([2 * share / (1 + share), 0, 0])

    def test_a_student_learns(self, make_trial, texts):
        gold = Labels(np.eye(N_CLASSES)[texts.gold_N], np.zeros(N_POOL, dtype=int), "gold")
        student = {"learning_rate": 1e-2, "min_steps": 200}
        figures = run_trial(make_trial("all", (N_POOL,), student=student), texts, gold)
        assert figures[0]["accuracy"] > 0.8
        assert figures[0]["pseudo_label_accuracy"] == 1

    def test_only_what_is_asked_for_is_trained(self, make_trial, texts, labels, trained):
        figures = run_trial(make_trial("random", reported=(20,)), texts, labels)
        assert [facts["size"] for facts in figures] == [20]
        assert trained == [20]
        run_trial(make_trial("entropy", reported=(10,)), texts, labels)
        assert trained == [20, 10, 20], "the student of 20 decides what comes next, that of 30 nothing"

    def test_quota_and_options_reach_the_policy(self, make_trial, texts, labels):
        trial = make_trial("random", selection={"quota": 0.0}, reported=(30,))
        run_trial(trial, texts, labels)
        label_M = labels.p_NC[rows(trial, labels, 2)].argmax(axis=1)
        assert np.bincount(label_M).tolist() == [10, 10, 10]
        wrong = make_trial("llkd", selection={"options": {"order": "worst"}})
        with pytest.raises(ValueError, match="order is 'worst'"):
            run_trial(wrong, texts, labels)

    @pytest.mark.parametrize(
        ("policy", "selection", "expected"),
        [
            ("random", {}, None),
            ("random", {"prior": 1.0}, 1.0),
            ("llkd_sample", {}, 0.5),
            ("llkd_sample", {"prior": "off"}, None),
        ],
    )
    def test_the_student_is_told_what_to_reckon_with(
        self, make_trial, texts, labels, monkeypatch, policy, selection, expected
    ):
        priors, real = [], trial_module.train_round

        def train_round(student, batch, *more, **named):
            priors.append(batch.prior_C)
            return real(student, batch, *more, **named)

        monkeypatch.setattr(trial_module, "train_round", train_round)
        skewed = Labels(labels.p_NC * [1.0, 0.5, 0.5], labels.tokens_N, "skewed")
        run_trial(make_trial(policy, (30,), selection=selection), texts, skewed)
        counts = np.bincount(skewed.p_NC.argmax(axis=1))
        (prior,) = priors
        assert prior == (expected and pytest.approx(counts**expected / (counts**expected).sum()))
        known = make_trial("llkd_sample", labels=KNOWN)  # which go before the teacher's counts
        assert known.prior(np.array([50, 60, 10])) == pytest.approx([0.25, 0.25, 0.5])

    @pytest.mark.parametrize("policy", ["random", "llkd_sample"])
    def test_same_seed_same_result(self, make_trial, texts, labels, policy):
        def figures(folder, seed):
            trial = make_trial(policy, (10, 20), folder=folder, run={"seed": seed})
            return without_time(run_trial(trial, texts, labels)), rows(trial, labels, 1)

        first = figures("a", seed=1)
        assert figures("b", seed=1) == first
        assert figures("c", seed=2)[1] != first[1]


class TestFiles:
    def test_a_second_call_reads_and_trains_nothing(self, make_trial, texts, labels, trained):
        trial, said = make_trial("llkd", (10, 20)), []
        assert finished(trial, labels.digest) == []
        first = run_trial(trial, texts, labels)
        assert run_trial(trial, texts, labels, said.append) == first, "to the second that it took"
        assert (len(trained), said, len(list(trial.folder.iterdir()))) == (2, [], 2)
        assert finished(trial, labels.digest) == first
        larger = finished(make_trial("llkd"), labels.digest)
        assert larger == first[:1], "for which nobody has asked the student of 20"
        assert finished(trial, "another teacher") == []

    @pytest.mark.parametrize("lost", [[2], [1, 2], [1]])
    @pytest.mark.parametrize(
        ("policy", "sections"),
        [
            ("random", {}),
            ("llkd_sample", {}),
            ("llkd_sample", {"budget": HALF, "acquisition": {"policy": "m_raru"}}),
        ],
    )
    def test_a_killed_trial_ends_as_if_it_had_not_been(
        self, make_trial, texts, labels, policy, sections, lost
    ):
        trial = make_trial(policy, **sections)
        first, chosen = without_time(run_trial(trial, texts, labels)), rows(trial, labels, 2)
        for k in lost:
            (trial.folder / f"{trial.key(labels.digest, k)}.npz").unlink()
        (trial.folder / "0123.1.partial").write_bytes(b"half a file")
        assert without_time(run_trial(trial, texts, labels)) == first
        assert rows(trial, labels, 2) == chosen

    def test_a_larger_size_gives_what_it_would_have_given_at_once(self, make_trial, texts, labels, trained):
        run_trial(make_trial("random", (10, 20)), texts, labels)
        run_trial(make_trial("random", (10, 20, 30)), texts, labels)
        assert trained == [10, 20, 30], "the files of the smaller are kept"
        # Nobody needed the opinion of the smaller trial's last student; now the next round does.
        small, large = make_trial("entropy", (10, 20)), make_trial("entropy", (10, 20, 30), reported=(30,))
        first = without_time(run_trial(small, texts, labels))
        grown = run_trial(large, texts, labels)
        at_once = run_trial(make_trial("entropy", reported=(30,), folder="other"), texts, labels)
        assert without_time(grown) == without_time(at_once)
        so_far = len(trained)
        assert without_time(run_trial(small, texts, labels)) == first
        run_trial(large, texts, labels)
        assert len(trained) == so_far, "trials that report other sizes do not undo each other's files"

    def test_key_stands_for_what_decides(self, make_trial):
        def key(*arguments, digest="labels", k=1, **more):
            return make_trial(*arguments, **more).key(digest, k)

        same = key()
        assert key(sizes=(10, 20, 40)) == key(sizes=(10, 20)) == key(reported=(10,)) == same
        assert key(acquisition={"policy": "entropy"}) == same, "all labels are there from the start"
        others = [
            *(key(digest="others"), key(k=0), key(sizes=(5, 20)), key("llkd"), key(run={"seed": 1})),
            *(key(selection={one: 0.5}) for one in ("quota", "prior")),
            *(key(labels=KNOWN), key(student={"epochs": 2}), key(budget={"labels": 100})),
            key(budget={"labels": 100}, sizes=(10, 20)),
            key(budget={"labels": 100}, acquisition={"policy": "entropy"}),
            key(budget={"first_labels": 0.5}),
        ]
        assert len({same, *others}) == len(others) + 1
        assert key(labels=KNOWN, selection={"prior": "off"}) == same, "what is known is not used"


class TestAcquisition:
    @pytest.mark.parametrize("policy", ["random", "sequential", "entropy", "m_raru"])
    def test_only_what_was_read_is_counted_and_chosen(self, make_trial, texts, labels, policy):
        trial = make_trial("random", budget=HALF, acquisition={"policy": policy})
        figures = run_trial(trial, texts, labels)
        assert [facts["labelled"] for facts in figures] == [20, 40, 60]
        read = []
        for k, facts in enumerate(figures):
            read += saved(trial, labels, k)["read"].tolist()
            assert set(rows(trial, labels, k)) <= set(read)
            assert facts["teacher_tokens"] == labels.tokens_N[read].sum()
        assert len(set(read)) == 60

    def test_labels_come_with_the_sizes(self, make_trial):
        def labelled(**budget):
            trial = make_trial(budget=budget)
            return [trial.labelled_before(k, N_POOL) for k in range(3)]

        assert labelled(first_labels=1.0) == [120, 120, 120]
        assert labelled(first_labels=0.0) == [40, 80, 120]
        assert labelled(first_labels=0.5, labels=60) == [30, 45, 60]
        assert labelled(first_labels=0.0, labels=999) == [40, 80, 120]
        assert labelled(first_labels=0.0, labels=15) == [10, 15, 15], "a round needs texts to choose from"

    def test_reads_what_the_student_was_least_sure_of(self, make_trial, texts, labels):
        acquisition = {"policy": "entropy", "explore": 0.0}
        trial = make_trial("random", budget=HALF, acquisition=acquisition, reported=(30,))
        run_trial(trial, texts, labels)
        first = saved(trial, labels, 0)
        scored, uncertainty = first["scored"], to_16_bits(entropy(first["p"]))  # as the table has it
        unread = ~np.isin(scored, first["read"])
        read = np.isin(scored, saved(trial, labels, 1)["read"])
        assert unread.sum() == 100
        assert read.sum() == 20
        assert uncertainty[read].min() >= uncertainty[unread & ~read].max()

    def test_the_student_is_heard_on_labels_that_came_after_its_scores(
        self, make_trial, texts, labels, monkeypatch
    ):
        seen, choose = [], SelectionPolicy.choose

        def spy(policy, candidates, *arguments, **more):
            seen.extend(candidates)  # so few are one chunk
            return choose(policy, candidates, *arguments, **more)

        monkeypatch.setattr(SelectionPolicy, "choose", spy)
        acquisition = {"policy": "entropy"}
        trial = make_trial("llkd_sample", (10, 20), budget=HALF, acquisition=acquisition, reported=(20,))
        run_trial(trial, texts, labels)
        first = saved(trial, labels, 0)
        scored, p_MC = first["scored"], first["p"]
        candidates = seen[1]
        assert np.isin(candidates.row_N, scored).all()
        expected = support(p_MC[np.searchsorted(scored, candidates.row_N)], candidates.label_N)
        np.testing.assert_allclose(candidates.support_N, expected, atol=1e-3)


def test_opinions_are_those_of_the_rounds_student(make_trial, texts, labels, monkeypatch):
    answers = []

    def spy(student, some, config):
        answers.append((list(some), predict(student, some, config)))
        return answers[-1][1]

    monkeypatch.setattr(trial_module, "predict", spy)
    trial = make_trial("entropy", (10, 20), reported=(20,))
    run_trial(trial, texts, labels)
    first = saved(trial, labels, 0)
    assert answers[0][0] == [texts.pool[row] for row in first["scored"]]
    np.testing.assert_allclose(first["p"], answers[0][1], atol=1e-6)
    left = np.delete(first["scored"], np.argsort(-entropy(first["p"]), kind="stable")[:10])
    assert not set(rows(trial, labels, 1)[10:]) & set(left.tolist())
