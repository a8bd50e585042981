"""The teacher reads what it should, every label has tokens of its own, and answers are understood."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from toys import NAMES, toy_texts
from transformers import AutoTokenizer

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.teacher.label_trie import LabelTrie
from llkd_ray.teacher.prompt import (
    DEFAULT_TEMPLATE,
    ELLIPSIS,
    Prompt,
    build_prompt,
    encode_prompts,
    escape_special,
    inline_template,
    label_sequences,
    match_answer,
    render_around,
)

LABELS = LabelsConfig(names=NAMES[:3], descriptions={"sea": "about ships"})
SHOT = {"text": "the boat came", "label": "sea"}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llm) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llm)


def with_chat(tokenizer: Any, template: str = CHAT) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer) -> Any:
    return with_chat(tokenizer)


def prompt_config(**settings: Any) -> PromptConfig:
    return PromptConfig.model_validate({"demonstrations": [SHOT]} | settings)


# --- templates

TWO = LabelsConfig(names=("sea", "kitchen"), descriptions={"sea": "about ships"})
KEY_OF = {"sea": "B", "kitchen": "C"}


def around(config: PromptConfig, clean: Any = str) -> tuple[str, str]:
    return render_around(config, TWO, KEY_OF, clean)


class TestTemplate:
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
    def test_the_built_in_one_joins_the_parts_and_changes_no_character(self, shots, **settings):
        """White space, line breaks and braces in the settings stay as they are."""
        shown = [{"text": text, "label": label} for text, label in shots]
        config = PromptConfig(demonstrations=shown, **settings)
        parts = [config.instruction] if config.instruction else []
        if config.show_labels:
            marks = ("B.", "C.") if config.answer == "letters" else ("-", "-")
            parts.append(f"{marks[0]} sea: about ships\n{marks[1]} kitchen")
        parts += [
            f"{config.text_prefix}{text}{config.answer_prefix} {KEY_OF[label]}" for text, label in shots
        ]
        assert around(config) == (config.separator.join([*parts, config.text_prefix]), config.answer_prefix)

    def test_the_built_in_one_can_be_written_down_as_the_users_own(self):
        assert around(PromptConfig(template=DEFAULT_TEMPLATE)) == around(PromptConfig())

    def test_own_template_sees_every_setting(self):
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
        head = "Do|letters|True|>|=|#\n  B sea about ships\n  C kitchen -\nA <B> & C is kitchen, so say C\n"
        assert around(config, clean=str.upper) == (head, " is"), (
            "nothing is escaped, demonstrations are cleaned, blocks leave no blank lines, "
            "and the end of the file is no part of it"
        )

    def test_one_in_a_file_is_read(self, tmp_path):
        path = tmp_path / "own.j2"
        path.write_text("Überall {{ text }}?\n", encoding="utf-8")
        config = PromptConfig(template=str(path))
        assert around(config) == ("Überall ", "?")
        inlined = inline_template(config)
        path.unlink()
        assert around(inlined) == ("Überall ", "?")
        assert inline_template(inlined) == inlined
        assert inline_template(PromptConfig()) == PromptConfig()

    @pytest.mark.parametrize("content", [None, b"\xff\xfe{{ text }}"])
    def test_one_that_cannot_be_read(self, tmp_path, content):
        path = tmp_path / "own.j2"
        if content:
            path.write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"^teacher\.prompt\.template: .*cannot be read.*check the path"
        ):
            around(PromptConfig(template=str(path)))

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("one\n{% if %} {{ text }}", "in line 2; repair it"),
            ("{{ typo }} {{ text }}", r"typo.*there are answer, answer_prefix, demonstrations, instruction"),
            ("{{ labels[0].typo }}{{ text }}", "typo"),
            ("{% if typo %}{% endif %}{{ text }}", "typo"),
            ("{{ 1 / 0 }}{{ text }}", "division"),
            ("{{ ''.__class__.__mro__ }}{{ text }}", "unsafe"),
            ("no text", "0 times; write {{ text }} once"),
            ("{{ text }} {{ text }}", "2 times; write {{ text }} once"),
            ("{{ text | upper }}", "0 times; write {{ text }} once"),
            ("{{ text[:3] }}", "0 times; write {{ text }} once"),
            ("{{ text | length }}{{ text }}", "what stands around the text depends on it"),
            ("{{ text }}{{ text | length }}", "what stands around the text depends on it"),
        ],
    )
    def test_refusals(self, template, message):
        pattern = message.replace("{", r"\{").replace("}", r"\}")
        with pytest.raises(ConfigError, match=rf"^teacher\.prompt\.template: .*{pattern}"):
            around(PromptConfig(template=template))


# --- prompts


class TestBuild:
    def test_plain(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        whole = prompt.render("a tram")
        assert whole == (
            "Classify the text into exactly one of the categories.\n\n"
            "B. sea: about ships\nC. kitchen\nD. garden\n\n"
            "Text: the boat came\nLabel: B\n\n"
            "Text: a tram\nLabel:"
        )
        assert prompt.answers == (" B", " C", " D")
        assert prompt.messages("a tram") == [{"role": "user", "content": whole}]
        names = build_prompt(prompt_config(answer="names"), LABELS, tokenizer)
        assert "\nLabel: sea\n" in names.head
        assert names.answers == (" sea", " kitchen", " garden")

    def test_chat(self, tokenizer, chat_tokenizer):
        prompt = build_prompt(prompt_config(system="You are terse."), LABELS, chat_tokenizer)
        whole = prompt.render("a tram")
        assert whole.startswith("<s>system: You are terse.\n<s>user: Classify the text")
        assert whole.index("Label: B") < whole.index("Text: a tram\n\nAnswer with label only.\nassistant:")
        assert not prompt.add_special_tokens, "the template has put them in"
        assert prompt.answers == ("B", "C", "D")
        messages = prompt.messages("a tram")
        assert [message["role"] for message in messages] == ["system", "user"]
        applied = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert applied == whole, "what a server makes of it is what we encode ourselves"
        unknown = build_prompt(prompt_config(system="You are terse."), LABELS, None)
        assert (unknown.messages("a tram"), unknown.answers) == (messages, prompt.answers)

    def test_chat_can_be_refused(self, tokenizer, chat_tokenizer):
        plain = build_prompt(prompt_config(), LABELS, tokenizer)
        assert build_prompt(prompt_config(chat="never"), LABELS, chat_tokenizer) == plain

    @pytest.mark.parametrize(
        ("template", "system", "message"),
        [
            ("always the same", None, r"chat: .* drops the text; set it to 'never'"),
            ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", None, "chat: .* repeats the text"),
            ("{{ raise_exception('no users') }}", None, r"chat: .* fails \(no users\); set it to 'never'"),
            ("{{ raise_exception('no system') }}", "Be terse.", r"system: .*\(no system\); put it into"),
            ("{{ messages[-1]['content'] }}", "Be terse.", r"system: .* drops it; put it into"),
            (None, "Be terse.", r"system: 'Be terse\.' needs a chat"),
        ],
    )
    def test_chat_template_that_loses_the_text_or_the_system_message(
        self, tokenizer, template, system, message
    ):
        used = tokenizer if template is None else with_chat(tokenizer, template)
        with pytest.raises(ConfigError, match=rf"^teacher\.prompt\.{message}"):
            build_prompt(prompt_config(system=system), LABELS, used)

    def test_a_system_message_needs_chat(self, chat_tokenizer):
        with pytest.raises(ConfigError, match=r"^teacher\.prompt\.system: 'Be terse\.' needs a chat"):
            build_prompt(prompt_config(system="Be terse.", chat="never"), LABELS, chat_tokenizer)

    @pytest.mark.parametrize(
        ("template", "chat", "whole", "answers"),
        [
            ("{{ labels[0].key }}? {{ text }} is", "never", "B? a tram is", (" B", " C", " D")),
            ("{{ text }} is ", "never", "a tram is ", ("B", "C", "D")),
            ("Which? {{ text }}!", "auto", "<s>user: Which? a tram!\nassistant:", ("B", "C", "D")),
        ],
    )
    def test_own_template(self, chat_tokenizer, template, chat, whole, answers):
        prompt = build_prompt(prompt_config(template=template, chat=chat), LABELS, chat_tokenizer)
        assert (prompt.render("a tram"), prompt.answers) == (whole, answers)

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    def test_all_before_the_text_is_the_same_for_every_text(self, tokenizer, chat_tokenizer, kind):
        used = chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(prompt_config(), LABELS, used)
        encoded, _ = encode_prompts(prompt, toy_texts(20, 3, seed=5)[0], used, 1000, "tail")
        head = used(prompt.head, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        # The last token of the head may merge with the text's first.
        shared = len(head) - 1
        assert shared > 30
        assert all(ids[:shared] == head[:shared] for ids in encoded)


class TestHash:
    def test_is_of_all_that_the_teacher_reads(self, tokenizer, chat_tokenizer):
        changes: list[dict[str, Any]] = [
            {},
            {"instruction": "Pick one."},
            {"answer": "names"},
            {"show_labels": False},
            {"text_prefix": "Text:"},
            {"answer_prefix": "\nClass:"},
            {"separator": "\n"},
            {"demonstrations": []},
            {"demonstrations": [SHOT, SHOT]},
            {"demonstrations": [SHOT | {"label": "kitchen"}]},
        ]
        prompts = [build_prompt(prompt_config(**change), LABELS, tokenizer) for change in changes]
        prompts += [
            build_prompt(prompt_config(), labels, used)
            for labels in (LabelsConfig(names=NAMES[:3]), LabelsConfig(names=NAMES[:4]))
            for used in (tokenizer, chat_tokenizer)
        ]
        prompts += [
            build_prompt(prompt_config(system=system), LABELS, used)
            for system in ("Be brief.", "Be kind.")
            for used in (chat_tokenizer, None)
        ]
        prompts += [Prompt("ab", "c", ("d",), True), Prompt("a", "bc", ("d",), True)]
        prompts += [Prompt("a", "b", ("c", "d"), True), Prompt("a", "b", ("cd",), True)]
        assert len({prompt.hash for prompt in prompts}) == len(prompts)
        assert build_prompt(prompt_config(), LABELS, tokenizer).hash == prompts[0].hash

    def test_does_not_change_with_what_the_teacher_does_not_see(self, tokenizer):
        hidden = prompt_config(show_labels=False)
        renamed = LabelsConfig(names=NAMES[:3], descriptions={"garden": "plants"})
        assert build_prompt(hidden, LABELS, tokenizer).hash == build_prompt(hidden, renamed, tokenizer).hash
        plain, never = (
            build_prompt(prompt_config(chat=chat), LABELS, tokenizer) for chat in ("auto", "never")
        )
        assert plain.hash == never.hash, "chat means nothing where there is no template"


# --- tokens


class TestLabelSequences:
    @pytest.mark.parametrize(
        ("answer", "names"),
        [
            ("letters", NAMES[:3]),
            ("names", NAMES[:3]),
            ("names", ("sea breeze", "sea", "sea storm")),
            ("names", ("an odd one", "én")),
        ],
    )
    @pytest.mark.parametrize("kind", ["plain", "chat"])
    def test_they_follow_the_prompt_as_it_is_encoded(self, tokenizer, chat_tokenizer, kind, answer, names):
        labels, used = LabelsConfig(names=names), chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(PromptConfig(answer=answer), labels, used)
        (encoded,), _ = encode_prompts(prompt, ["the sea"], used, 500, "tail")
        sequences = label_sequences(prompt, labels, used)
        for tokens, said in zip(sequences, prompt.answers, strict=True):
            whole = used(prompt.render("the sea") + said, add_special_tokens=prompt.add_special_tokens)
            assert whole["input_ids"] == [*encoded, *tokens]
            assert used.decode(tokens) == said
        assert LabelTrie.of(sequences).n_labels == len(names)

    def test_names_that_are_the_same_tokens(self, tokenizer):
        blind = copy.deepcopy(tokenizer)
        blind._tokenizer.normalizer = normalizers.Lowercase()
        labels = LabelsConfig(names=("Sea breeze", "kitchen", "sea breeze"))
        prompt = build_prompt(PromptConfig(answer="names"), labels, blind)
        with pytest.raises(ConfigError, match=r"^labels\.names: 'Sea breeze' and 'sea breeze'.*; rename it"):
            label_sequences(prompt, labels, blind)
        assert len(set(label_sequences(prompt, labels, tokenizer))) == 3, "this one sees case"

    def test_name_without_tokens(self, tokenizer):
        deaf = copy.deepcopy(tokenizer)
        deaf._tokenizer.normalizer = normalizers.Replace("é", "")
        labels = LabelsConfig(names=("sea", "é"))
        prompt = Prompt("", "\nLabel:", ("sea", "é"), add_special_tokens=True)
        with pytest.raises(ConfigError, match=r"labels\.names: 'é' has no tokens for this teacher; rename"):
            label_sequences(prompt, labels, deaf)

    def test_answer_that_joins_the_prompt(self, tokenizer):
        # " the" and then "y" are one token, " they".
        labels = LabelsConfig(names=("re", "y"))
        prompt = Prompt("", " the", ("re", "y"), add_special_tokens=True)
        with pytest.raises(ConfigError, match=r"joins 're' \(label 're'\) to the prompt before it; change"):
            label_sequences(prompt, labels, tokenizer)

    def test_tokenizer_that_puts_an_end_mark_behind_every_text(self, tokenizer):
        ending = copy.deepcopy(tokenizer)
        ending._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        assert label_sequences(prompt, LABELS, ending) == label_sequences(prompt, LABELS, tokenizer)
        for limit in (500, 80):
            texts = ["the sea", "anchor " * 100]
            (found, cut), (expected, _) = (
                encode_prompts(prompt, texts, one, limit, "tail") for one in (ending, tokenizer)
            )
            assert found == expected
            assert cut.tolist() == [False, limit == 80]

    def test_special_token_at_the_end_of_the_prompt_is_no_end_mark(self, tokenizer):
        prompt = Prompt("<s>user ", " </s>", ("A", "B"), add_special_tokens=True)
        (ids,), _ = encode_prompts(prompt, ["the sea"], tokenizer, 500, "tail")
        assert ids[-1] == tokenizer.eos_token_id


class TestEncode:
    def test_only_long_ones_are_cut(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        texts = ["short", "sea " * 500, "tiny", "pan " * 500]
        encoded, cut = encode_prompts(prompt, texts, tokenizer, 100, "tail")
        assert cut.tolist() == [False, True, False, True]
        assert max(map(len, encoded)) <= 100
        for i in (0, 2):
            assert encoded[i] == tokenizer(prompt.render(texts[i]))["input_ids"]
        encoded, cut = encode_prompts(prompt, [], tokenizer, 10, "tail")
        assert (encoded, cut.tolist()) == ([], [])

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    @pytest.mark.parametrize("cut", ["tail", "head", "middle"])
    @settings(max_examples=25, deadline=None)
    @given(
        text=st.text(min_size=60, max_size=400) | st.sampled_from(["the sea " * 90, "é" * 300, "\n" * 300]),
        spare=st.integers(16, 50),
    )
    def test_long_text_is_cut_where_the_config_says_and_nothing_else(
        self, tokenizer, chat_tokenizer, kind, cut, text, spare
    ):
        used = chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(prompt_config(), LABELS, used)
        around = len(used(prompt.render(""), add_special_tokens=prompt.add_special_tokens)["input_ids"])
        limit = around + spare
        (ids,), (was_cut,) = encode_prompts(prompt, [text], used, limit, cut)
        assert len(ids) <= limit
        said = used.decode(ids).removeprefix("<s>")
        head, tail = prompt.head.removeprefix("<s>"), prompt.tail
        assert said.startswith(head)
        assert said.endswith(tail)
        kept = said[len(head) : len(said) - len(tail)]
        if not was_cut:
            assert kept == text
            return
        assert len(ids) >= limit - 4, "little room is wasted"
        # A cut can go through a character of several bytes; all else is the text's own.
        if cut == "tail":
            assert text.startswith(kept.rstrip("\ufffd"))
        elif cut == "head":
            assert text.endswith(kept.lstrip("\ufffd"))
        else:
            first, _, last = kept.partition(ELLIPSIS)
            assert text.startswith(first.rstrip("\ufffd"))
            assert text.endswith(last.lstrip("\ufffd"))
            assert first
            assert last

    @pytest.mark.parametrize("cut", ["tail", "head", "middle"])
    def test_a_very_long_text_is_tokenised_a_few_times_only(self, tokenizer, cut):
        calls = []

        class Counting:
            chat_template = None
            all_special_tokens = tokenizer.all_special_tokens

            def __call__(self, text, **options):
                calls.append(sum(map(len, text)) if isinstance(text, list) else len(text))
                return tokenizer(text, **options)

        prompt = build_prompt(prompt_config(), LABELS, Counting())
        text = "x1;\u00e9 " * 20_000
        (ids,), _ = encode_prompts(prompt, [text], Counting(), 900, cut)
        assert 890 <= len(ids) <= 900
        assert sum(length > 50_000 for length in calls) == 2, "whole, and for the places of its tokens"
        assert len(calls) < 20

    def test_tokenizer_that_does_not_tell_where_its_tokens_are(self, tokenizer):
        class Slow:
            is_fast = False
            chat_template = None

            def __call__(self, text, add_special_tokens=True):
                return tokenizer(text, add_special_tokens=add_special_tokens)

        prompt = build_prompt(prompt_config(), LABELS, Slow())
        (ids,), cut = encode_prompts(prompt, ["the tide " * 400], Slow(), 120, "head")
        assert cut.tolist() == [True]
        assert 117 <= len(ids) <= 120

    def test_no_room_for_a_text(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        around = len(tokenizer(prompt.render(""))["input_ids"])
        message = rf"^teacher\.max_model_len leaves no room.* {around} tokens of {around}; raise it"
        with pytest.raises(ConfigError, match=message):
            encode_prompts(prompt, ["x"], tokenizer, around, "tail")

    @pytest.mark.parametrize("cut", ["tail", "head", "middle"])
    def test_text_that_is_short_alone_and_long_in_the_prompt(self, cut):
        # Head, text and tail can make more tokens together than the empty prompt and the text do.
        class Growing:
            chat_template = None

            def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
                if isinstance(text, list):
                    return {"input_ids": [self(one)["input_ids"] for one in text]}
                if return_offsets_mapping:
                    return {"offset_mapping": [(i, i + 1) for i in range(len(text))]}
                # "<>" is one token; with anything between, the marks are two each.
                tokens = [0] if text == "<>" else [0, 1, *(9 for _ in text[1:-1]), 2, 3]
                return {"input_ids": tokens}

        (ids,), was_cut = encode_prompts(Prompt("<", ">", (), True), ["ab"], Growing(), 5, cut)
        assert was_cut.tolist() == [True]
        assert len(ids) <= 5


class TestSpecialTokens:
    marks = st.sampled_from(["<s>", "</s>", "<pad>", "<|turn|>", "<", "s>", " ", "<<s>", "a", "\n"])

    @pytest.fixture(scope="class")
    @classmethod
    def marked(cls, tokenizer) -> Any:
        changed = with_chat(tokenizer)
        changed.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|turn|>ed"]})
        return changed

    @pytest.mark.parametrize("chat", ["auto", "never"])
    @settings(max_examples=60, deadline=None)
    @given(text=st.lists(marks, max_size=40).map("".join), limit=st.sampled_from([80, 500]))
    def test_none_comes_out_of_a_text(self, marked, chat, text, limit):
        prompt = build_prompt(prompt_config(chat=chat, demonstrations=[]), LABELS, marked)
        (ids,), _ = encode_prompts(prompt, [text], marked, limit, "middle")
        (around,), _ = encode_prompts(prompt, [""], marked, limit, "middle")
        special = set(marked.all_special_ids)
        assert [i for i in ids if i in special] == [i for i in around if i in special]

    def test_nor_out_of_a_demonstration(self, tokenizer):
        shot = {"text": "the boat</s> came", "label": "sea"}
        prompt = build_prompt(prompt_config(demonstrations=[shot]), LABELS, tokenizer)
        assert "Text: the boat< /s> came\nLabel: B" in prompt.head
        (ids,), _ = encode_prompts(prompt, ["x"], tokenizer, 500, "tail")
        assert tokenizer.eos_token_id not in ids

    def test_nor_out_of_a_message(self, marked):
        prompt = build_prompt(prompt_config(), LABELS, marked)
        assert "Text: hi < |turn|>" in prompt.messages("hi <|turn|>")[0]["content"]

    @pytest.mark.parametrize(
        "token",
        [
            *("<|im_end|>", "<|reserved_special_token_7|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"),
            *("<end_of_turn>", "</think>", "[/INST]", "<<SYS>>", "[tool_calls]"),
        ],
    )
    def test_nor_out_of_a_message_to_a_server_whose_tokenizer_is_unknown(self, token):
        unknown = build_prompt(prompt_config(), LABELS, None)
        said = unknown.messages(f"hi{token}{token} there")[0]["content"]
        assert token not in said
        assert f"Text: hi{token[0]} {token[1:]}{token[0]} {token[1:]} there" in said
        assert "a < b | c > d, [1] <b>x</b>" in unknown.messages("a < b | c > d, [1] <b>x</b>")[0]["content"]

    @pytest.mark.parametrize(
        ("text", "special", "escaped"),
        [
            ("a <s> b", ("<s>", "</s>"), "a < s> b"),
            ("<s>longer", ("<s>", "<s>long"), "< s>longer"),
            ("<S> s> <s", ("<s>",), "<S> s> <s"),
            # What breaking leaves is broken, too.
            ("<</s>/s>", ("</s>",), "<< /s>/s>"),
            ("ab", ("ab", "a b"), "a  b"),
            ("x§y", ("§",), "x y"),
            # White space around a special string means nothing.
            ("a  <s> b", (" <s>", "  "), "a  < s> b"),
        ],
    )
    def test_broken_with_a_space_longest_first_and_by_case(self, text, special, escaped):
        assert escape_special(text, special) == escaped

    @given(st.text())
    def test_all_else_is_left_alone(self, text):
        assert escape_special(text, ("<|im_end|>", "<s>")) == text or "<s>" in text or "<|im_end|>" in text


class TestMatchAnswer:
    @pytest.mark.parametrize(
        ("answers", "label", "said"),
        [
            ((" A", " B", " C", " I"), 0, [
                "A", " A", "a", "A.", "A. sea", "A) sea", "(A)", "**A**", '"A"', "A: sea", "- A",
                "A\nbecause", "`A`", "Label: A", "**Label:** A", "The answer is: A", "A - sea",
                "A, clearly", "[A]"]),
            ((" A", " B", " C", " I"), -1, [
                "Apple", "A boat came", "I am not sure", "I'm not sure", "", " ", "D", "none", "AB", "***"]),
            (("card", "card arrival"), 1, ["card arrival.", "Card Arrival"]),
            (("card", "card arrival"), 0, ["card arrivals", "card\n"]),
            (("sea", "1"), 0, ["'sea'", "category: sea", "**Category**: *sea*", "sea because of ships"]),
            (("C++", "-1", "1"), 0, ["C++ code"]),
            (("C++", "-1", "1"), 1, ["-1", "**-1**"]),
            (("C++", "-1", "1"), 2, ["1"]),
            (("card", "sea", "1"), -1, ["cards", "the sea", "12"]),
            # Case decides where nothing else does.
            (("sea", "Sea"), 1, ["Sea"]),
            (("sea", "Sea"), 0, ["sea."]),
            (("sea", "Sea"), -1, ["SEA"]),
        ],
    )  # fmt: skip
    def test_what_it_means(self, answers, label, said):
        assert {one: match_answer(one, answers) for one in said} == dict.fromkeys(said, label)

    @given(
        st.lists(st.text("abc \u00e9ß", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1,
                 unique_by=str.casefold)
    )  # fmt: skip
    def test_an_answer_means_itself(self, answers):
        assert [match_answer(answer, answers) for answer in answers] == list(range(len(answers)))
