"""Checkpoints as transformers knows them: what is needed of one without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llkd_ray.sections import ConfigError

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


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


def size_on_disk(model: str) -> int | None:
    """Bytes of a checkpoint's weights, in a folder or in the hub's cache; None where they are not here.

    One kind of file counts, as some checkpoints hold their weights in several.
    """
    folder = Path(model) if Path(model).is_dir() else _cached_folder(model)
    if folder is None:
        return None
    for pattern in WEIGHTS:
        if size := sum(file.stat().st_size for file in folder.glob(pattern)):
            return size
    return None


def _cached_folder(name: str) -> Path | None:
    """Where the hub's cache has a model's newest files."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None  # a path
    return Path(file).parent if isinstance(file, str) else None
