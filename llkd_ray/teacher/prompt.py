"""The teacher's prompt: the text around the input, tokens of prompts and labels, and parsing of answers.

The text comes last: everything before it is the same for every text, and an engine's prefix cache computes
it once. Shapes in names: N texts of one call.

Blocks leave no blank lines and no indentation (``trim_blocks``, ``lstrip_blocks``), as in chat templates.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import ANSWER_LETTERS, PromptConfig

Cut = Literal["head", "tail", "middle"]
"""Which part of a text that is too long is left out."""
Encode = Callable[[Sequence[str]], list[list[int]]]
ELLIPSIS = " … "  # replaces the middle of a text that was cut there
COMMON_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,80}\|>"  # Qwen, Llama 3, Phi, GPT
    r"|<｜[^｜<>\n]{1,80}｜>"  # DeepSeek
    r"|</?(?:s|bos|eos|pad|unk|mask|think|tool_call|tool_response|start_of_turn|end_of_turn)>"  # and Gemma
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"  # Mistral
    r"|<</?SYS>>",  # Llama 2
    re.IGNORECASE,
)
"""Patterns of what models read as special tokens, for a served model whose tokenizer is unknown."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer's interface that is used here."""

    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """The fixed strings around a text; ``head + text + tail`` is the whole prompt."""

    head: str
    tail: str
    answers: tuple[str, ...]
    """The expected answer for each label, in label order."""
    add_special_tokens: bool
    message: tuple[str, str] | None = None
    """The strings around the text in the user's message, where a chat template wraps the message."""
    system: str | None = None
    special: tuple[str, ...] | None = ()
    """Strings that the model reads as special tokens, broken up in a text; None: not known, by pattern."""

    @property
    def hash(self) -> str:
        """Depends on everything that the teacher reads, except the text."""
        system = () if self.system is None else (self.system,)
        content = "\x00".join([self.head, self.tail, *self.answers, str(self.add_special_tokens), *system])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def render(self, text: str) -> str:
        """The whole prompt, in the model's chat format if it has one."""
        return f"{self.head}{escape_special(text, self.special)}{self.tail}"

    def messages(self, text: str) -> list[dict[str, str]]:
        """The prompt as chat messages, for a server that applies the model's chat format itself."""
        before, behind = self.message or (self.head, self.tail)
        user = {"role": "user", "content": f"{before}{escape_special(text, self.special)}{behind}"}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


def escape_special(text: str, special: tuple[str, ...] | None) -> str:
    """The text with a space after the first character of each special string in it; see :class:`Prompt`."""
    pattern = COMMON_SPECIAL if special is None else _pattern(special)
    while pattern is not None and pattern.search(text):  # again: this may create another
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if found[0][1:] else " ", text)
    return text


@lru_cache(maxsize=16)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str] | None:
    # Without outer white space, so that an inserted space always breaks them.
    cores = sorted({one.strip() for one in special} - {""}, key=lambda core: (-len(core), core))
    return re.compile("|".join(map(re.escape, cores))) if cores else None


def _special_strings(tokenizer: Tokenizer | None) -> tuple[str, ...] | None:
    if tokenizer is None:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = [*getattr(tokenizer, "all_special_tokens", ()), *(str(one) for one in added if one.special)]
    return tuple(sorted(set(named)))


# Building


def build_prompt(config: PromptConfig, labels: LabelsConfig, tokenizer: Tokenizer | None) -> Prompt:
    """Combine instruction, label list and demonstrations, in the model's chat format if it has one.

    Without a tokenizer, ``messages`` is what a server gets. Raises :class:`ConfigError` where a template is
    unusable, or where the model's format does not support a system message.
    """
    assert config.draw is None, "demonstrations are drawn before a prompt is built"
    keys = tuple(ANSWER_LETTERS[: len(labels.names)] if config.answer == "letters" else labels.names)
    special = _special_strings(tokenizer)
    key_of = dict(zip(labels.names, keys, strict=True))
    head, tail = render_around(config, labels, key_of, partial(escape_special, special=special))
    if config.chat == "never" or not (tokenizer is None or getattr(tokenizer, "chat_template", None)):
        if config.system is not None:
            raise ConfigError(
                f"teacher.prompt.system: {config.system!r} needs a chat template, and this teacher has none, "
                "or teacher.prompt.chat is 'never'; put it into teacher.prompt.instruction"
            )
        # A user's template may already end with the space before the answer.
        space = "" if config.template is not None and tail[-1:].isspace() else " "
        return Prompt(head, tail, tuple(f"{space}{key}" for key in keys), True, special=special)
    if config.template is None:
        asked = config.answer_prefix.strip().rstrip(":").lower()
        tail = f"\n\nAnswer with {asked or 'the label'} only."
    message = head, tail
    if tokenizer is not None:
        head, tail = _in_chat_format(message, config.system, tokenizer)
    return Prompt(head, tail, keys, False, message=message, system=config.system, special=special)


