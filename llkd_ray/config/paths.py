"""Local paths in settings, made absolute: workers of a cluster run from another directory than the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llkd_ray.config.base import Section, SectionT


def absolute(uri: str) -> str:
    """A local path from the root on; a URI stays as it is."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def absolute_folder(model: str) -> str:
    """A checkpoint's folder by its whole path; a hub's name stays as it is."""
    return absolute(model) if Path(model).expanduser().is_dir() else model


def local_dir(folder: str) -> str:
    """Where a relative folder for results is.

    In a job that was submitted to a cluster the working directory is a copy that Ray deletes, so results
    go below the home directory there.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return absolute(folder)
    in_job = "working_dir_files" in Path.cwd().parts
    return str((Path.home() / "llkd-ray" if in_job else Path.cwd()) / folder)


@dataclass(frozen=True)
class Resolve:
    """Marks a setting that may hold a local path, with the function that makes it absolute."""

    by: Callable[[str], str]


DataUri = Annotated[str, Resolve(absolute)]
DataUris = Annotated[str | tuple[str, ...], Resolve(absolute)]
Model = Annotated[str, Resolve(absolute_folder)]
"""A checkpoint's folder or a hub's name."""
OptionalModel = Annotated[str | None, Resolve(absolute_folder)]
ResultDir = Annotated[str, Resolve(local_dir)]
Template = Annotated[str | None, Resolve(lambda text: absolute(text) if text.endswith(".j2") else text)]
Cache = Annotated[str | None, Resolve(lambda folder: folder if folder == "auto" else absolute(folder))]


def with_absolute_paths(section: SectionT) -> SectionT:
    """The settings with every marked path absolute; nothing else changes, so nothing is checked again."""
    changes = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, Resolve) and value is not None:
                value = mark.by(value) if isinstance(value, str) else tuple(map(mark.by, value))
        changes[name] = with_absolute_paths(value) if isinstance(value, Section) else value
    return section.model_copy(update=changes)
