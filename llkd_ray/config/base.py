"""What all sections of the configuration share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake in the configuration; the message names field, value and remedy."""


class Section(BaseModel):
    """A frozen part of the tree that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def ends(number: int | tuple[int, int]) -> tuple[int, int]:
    """Least and most of a pool that is given as a number or as (min, max); raises ValueError."""
    low, high = (number, number) if isinstance(number, int) else number
    if not 1 <= low <= high:
        raise ValueError(f"is {number}: give a number, at least 1, or (min, max) with 1 <= min <= max")
    return low, high


def member_field(name: str) -> str:
    """Where the settings of a teacher stand that :meth:`TeacherConfig.members` calls so."""
    return "teacher" if name == "teacher" else f"teacher.cascade.{name}"
