"""What Ray sees, as one line of JSON: ``python -m llkd_ray.cluster_view [ADDRESS]``.

A program of its own, because Ray ends the process that it cannot connect for, and only after two minutes:
who asks gives it a time limit. With an address it joins that cluster as a run would; without one it starts
nothing, and says what Ray would find on this machine.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray

from llkd_ray.doctor_cluster import MARK


def view(address: str) -> dict[str, Any]:
    """The cluster's version and the resources of its live nodes, or the error that keeps us out."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **options)
    except Exception as error:
        return {"error": type(error).__name__, "said": " ".join(str(error).split())}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {"version": ray.__version__, "nodes": nodes}


def view_of_this_machine() -> dict[str, Any]:
    """What Ray would count here if it were started."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia
    from ray._private.utils import get_num_cpus

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    gpus = Nvidia.get_current_node_num_accelerators()
    gpus = gpus if visible is None else min(gpus, len(visible))
    node = {"CPU": float(get_num_cpus(override_docker_cpu_warning=True)), "GPU": float(gpus)}
    return {"version": ray.__version__, "nodes": [{name: n for name, n in node.items() if n}]}


if __name__ == "__main__":
    seen = view(sys.argv[1]) if sys.argv[1:] else view_of_this_machine()
    print(MARK + json.dumps(seen), flush=True)
    os._exit(0)  # a driver's ordinary end takes seconds, and has nothing to tidy up
