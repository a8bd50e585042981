"""Templates: the built-in one word by word, the user's own, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.teacher.prompt import DEFAULT_TEMPLATE, inline_template, render_around

LABELS = LabelsConfig(names=("sea", "kitchen"), descriptions={"sea": "about ships"})
KEY_OF = {"sea": "A", "kitchen": "B"}


def around(config: PromptConfig) -> tuple[str, str]:
    return render_around(config, LABELS, KEY_OF, clean=lambda text: text)


def refusal(template: str) -> str:
    with pytest.raises(ConfigError) as caught:
        around(PromptConfig(template=template))
    return str(caught.value)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    instruction=words,
    answer=st.sampled_from(["letters", "names"]),
    show_labels=st.booleans(),
    text_prefix=words,
    answer_prefix=words,
    separator=words,
    shots=st.lists(st.tuples(words.filter(bool), st.sampled_from(["sea", "kitchen"])), max_size=3),
)
def test_the_built_in_one_joins_the_parts_and_changes_no_character(shots, **settings):
    """White space, line breaks and braces in the settings stay as they are."""
    config = PromptConfig(
        demonstrations=[{"text": text, "label": label} for text, label in shots], **settings
    )
    parts = [config.instruction] if config.instruction else []
    if config.show_labels:
        marks = ("A.", "B.") if config.answer == "letters" else ("-", "-")
        parts.append(f"{marks[0]} sea: about ships\n{marks[1]} kitchen")
    parts += [f"{config.text_prefix}{text}{config.answer_prefix} {KEY_OF[label]}" for text, label in shots]
    assert around(config) == (config.separator.join([*parts, config.text_prefix]), config.answer_prefix)


def test_the_built_in_one_can_be_written_down_as_the_users_own():
    assert around(PromptConfig(template=DEFAULT_TEMPLATE)) == around(PromptConfig())


def test_own_template_sees_every_setting():
    template = """\
{{ instruction }}|{{ answer }}|{{ show_labels }}|{{ text_prefix }}|{{ answer_prefix }}|{{ separator }}
{% for label in labels %}
  {{ label.key }} {{ label.name }} {{ label.description or "-" }}
{% endfor %}
{% for shot in demonstrations %}
{{ shot.text }} is {{ shot.label }}, so say {{ shot.answer }}
{% endfor %}
{{ text }} is
"""
    config = PromptConfig(
        template=template,
        instruction="Do",
        text_prefix=">",
        answer_prefix="=",
        separator="#",
        demonstrations=[{"text": "a <b> & c", "label": "kitchen"}],
    )
    assert around(config) == (
        "Do|letters|True|>|=|#\n  A sea about ships\n  B kitchen -\na <b> & c is kitchen, so say B\n",
        " is",
    ), "nothing is escaped, blocks leave no blank lines, and the end of the file is no part of it"


def test_demonstrations_are_cleaned():
    config = PromptConfig(demonstrations=[{"text": "hello", "label": "sea"}])
    assert "Text: HELLO\n" in render_around(config, LABELS, KEY_OF, clean=str.upper)[0]


class TestFile:
    def test_is_read(self, tmp_path):
        path = tmp_path / "own.j2"
        path.write_text("Überall {{ text }}?\n", encoding="utf-8")
        config = PromptConfig(template=str(path))
        assert around(config) == ("Überall ", "?")
        inlined = inline_template(config)
        path.unlink()
        assert around(inlined) == ("Überall ", "?")

    @pytest.mark.parametrize("template", [None, "{{ text }}"])
    def test_other_templates_stay_as_they_are(self, template):
        assert inline_template(PromptConfig(template=template)).template == template

    @pytest.mark.parametrize("content", [None, b"\xff\xfe{{ text }}"])
    def test_that_cannot_be_read(self, tmp_path, content):
        path = tmp_path / "own.j2"
        if content:
            path.write_bytes(content)
        message = refusal(str(path))
        assert message.startswith(f"teacher.prompt.template: {str(path)!r} cannot be read (")
        assert "check the path" in message


class TestRefusals:
    def test_syntax(self):
        message = refusal("one\n{% if %} {{ text }}")
        assert message.startswith("teacher.prompt.template: ")
        assert "in line 2; repair it" in message

    @pytest.mark.parametrize(
        "template",
        ["{{ typo }} {{ text }}", "{{ labels[0].typo }}{{ text }}", "{% if typo %}{% endif %}{{ text }}"],
    )
    def test_unknown_variable(self, template):
        message = refusal(template)
        assert message.startswith("teacher.prompt.template: ")
        assert "typo" in message
        assert "there are answer, answer_prefix, demonstrations, instruction, labels, separator" in message

    def test_errors_of_any_kind(self):
        assert "division" in refusal("{{ 1 / 0 }}{{ text }}")

    def test_nothing_unsafe(self):
        assert "unsafe" in refusal("{{ ''.__class__.__mro__ }}{{ text }}")

    @pytest.mark.parametrize(
        ("template", "times"),
        [("no text", 0), ("{{ text }} {{ text }}", 2), ("{{ text | upper }}", 0), ("{{ text[:3] }}", 0)],
    )
    def test_the_text_stands_in_it_once(self, template, times):
        assert f"the text stands in it {times} times; write {{{{ text }}}} once" in refusal(template)

    @pytest.mark.parametrize("where", ["{0}{{{{ text }}}}", "{{{{ text }}}}{0}"])
    def test_nothing_else_depends_on_the_text(self, where):
        message = refusal(where.format("{{ text | length }}"))
        assert "what stands around the text depends on it" in message
