"""The walk through the labels' tokens, against brute force over every answer that could be given."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llkd_ray.teacher.label_trie import MAX_TOKENS, LabelTrie, Mass

VOCABULARY = 4
DEPTH = 4
Tokens = tuple[int, ...]


class Model:
    """A next-token model of chance, the same for the same seed; notes what it is asked."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY, sharpness: float = 2.0) -> None:
        self.seed, self.vocabulary, self.sharpness = seed, vocabulary, sharpness
        self.asked: list[tuple[Tokens, Tokens]] = []

    def next_p(self, after: Tokens) -> np.ndarray:
        """float64[V]: one sharp distribution for each place."""
        rng = np.random.default_rng([self.seed, len(after), *after])
        p_V = np.exp(self.sharpness * rng.standard_normal(self.vocabulary))
        return p_V / p_V.sum()

    async def __call__(self, after: Tokens, tokens: Tokens) -> Sequence[float]:
        self.asked.append((after, tokens))
        await asyncio.sleep(0)
        return self.next_p(after)[list(tokens)].tolist()

    def sequence(self, tokens: Tokens) -> float:
        return float(np.prod([self.next_p(tokens[:i])[token] for i, token in enumerate(tokens)]))


class Fixed:
    """A model whose probabilities are written down: ``{after: {token: p}}``; 0 elsewhere."""

    def __init__(self, table: dict[Tokens, dict[int, float]]) -> None:
        self.table = table
        self.asked: list[Tokens] = []

    async def __call__(self, after: Tokens, tokens: Tokens) -> Sequence[float]:
        self.asked.append(after)
        return [self.table[after].get(token, 0.0) for token in tokens]


def walk(labels: Sequence[Sequence[int]], model, min_branch_prob: float = 0.0) -> Mass:
    return asyncio.run(LabelTrie.of(labels).mass(model, min_branch_prob))


def brute_force(labels: Sequence[Tokens], model: Model) -> np.ndarray:
    """float64[C + 1]: every answer of DEPTH tokens to the longest label that it begins with, or off-label."""
    mass_S = np.zeros(len(labels) + 1)
    for answer in itertools.product(range(model.vocabulary), repeat=DEPTH):
        begun = [i for i, label in enumerate(labels) if answer[: len(label)] == label]
        mass_S[max(begun, key=lambda i: len(labels[i]), default=-1)] += model.sequence(answer)
    return mass_S


label_sets = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=DEPTH).map(tuple),
    min_size=1,
    max_size=14,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(labels=label_sets, seed=st.integers(0, 1000))
def test_is_exact_where_everything_is_followed(labels, seed):
    model = Model(seed)
    mass = walk(labels, model)
    np.testing.assert_allclose([*mass.probs_C, mass.off_label], brute_force(labels, model), atol=1e-12)
    assert (mass.min_branch_prob, LabelTrie.of(labels).depth) == (0, max(map(len, labels)))


@settings(max_examples=60, deadline=None)
@given(labels=label_sets, seed=st.integers(0, 1000), min_branch_prob=st.floats(1e-4, 0.5))
@example(labels=[(0,), (0, 1), (0, 2), (0, 3), (0, 0, 0)], seed=334, min_branch_prob=0.5)
def test_is_as_near_as_it_says(labels, seed, min_branch_prob):
    model = Model(seed)
    mass = walk(labels, model, min_branch_prob)
    found_S = np.array([*mass.probs_C, mass.off_label])
    apart_S = found_S - brute_force(labels, model)
    assert abs(apart_S).sum() / 2 <= mass.min_branch_prob + 1e-12, "total variation: of any set of labels"
    begins_another_C = [any(other[: len(own)] == own != other for other in labels) for own in labels]
    apart_of_others_S = abs(apart_S[:-1])[np.logical_not(begins_another_C)]
    assert (apart_of_others_S <= min_branch_prob + 1e-12).all(), "of any label"
    assert found_S.sum() == pytest.approx(1, abs=1e-12)
    assert found_S.min() >= 0
    has_mass_C = brute_force(labels, model)[:-1] > 1e-12  # longer labels may leave nothing to a shorter one
    assert (mass.probs_C[has_mass_C] > 0).all(), "no label gets a hard 0"


@settings(max_examples=60, deadline=None)
@given(labels=label_sets, seed=st.integers(0, 1000), min_branch_prob=st.sampled_from([0.0, 0.01, 0.1, 0.3]))
def test_asks_for_every_branch_that_matters_and_for_no_other(labels, seed, min_branch_prob):
    model = Model(seed)
    mass = walk(labels, model, min_branch_prob)
    places = [after for after, _ in model.asked]
    assert mass.requests == len(places) == len(set(places)), "each place once"
    inner = {label[:i] for label in labels for i in range(len(label))}
    assert set(places) == {place for place in inner if model.sequence(place) > min_branch_prob}


def test_a_label_that_is_left_open_shares_with_those_that_extend_it():
    # Token 5 leads to a label and, through it, to two more; with 0.03 it is not worth a question.
    model = Fixed({(): {1: 0.9, 5: 0.03}})
    mass = walk([(1,), (5,), (5, 6), (5, 6, 7)], model, 0.05)
    assert model.asked == [()]
    np.testing.assert_allclose(mass.probs_C, [0.9, 0.01, 0.01, 0.01])
    assert mass.off_label == pytest.approx(0.07)
    assert mass.min_branch_prob == pytest.approx(0.03)


