"""One contract for every selection policy, and what each of ours promises beyond it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from candidate_sets import make_candidates
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SelectionConfig
from llkd_ray.selection import table
from llkd_ray.selection.policies import (
    SELECTION,
    Selection,
    class_quotas,
    find_selection,
    target_prior,
    tempered,
)
from llkd_ray.selection.search import class_thresholds
from llkd_ray.selection.table import Candidates, Chunked

WITH_STUDENT = {"entropy", "margin", "product", "llkd", "llkd_rank", "llkd_sample"}
SOME_MAY_NOT_PASS = {"freematch", "llkd"}


def choose(name: str, candidates: Candidates, n: int, seed: int = 0, **more) -> Selection:
    """Without quotas, unless the test asks for them."""
    return SELECTION[name].choose(candidates, n, np.random.default_rng(seed), **{"quota": "off", **more})


def places(candidates: Candidates, chosen: Selection) -> np.ndarray:
    return np.searchsorted(candidates.row_N, chosen.row_M)


def threshold_of(signal: np.ndarray, label: np.ndarray) -> np.ndarray:
    """What each text's pseudo-class has to reach, from sums in floats."""
    return class_thresholds(np.bincount(label, weights=signal), np.bincount(label))[label]


def test_registry():
    assert set(SELECTION) >= WITH_STUDENT | {"all", "random", "confidence", "freematch"}
    assert all(SELECTION[name].uses_student for name in WITH_STUDENT)
    assert SELECTION["random"].options == {}
    assert SELECTION["llkd"].options == {"thresholds": "class", "order": "random", "weights": True}
    assert SELECTION["llkd_sample"].options == {"trust": 4.0, "need": 0.5, "support": 0.5}


