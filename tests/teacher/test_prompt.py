"""The teacher reads what it should, and every label has tokens of its own."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from toys import NAMES, toy_texts
from transformers import AutoTokenizer

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.teacher.label_trie import LabelTrie
from llkd_ray.teacher.prompt import (
    ELLIPSIS,
    Prompt,
    build_prompt,
    encode_prompts,
    escape_special,
    label_sequences,
    match_answer,
)

LABELS = LabelsConfig(names=NAMES[:3], descriptions={"sea": "about ships"})
SHOT = {"text": "the boat came", "label": "sea"}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    return AutoTokenizer.from_pretrained(tiny_llm)


@pytest.fixture
def chat_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


def prompt_config(**settings) -> PromptConfig:
    return PromptConfig.model_validate({"demonstrations": [SHOT]} | settings)


class TestBuild:
    def test_letters(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        assert prompt.render("a tram") == (
            "Classify the text into exactly one of the categories.\n\n"
            "A. sea: about ships\nB. kitchen\nC. garden\n\n"
            "Text: the boat came\nLabel: A\n\n"
            "Text: a tram\nLabel:"
        )
        assert prompt.answers == (" A", " B", " C")

    def test_names(self, tokenizer):
        prompt = build_prompt(prompt_config(answer="names"), LABELS, tokenizer)
        assert "- sea: about ships\n- kitchen\n- garden\n\n" in prompt.head
        assert "\nLabel: sea\n" in prompt.head
        assert prompt.answers == (" sea", " kitchen", " garden")

    def test_parts_can_be_left_out_and_reworded(self, tokenizer):
        config = PromptConfig(
            instruction="", show_labels=False, text_prefix="> ", answer_prefix=" =>", separator=" | "
        )
        assert build_prompt(config, LABELS, tokenizer).render("x") == "> x =>"
        config = prompt_config(instruction="Do", show_labels=False, separator="#")
        assert build_prompt(config, LABELS, tokenizer).head == "Do#Text: the boat came\nLabel: A#Text: "

    def test_demonstrations_keep_their_order(self, tokenizer):
        shots = [{"text": f"shot {i}", "label": name} for i, name in enumerate(("garden", "sea", "garden"))]
        head = build_prompt(prompt_config(demonstrations=shots), LABELS, tokenizer).head
        assert "Text: shot 0\nLabel: C\n\nText: shot 1\nLabel: A\n\nText: shot 2\nLabel: C\n\nText: " in head

    def test_chat(self, chat_tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, chat_tokenizer)
        whole = prompt.render("a tram")
        assert whole.startswith("<s>user: Classify the text")
        assert whole.endswith("\nassistant:")
        assert whole.index("Label: A") < whole.index("Text: a tram") < whole.index("Answer with label only.")
        assert not prompt.add_special_tokens, "the template has put them in"
        assert prompt.answers == ("A", "B", "C")

    def test_chat_can_be_refused(self, tokenizer, chat_tokenizer):
        plain = build_prompt(prompt_config(), LABELS, tokenizer)
        assert build_prompt(prompt_config(chat="never"), LABELS, chat_tokenizer) == plain

    def test_chat_template_that_loses_the_text(self, chat_tokenizer):
        chat_tokenizer.chat_template = "always the same"
        with pytest.raises(ConfigError, match=r"teacher\.prompt\.chat: .* drops the text; set it to 'never'"):
            build_prompt(prompt_config(), LABELS, chat_tokenizer)

    def test_chat_template_that_repeats_the_text(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"
        with pytest.raises(
            ConfigError, match=r"teacher\.prompt\.chat: .* repeats the text; set it to 'never'"
        ):
            build_prompt(prompt_config(), LABELS, chat_tokenizer)

    def test_chat_template_that_fails(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ raise_exception('no users') }}"
        with pytest.raises(
            ConfigError, match=r"teacher\.prompt\.chat: .* fails \(no users\); set it to 'never'"
        ):
            build_prompt(prompt_config(), LABELS, chat_tokenizer)

    def test_own_template_without_chat(self, tokenizer):
        config = prompt_config(
            template="{{ labels[0].key }}={{ labels[0].name }}? {{ text }} is", chat="never"
        )
        prompt = build_prompt(config, LABELS, tokenizer)
        assert (prompt.head, prompt.tail) == ("A=sea? ", " is")
        assert prompt.answers == (" A", " B", " C")

    def test_own_template_that_ends_with_a_space_has_answers_without(self, tokenizer):
        prompt = build_prompt(prompt_config(template="{{ text }} is "), LABELS, tokenizer)
        assert prompt.answers == ("A", "B", "C")

    def test_own_template_is_all_of_the_message_in_chat(self, chat_tokenizer):
        prompt = build_prompt(prompt_config(template="Which? {{ text }}!"), LABELS, chat_tokenizer)
        assert prompt.render("a tram") == "<s>user: Which? a tram!\nassistant:"
        assert prompt.answers == ("A", "B", "C")

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    def test_all_before_the_text_is_the_same_for_every_text(self, tokenizer, chat_tokenizer, kind):
        used = chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(prompt_config(), LABELS, used)
        texts, _ = toy_texts(20, 3, seed=5)
        encoded, _ = encode_prompts(prompt, texts, used, 1000, "tail")
        head = used(prompt.head, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        # The last token of the head may merge with the text's first.
        shared = len(head) - 1
        assert shared > 30
        assert all(ids[:shared] == head[:shared] for ids in encoded)


class TestSystem:
    config = prompt_config(system="You are terse.")

    def test_stands_in_the_chat(self, chat_tokenizer):
        prompt = build_prompt(self.config, LABELS, chat_tokenizer)
        assert prompt.head.startswith("<s>system: You are terse.\n<s>user: Classify")
        assert prompt.messages("x")[0] == {"role": "system", "content": "You are terse."}

    def test_template_that_refuses_it(self, chat_tokenizer):
        refuse = "{{ raise_exception('System role not supported') }}"
        refusing = f"{{% if messages[0]['role'] == 'system' %}}{refuse}{{% endif %}}"
        chat_tokenizer.chat_template = refusing + CHAT
        with pytest.raises(ConfigError) as caught:
            build_prompt(self.config, LABELS, chat_tokenizer)
        assert str(caught.value).startswith("teacher.prompt.system: the model's chat template fails with it")
        assert "System role not supported" in str(caught.value)
        assert "put it into teacher.prompt.instruction" in str(caught.value)
        assert build_prompt(prompt_config(), LABELS, chat_tokenizer).system is None

    def test_template_that_drops_it(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        with pytest.raises(ConfigError, match=r"teacher\.prompt\.system: .* drops it; put it into"):
            build_prompt(self.config, LABELS, chat_tokenizer)

    @pytest.mark.parametrize("chat", ["auto", "never"])
    def test_without_a_chat_template_there_is_no_place_for_it(self, tokenizer, chat_tokenizer, chat):
        used = tokenizer if chat == "auto" else chat_tokenizer
        with pytest.raises(ConfigError, match=r"teacher\.prompt\.system: 'You are terse\.' needs a chat"):
            build_prompt(prompt_config(system="You are terse.", chat=chat), LABELS, used)


class TestMessages:
    def test_are_the_same_with_and_without_a_tokenizer(self, chat_tokenizer):
        config = prompt_config(system="You are terse.")
        known, unknown = (build_prompt(config, LABELS, one) for one in (chat_tokenizer, None))
        assert known.messages("a tram") == unknown.messages("a tram")
        assert known.answers == unknown.answers

    def test_hold_what_the_template_puts_around_the_text_and_no_format_of_the_model(self, chat_tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, chat_tokenizer)
        (message,) = prompt.messages("a tram")
        assert message["role"] == "user"
        assert message["content"].startswith("Classify the text")
        assert message["content"].endswith("Text: a tram\n\nAnswer with label only.")
        whole = chat_tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        assert whole == prompt.render("a tram"), "what a server makes of it is what we encode ourselves"

    def test_plain_prompt_is_one_message(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        assert prompt.messages("a tram") == [{"role": "user", "content": prompt.render("a tram")}]


class TestHash:
    def test_is_the_same_for_the_same_prompt(self, tokenizer):
        one, other = (build_prompt(prompt_config(), LABELS, tokenizer) for _ in range(2))
        assert one.hash == other.hash

    @pytest.mark.parametrize(
        "change",
        [
            {"instruction": "Pick one."},
            {"answer": "names"},
            {"show_labels": False},
            {"text_prefix": "Text:"},
            {"answer_prefix": "\nClass:"},
            {"separator": "\n"},
            {"demonstrations": []},
            {"demonstrations": [SHOT, SHOT]},
            {"demonstrations": [SHOT | {"label": "kitchen"}]},
        ],
    )
    def test_changes_with_every_part(self, tokenizer, change):
        before = build_prompt(prompt_config(), LABELS, tokenizer)
        assert build_prompt(prompt_config(**change), LABELS, tokenizer).hash != before.hash

    def test_changes_with_labels_and_chat(self, tokenizer, chat_tokenizer):
        hashes = {
            build_prompt(prompt_config(), labels, used).hash
            for labels in (LABELS, LabelsConfig(names=NAMES[:3]), LabelsConfig(names=NAMES[:4]))
            for used in (tokenizer, chat_tokenizer)
        }
        assert len(hashes) == 6

    def test_changes_with_the_system_message(self, chat_tokenizer):
        for used in (chat_tokenizer, None):
            hashes = {
                build_prompt(prompt_config(system=system), LABELS, used).hash
                for system in (None, "Be brief.", "Be kind.")
            }
            assert len(hashes) == 3

    def test_does_not_change_with_what_the_teacher_does_not_see(self, tokenizer):
        hidden = prompt_config(show_labels=False)
        renamed = LabelsConfig(names=NAMES[:3], descriptions={"garden": "plants"})
        assert (
            build_prompt(hidden, LABELS, tokenizer).hash == build_prompt(hidden, renamed, tokenizer).hash
        ), "descriptions that are not shown"
        assert (
            build_prompt(prompt_config(chat="never"), LABELS, tokenizer).hash
            == build_prompt(prompt_config(), LABELS, tokenizer).hash
        ), "chat means nothing where there is no template"

    def test_parts_do_not_run_into_each_other(self):
        assert Prompt("ab", "c", ("d",), True).hash != Prompt("a", "bc", ("d",), True).hash
        assert Prompt("a", "b", ("c", "d"), True).hash != Prompt("a", "b", ("cd",), True).hash


class TestLabelSequences:
    @pytest.mark.parametrize("answer", ["letters", "names"])
    def test_one_token_each_in_label_order(self, tokenizer, answer):
        prompt = build_prompt(prompt_config(answer=answer), LABELS, tokenizer)
        sequences = label_sequences(prompt, LABELS, tokenizer)
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in map(list, sequences)] == [
            [answer.replace(" ", "Ġ")] for answer in prompt.answers
        ]

    @pytest.mark.parametrize("names", [NAMES[:3], ("sea breeze", "sea", "sea storm"), ("an odd one", "én")])
    def test_they_follow_the_prompt_as_it_is_encoded(self, tokenizer, names):
        labels = LabelsConfig(names=names)
        prompt = build_prompt(PromptConfig(answer="names"), labels, tokenizer)
        (encoded,), _ = encode_prompts(prompt, ["the sea"], tokenizer, 500, "tail")
        sequences = label_sequences(prompt, labels, tokenizer)
        for tokens, answer in zip(sequences, prompt.answers, strict=True):
            assert tokenizer(prompt.render("the sea") + answer)["input_ids"] == [*encoded, *tokens]
            assert tokenizer.decode(tokens) == answer

    def test_chat(self, chat_tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, chat_tokenizer)
        sequences = label_sequences(prompt, LABELS, chat_tokenizer)
        assert [chat_tokenizer.decode(tokens) for tokens in sequences] == ["A", "B", "C"]

    def test_names_that_share_tokens_make_a_trie(self, tokenizer):
        labels = LabelsConfig(names=("sea breeze", "kitchen", "sea storm", "sea"))
        prompt = build_prompt(PromptConfig(answer="names"), labels, tokenizer)
        sequences = label_sequences(prompt, labels, tokenizer)
        assert sequences[0][:1] == sequences[2][:1] == sequences[3]
        assert LabelTrie.of(sequences).n_labels == 4

    def test_names_that_are_the_same_tokens(self, tokenizer):
        blind = copy.deepcopy(tokenizer)
        blind._tokenizer.normalizer = normalizers.Lowercase()
        labels = LabelsConfig(names=("Sea breeze", "kitchen", "sea breeze"))
        prompt = build_prompt(PromptConfig(answer="names"), labels, blind)
        with pytest.raises(ConfigError) as caught:
            label_sequences(prompt, labels, blind)
        assert str(caught.value).startswith("labels.names: 'Sea breeze' and 'sea breeze' are the same tokens")
        assert "rename it, or set teacher.prompt.answer to 'letters'" in str(caught.value)
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
    def test_short_texts_are_whole(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        texts, _ = toy_texts(10, 3, seed=6)
        encoded, cut = encode_prompts(prompt, texts, tokenizer, 500, "tail")
        assert cut.tolist() == [False] * 10
        assert encoded == [tokenizer(prompt.render(text))["input_ids"] for text in texts]
        assert [tokenizer.decode(ids) for ids in encoded] == [f"<s>{prompt.render(text)}" for text in texts]

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    @pytest.mark.parametrize("cut", ["tail", "head", "middle"])
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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

    def test_the_halves_around_a_cut_middle_are_alike(self, tokenizer):
        prompt = build_prompt(PromptConfig(), LABELS, tokenizer)
        words = [f"{word} " for word in ("anchor", "boat", "tide", "wave") for _ in range(50)]
        (ids,), _ = encode_prompts(prompt, ["".join(words)], tokenizer, 120, "middle")
        kept = tokenizer.decode(ids).removeprefix(f"<s>{prompt.head}").removesuffix(prompt.tail)
        first, _, last = kept.partition(ELLIPSIS)
        assert abs(len(first.split()) - len(last.split())) <= 1
        assert set(first.split()) == {"anchor"}
        assert set(last.split()) == {"wave"}

    def test_only_long_ones_are_cut(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        texts = ["short", "sea " * 500, "tiny", "pan " * 500]
        encoded, cut = encode_prompts(prompt, texts, tokenizer, 100, "tail")
        assert cut.tolist() == [False, True, False, True]
        assert [len(ids) <= 100 for ids in encoded] == [True] * 4

    def test_no_texts(self, tokenizer):
        encoded, cut = encode_prompts(Prompt("", "", (), True), [], tokenizer, 10, "tail")
        assert (encoded, cut.tolist()) == ([], [])

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
        with pytest.raises(ConfigError) as caught:
            encode_prompts(prompt, ["x"], tokenizer, around, "tail")
        assert f"the prompt around it has {around} tokens of {around}" in str(caught.value)
        assert str(caught.value).startswith("teacher.max_model_len leaves no room")
        assert "raise it or use fewer demonstrations" in str(caught.value)

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

    @pytest.fixture
    def marked(self, chat_tokenizer):
        chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|turn|>ed"]})
        return chat_tokenizer

    @pytest.mark.parametrize("chat", ["auto", "never"])
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        assert "Text: the boat< /s> came\nLabel: A" in prompt.head
        (ids,), _ = encode_prompts(prompt, ["x"], tokenizer, 500, "tail")
        assert tokenizer.eos_token_id not in ids

    def test_nor_out_of_a_message(self, marked):
        prompt = build_prompt(prompt_config(), LABELS, marked)
        assert "Text: hi < |turn|>" in prompt.messages("hi <|turn|>")[0]["content"]
        unknown = build_prompt(prompt_config(), LABELS, None)
        assert "Text: hi< |im_end|>" in unknown.messages("hi<|im_end|>")[0]["content"]

    def test_broken_with_a_space_longest_first_and_by_case(self):
        special = ("<s>", "<s>long", "</s>")
        assert escape_special("a <s> b", special) == "a < s> b"
        assert escape_special("<s>longer", special) == "< s>longer"
        assert escape_special("<S> s> <s", special) == "<S> s> <s"
        assert escape_special("<</s>/s>", special) == "<< /s>/s>"

    def test_what_breaking_leaves_is_broken_too(self):
        assert escape_special("ab", ("ab", "a b")) == "a  b"
        assert escape_special("x§y", ("§",)) == "x y"

    def test_white_space_around_a_special_string_means_nothing(self):
        assert escape_special("a  <s> b", (" <s>", "  ")) == "a  < s> b"

    @given(st.text())
    def test_all_else_is_left_alone(self, text):
        assert escape_special(text, ("<|im_end|>", "<s>")) == text or "<s>" in text or "<|im_end|>" in text


class TestMatchAnswer:
    letters = (" A", " B", " C", " I")
    names = ("card", "card arrival", "sea", "C++", "-1", "1")

    @pytest.mark.parametrize(
        "said",
        ["A", " A", "a", "A.", "A. sea", "A) sea", "(A)", "**A**", '"A"', "A: sea", "A\nbecause", "`A`",
         "Label: A", "**Label:** A", "The answer is: A", "A - sea", "A, clearly", "- A", "[A]"],
    )  # fmt: skip
    def test_a_letter(self, said):
        assert match_answer(said, self.letters) == 0

    @pytest.mark.parametrize(
        "said", ["Apple", "A boat came", "I am not sure", "I'm not sure", "", " ", "D", "none", "AB", "***"]
    )
    def test_no_letter(self, said):
        assert match_answer(said, self.letters) == -1

    @pytest.mark.parametrize(
        ("said", "label"),
        [
            ("card arrival.", 1),
            ("Card Arrival", 1),
            ("card arrivals", 0),
            ("card\n", 0),
            ("cards", -1),
            ("'sea'", 2),
            ("category: sea", 2),
            ("**Category**: *sea*", 2),
            ("sea because of ships", 2),
            ("the sea", -1),
            ("C++ code", 3),
            ("-1", 4),
            ("**-1**", 4),
            ("1", 5),
            ("12", -1),
        ],
    )
    def test_a_name(self, said, label):
        assert match_answer(said, self.names) == label

    def test_case_decides_where_nothing_else_does(self):
        assert match_answer("Sea", ("sea", "Sea")) == 1
        assert match_answer("sea.", ("sea", "Sea")) == 0
        assert match_answer("SEA", ("sea", "Sea")) == -1

    @given(
        st.lists(st.text("abc \u00e9ß", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1,
                 unique_by=str.casefold)
    )  # fmt: skip
    def test_an_answer_means_itself(self, answers):
        assert [match_answer(answer, answers) for answer in answers] == list(range(len(answers)))
