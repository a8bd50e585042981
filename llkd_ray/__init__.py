"""llkd-ray: turn an LLM into a small classifier of your own, on Ray. See README.md."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llkd_ray.api import compare, distill, predict, resume

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "distill", "predict", "resume"]

# Read when ray is imported. A thread that calls Ray after the driver has shut it down must fail: by default
# the call connects anew, in the middle of the shutdown, and that has ended a driver before it said why.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def __getattr__(name: str) -> Any:
    """The functions of :mod:`llkd_ray.api`, imported when one is asked for: that takes Ray and torch."""
    if name in __all__:
        from llkd_ray import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
