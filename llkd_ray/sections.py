"""What all sections of the configuration share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake in the configuration; the message names field, value and remedy."""


class Section(BaseModel):
    """A frozen part of the tree that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
