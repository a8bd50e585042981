"""Write docs/reference/config.md from the code: every setting with type, default and meaning.

    python scripts/config_reference.py > docs/reference/config.md

A test holds the page to what this prints.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llkd_ray.config.schema import Config

HEAD = """# Every setting

Made from `llkd_ray/config/schema.py` by `scripts/config_reference.py`. In YAML a section is a mapping; on the
command line any setting is `--set section.setting=value`, with the value in YAML. What is unknown or out of
range is refused before anything starts, with the remedy.
"""


BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def main() -> None:
    print("\n".join([HEAD, *sections("", Config, seen=set())]), end="")


def sections(path: str, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """The lines of a section and of those below it; one that stands in several places is told once."""
    seen.add(section)
    below = []
    rows = []
    for name, field in section.model_fields.items():
        inner = inner_section(field.annotation)
        where = f"{path}.{name}".lstrip(".")
        if inner and inner not in seen:
            below.append((where, inner))
        rows.append(f"| `{where}` | {kind(field)} | {default(field)} | {meaning(field, inner)} |")
    if path:
        yield f"## {path}\n"
        yield f"{one_line(section.__doc__ or '')}\n"
    yield "| setting | type | default | |\n|---|---|---|---|"
    yield from rows
    yield ""
    for where, inner in below:
        if inner not in seen:
            yield from sections(where, inner, seen)


def inner_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, also where it may be null or one of many."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := inner_section(one))), None)


def kind(field: FieldInfo) -> str:
    limits = [(sign, getattr(one, name, None)) for one in field.metadata for name, sign in BOUNDS.items()]
    bounds = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return ", ".join([type_name(field.annotation), *bounds])


def type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(one) for one in arguments)
    if origin is tuple:
        inner = [type_name(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}" if len(inner) < len(arguments) else f"({', '.join(inner)})"
    if origin is dict:
        return f"mapping to {type_name(arguments[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", bool: "true or false", int: "whole number", float: "number"}.get(annotation, "any")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    if value is PydanticUndefined:
        assert field.default_factory is not None
        value = field.default_factory()  # type: ignore[call-arg]
        if isinstance(value, BaseModel):
            return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, str):
        return f"`{json.dumps(value)}`" if "\n" in value or not value else f"`{value}`"
    written = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return f"`{written.strip().removesuffix('...').strip()}`"


def meaning(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    said = field.description or (one_line(inner.__doc__ or "") if inner else "")
    return one_line(said).replace("|", "\\|")


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main()
