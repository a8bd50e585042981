"""One contract for every selection policy, and what each of ours promises beyond it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from candidate_sets import make_candidates
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.metrics.uncertainty import RowRandom
from llkd_ray.selection import table
from llkd_ray.selection.policies import SELECTION, Selection, class_quotas
from llkd_ray.selection.search import Pool, PoolStats, class_thresholds
from llkd_ray.selection.table import Candidates, Chunked

WITH_STUDENT = {"entropy", "margin", "product", "llkd", "llkd_rank", "llkd_sample"}
SOME_MAY_NOT_PASS = {"freematch", "llkd"}
QUOTAS = [None, 0.0, 0.5, 1.0]
POLICY_QUOTAS = ["off", *QUOTAS]


def choose(name: str, candidates: Candidates, n: int, seed: int = 0, **more) -> Selection:
    """Without quotas, unless the test asks for them."""
    return SELECTION[name].choose(candidates, n, np.random.default_rng(seed), **{"quota": "off", **more})


def places(candidates: Candidates, chosen: Selection) -> np.ndarray:
    return np.searchsorted(candidates.row_N, chosen.row_M)


def threshold_of(signal: np.ndarray, label: np.ndarray) -> np.ndarray:
    """What each text's pseudo-class has to reach, from sums in floats."""
    return class_thresholds(np.bincount(label, weights=signal), np.bincount(label))[label]


def test_registry():
    assert set(SELECTION) == WITH_STUDENT | {"all", "random", "confidence", "freematch"}
    assert {name for name, policy in SELECTION.items() if policy.uses_student} == WITH_STUDENT


@pytest.mark.parametrize("scored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", sorted(SELECTION))
class TestContract:
    @settings(max_examples=30, deadline=None)
    @given(
        n_candidates=st.integers(0, 200),
        n=st.integers(0, 250),
        seed=st.integers(0, 2**32),
        quota=st.sampled_from(POLICY_QUOTAS),
        trained=st.one_of(st.none(), st.lists(st.integers(0, 80), min_size=4, max_size=4)),
    )
    def test_size_membership_and_weights(self, name, scored, n_candidates, n, seed, quota, trained):
        candidates = make_candidates(n_candidates, seed, scored=scored)
        trained_C = None if trained is None else np.array(trained)
        chosen = choose(name, candidates, n, seed, quota=quota, trained_C=trained_C)
        assert len(chosen) <= min(n, n_candidates)
        if name not in SOME_MAY_NOT_PASS:
            assert len(chosen) == min(n, n_candidates)
        assert np.unique(chosen.row_M).size == len(chosen), "a row was chosen twice"
        assert np.isin(chosen.row_M, candidates.row_N).all()
        assert chosen.weight_M.shape == chosen.row_M.shape
        assert (chosen.weight_M >= 0).all()
        assert len(chosen) == 0 or chosen.weight_M.mean() == pytest.approx(1.0)

    @pytest.mark.parametrize("quota", POLICY_QUOTAS)
    def test_chooses_something_and_nothing_of_nothing(self, name, scored, quota):
        candidates = make_candidates(100, scored=scored)
        assert len(choose(name, candidates, 10, quota=quota)) > 0
        assert len(choose(name, candidates, 0, quota=quota)) == 0
        assert len(choose(name, make_candidates(0, scored=scored), 10, quota=quota)) == 0

    @pytest.mark.parametrize("quota", POLICY_QUOTAS)
    def test_quotas_do_not_change_how_many_are_found(self, name, scored, quota):
        candidates = make_candidates(150, scored=scored)
        without = choose(name, candidates, 100, seed=3)
        assert len(choose(name, candidates, 100, seed=3, quota=quota)) == len(without)

    @pytest.mark.parametrize("quota", ["off", 0.5])
    def test_same_seed_same_choice(self, name, scored, quota):
        candidates = make_candidates(150, scored=scored)
        first, second = (choose(name, candidates, 40, seed=3, quota=quota) for _ in range(2))
        np.testing.assert_array_equal(first.row_M, second.row_M)
        np.testing.assert_array_equal(first.weight_M, second.weight_M)

    @pytest.mark.parametrize("quota", ["off", 0.5])
    def test_order_of_candidates_does_not_matter(self, name, scored, quota):
        candidates = make_candidates(150, scored=scored)
        shuffled = candidates.take(np.random.default_rng(9).permutation(150))
        one, other = (choose(name, which, 40, seed=3, quota=quota) for which in (candidates, shuffled))
        np.testing.assert_array_equal(one.row_M, other.row_M)
        np.testing.assert_array_equal(one.weight_M, other.weight_M)

    @pytest.mark.parametrize("quota", ["off", 0.5])
    def test_chunks_do_not_matter(self, name, scored, quota, monkeypatch):
        candidates = make_candidates(150, scored=scored)
        whole = choose(name, candidates, 40, seed=3, quota=quota)
        borders = [slice(0, 0), slice(0, 1), slice(1, 90), slice(90, 90), slice(90, 150)]
        as_they_come = Chunked(lambda: map(candidates.take, borders))
        assert len(as_they_come) == 150
        monkeypatch.setattr(table, "CHUNK", 7)
        for parts in (candidates, as_they_come):
            chosen = choose(name, parts, 40, seed=3, quota=quota)
            np.testing.assert_array_equal(chosen.row_M, whole.row_M)
            np.testing.assert_array_equal(chosen.weight_M, whole.weight_M)

    def test_a_text_is_judged_by_itself_and_by_the_pool(self, name, scored):
        candidates, policy = make_candidates(60, scored=scored), SELECTION[name]
        pool = Pool(PoolStats.of([candidates], policy.ranks), RowRandom(0))
        whole = policy.rule(candidates, pool)
        for place in (0, 17, 59):
            alone = policy.rule(candidates.take(np.array([place])), pool)
            assert alone.value_N[0] == whole.value_N[place]
            assert (alone.weight_N is None) == (whole.weight_N is None)
            assert whole.weight_N is None or alone.weight_N[0] == whole.weight_N[place]

    def test_input_is_left_alone(self, name, scored):
        candidates = make_candidates(50, scored=scored)
        trained_C = np.array([5, 0, 1, 2])
        arrays = [*(value for value in vars(candidates).values() if isinstance(value, np.ndarray)), trained_C]
        before = [array.copy() for array in arrays]
        choose(name, candidates, 20, quota=0.5, trained_C=trained_C)
        for old, new in zip(before, arrays, strict=True):
            np.testing.assert_array_equal(old, new)

    @pytest.mark.parametrize("quota", POLICY_QUOTAS)
    def test_one_class_only(self, name, scored, quota):
        candidates = make_candidates(30, scored=scored)
        candidates = replace(candidates, label_N=np.full(30, 2, dtype=np.int16))
        assert 0 < len(choose(name, candidates, 10, quota=quota)) <= 10


