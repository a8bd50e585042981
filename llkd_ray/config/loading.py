"""Reads and writes settings as YAML: files, ``--set a.b=c`` overrides, the resolved config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llkd_ray.config.base import ConfigError, Section, SectionT, anchored, parse, with_absolute_paths
from llkd_ray.config.schema import Config

Overrides = Mapping[str, Any] | Sequence[str]
"""``{"budget.rounds": 3}`` or, as on the command line, ``["budget.rounds=3"]``."""


def resolve(
    kind: type[SectionT], given: SectionT | Mapping[str, Any] | str | Path, overrides: Overrides = ()
) -> SectionT:
    """Settings with overrides and absolute paths, validated once.

    ``given``: validated settings, a dictionary, or the path of a YAML file.
    Raises :class:`ConfigError` with one line per mistake.
    """
    if isinstance(given, kind) and not overrides:
        return with_absolute_paths(given)
    if isinstance(given, str | Path):
        tree: Mapping[str, Any] = load_tree(given, kind)
    else:
        tree = given.model_dump() if isinstance(given, Section) else given
    return with_absolute_paths(parse(kind, apply_overrides(tree, overrides)))


def load_config(path: str | Path, overrides: Overrides = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides (values are YAML) and validate the result.

    Raises :class:`ConfigError` with one line per mistake.
    """
    return parse_config(apply_overrides(load_tree(path, Config), overrides))


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree of settings; raises :class:`ConfigError` with one line per mistake."""
    return parse(Config, tree)


def load_tree(path: str | Path, kind: type[Section]) -> dict[str, Any]:
    """The settings of a YAML file, not validated; relative paths of inputs are relative to the file.

    Raises :class:`ConfigError` if it cannot be read.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds no settings: llkd init writes one")
    return anchored(kind, tree, Path(path).parent)


def dotted(overrides: Overrides) -> list[str]:
    """Overrides in command-line form; strings survive the YAML round trip unchanged."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides)


def apply_overrides(tree: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A copy of ``tree`` with each ``a.b=c`` applied; ``c`` is parsed as YAML, so ``null`` and lists work."""
    result = _copy(tree)
    for override in dotted(overrides):
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise ConfigError(f"--set {override!r}: write it as section.field=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from None
        *parents, leaf = name.split(".")
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
    # Some characters, such as a lone NEL, do not survive a round trip through PyYAML's unicode output.
    return readable if yaml.safe_load(readable) == tree else yaml.safe_dump(tree, sort_keys=False)


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree
