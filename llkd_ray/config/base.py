"""Base of all configuration sections: strict, frozen, one format for all error messages, absolute paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A mistake in the configuration; the message names field, value and remedy."""


class Section(BaseModel):
    """A frozen part of the configuration tree that rejects unknown settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    whole: ClassVar[str] = "config"
    """The field named for an error that concerns no single setting; "" if its message names one."""


SectionT = TypeVar("SectionT", bound=Section)


def parse(section: type[SectionT], tree: Mapping[str, Any]) -> SectionT:
    """Validate plain settings. Raises :class:`ConfigError` with one line per mistake.

    Secrets are a mistake: settings are copied into reports, model cards, trackers and the hub.
    """
    if found := list(_secrets(tree, "")):
        raise ConfigError("\n".join(found))
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        # pydantic reports a union-typed setting once per type; that is a single mistake.
        reasons: dict[str, list[str]] = {}
        for problem in error.errors():
            reasons.setdefault(_field(problem["loc"]) or section.whole, []).append(_reason(section, problem))
        lines = (": ".join(filter(None, (field, "; ".join(why)))) for field, why in reasons.items())
        raise ConfigError("\n".join(lines)) from None


_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:token|secret|password|passwd|credentials?|api_?key|access_?key|secret_?key|private_?key)",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"^(\w[\w+.-]*://)[^/?#@\s]*@")
_SIGNATURE = re.compile(r"[?&]([\w-]*(?:token|secret|signature|password|key|sig))=", re.IGNORECASE)


def check_uri(field: str, uri: str) -> None:
    """Raises :class:`ConfigError` for an address with a password or a key in it; the message has neither."""
    if _USERINFO.match(uri):
        shown = _USERINFO.sub(r"\1", uri).partition("?")[0]
        raise ConfigError(
            f"{field}: a user or key stands in the address {shown!r}; leave it out and set it in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://) on every node"
        )
    if "://" in uri and (found := _SIGNATURE.search(uri)):
        raise ConfigError(
            f"{field}: {found[1]!r} stands in the address {uri.partition('?')[0]!r}; leave it out and set "
            "it in the environment, on every node"
        )


def _secrets(value: Any, field: str) -> Iterator[str]:
    """A message about every secret in plain settings.

    The columns of a ``where`` may have any name, and the texts of a prompt may be about anything.
    """
    if isinstance(value, str):
        try:
            check_uri(field, value)
        except ConfigError as error:
            yield str(error)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            name = f"{field}.{key}" if field else str(key)
            if isinstance(one, str) and _SECRET_KEY.fullmatch(str(key)) and not field.endswith("where"):
                yield f"{name}: settings are not secret; leave it out and set it in every node's environment"
            elif key != "prompt":
                yield from _secrets(one, name)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _secrets(one, field)


def _field(loc: Sequence[Any]) -> str:
    """The setting's dotted name, without the type names that pydantic appends."""
    types = re.compile(r"int|(constrained-)?float|str|bool|tuple\[.*\]|literal\[.*\]")
    return ".".join(str(part) for part in loc if not types.fullmatch(str(part)))


def _reason(section: type[BaseModel], problem: Any) -> str:
    """The message of one pydantic error: value and remedy."""
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown setting; known here: {', '.join(_known_fields(section, problem['loc'][:-1]))}"
        case "missing":
            return "missing; it has no default, so set it"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            return f"{problem['input']!r} is refused: {problem['msg']}"


def _known_fields(section: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The field names of the section at ``loc``, as far as it can be resolved in the model tree."""
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_at(section, part) or section
    return sorted(section.model_fields)


def _section_at(section: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The section that a field holds; None for a plain setting."""
    annotation = section.model_fields[field].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def ends(number: int | tuple[int, int]) -> tuple[int, int]:
    """Minimum and maximum of a pool size given as a number or as (min, max); raises ValueError."""
    low, high = (number, number) if isinstance(number, int) else number
    if not 1 <= low <= high:
        raise ValueError(f"is {number}: give a number, at least 1, or (min, max) with 1 <= min <= max")
    return low, high


def member_field(name: str) -> str:
    """The path of the settings of the teacher that :meth:`TeacherConfig.members` calls ``name``."""
    return "teacher" if name == "teacher" else f"teacher.cascade.{name}"


# --- paths: absolute, because cluster workers run in another directory than the driver

HERE = Path()
"""The working directory."""


def absolute(uri: str, folder: Path = HERE) -> str:
    """The absolute path of a local path below ``folder``; a URI is returned unchanged."""
    return uri if "://" in uri else str((folder / Path(uri).expanduser()).resolve())


def absolute_folder(model: str, folder: Path = HERE) -> str:
    """The absolute path of a checkpoint folder; a hub name is returned unchanged."""
    is_path = model.startswith((".", "/", "~")) or (folder / model).is_dir()
    return absolute(model, folder) if is_path else model


def local_dir(folder: str) -> str:
    """The absolute path of a results folder; a relative one is below the working directory.

    In a job submitted to a cluster, the working directory is a copy that Ray deletes, so results are written
    below the home directory there.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return absolute(folder)
    in_job = "working_dir_files" in Path.cwd().parts
    return str((Path.home() / "llkd-ray" if in_job else Path.cwd()) / folder)


@dataclass(frozen=True)
class Resolve:
    """Marks a setting that may hold a local path, with the function that makes it absolute.

    ``by(value, folder)``: for an input, relative paths are below ``folder``, which is that of the YAML file
    with the setting; results are below the working directory.
    """

    by: Callable[[str, Path], str]


DataUri = Annotated[str, Resolve(absolute)]
DataUris = Annotated[str | tuple[str, ...], Resolve(absolute)]
Model = Annotated[str, Resolve(absolute_folder)]
"""A checkpoint folder or a hub name."""
OptionalModel = Annotated[str | None, Resolve(absolute_folder)]
ResultDir = Annotated[str, Resolve(lambda uri, _: local_dir(uri))]
Template = Annotated[
    str | None, Resolve(lambda text, folder: absolute(text, folder) if text.endswith(".j2") else text)
]
Cache = Annotated[str | None, Resolve(lambda uri, _: uri if uri == "auto" else absolute(uri))]


def with_absolute_paths(section: SectionT) -> SectionT:
    """The settings with every marked path absolute; not validated again, as nothing else changes."""
    changes = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, Resolve) and value is not None:
                value = _resolved(value, mark, HERE)
        changes[name] = with_absolute_paths(value) if isinstance(value, Section) else value
    return section.model_copy(update=changes)


def anchored(section: type[BaseModel], tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain settings of a YAML file in ``folder``, with the paths of inputs made absolute; not validated."""
    changed = dict(tree)
    for name in tree.keys() & section.model_fields.keys():
        value, below = tree[name], _section_at(section, name)
        if below is not None and isinstance(value, Mapping):
            changed[name] = anchored(below, value, folder)
        for mark in section.model_fields[name].metadata:
            if isinstance(mark, Resolve):
                changed[name] = _resolved(value, mark, folder)
    return changed


def _resolved(value: Any, mark: Resolve, folder: Path) -> Any:
    """A setting's value, or each of several, made absolute; what is no string is left to validation."""
    if isinstance(value, str):
        return mark.by(value, folder)
    if isinstance(value, list | tuple):
        return tuple(_resolved(one, mark, folder) for one in value)
    return value
