"""llkd-ray: turn an LLM into a small classifier of your own, on Ray. See README.md."""

__version__ = "0.1.0"
