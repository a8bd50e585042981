"""The teacher reads what it should, and every label has a token of its own."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from toys import NAMES, toy_texts
from transformers import AutoTokenizer

from llkd_ray.config import ConfigError, LabelsConfig, PromptConfig
from llkd_ray.prompts import Prompt, build_prompt, encode_prompts, label_token_ids

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

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    def test_all_before_the_text_is_the_same_for_every_text(self, tokenizer, chat_tokenizer, kind):
        used = chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(prompt_config(), LABELS, used)
        texts, _ = toy_texts(20, 3, seed=5)
        encoded, _ = encode_prompts(prompt, texts, used, 1000)
        head = used(prompt.head, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        # The last token of the head may merge with the text's first.
        shared = len(head) - 1
        assert shared > 30
        assert all(ids[:shared] == head[:shared] for ids in encoded)


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


class TestLabelTokens:
    @pytest.mark.parametrize("answer", ["letters", "names"])
    def test_one_a_label_in_label_order(self, tokenizer, answer):
        prompt = build_prompt(prompt_config(answer=answer), LABELS, tokenizer)
        ids = label_token_ids(prompt, LABELS, tokenizer)
        assert tokenizer.convert_ids_to_tokens(ids) == [answer.replace(" ", "Ġ") for answer in prompt.answers]

    def test_they_follow_the_prompt_as_it_is_encoded(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        (encoded,), _ = encode_prompts(prompt, ["the sea"], tokenizer, 500)
        for token, answer in zip(label_token_ids(prompt, LABELS, tokenizer), prompt.answers, strict=True):
            assert tokenizer(prompt.render("the sea") + answer)["input_ids"] == [*encoded, token]

    def test_chat(self, chat_tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, chat_tokenizer)
        ids = label_token_ids(prompt, LABELS, chat_tokenizer)
        assert chat_tokenizer.convert_ids_to_tokens(ids) == ["A", "B", "C"]

    def test_of_a_name_of_several_tokens_the_first_counts(self, tokenizer):
        labels = LabelsConfig(names=("sea breeze", "kitchen sink"))
        prompt = build_prompt(PromptConfig(answer="names"), labels, tokenizer)
        assert tokenizer.convert_ids_to_tokens(label_token_ids(prompt, labels, tokenizer)) == [
            "Ġsea",
            "Ġkitchen",
        ]

    def test_colliding_labels(self, tokenizer):
        labels = LabelsConfig(names=("sea breeze", "kitchen", "sea storm"))
        prompt = build_prompt(PromptConfig(answer="names"), labels, tokenizer)
        with pytest.raises(ConfigError) as caught:
            label_token_ids(prompt, labels, tokenizer)
        assert "labels.names: 'sea breeze' and 'sea storm' begin with the same token" in str(caught.value)
        assert "rename one of them, or set teacher.prompt.answer to 'letters'" in str(caught.value)
        letters = build_prompt(PromptConfig(), labels, tokenizer)
        assert len(set(label_token_ids(letters, labels, tokenizer))) == 3

    def test_answer_that_joins_the_prompt(self, tokenizer):
        # " the" and then "y" are one token, " they".
        labels = LabelsConfig(names=("re", "y"))
        prompt = Prompt("", " the", ("re", "y"), add_special_tokens=True)
        with pytest.raises(ConfigError, match=r"joins 're' \(label 're'\) to the prompt before it; change"):
            label_token_ids(prompt, labels, tokenizer)

    def test_tokenizer_that_puts_an_end_mark_behind_every_text(self, tokenizer):
        ending = copy.deepcopy(tokenizer)
        ending._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        assert label_token_ids(prompt, LABELS, ending) == label_token_ids(prompt, LABELS, tokenizer)
        for limit in (500, 80):
            texts = ["the sea", "anchor " * 100]
            assert encode_prompts(prompt, texts, ending, limit) == encode_prompts(
                prompt, texts, tokenizer, limit
            )


class TestEncode:
    def test_short_texts_are_whole(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        texts, _ = toy_texts(10, 3, seed=6)
        encoded, cut = encode_prompts(prompt, texts, tokenizer, 500)
        assert cut == 0
        assert [tokenizer.decode(ids) for ids in encoded] == [f"<s>{prompt.render(text)}" for text in texts]

    @pytest.mark.parametrize("kind", ["plain", "chat"])
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        text=st.text(min_size=60, max_size=400) | st.sampled_from(["the sea " * 90, "é" * 300, "\n" * 300]),
        spare=st.integers(1, 50),
    )
    def test_long_text_is_cut_at_its_end_and_nothing_else(self, tokenizer, chat_tokenizer, kind, text, spare):
        used = chat_tokenizer if kind == "chat" else tokenizer
        prompt = build_prompt(prompt_config(), LABELS, used)
        around = len(used(prompt.render(""), add_special_tokens=prompt.add_special_tokens)["input_ids"])
        limit = around + spare
        (ids,), cut = encode_prompts(prompt, [text], used, limit)
        assert len(ids) <= limit
        said = used.decode(ids).removeprefix("<s>")
        head, tail = prompt.head.removeprefix("<s>"), prompt.tail
        assert said.startswith(head)
        assert said.endswith(tail)
        kept = said[len(head) : len(said) - len(tail)]
        if cut:
            # A cut can go through a character of several bytes; all before it is the text's own.
            assert text.startswith(kept.rstrip("\ufffd"))
            assert len(ids) >= limit - 4, "little room is wasted"
        else:
            assert kept == text

    def test_only_long_ones_are_counted(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        encoded, cut = encode_prompts(prompt, ["short", "sea " * 500, "tiny", "pan " * 500], tokenizer, 100)
        assert cut == 2
        assert [len(ids) <= 100 for ids in encoded] == [True] * 4

    def test_no_room_for_a_text(self, tokenizer):
        prompt = build_prompt(prompt_config(), LABELS, tokenizer)
        around = len(tokenizer(prompt.render(""))["input_ids"])
        with pytest.raises(ConfigError) as caught:
            encode_prompts(prompt, ["x"], tokenizer, around)
        assert f"the prompt around it has {around} tokens of {around}" in str(caught.value)
        assert str(caught.value).startswith("teacher.max_model_len leaves no room")
        assert "raise it or use fewer demonstrations" in str(caught.value)

    def test_text_that_is_short_alone_and_long_in_the_prompt(self, tokenizer):
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

        (ids,), cut = encode_prompts(Prompt("<", ">", (), True), ["ab"], Growing(), 5)
        assert cut == 1
        assert len(ids) <= 5