@pytest.mark.parametrize("name", sorted(SELECTION))
@settings(max_examples=25, deadline=None)
@given(
    n_candidates=st.integers(0, 200),
    n=st.integers(0, 250),
    seed=st.integers(0, 2**32),
    scored=st.sampled_from([0.0, 0.5, 1.0]),
    quota=st.sampled_from(["off", None, 0.0, 0.5, 1.0]),
    trained=st.one_of(st.none(), st.lists(st.integers(0, 80), min_size=4, max_size=4)),
    one_class=st.booleans(),
    chunk=st.integers(1, 60),
    borders=st.lists(st.integers(0, 200), max_size=4),
)
def test_contract(name, n_candidates, n, seed, scored, quota, trained, one_class, chunk, borders):
    """Size, no row twice, weights of mean one; the same for a seed whatever the order and the chunks."""
    candidates = make_candidates(n_candidates, seed, scored=scored)
    if one_class:
        candidates = replace(candidates, label_N=np.full(n_candidates, 2, dtype=np.int16))
    trained_C = None if trained is None else np.array(trained)
    before = [np.copy(value) for value in vars(candidates).values()]

    def chosen_from(texts: Candidates | Chunked[Candidates]) -> Selection:
        return choose(name, texts, n, seed, quota=quota, trained_C=trained_C)

    chosen = chosen_from(candidates)
    assert len(chosen) <= min(n, n_candidates)
    assert name in SOME_MAY_NOT_PASS or len(chosen) == min(n, n_candidates)
    assert len(chosen) > 0 or n == 0 or n_candidates < 100
    assert chosen.candidates == n_candidates
    assert len(choose(name, candidates, n, seed)) == len(chosen), "quotas do not change how many"
    assert np.unique(chosen.row_M).size == len(chosen)
    assert np.isin(chosen.row_M, candidates.row_N).all()
    assert chosen.weight_M.shape == chosen.row_M.shape
    assert (chosen.weight_M >= 0).all()
    assert len(chosen) == 0 or chosen.weight_M.mean() == pytest.approx(1.0)

    shuffled = candidates.take(np.random.default_rng(9).permutation(n_candidates))
    edges = [0, *sorted(min(border, n_candidates) for border in borders), n_candidates]
    chunked = Chunked(lambda: (candidates.take(slice(*edge)) for edge in pairwise(edges)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        for same in (candidates, shuffled, chunked):
            again = chosen_from(same)
            np.testing.assert_array_equal(again.row_M, chosen.row_M)
            np.testing.assert_array_equal(again.weight_M, chosen.weight_M)
    for old, new in zip(before, vars(candidates).values(), strict=True):
        np.testing.assert_array_equal(old, new)


class TestOptions:
    def test_defaults_are_accepted_and_change_nothing(self):
        candidates = make_candidates(100)
        for name, policy in SELECTION.items():
            policy.check_options(policy.options)
            with_defaults = choose(name, candidates, 20, options=policy.options)
            np.testing.assert_array_equal(with_defaults.row_M, choose(name, candidates, 20).row_M)
        find_selection(SelectionConfig(policy="llkd_sample", options={"trust": 2}))  # a whole number will do

    @pytest.mark.parametrize(
        ("name", "options", "named"),
        [
            ("random", {"trust": 1.0}, "trust"),
            ("llkd", {"oder": "random"}, "oder"),
            ("llkd", {"order": "best"}, "order"),
            ("llkd", {"thresholds": "batch"}, "thresholds"),
            ("llkd", {"weights": "yes"}, "weights"),
            ("llkd_sample", {"trust": "much"}, "trust"),
            ("llkd_sample", {"trust": True}, "trust"),
            ("llkd_sample", {"need": -0.5}, "need"),
        ],
    )
    def test_what_is_refused(self, name, options, named):
        with pytest.raises(ConfigError, match=rf"^selection\.options: .*\b{named}\b"):
            find_selection(SelectionConfig(policy=name, options=options))
        with pytest.raises(ConfigError, match=r"selection\.policy: 'bets' .* llkd_sample"):
            find_selection(SelectionConfig(policy="bets"))


class TestBaselines:
    def test_takes_the_largest_first(self):
        candidates = make_candidates(100)
        product = candidates.confidence_N * candidates.uncertainty_N
        value_of = {
            "all": -candidates.row_N,
            "confidence": candidates.confidence_N,
            "entropy": candidates.uncertainty_N,
            "margin": -candidates.margin_N,
            "product": product,
        }
        for name, value in value_of.items():
            chosen, order = choose(name, candidates, 30), np.argsort(-value, kind="stable")[:30]
            np.testing.assert_array_equal(places(candidates, chosen), order, err_msg=name)
            weight = product[order] / product[order].mean() if name == "product" else np.ones(30)
            np.testing.assert_allclose(chosen.weight_M, weight, rtol=1e-6)

    def test_random_takes_all_parts_alike(self):
        candidates = make_candidates(1000)
        upper = [np.mean(places(candidates, choose("random", candidates, 100, s)) >= 500) for s in range(50)]
        # 5,000 draws: three standard errors are 0.021.
        assert np.mean(upper) == pytest.approx(0.5, abs=0.021)

    @pytest.mark.parametrize("name", ["entropy", "margin", "llkd_rank"])
    def test_without_a_student_chance_decides(self, name):
        candidates = make_candidates(200, scored=0.0)
        first, second = (set(choose(name, candidates, 50, seed).row_M) for seed in (1, 2))
        assert first != second

    @pytest.mark.parametrize("name", ["entropy", "margin", "product"])
    def test_what_the_student_never_saw_is_as_unknown_as_can_be(self, name):
        candidates = make_candidates(100, scored=0.8)
        candidates = replace(candidates, confidence_N=np.full(100, 0.9))
        unknown = np.flatnonzero(np.isnan(candidates.uncertainty_N))
        assert 5 < unknown.size < 60
        assert set(places(candidates, choose(name, candidates, unknown.size))) == set(unknown)

    def test_freematch_draws_among_the_confident_of_each_class(self):
        candidates = make_candidates(400)
        threshold = threshold_of(candidates.confidence_N, candidates.label_N)
        sure = set(candidates.row_N[candidates.confidence_N >= threshold])
        assert 0 < len(sure) < 400
        assert set(choose("freematch", candidates, 400).row_M) == sure
        first, second = (set(choose("freematch", candidates, 40, seed).row_M) for seed in (1, 2))
        assert first != second
        assert first | second <= sure


class TestLlkd:
    def passing(self, candidates, thresholds="class"):
        signals = candidates.confidence_N, candidates.uncertainty_N
        of_class = [signal >= threshold_of(signal, candidates.label_N) for signal in signals]
        of_all = [signal >= signal.mean() for signal in signals]
        return np.all(of_class if thresholds == "class" else of_all, axis=0)

    @pytest.mark.parametrize("thresholds", ["class", "global"])
    def test_takes_only_texts_over_both_thresholds_at_random(self, thresholds):
        candidates, options = make_candidates(400), {"thresholds": thresholds}
        passing = self.passing(candidates, thresholds)
        assert 50 < passing.sum() < 350
        assert (self.passing(candidates, "class") != self.passing(candidates, "global")).any()
        chosen = choose("llkd", candidates, 400, options=options)
        assert set(chosen.row_M) == set(candidates.row_N[passing])
        first, second = (set(choose("llkd", candidates, 20, s, options=options).row_M) for s in (1, 2))
        assert first != second

    @pytest.mark.parametrize("weights", [True, False])
    def test_order_by_product_and_weights(self, weights):
        candidates = make_candidates(400)
        chosen = choose("llkd", candidates, 20, options={"order": "product", "weights": weights})
        value = np.where(self.passing(candidates), candidates.confidence_N * candidates.uncertainty_N, 0)
        order = np.argsort(-value)[:20]
        np.testing.assert_array_equal(places(candidates, chosen), order)
        weight = value[order] / value[order].mean() if weights else np.ones(20)
        np.testing.assert_allclose(chosen.weight_M, weight, rtol=1e-6)

    @pytest.mark.parametrize("order", ["random", "product"])
    def test_without_a_student_draws_among_the_confident(self, order):
        candidates = make_candidates(400, scored=0.0)
        chosen = choose("llkd", candidates, 50, options={"order": order})
        threshold = threshold_of(candidates.confidence_N, candidates.label_N)
        assert len(chosen) == 50
        assert set(chosen.row_M) <= set(candidates.row_N[candidates.confidence_N >= threshold])
        assert (chosen.weight_M == 1).all()
        again = choose("llkd", candidates, 50, seed=1, options={"order": order})
        assert set(chosen.row_M) != set(again.row_M)


def over_confident(n: int = 300) -> Candidates:
    """The teacher is surer of any text that it calls 0 than of any other; the student knows nothing yet."""
    rng = np.random.default_rng(0)
    label_N = np.arange(n) % 3
    confidence_N = np.where(label_N == 0, rng.uniform(0.95, 1.0, n), rng.uniform(0.4, 0.9, n))
    return replace(
        make_candidates(n, n_classes=3),
        label_N=label_N,
        confidence_N=confidence_N,
        uncertainty_N=np.full(n, 0.5),
        support_N=np.full(n, 0.5),
    )


class TestLlkdRank:
    def test_an_over_confident_class_does_not_take_all(self):
        candidates = over_confident()
        by_rank = candidates.label_N[places(candidates, choose("llkd_rank", candidates, 60))]
        by_confidence = candidates.label_N[places(candidates, choose("confidence", candidates, 60))]
        assert np.bincount(by_rank, minlength=3).tolist() == [20, 20, 20]
        chosen = places(candidates, choose("llkd_rank", candidates, 60))
        for c in range(3):
            of_class = np.flatnonzero(candidates.label_N == c)
            surest = of_class[np.argsort(-candidates.confidence_N[of_class])[:20]]
            assert set(chosen[candidates.label_N[chosen] == c]) == set(surest)
        assert np.bincount(by_confidence, minlength=3).tolist() == [60, 0, 0]

    def test_a_class_of_one_confidence_is_not_the_surest_of_all(self):
        candidates = over_confident()
        saturated = candidates.label_N == 0
        candidates = replace(candidates, confidence_N=np.where(saturated, 1.0, candidates.confidence_N))
        chosen = places(candidates, choose("llkd_rank", candidates, 90))
        assert not saturated[chosen].any(), "its texts rank in the middle, and the others have 100 above it"

    def test_prefers_what_the_student_does_not_know(self):
        candidates = over_confident()
        known = np.arange(300) % 2 == 0
        candidates = replace(candidates, uncertainty_N=np.where(known, 0.01, 0.9))
        assert not known[places(candidates, choose("llkd_rank", candidates, 60))].any()


def test_texts_of_one_confidence_all_reach_their_threshold():
    candidates = replace(make_candidates(90), confidence_N=np.full(90, 0.7))
    assert len(choose("freematch", candidates, 90)) == 90


class TestLlkdSample:
    def share_of_draws(self, candidates, marked, n=30, **options):
        """How much of 100 draws is of marked texts."""
        draws = [
            places(candidates, choose("llkd_sample", candidates, n, s, options=options)) for s in range(100)
        ]
        return float(np.mean(marked[np.concatenate(draws)]))

    def test_what_weighs_more_is_drawn_more_often(self):
        candidates = over_confident()
        marked = np.arange(300) % 2 == 0  # in every class, half of the texts
        for column in ("uncertainty_N", "support_N"):
            preferred = replace(candidates, **{column: np.where(marked, 0.8, 0.2)})
            # A factor of sqrt(4) in the weight: about two thirds of the draws.
            assert 0.60 < self.share_of_draws(preferred, marked) < 0.72, column

    def test_the_surer_half_of_each_class_is_drawn_more_often_but_not_only(self):
        candidates = over_confident()
        surer = np.zeros(300, dtype=bool)
        for c in range(3):
            of_class = np.flatnonzero(candidates.label_N == c)
            surer[of_class[np.argsort(-candidates.confidence_N[of_class])[:50]]] = True
        share = self.share_of_draws(candidates, surer)
        assert 0.85 < share < 0.99
        assert self.share_of_draws(candidates, surer, trust=0.0) == pytest.approx(0.5, abs=0.05)

    def test_an_over_confident_class_does_not_take_all(self):
        candidates = over_confident()
        share = self.share_of_draws(candidates, candidates.label_N == 0)
        assert share == pytest.approx(1 / 3, abs=0.05)

    def test_probabilities_of_a_single_draw_are_proportional_to_the_weights(self):
        uncertainty = np.array([0.1, 0.2, 0.3, 0.4])
        candidates = replace(
            make_candidates(4), label_N=np.arange(4), uncertainty_N=uncertainty, support_N=np.ones(4)
        )  # alone in its class, each text has rank 1
        policy, rng = SELECTION["llkd_sample"], np.random.default_rng(0)
        draws = [
            policy.choose(candidates, 1, rng, quota="off", options={"need": 1.0}).row_M[0]
            for _ in range(4000)
        ]
        counts = np.bincount(np.searchsorted(candidates.row_N, draws), minlength=4)
        # Four standard errors of a share of 4,000 are 0.032 at most.
        np.testing.assert_allclose(counts / 4000, uncertainty, atol=0.032)

    def test_has_a_quota_of_its_own_that_can_be_turned_off(self):
        candidates = replace(make_candidates(400), label_N=np.repeat([0, 1], [380, 20]))
        is_rare = np.arange(400) >= 380
        rare = {
            quota: int(is_rare[places(candidates, choose("llkd_sample", candidates, 40, quota=quota))].sum())
            for quota in (None, 0.25, "off")
        }
        assert rare[None] == rare[0.25] == 13  # 40 × 20 ** 0.25 / (20 ** 0.25 + 380 ** 0.25)
        assert rare["off"] < 6

    def test_of_texts_that_weigh_nothing_as_many_as_wanted_are_drawn(self):
        candidates = replace(make_candidates(50), uncertainty_N=np.zeros(50))
        assert len(choose("llkd_sample", candidates, 20)) == 20


class TestClassQuotas:
    @given(
        count=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
        n=st.integers(0, 500),
        quota=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        data=st.data(),
    )
    def test_shares_sum_to_n_and_empty_classes_get_nothing(self, count, n, quota, data):
        trained = data.draw(st.lists(st.integers(0, 50), min_size=len(count), max_size=len(count)))
        count_C, trained_C = np.array(count), np.array(trained)
        share_C = class_quotas(count_C, n, quota, trained_C)
        assert (share_C >= 0).all()
        assert share_C.sum() == (n if (count_C + trained_C).any() else 0)
        assert (share_C[count_C + trained_C == 0] == 0).all()

    @pytest.mark.parametrize(
        ("count", "n", "quota", "trained", "expected"),
        [
            ([600, 300, 100, 0], 20, 1.0, None, [12, 6, 2, 0]),
            ([600, 300, 100, 0], 21, 0.0, None, [7, 7, 7, 0]),
            ([900, 100], 40, 0.5, None, [30, 10]),
            ([70, 30], 11, 1.0, None, [8, 3]),  # 7.7 and 3.3
            ([600, 100, 300], 4, 0.0, None, [1, 2, 1]),  # the rarer class goes before
            ([0, 0, 0], 10, 0.5, None, [0, 0, 0]),
            ([50, 50, 50], 15, 0.0, [10, 5, 0], [0, 5, 10]),  # 10 of each class in all rounds
            ([50, 50], 10, 0.0, [30, 0], [0, 10]),  # a class over its share gets nothing
        ],
    )
    def test_shares(self, count, n, quota, trained, expected):
        trained_C = None if trained is None else np.array(trained)
        assert class_quotas(np.array(count), n, quota, trained_C).tolist() == expected


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=30), st.floats(0, 1))
def test_tempered_shares_are_powers_of_the_counts(counts, exponent):
    power_C = np.array([float(n) ** exponent if n else 0.0 for n in counts])
    expected_C = power_C / max(power_C.sum(), 1.0)
    assert tempered(np.array(counts), exponent) == pytest.approx(expected_C, rel=1e-9)


@pytest.mark.parametrize(
    ("setting", "own", "known", "expected"),
    [
        (None, 0.5, (), [0.75, 0.25]),
        (1.0, 0.5, (), [0.9, 0.1]),
        (0.0, None, (), [0.5, 0.5]),
        (None, None, (), None),
        ("off", 0.5, (), None),
        (None, None, (0.2, 0.8), [0.2, 0.8]),  # what is known goes before
        (0.5, None, (0.2, 0.8), [0.2, 0.8]),
        ("off", None, (0.2, 0.8), None),
    ],
)
def test_target_prior(setting, own, known, expected):
    prior_C = target_prior(np.array([90, 10]), setting, own, known)
    assert prior_C is None if expected is None else prior_C == pytest.approx(expected)