class TestOptions:
    def test_the_registry_knows_them(self):
        assert SELECTION["random"].options == {}
        assert SELECTION["llkd"].options == {"thresholds": "class", "order": "random", "weights": True}
        assert SELECTION["llkd_sample"].options == {"trust": 4.0, "need": 0.5, "support": 0.5}

    @pytest.mark.parametrize("name", sorted(SELECTION))
    def test_defaults_are_accepted_and_change_nothing(self, name):
        policy, candidates = SELECTION[name], make_candidates(100)
        policy.check_options(policy.options)
        with_defaults = choose(name, candidates, 20, options=policy.options)
        np.testing.assert_array_equal(with_defaults.row_M, choose(name, candidates, 20).row_M)

    def test_whole_number_for_a_fraction(self):
        SELECTION["llkd_sample"].check_options({"trust": 2})

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("random", {"trust": 1.0}, "'trust' is no option of the policy; it has none"),
            ("llkd", {"oder": "random"}, "'oder' is no option of the policy; it has thresholds (class)"),
            ("llkd", {"order": "best"}, "order is 'best': use random or product"),
            ("llkd", {"thresholds": "batch"}, "thresholds is 'batch': use class or global"),
            ("llkd", {"weights": "yes"}, "weights is 'yes': use a truth value like True"),
            ("llkd_sample", {"trust": "much"}, "trust is 'much': use a number like 4.0"),
            ("llkd_sample", {"trust": True}, "trust is True: use a number like 4.0"),
            ("llkd_sample", {"need": -0.5}, "need is -0.5: use 0, which leaves it out, or more"),
        ],
    )
    def test_what_is_refused(self, name, options, message):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            SELECTION[name].check_options(options)


