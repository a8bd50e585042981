"""The Jinja2 template of a prompt, the built-in one or the user's, and what it puts around a text.

Blocks leave no blank lines and no indentation (``trim_blocks``, ``lstrip_blocks``), as in chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llkd_ray.config import LabelsConfig
from llkd_ray.sections import ConfigError
from llkd_ray.teacher_config import PromptConfig

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
"""Texts of different length that stand nowhere else: they show where a template ends and a text begins."""
SETTINGS = {"instruction", "answer", "show_labels", "text_prefix", "answer_prefix", "separator"}


def inline_template(config: PromptConfig) -> PromptConfig:
    """The config with the template itself in place of its file, for machines that do not have that."""
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
    """What the template puts before and behind a text, the same for every text.

    ``key_of``: what each label is called in an answer; ``clean`` is applied to the demonstrations' texts.
    Raises :class:`ConfigError` where the template cannot be read or rendered, where the text does not stand
    in it once, or where anything else depends on the text.
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
    except Exception as error:  # a template can raise anything
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        known = ", ".join(sorted([*variables, "text"]))
        raise ConfigError(f"{FIELD}: {error}{line}; repair it (there are {known})") from error
