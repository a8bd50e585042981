"""Settings from and to YAML: files, ``--set a.b=c`` overrides, absolute paths, the resolved config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config


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


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree of settings; raises :class:`ConfigError` with one line per mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A setting of several types is refused once for each of them; that is one mistake.
        said: dict[str, list[str]] = {}
        for problem in error.errors():
            said.setdefault(_field(problem["loc"]), []).append(_explain(problem))
        raise ConfigError("\n".join(f"{field}: {'; '.join(why)}" for field, why in said.items())) from None


def _field(loc: Sequence[Any]) -> str:
    """The setting's dotted name, without the names of types that pydantic puts behind it."""
    types = re.compile(r"int|(constrained-)?float|str|bool|tuple\[.*\]|literal\[.*\]")
    return ".".join(str(part) for part in loc if not types.fullmatch(str(part))) or "config"


def _explain(problem: Any) -> str:
    """What one pydantic error says of a field: value and remedy."""
    match problem["type"]:
        case "extra_forbidden":
            parent = problem["loc"][:-1]
            return f"unknown setting; known here: {', '.join(_known_fields(parent))}"
        case "missing":
            return "missing; it has no default, so set it"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            return f"{problem['input']!r} is refused: {problem['msg']}"


def _known_fields(loc: Sequence[Any]) -> list[str]:
    """The field names of the section at ``loc``, as far as the tree of models tells."""
    section: type[BaseModel] = Config
    for part in loc:
        if not isinstance(part, str) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return sorted(section.model_fields)


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: the workers of a cluster run from another directory than the driver."""
    tree = config.model_dump()
    cascade = tree["teacher"]["cascade"] or {}
    teachers = [tree["teacher"], *(cascade[name] for name in ("small", "large") if cascade)]
    sources = [tree["corpus"], tree["test"]]
    for teacher in teachers:
        sources += [teacher["recorded"], teacher["prompt"]["draw"]]
        if teacher["cache"] not in (None, "auto"):
            teacher["cache"] = absolute(teacher["cache"])
        template = teacher["prompt"]["template"]
        if template and template.endswith(".j2"):
            teacher["prompt"]["template"] = absolute(template)
        if teacher["server"]:
            _make_folder_absolute(teacher["server"], "tokenizer")
    for source in filter(None, sources):
        uris = source["uri"]
        source["uri"] = absolute(uris) if isinstance(uris, str) else tuple(map(absolute, uris))
    for part in (*teachers, tree["student"]):
        _make_folder_absolute(part, "model")
    tree["run"]["dir"] = local_dir(tree["run"]["dir"])
    return parse_config(tree)


def _make_folder_absolute(section: dict[str, Any], field: str) -> None:
    """A checkpoint's folder; a hub's name stays."""
    if section[field]:
        section[field] = absolute_folder(section[field])


def absolute_folder(model: str) -> str:
    """A checkpoint's folder by its whole path; a hub's name stays as it is."""
    return absolute(model) if Path(model).expanduser().is_dir() else model


def absolute(uri: str) -> str:
    """A local path from the root on; a URI stays as it is."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def local_dir(folder: str) -> str:
    """Where a relative folder for results is.

    In a job that was submitted to a cluster the working directory is a copy that Ray deletes, so results
    go below the home directory there.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return absolute(folder)
    in_job = "working_dir_files" in Path.cwd().parts
    return str((Path.home() / "llkd-ray" if in_job else Path.cwd()) / folder)
