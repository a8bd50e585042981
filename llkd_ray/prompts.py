"""What the teacher reads: the prompt around a text, and the tokens that stand for the labels.

A label is scored by the probability of its first token right after the prompt, so each label needs a
first token of its own. The text comes last: all before it is the same for every text, and the engine's
prefix cache computes it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Protocol

from llkd_ray.config import ConfigError, LabelsConfig, PromptConfig


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """The fixed strings around a text; ``head + text + tail`` is the whole prompt."""

    head: str
    tail: str
    answers: tuple[str, ...]
    """What the teacher is to answer for each label, in label order."""
    add_special_tokens: bool

    @property
    def hash(self) -> str:
        """Changes with anything that the teacher sees, apart from the text."""
        content = "\x00".join([self.head, self.tail, *self.answers, str(self.add_special_tokens)])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def render(self, text: str) -> str:
        return f"{self.head}{text}{self.tail}"


def build_prompt(config: PromptConfig, labels: LabelsConfig, tokenizer: Tokenizer) -> Prompt:
    """Put instruction, label list and demonstrations together, in the model's chat format if it has one."""
    letters = config.answer == "letters"
    keys = list(ascii_uppercase[: len(labels.names)]) if letters else list(labels.names)
    answer_of = dict(zip(labels.names, keys, strict=True))
    parts = [config.instruction] if config.instruction else []
    if config.show_labels:
        parts.append("\n".join(_label_line(name, answer_of[name], labels, letters) for name in labels.names))
    parts += [
        f"{config.text_prefix}{shot.text}{config.answer_prefix} {answer_of[shot.label]}"
        for shot in config.demonstrations
    ]
    head = config.separator.join([*parts, config.text_prefix])
    if config.chat == "auto" and getattr(tokenizer, "chat_template", None):
        return _chat_prompt(head, config.answer_prefix, tuple(keys), tokenizer)
    return Prompt(head, config.answer_prefix, tuple(f" {key}" for key in keys), add_special_tokens=True)


def _label_line(name: str, key: str, labels: LabelsConfig, letters: bool) -> str:
    described = f"{name}: {labels.descriptions[name]}" if name in labels.descriptions else name
    return f"{key}. {described}" if letters else f"- {described}"


def _chat_prompt(head: str, answer_prefix: str, keys: tuple[str, ...], tokenizer: Tokenizer) -> Prompt:
    # A mark that no template changes shows where the template ends and the text begins.
    mark = "\u241etext\u241e"
    content = f"{head}{mark}\n\nAnswer with {answer_prefix.strip().rstrip(':').lower()} only."
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = whole.partition(mark)
    if not found:
        raise ConfigError("teacher.prompt.chat: the model's chat template drops the text; set it to 'never'")
    return Prompt(before, after, keys, add_special_tokens=False)


def label_token_ids(prompt: Prompt, labels: LabelsConfig, tokenizer: Tokenizer) -> list[int]:
    """int[C]: the first token of each label's answer, as it is tokenised right after the prompt.

    Raises :class:`ConfigError` where two labels begin with the same token, or where a label's answer
    changes how the prompt before it is cut into tokens.
    """
    base = _token_ids(prompt, prompt.render("x"), tokenizer)
    owner: dict[int, str] = {}
    ids = []
    for name, answer in zip(labels.names, prompt.answers, strict=True):
        whole = _token_ids(prompt, prompt.render("x") + answer, tokenizer)
        token = whole[len(base)] if len(whole) > len(base) else None
        if token is None or whole[: len(base)] != base:
            raise ConfigError(
                f"labels.names: the teacher's tokenizer joins {answer!r} (label {name!r}) to the prompt "
                "before it; change teacher.prompt.answer_prefix, or set teacher.prompt.answer to 'letters'"
            )
        if token in owner:
            raise ConfigError(
                f"labels.names: {owner[token]!r} and {name!r} begin with the same token for this teacher "
                f"(id {token}), so their probabilities cannot be told apart; rename one of them, or set "
                "teacher.prompt.answer to 'letters'"
            )
        owner[token] = name
        ids.append(int(token))
    return ids


def _token_ids(prompt: Prompt, whole: str, tokenizer: Tokenizer) -> list[int]:
    """A whole prompt as the engine gets it."""
    ids = tokenizer(whole, add_special_tokens=prompt.add_special_tokens)["input_ids"]
    return _without_end_mark(prompt, ids, tokenizer)


def _without_end_mark(prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The answer comes next, so an end mark that a tokenizer puts behind every text must go."""
    special = getattr(tokenizer, "all_special_ids", ()) if prompt.add_special_tokens else ()
    return list(ids[:-1] if ids and ids[-1] in special else ids)


def encode_prompts(
    prompt: Prompt, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of each text's whole prompt, at most ``max_tokens`` long, and how many texts were cut.

    Only the text is cut, at its end; never the instruction or a demonstration.
    """
    whole = tokenizer([prompt.render(text) for text in texts], add_special_tokens=prompt.add_special_tokens)
    encoded = [_without_end_mark(prompt, ids, tokenizer) for ids in whole["input_ids"]]
    long = [i for i, ids in enumerate(encoded) if len(ids) > max_tokens]
    if long:
        room = room_for_text(prompt, tokenizer, max_tokens)
    for i in long:
        encoded[i] = _encode_cut(prompt, texts[i], tokenizer, max_tokens, room)
    return encoded, len(long)


def room_for_text(prompt: Prompt, tokenizer: Tokenizer, max_tokens: int) -> int:
    """Tokens that a text may have; raises :class:`ConfigError` where the prompt leaves none."""
    room = max_tokens - len(_token_ids(prompt, prompt.render(""), tokenizer))
    if room < 1:
        raise ConfigError(
            f"teacher.max_model_len leaves no room for a text: the prompt around it has "
            f"{max_tokens - room} tokens of {max_tokens}; raise it or use fewer demonstrations"
        )
    return room


def _encode_cut(prompt: Prompt, text: str, tokenizer: Tokenizer, max_tokens: int, room: int) -> list[int]:
    # Tokens at the seams may merge differently, so cut a little more until the whole fits.
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for keep in range(min(room, len(offsets)), -1, -1):
        start_of_text = text[: offsets[keep - 1][1]] if keep else ""
        ids = _token_ids(prompt, prompt.render(start_of_text), tokenizer)
        if len(ids) <= max_tokens:
            return ids
    raise AssertionError("an empty text always fits")
