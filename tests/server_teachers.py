"""Teachers behind the stub server, and what asks them."""

from __future__ import annotations

import asyncio
from typing import Any

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import Answers, Unlimited
from llkd_ray.teacher.openai.teacher import OpenAITeacher

LABELS = LabelsConfig(names=("sea", "kitchen", "garden"))


KEY_ENV = "STUB_SERVER_KEY"


def teacher_config(base_url: str, server: dict[str, Any] | None = None, **settings: Any) -> TeacherConfig:
    """One sampled answer a text: one request a text, in which the text can be read."""
    simple = {"api_key_env": KEY_ENV, "scores": "votes", "back_off_s": 0.005, "concurrency": 4}
    return TeacherConfig.model_validate(
        {
            "kind": "openai",
            "model": "stub",
            "server": {"base_url": base_url} | simple | (server or {}),
            "confidence": {"samples": 1},
            "timeout_s": 20.0,
        }
        | settings
    )


class Counting(Unlimited):
    """An allowance without an end that counts what is claimed."""

    def __init__(self) -> None:
        self.claims = 0

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        self.claims += 1
        return True


def ask(teacher: OpenAITeacher, *calls: list[str], allowance: Any = None) -> Answers:
    """Label the texts of some calls, one call after the other; gives the last one's answers."""

    async def run() -> Answers:
        for texts in calls:
            ids = [str(i) for i in range(len(texts))]
            answers = await teacher.label(ids, texts, allowance or Unlimited())
        return answers

    try:
        return asyncio.run(run())
    finally:
        teacher.close()


def texts_of(n: int) -> list[str]:
    return [f"text number {i}." for i in range(n)]
