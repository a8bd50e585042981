"""Checkpoints as transformers knows them: what is needed of one without its weights."""

from __future__ import annotations

from typing import Any

from llkd_ray.sections import ConfigError


def load_tokenizer(source: str, revision: str | None, field: str) -> Any:
    """The tokenizer of a checkpoint folder or hub name.

    Raises :class:`ConfigError` where there is none; ``field`` is the setting that named ``source``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{field}: no tokenizer can be loaded from {source!r}; give a checkpoint folder or a hub name "
            f"({first_line})"
        ) from None
    if len(tokenizer) < len(tokenizer.all_special_ids) + 10:
        # For some types, transformers makes an empty tokenizer where there are no files for it.
        raise ConfigError(
            f"{field}: {source!r} has no tokenizer files (its tokenizer knows {len(tokenizer)} tokens); save "
            "the tokenizer beside the weights"
        )
    return tokenizer
