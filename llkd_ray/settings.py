"""Settings from and to YAML: files, ``--set a.b=c`` overrides, and the resolved configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llkd_ray.config import Config, ConfigError, parse_config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides (values are YAML) and check the whole.

    Raises :class:`ConfigError` with one line per mistake.
    """
    return parse_config(apply_overrides(load_tree(path), overrides))


def load_tree(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, unchecked; raises :class:`ConfigError` where it cannot be read."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds no settings: see configs/ for examples")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with each ``a.b=c`` set; ``c`` is read as YAML, so ``null`` and lists work."""
    result = _copy(tree)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ConfigError(f"--set {override!r}: write it as section.field=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from None
        *parents, leaf = dotted.split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
            node = child
        node[leaf] = value
    return result


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; :func:`load_config` reads it back unchanged."""
    tree = config.model_dump(mode="json")
    readable = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # Some characters (a lone NEL, for one) do not come back from PyYAML's readable form.
    return readable if yaml.safe_load(readable) == tree else yaml.safe_dump(tree, sort_keys=False)


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree
