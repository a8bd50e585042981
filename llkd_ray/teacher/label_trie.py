"""The probabilities of labels of several tokens, from few questions about the next token.

The labels' token sequences stand in a trie. All answers that a teacher could give are shared out by the
longest label that they begin with; those that begin with none are off-label. So the mass of a label is

    P(label) = P(its tokens | prompt) - sum of P(tokens | prompt) of the nearest longer labels that extend it

where the probability of a sequence is the product of its tokens' (the chain rule). Next to "card arrival",
"card" gets the answers that begin with "card" and do not go on with "arrival". Labels and off-label mass
add up to one by construction.

Shapes in names: C labels, K tokens that are asked for together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llkd_ray.teacher.base import gather_or_cancel

MAX_TOKENS = 128
"""Tokens that one request may ask for: vLLM's limit of ``logprob_token_ids``."""
OVERFULL = 0.01
"""Next-token probabilities may add up to this much more than one; an engine that says more is broken."""
NextTokens = Callable[[tuple[int, ...], tuple[int, ...]], Awaitable[Sequence[float]]]
"""``ask(after, tokens)``: the probability of each of ``tokens`` as the next one behind ``after``."""


@dataclass(frozen=True)
class Mass:
    """How a teacher's answers to one text are shared out; ``probs_C`` and ``off_label`` add up to one."""

    probs_C: np.ndarray
    """float64[C]"""
    off_label: float
    min_branch_prob: float
    """Of branches that were not followed: so much, in all, may stand at another label, or off-label."""
    requests: int


@dataclass
class _Node:
    """A place in the trie: what an answer has begun with."""

    after: tuple[int, ...]
    owner: int
    """The longest label that ``after`` begins with; -1 where it begins with none."""
    children: dict[int, _Node] = field(default_factory=dict)
    claimants: list[int] = field(default_factory=list)
    """The labels that an answer which begins with ``after`` can come to: those that go on from here, and
    the owner.
    """

    @property
    def requests(self) -> int:
        """How many it takes to ask for all children."""
        return -(-len(self.children) // MAX_TOKENS)


@dataclass
class _Branch:
    """A node with the mass of the answers that get there."""

    mass: float
    node: _Node


class LabelTrie:
    """The token sequences of C labels; build it with :meth:`of`."""

    def __init__(self, root: _Node, depth: int) -> None:
        self._root = root
        self.n_labels = len(root.claimants)
        self.depth = depth
        """Tokens of the longest label: what must be left of a model's length behind a prompt."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> LabelTrie:
        """From each label's tokens, in label order.

        Raises ValueError, with the labels' indexes, where a sequence is empty or two are the same.
        """
        root = _Node(after=(), owner=-1)
        # Shorter labels first: a node is then made after all labels that its tokens begin with.
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
        """Of every place that a walk may come to, the root first: its tokens behind the prompt, and the
        requests that it takes.
        """
        nodes = [self._root]
        for node in nodes:
            yield len(node.after), node.requests
            nodes += [child for child in node.children.values() if child.children]

    async def mass(self, ask: NextTokens, min_branch_prob: float) -> Mass:
        """Share out the answers to one text; branches up to a mass of ``min_branch_prob`` are not followed.

        The walk goes level by level, and asks for all branches of a level that matter at the same time. The
        mass of a branch that is not followed goes in equal parts to the labels that its answers can come to:
        those below it and the longest that it begins with. So a label is no further than ``min_branch_prob``
        from its true mass; one that begins others, no further than its branches that were not followed hold
        together. That is told of all of them in ``Mass.min_branch_prob``.

        Each node is asked for once. Exceptions of ``ask`` come through as they are, and end the other
        questions. Raises ValueError where ``min_branch_prob`` is not in [0, 1), or where ``ask`` gives what
        cannot be probabilities.
        """
        if not 0 <= min_branch_prob < 1:
            raise ValueError(f"min_branch_prob is {min_branch_prob}: give a probability below 1")
        mass_S = np.zeros(self.n_labels + 1)  # of each label and, at index -1, off-label
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
    # The first one alone: an engine's prefix cache then knows the prompt when the others come.
    answers = [await ask(node.after, chunks[0])]
    answers += await gather_or_cancel([_ask_one(ask, node.after, chunk) for chunk in chunks[1:]])
    for chunk, answer in zip(chunks, answers, strict=True):
        if len(answer) != len(chunk):
            raise ValueError(f"{len(answer)} probabilities came back for {len(chunk)} tokens")
    p_K = np.concatenate([np.asarray(answer, dtype=np.float64) for answer in answers])
    total = p_K.sum()
    if not (np.isfinite(p_K).all() and p_K.min() > -OVERFULL and total < 1 + OVERFULL):
        raise ValueError(f"no probabilities of next tokens: from {p_K.min()} up, {total} in all")
    p_K = np.maximum(p_K, 0.0)
    return p_K / max(1.0, p_K.sum())


async def _ask_one(ask: NextTokens, after: tuple[int, ...], tokens: tuple[int, ...]) -> Sequence[float]:
    return await ask(after, tokens)
