"""What is said of a checkpoint that has no tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from llkd_ray.config.base import ConfigError
from llkd_ray.storage.checkpoints import load_tokenizer


def test_a_folder(tiny_llm):
    tokenizer = load_tokenizer(tiny_llm, None, "teacher.model")
    text = "the captain left the harbour"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("field", ["teacher.model", "teacher.cascade.small.server.tokenizer"])
def test_one_that_is_not_there(tmp_path, field):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / "nowhere"), None, field)
    message = str(caught.value)
    assert message.startswith(f"{field}: no tokenizer can be loaded from '{tmp_path}/nowhere'")
    assert "give a checkpoint folder or a hub name" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_one_without_tokenizer_files(tmp_path, kind):
    # For some types, transformers makes an empty tokenizer, without a word.
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^teacher\.model: "):
        load_tokenizer(str(tmp_path), None, "teacher.model")
