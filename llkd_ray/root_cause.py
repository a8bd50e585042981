"""Why an engine did not start, from what its processes wrote."""

from __future__ import annotations

import re
from typing import IO


def root_cause(log: IO[bytes] | None) -> str:
    """The first error that a log of nested tracebacks ends in, without its time and place; or nothing."""
    if log is None:
        return ""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").splitlines()
    errors = [found[1] for line in lines if (found := re.search(r"\b(\w*(?:Error|Exception): .+)$", line))]
    if not errors:
        return ""
    quoted = re.search(r"Worker failed with error '(.+)', please check", errors[0])
    return (quoted[1] if quoted else errors[0])[:500]
