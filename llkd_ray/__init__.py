"""llkd-ray: turn an LLM into a small classifier of your own, on Ray. See README.md."""

import os

__version__ = "0.1.0"

# Read when ray is imported. A thread that calls Ray after the driver has shut it down must fail: by default
# the call connects anew, in the middle of the shutdown, and that has ended a driver before it said why.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