def _in_chat_format(message: tuple[str, str], system: str | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """The strings around the text after the model's chat template is applied to the user's message."""
    conversation = [{"role": "user", "content": MARKS[0].join(message)}]
    if system is not None:
        conversation.insert(0, {"role": "system", "content": system})
    never = "set it to 'never'"
    instead = "put it into teacher.prompt.instruction"
    try:
        whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        if system is None:
            raise ConfigError(
                f"teacher.prompt.chat: the model's chat template fails ({error}); {never}"
            ) from error
        raise ConfigError(
            f"teacher.prompt.system: the model's chat template fails with it ({error}); {instead}"
        ) from error
    before, found, behind = whole.partition(MARKS[0])
    if not found or MARKS[0] in behind:
        does = "repeats" if found else "drops"
        raise ConfigError(f"teacher.prompt.chat: the model's chat template {does} the text; {never}")
    if system is not None and system.strip() not in whole:
        raise ConfigError(f"teacher.prompt.system: the model's chat template drops it; {instead}")
    return before, behind


# Tokens


def label_sequences(prompt: Prompt, labels: LabelsConfig, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Each label's whole answer as tokens, as they follow the prompt.

    Raises :class:`ConfigError` where an answer has no tokens, where it changes the tokenization of the prompt
    before it, or where two labels have the same tokens.
    """
    encode = _encoder(prompt, tokenizer)
    base, *wholes = encode([prompt.render("x") + answer for answer in ("", *prompt.answers)])
    owner: dict[tuple[int, ...], str] = {}
    for name, answer, whole in zip(labels.names, prompt.answers, wholes, strict=True):
        tokens = tuple(whole[len(base) :])
        remedy = "rename it, or set teacher.prompt.answer to 'letters'"
        if whole[: len(base)] != base:
            raise ConfigError(
                f"labels.names: the teacher's tokenizer joins {answer!r} (label {name!r}) to the prompt "
                "before it; change teacher.prompt.answer_prefix, or how teacher.prompt.template ends, or "
                "set teacher.prompt.answer to 'letters'"
            )
        if not tokens:
            raise ConfigError(f"labels.names: {name!r} has no tokens for this teacher; {remedy}")
        if tokens in owner:
            raise ConfigError(
                f"labels.names: {owner[tokens]!r} and {name!r} are the same tokens for this teacher "
                f"({list(tokens)}), so their probabilities cannot be told apart; {remedy}"
            )
        owner[tokens] = name
    return list(owner)


def encode_prompts(
    prompt: Prompt, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, cut: Cut
) -> tuple[list[list[int]], np.ndarray]:
    """Token ids of each text's whole prompt, at most ``max_tokens`` long, and bool[N]: which were cut.

    ``cut`` selects which part of a text that is too long is left out. The instruction and the demonstrations
    are never cut; raises :class:`ConfigError` where they leave no room for a text.
    """
    if not texts:
        return [], np.zeros(0, dtype=bool)
    encode = _encoder(prompt, tokenizer)
    encoded = encode([prompt.render(text) for text in texts])
    was_cut_N = np.array([len(ids) > max_tokens for ids in encoded])
    if was_cut_N.any():
        room = room_for_text(prompt, tokenizer, max_tokens)
    for i in np.flatnonzero(was_cut_N):
        encoded[i] = _encode_cut(prompt, texts[i], tokenizer, encode, max_tokens, room, cut)
    return encoded, was_cut_N


def room_for_text(prompt: Prompt, tokenizer: Tokenizer, max_tokens: int) -> int:
    """Maximum number of tokens of a text; raises :class:`ConfigError` where the prompt leaves none."""
    (around,) = _encoder(prompt, tokenizer)([prompt.render("")])
    if len(around) >= max_tokens:
        raise ConfigError(
            f"teacher.max_model_len leaves no room for a text: the prompt around it has "
            f"{len(around)} tokens of {max_tokens}; raise it or use fewer demonstrations"
        )
    return max_tokens - len(around)


def _encoder(prompt: Prompt, tokenizer: Tokenizer) -> Encode:
    """Encodes whole prompts, without a tokenizer's end-of-sequence tokens, as the answer follows."""
    n_marks = _end_marks(tokenizer) if prompt.add_special_tokens else 0

    def encode(wholes: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(list(wholes), add_special_tokens=prompt.add_special_tokens)["input_ids"]
        return [list(ids[: len(ids) - n_marks]) for ids in encoded]

    return encode


def _end_marks(tokenizer: Tokenizer) -> int:
    """The number of tokens that a tokenizer appends to every text."""
    bare, marked = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
    ends = [
        len(marked) - start - len(bare)
        for start in range(len(marked) - len(bare) + 1)
        if marked[start : start + len(bare)] == bare
    ]
    return min(ends, default=0)


def _encode_cut(
    prompt: Prompt, text: str, tokenizer: Tokenizer, encode: Encode, max_tokens: int, room: int, cut: Cut
) -> list[int]:
    """The tokens of a prompt whose text is cut by the minimum that is necessary."""
    text = escape_special(text, prompt.special)
    spans, most = _spans(text, tokenizer), room
    if spans is None:  # by characters, where a tokenizer returns no offsets
        spans = [(i, i + 1) for i in range(len(text))]
        most = len(spans)

    def attempt(keep: int) -> list[int]:
        return encode([prompt.render(shorten(text, spans, keep, cut))])[0]

    # Tokens merge differently at the cuts, so a few more than counted may have to be removed.
    most = max(0, min(most, len(spans) - 1))
    return attempt(_most(most, lambda keep: len(attempt(keep)) - max_tokens))


def _spans(text: str, tokenizer: Tokenizer) -> list[tuple[int, int]] | None:
    """The character span of each token of the text, where the tokenizer returns it."""
    if not getattr(tokenizer, "is_fast", True):
        return None
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def shorten(text: str, spans: Sequence[tuple[int, int]], keep: int, cut: Cut) -> str:
    """A text reduced to ``keep`` of its tokens; ``spans`` are the characters of each token.

    ``cut`` selects which tokens are removed: those at the head, the tail or in the middle.
    """
    if not keep:
        return ""
    first = {"tail": keep, "head": 0, "middle": (keep + 1) // 2}[cut]
    start = text[: spans[first - 1][1]] if first else ""
    end = text[spans[len(spans) - (keep - first)][0] :] if keep > first else ""
    return f"{start}{ELLIPSIS if cut == 'middle' else ''}{end}"


def _most(most: int, excess: Callable[[int], int]) -> int:
    """The largest number up to ``most`` without excess (0 has none); searches near ``most`` first."""
    good, too_many, step = most, most + 1, 1
    while good > 0 and (over := excess(good)) > 0:
        step = max(step, over)
        too_many, good, step = good, max(0, good - step), 2 * step
    while too_many - good > 1:
        middle = (good + too_many) // 2
        good, too_many = (middle, too_many) if excess(middle) <= 0 else (good, middle)
    return good


# Answers

_LEADING = frozenset(" \t\r\n\"'`“”‘’«»*_#>~-–—([{<•:.")


def match_answer(said: str, answers: Sequence[str]) -> int:
    """The label that a sampled answer means, -1 for none; ``answers`` as in :class:`Prompt`.

    It is the longest answer that ``said`` starts with, up to a word boundary and ignoring case, after any
    quotes, brackets, markdown and one word with a colon ("Label: sea"). A single letter counts only where no
    word follows on its line: "B. sea" means B, "B boat" does not.
    """
    known = [answer.strip() for answer in answers]
    rest = said.strip()
    while rest:
        if (label := _begins_with(rest, known)) >= 0:
            return label
        if rest[0] in _LEADING:
            rest = rest[1:]
        elif prefix := re.match(r"(the answer is|\w+)[*_]*\s*:", rest, re.IGNORECASE):
            rest = rest[prefix.end() :]
        else:
            break
    return -1


def _begins_with(said: str, known: Sequence[str]) -> int:
    folded = said.casefold()
    found = [i for i, answer in enumerate(known) if _is_whole(folded, answer.casefold())]
    longest = max((len(known[i]) for i in found), default=0)
    found = [i for i in found if len(known[i]) == longest]
    if len(found) > 1:  # they differ only in case
        found = [i for i in found if said.startswith(known[i])]
    return found[0] if len(found) == 1 else -1


def _is_whole(said: str, answer: str) -> bool:
    if not answer or not said.startswith(answer):
        return False
    behind = said[len(answer) :]
    if len(answer) == 1 and answer.isalpha():
        return re.match(r"[^\S\n]*($|\n|[^\w\s'’])", behind) is not None
    return not (answer[-1].isalnum() and re.match(r"\w", behind))


DEFAULT_TEMPLATE = r"""
{%- if instruction %}
{{ instruction }}{{ separator -}}
{% endif %}
{% if show_labels %}
{% for label in labels %}
{{ label.key + "." if answer == "letters" else "-" }} {{ label.name }}
{%- if label.description %}: {{ label.description }}{% endif %}
{{- separator if loop.last else "\n" -}}
{% endfor %}
{% endif %}
{% for shot in demonstrations %}
{{ text_prefix }}{{ shot.text }}{{ answer_prefix }} {{ shot.answer }}{{ separator -}}
{% endfor %}
{{ text_prefix }}{{ text }}{{ answer_prefix }}"""
FIELD = "teacher.prompt.template"
MARKS = ("\u241etext\u241e", "\u241eA longer text.\n" * 50 + "\u241e")
"""Texts of different lengths that occur nowhere else: they locate the text in a rendered template."""
SETTINGS = {"instruction", "answer", "show_labels", "text_prefix", "answer_prefix", "separator"}


def inline_template(config: PromptConfig) -> PromptConfig:
    """The config with the template's content instead of its path, for machines without the file."""
    if config.template is None or not config.template.endswith(".j2"):
        return config
    try:
        source = Path(config.template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{FIELD}: {config.template!r} cannot be read ({error}); check the path, or write the template "
            "itself"
        ) from error
    return config.model_copy(update={"template": source})


def render_around(
    config: PromptConfig, labels: LabelsConfig, key_of: Mapping[str, str], clean: Callable[[str], str]
) -> tuple[str, str]:
    """The template's output before and after a text, the same for every text.

    ``key_of``: the key of each label in an answer; ``clean`` is applied to the demonstrations' texts.
    Raises :class:`ConfigError` where the template cannot be read or rendered, where it does not contain the
    text exactly once, or where anything else depends on the text.
    """
    source = inline_template(config).template
    variables: dict[str, Any] = {
        **config.model_dump(include=SETTINGS),
        "labels": [
            {"name": name, "key": key, "description": labels.descriptions.get(name, "")}
            for name, key in key_of.items()
        ],
        "demonstrations": [
            {"text": clean(shot.text), "label": shot.label, "answer": key_of[shot.label]}
            for shot in config.demonstrations
        ],
    }
    wholes = [_render(DEFAULT_TEMPLATE if source is None else source, variables, mark) for mark in MARKS]
    around = [whole.split(mark) for whole, mark in zip(wholes, MARKS, strict=True)]
    if len(around[0]) != 2:
        raise ConfigError(
            f"{FIELD}: the text stands in it {len(around[0]) - 1} times; write {{{{ text }}}} once, as it is"
        )
    if around[0] != around[1]:
        raise ConfigError(f"{FIELD}: what stands around the text depends on it; write {{{{ text }}}} only")
    before, behind = around[0]
    return before, behind


def _render(source: str, variables: Mapping[str, Any], text: str) -> str:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        return environment.from_string(source).render(variables, text=text)
    except Exception as error:  # a template may raise any exception
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        known = ", ".join(sorted([*variables, "text"]))
        raise ConfigError(f"{FIELD}: {error}{line}; repair it (there are {known})") from error