def test_a_branch_without_any_mass_is_not_asked_for():
    model = Fixed({(): {1: 1.0}})
    mass = walk([(1,), (2, 3)], model, 0.0)
    assert model.asked == [()]
    assert mass.probs_C.tolist() == [1.0, 0.0]


def test_many_children_are_asked_for_in_chunks_that_miss_none():
    n = 2 * MAX_TOKENS + 10
    model = Model(vocabulary=300)
    mass = walk([(i,) for i in range(n)], model)
    assert [len(tokens) for _, tokens in model.asked] == [128, 128, 10]
    assert mass.requests == 3
    np.testing.assert_allclose(mass.probs_C, model.next_p(())[:n])
    assert mass.off_label == pytest.approx(model.next_p(())[n:].sum())


@pytest.mark.parametrize(
    ("labels", "at_once"),
    [
        ([(i, j) for i in range(3) for j in range(2)], [1, 1, 2, 3]),
        # Of many children, the first chunk goes ahead, so that the prompt is in the prefix cache.
        ([(i,) for i in range(2 * MAX_TOKENS + 10)], [1, 1, 2]),
    ],
)
def test_what_cannot_be_spared_is_asked_for_together(labels, at_once):
    seen: list[int] = []
    under_way: set[tuple[Tokens, Tokens]] = set()

    async def ask(after: Tokens, tokens: Tokens) -> list[float]:
        under_way.add((after, tokens))
        seen.append(len(under_way))
        for _ in range(10):
            await asyncio.sleep(0)
        under_way.remove((after, tokens))
        return [0.3 if len(tokens) == 3 else 0.0] * len(tokens)

    walk(labels, ask)
    assert seen == at_once


class TestProbabilitiesThatAreNot:
    def test_rounding_makes_no_negative_mass(self):
        model = Fixed({(): {1: 0.6 + 1e-6, 2: 0.4 + 1e-6, 3: -1e-6}, (3,): {4: 1.0}})
        mass = walk([(1,), (2,), (3, 4)], model)
        assert mass.probs_C.min() >= 0
        assert mass.off_label >= 0
        assert mass.probs_C.sum() + mass.off_label == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(mass.probs_C, [0.6, 0.4, 0.0], atol=2e-6)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.5, -0.5])
    def test_nonsense_is_refused(self, bad):
        with pytest.raises(ValueError, match="no probabilities of next tokens"):
            walk([(1,), (2,)], Fixed({(): {1: bad, 2: 0.1}}))

    def test_one_request_that_is_nonsense_is_repeated_once(self):
        replies = [[0.9, 0.9], [0.5, 0.25]]

        async def ask(after: Tokens, tokens: Tokens) -> list[float]:
            return replies.pop(0)

        assert walk([(1,), (2,)], ask).probs_C.tolist() == [0.5, 0.25]
        assert replies == []

    def test_requests_of_more_than_one_in_all_are_no_nonsense(self):
        """Each is rounded in a batch of its own; with many labels the text went to quarantine once."""

        async def ask(after: Tokens, tokens: Tokens) -> list[float]:
            return [1.008 / 2 / 64] * len(tokens)

        mass = walk([(i,) for i in range(2 * MAX_TOKENS)], ask)
        assert mass.probs_C.sum() == pytest.approx(1)
        assert mass.off_label == 0

    def test_too_few_are_refused(self):
        async def ask(after: Tokens, tokens: Tokens) -> list[float]:
            return [0.1]

        with pytest.raises(ValueError, match="1 probabilities came back for 2 tokens"):
            walk([(1,), (2,)], ask)

    @pytest.mark.parametrize("min_branch_prob", [-0.1, 1.0, float("nan")])
    def test_unresolved_is_a_probability(self, min_branch_prob):
        with pytest.raises(ValueError, match="min_branch_prob is"):
            walk([(1,)], Model(), min_branch_prob)


def test_a_question_that_fails_ends_the_others_and_comes_alone():
    ended: list[Tokens] = []

    async def ask(after: Tokens, tokens: Tokens) -> list[float]:
        if not after:
            return [0.3, 0.3, 0.3]
        if after == (1,):
            await asyncio.sleep(0)
            raise ConnectionError("gone")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(after)
        return []

    with pytest.raises(ConnectionError, match="gone"):
        walk([(0, 1), (1, 1), (2, 1)], ask)
    assert sorted(ended) == [(0,), (2,)]


def test_one_trie_serves_many_texts_at_a_time():
    labels = [(1, 2), (1, 3, 0), (2,), (2, 2), (3, 1)]
    trie = LabelTrie.of(labels)

    async def run() -> list[Mass]:
        return await asyncio.gather(*(trie.mass(Model(seed), 0.02) for seed in range(20)))

    for seed, mass in enumerate(asyncio.run(run())):
        alone = walk(labels, Model(seed), 0.02)
        assert mass.probs_C.tolist() == alone.probs_C.tolist()
        assert (mass.off_label, mass.requests) == (alone.off_label, alone.requests)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([(4,), (4, 5), (4, 5, 6), (4, 5)], r"labels 1 and 3 have the same tokens: \[4, 5\]"),
        ([(4,), ()], "label 1 has no tokens"),
        ([], "there are no labels"),
    ],
)
def test_sequences_that_make_no_trie(sequences, message):
    with pytest.raises(ValueError, match=message):
        LabelTrie.of(sequences)


def test_a_very_long_label():
    trie = LabelTrie.of([(1,), tuple(range(3000))])
    assert (trie.n_labels, trie.depth) == (2, 3000)
