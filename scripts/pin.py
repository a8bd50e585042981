"""Write constraints.txt from pip's own resolution reports; its first lines say how to call this.

    python scripts/pin.py REPORT.json [REPORT.json …] > constraints.txt

One file serves every kind of machine, so all reports must agree on a version wherever two of them hold
the same package: where they do not, this says so and stops.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = """\
# Exact versions of all that llkd-ray needs, of both engines (gpu, cpu) and of the development tools.
# Used by scripts/setup.py. To renew: take out the lines that may change, or leave out `-c` to renew all,
# and let pip resolve both sets. For the first one pip must not be set to prefer a torch without CUDA
# (see `pip config list`).
#   pip install --dry-run --ignore-installed -c constraints.txt \\
#       --report build/gpu.json '.[gpu,quickstart,onnx,dev]'
#   pip install --dry-run --ignore-installed -c constraints.txt \\
#       --report build/cpu.json '.[cpu,quickstart,onnx,dev]'
#   python scripts/pin.py build/gpu.json build/cpu.json > constraints.txt
# A local version (torch 2.13.0+cpu) satisfies a pin on the public one.
"""


def merge(reports: Sequence[Mapping[str, Any]], own: str = "llkd-ray") -> dict[str, str]:
    """Package → public version over all reports, sorted; ``own`` is left out.

    Raises ValueError where two reports disagree.
    """
    pins: dict[str, str] = {}
    for report in reports:
        for item in report["install"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            version = item["metadata"]["version"].partition("+")[0]
            if pins.setdefault(name, version) != version:
                raise ValueError(
                    f"{name}: one report has {pins[name]}, another {version}. Put the version that suits "
                    "both into constraints.txt (the stricter set's, mostly) and resolve again"
                )
    pins.pop(own, None)
    return dict(sorted(pins.items()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        pins = merge([json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]])
    except ValueError as error:
        sys.exit(f"pin: {error}")
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in pins.items()))
