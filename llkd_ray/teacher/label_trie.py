"""Probabilities of labels of several tokens, from few next-token requests.

The labels' token sequences form a trie. Each possible answer of the teacher is assigned to the longest
label that it starts with; answers that start with no label are off-label. So the mass of a label is

    P(label) = P(its tokens | prompt) - sum of P(tokens | prompt) of the nearest longer labels that extend it

where the probability of a sequence is the product of its tokens' (the chain rule). Next to "card arrival",
"card" gets the answers that start with "card" and do not continue with "arrival". Labels and off-label mass
add up to one by construction.

Shapes in names: C labels, K tokens that are requested together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llkd_ray.teacher.base import gather_or_cancel

MAX_TOKENS = 128
"""Maximum number of tokens in one request: vLLM's limit of ``logprob_token_ids``."""
OVERFULL = 0.01
"""Next-token probabilities of one request may exceed one by this much in total; beyond that, it is faulty."""
NextTokens = Callable[[tuple[int, ...], tuple[int, ...]], Awaitable[Sequence[float]]]
"""``ask(after, tokens)``: the probability of each of ``tokens`` as the next one after ``after``."""


@dataclass(frozen=True)
class Mass:
    """Distribution of a teacher's answers to one text; ``probs_C`` and ``off_label`` add up to one."""

    probs_C: np.ndarray
    """float64[C]"""
    off_label: float
    min_branch_prob: float
    """Total mass of branches that were not followed; up to this much may be on a wrong label or off-label."""
    requests: int


@dataclass
class _Node:
    """A node of the trie: the tokens that an answer starts with."""

    after: tuple[int, ...]
    owner: int
    """The longest label that ``after`` starts with; -1 where there is none."""
    children: dict[int, _Node] = field(default_factory=dict)
    claimants: list[int] = field(default_factory=list)
    """The possible labels of an answer that starts with ``after``: those that continue from here, and the
    owner.
    """

    @property
    def requests(self) -> int:
        """The number of requests for all children."""
        return -(-len(self.children) // MAX_TOKENS)


@dataclass
class _Branch:
    """A node with the mass of the answers that reach it."""

    mass: float
    node: _Node


class LabelTrie:
    """The token sequences of C labels; build it with :meth:`of`."""

    def __init__(self, root: _Node, depth: int) -> None:
        self._root = root
        self.n_labels = len(root.claimants)
        self.depth = depth
        """Tokens of the longest label: a model's length must leave this many after the prompt."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> LabelTrie:
        """Build the trie from each label's tokens, in label order.

        Raises ValueError, with the labels' indexes, where a sequence is empty or two are the same.
        """
        root = _Node(after=(), owner=-1)
        # Shorter labels first, so that a node is created after all labels that its tokens start with.
        for label in sorted(range(len(sequences)), key=lambda label: len(sequences[label])):
            node, is_new = root, False
            path = [root]
            for token in sequences[label]:
                is_new = token not in node.children
                if is_new:
                    shorter = [node.owner] if node.owner >= 0 else []
                    node.children[token] = _Node((*node.after, token), node.owner, claimants=shorter)
                node = node.children[token]
                path.append(node)
            if node is root:
                raise ValueError(f"label {label} has no tokens: every label needs at least one")
            if not is_new:
                raise ValueError(f"labels {node.owner} and {label} have the same tokens: {list(node.after)}")
            node.owner, node.claimants = label, []
            for passed in path:
                passed.claimants.append(label)
        if not root.children:
            raise ValueError("there are no labels: give at least one sequence of tokens")
        return cls(root, max(map(len, sequences)))

    def questions(self) -> Iterator[tuple[int, int]]:
        """For every node that a walk may visit, the root first: its number of tokens after the prompt, and of
        requests.
        """
        nodes = [self._root]
        for node in nodes:
            yield len(node.after), node.requests
            nodes += [child for child in node.children.values() if child.children]

    async def mass(self, ask: NextTokens, min_branch_prob: float) -> Mass:
        """Distribute the answers to one text; branches up to a mass of ``min_branch_prob`` are not followed.

        The walk goes level by level, and requests all relevant branches of a level concurrently. The mass of
        a branch that is not followed is divided equally between its answers' possible labels: those below it
        and the longest that it starts with. So the error of a label's mass is at most ``min_branch_prob``;
        for a label that is a prefix of others, at most the total of its branches that were not followed. The
        total of all such branches is ``Mass.min_branch_prob``.

        Each node is requested once. Exceptions of ``ask`` are passed on unchanged, and cancel the other
        requests. Raises ValueError where ``min_branch_prob`` is not in [0, 1), or where ``ask`` returns
        invalid probabilities.
        """
        if not 0 <= min_branch_prob < 1:
            raise ValueError(f"min_branch_prob is {min_branch_prob}: give a probability below 1")
        mass_S = np.zeros(self.n_labels + 1)  # of each label; index -1 is off-label
        level: list[_Branch] = [_Branch(1.0, self._root)]
        requests, left = 0, 0.0
        while level:
            needed = [branch for branch in level if branch.mass > min_branch_prob]
            for branch in level:
                if branch.mass <= min_branch_prob:
                    mass_S[branch.node.claimants] += branch.mass / len(branch.node.claimants)
                    left += branch.mass
            level = []
            answers = await gather_or_cancel([_ask_all(ask, branch.node) for branch in needed])
            for branch, p_K in zip(needed, answers, strict=True):
                requests += branch.node.requests
                mass_S[branch.node.owner] += branch.mass * max(0.0, 1.0 - p_K.sum())
                for p, child in zip(p_K.tolist(), branch.node.children.values(), strict=True):
                    if child.children:
                        level.append(_Branch(branch.mass * p, child))
                    else:
                        mass_S[child.owner] += branch.mass * p
        return Mass(mass_S[:-1], off_label=float(mass_S[-1]), min_branch_prob=left, requests=requests)


async def _ask_all(ask: NextTokens, node: _Node) -> np.ndarray:
    """float64[K]: probability of each child as the next token, at most one in all."""
    tokens = tuple(node.children)
    chunks = [tokens[start : start + MAX_TOKENS] for start in range(0, len(tokens), MAX_TOKENS)]
    # The first one alone, so that the prompt is in the engine's prefix cache for the others.
    answers = [await _ask_one(ask, node.after, chunks[0])]
    answers += await gather_or_cancel([_ask_one(ask, node.after, chunk) for chunk in chunks[1:]])
    p_K = np.concatenate(answers)
    # Requests are computed in batches of their own, whose rounding differs, so their sum may exceed one.
    return p_K / max(1.0, p_K.sum())


async def _ask_one(ask: NextTokens, after: tuple[int, ...], tokens: tuple[int, ...]) -> np.ndarray:
    """float64[K]: the probabilities of one request, which is repeated once if they are none."""
    for _ in range(2):
        p_K = np.asarray(await ask(after, tokens), dtype=np.float64)
        if len(p_K) != len(tokens):
            raise ValueError(f"{len(p_K)} probabilities came back for {len(tokens)} tokens")
        if np.isfinite(p_K).all() and p_K.min() > -OVERFULL and p_K.sum() < 1 + OVERFULL:
            return np.maximum(p_K, 0.0)
    raise ValueError(f"no probabilities of next tokens: from {p_K.min()} up, {p_K.sum()} in all")