class TestBaselines:
    def test_all_takes_in_corpus_order(self):
        candidates = make_candidates(100)
        np.testing.assert_array_equal(choose("all", candidates, 60).row_M, candidates.row_N[:60])
        assert (choose("all", candidates, 60).weight_M == 1).all()

    def test_random_takes_all_parts_alike(self):
        candidates = make_candidates(1000)
        upper = [np.mean(places(candidates, choose("random", candidates, 100, s)) >= 500) for s in range(50)]
        # 5,000 draws: three standard errors are 0.021.
        assert np.mean(upper) == pytest.approx(0.5, abs=0.021)

    def test_confidence_takes_the_surest_first(self):
        candidates = make_candidates(100)
        order = np.argsort(-candidates.confidence_N)
        np.testing.assert_array_equal(places(candidates, choose("confidence", candidates, 30)), order[:30])

    def test_entropy_takes_the_least_known_first(self):
        candidates = make_candidates(100)
        order = np.argsort(-candidates.uncertainty_N)
        np.testing.assert_array_equal(places(candidates, choose("entropy", candidates, 30)), order[:30])

    def test_margin_takes_the_closest_first(self):
        candidates = make_candidates(100)
        order = np.argsort(candidates.margin_N, kind="stable")
        np.testing.assert_array_equal(places(candidates, choose("margin", candidates, 30)), order[:30])

    def test_product_takes_the_largest_and_weighs_by_it(self):
        candidates = make_candidates(100)
        value = candidates.confidence_N * candidates.uncertainty_N
        chosen = choose("product", candidates, 30)
        order = np.argsort(-value)[:30]
        np.testing.assert_array_equal(places(candidates, chosen), order)
        np.testing.assert_allclose(chosen.weight_M, value[order] / value[order].mean(), rtol=1e-6)

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
    def passing(self, candidates, of_class=True):
        passing = np.ones(len(candidates), dtype=bool)
        for signal in (candidates.confidence_N, candidates.uncertainty_N):
            if of_class:
                passing &= signal >= threshold_of(signal, candidates.label_N)
            else:
                passing &= signal >= signal.mean()
        return passing

    def test_takes_only_texts_over_both_thresholds_at_random(self):
        candidates = make_candidates(400)
        passing = self.passing(candidates)
        assert 50 < passing.sum() < 350
        assert set(choose("llkd", candidates, 400).row_M) == set(candidates.row_N[passing])
        first, second = (set(choose("llkd", candidates, 20, seed).row_M) for seed in (1, 2))
        assert first != second

    def test_global_thresholds(self):
        candidates = make_candidates(400)
        chosen = choose("llkd", candidates, 400, options={"thresholds": "global"})
        passing = self.passing(candidates, of_class=False)
        assert set(chosen.row_M) == set(candidates.row_N[passing])
        assert (passing != self.passing(candidates)).any()

    def test_order_by_product(self):
        candidates = make_candidates(400)
        chosen = choose("llkd", candidates, 20, options={"order": "product"})
        value = np.where(self.passing(candidates), candidates.confidence_N * candidates.uncertainty_N, 0)
        np.testing.assert_array_equal(places(candidates, chosen), np.argsort(-value)[:20])

    @pytest.mark.parametrize("weights", [True, False])
    def test_weights(self, weights):
        candidates = make_candidates(400)
        chosen = choose("llkd", candidates, 30, options={"weights": weights})
        index = places(candidates, chosen)
        value = candidates.confidence_N[index] * candidates.uncertainty_N[index] if weights else np.ones(30)
        np.testing.assert_allclose(chosen.weight_M, value / value.mean(), rtol=1e-6)

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

    def test_takes_a_text_the_student_never_saw_as_unknown(self):
        candidates = replace(
            make_candidates(4),
            row_N=np.arange(4),
            label_N=np.zeros(4, dtype=int),
            confidence_N=np.full(4, 0.9),
            uncertainty_N=np.array([0.1, 0.2, 0.3, np.nan]),
        )
        assert choose("llkd", candidates, 1).row_M.tolist() == [3]


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
        assert np.bincount(by_confidence, minlength=3).tolist() == [60, 0, 0]

    def test_takes_the_surest_of_a_class_where_the_student_knows_all_alike(self):
        candidates = over_confident()
        chosen = places(candidates, choose("llkd_rank", candidates, 60))
        for c in range(3):
            of_class = np.flatnonzero(candidates.label_N == c)
            surest = of_class[np.argsort(-candidates.confidence_N[of_class])[:20]]
            assert set(chosen[candidates.label_N[chosen] == c]) == set(surest)

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

    def test_seeds_differ(self):
        candidates = make_candidates(200)
        first, second = (set(choose("llkd_sample", candidates, 40, seed).row_M) for seed in (1, 2))
        assert first != second

    def test_all_weigh_the_same_in_the_loss(self):
        assert (choose("llkd_sample", make_candidates(200), 40).weight_M == 1).all()

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

    def test_one_is_in_proportion(self):
        assert class_quotas(np.array([600, 300, 100, 0]), 20, 1.0).tolist() == [12, 6, 2, 0]

    def test_zero_is_all_alike(self):
        assert class_quotas(np.array([600, 300, 100, 0]), 21, 0.0).tolist() == [7, 7, 7, 0]

    def test_half_is_by_the_square_root(self):
        assert class_quotas(np.array([900, 100]), 40, 0.5).tolist() == [30, 10]

    def test_remainders_go_to_the_largest_fraction_and_the_rarer_class(self):
        assert class_quotas(np.array([70, 30]), 11, 1.0).tolist() == [8, 3]  # 7.7 and 3.3
        assert class_quotas(np.array([600, 100, 300]), 4, 0.0).tolist() == [1, 2, 1]

    def test_all_rounds_together_are_shared_out(self):
        # 30 texts in all, 10 of each class; the round makes up for what is missing.
        assert class_quotas(np.array([50, 50, 50]), 15, 0.0, np.array([10, 5, 0])).tolist() == [0, 5, 10]

    def test_a_class_over_its_share_gets_nothing(self):
        assert class_quotas(np.array([50, 50]), 10, 0.0, np.array([30, 0])).tolist() == [0, 10]

    def test_of_no_class_at_all(self):
        assert class_quotas(np.zeros(3, dtype=int), 10, 0.5).tolist() == [0, 0, 0]
