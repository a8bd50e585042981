"""Makes local paths in settings absolute: cluster workers run in another directory than the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llkd_ray.config.base import Section, SectionT


def absolute(uri: str) -> str:
    """An absolute local path; a URI is returned unchanged."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def absolute_folder(model: str) -> str:
    """The absolute path of a checkpoint folder; a hub name is returned unchanged."""
    return absolute(model) if Path(model).expanduser().is_dir() else model


def local_dir(folder: str) -> str:
    """The absolute path of a results folder.

    In a job submitted to a cluster, the working directory is a copy that Ray deletes, so results are written
    below the home directory there.
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
"""A checkpoint folder or a hub name."""
OptionalModel = Annotated[str | None, Resolve(absolute_folder)]
ResultDir = Annotated[str, Resolve(local_dir)]
Template = Annotated[str | None, Resolve(lambda text: absolute(text) if text.endswith(".j2") else text)]
Cache = Annotated[str | None, Resolve(lambda folder: folder if folder == "auto" else absolute(folder))]


def with_absolute_paths(section: SectionT) -> SectionT:
    """The settings with every marked path absolute; not validated again, as nothing else changes."""
    changes = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, Resolve) and value is not None:
                value = mark.by(value) if isinstance(value, str) else tuple(map(mark.by, value))
        changes[name] = with_absolute_paths(value) if isinstance(value, Section) else value
    return section.model_copy(update=changes)
