"""Doctor: checks whether the set-up is ready for a run, and says how to fix each problem.

Nothing expensive starts: no engine, no weights, no Ray instance of our own. Each check imports its own
dependencies, so that a broken installation can still be checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llkd_ray.config.base import ConfigError, local_dir, with_absolute_paths
from llkd_ray.config.loading import apply_overrides, load_tree, parse_config
from llkd_ray.config.schema import Config
from llkd_ray.doctor.cluster import View, cluster_address, cluster_checks, query_once
from llkd_ray.doctor.findings import Check, Finding, describe_error, ok, problem
from llkd_ray.doctor.inputs import data_checks, storage_checks, student_check, teacher_checks
from llkd_ray.doctor.machine import machine_checks


def load(path: str | None, overrides: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The config as a run would resolve it, and findings about it; None if it is invalid."""
    try:
        if path is None:
            config = parse_config(apply_overrides(_quickstart_settings(), overrides))
            said = "none is given: the set-up is checked for the quickstart"
        else:
            config = parse_config(apply_overrides(load_tree(path, Config), overrides))
            said = f"{path} is sound"
        return with_absolute_paths(config), [ok("config", said)]
    except ConfigError as error:
        return None, [problem("config", line) for line in str(error).splitlines()]
    except Exception as error:  # a failed import; the package check names the cause
        return None, [problem("config", f"cannot be read ({describe_error(error)})", "make setup")]


def _quickstart_settings() -> dict[str, object]:
    from llkd_ray.quickstart.teacher import settings

    return settings(Path(local_dir("runs")) / "quickstart-data", seed=0)


def all_checks(
    config: Config | None, *, inputs: bool, query: Callable[[], View] | None = None
) -> list[Check]:
    """All checks, in order; with ``inputs``, also of corpus, test set and teacher."""
    query = query or query_once(config)
    joins = cluster_address(config, os.environ)[0] is not None
    needs_vllm = config is not None and any(one.kind == "vllm" for _, one in config.teacher.members())
    checks = machine_checks(config, lambda: query().nodes, needs_vllm=needs_vllm, joins=joins)
    checks += cluster_checks(config, query)
    if config is None:
        return checks
    policies = Check("policies", partial(check_policy_names, config))
    checks += [*storage_checks(config), policies, student_check(config)]
    return checks + data_checks(config) + teacher_checks(config) if inputs else checks


def check_policy_names(config: Config) -> Finding:
    from llkd_ray.run.loop import check_policies

    check_policies(config)
    return ok("policies", f"{config.selection.policy} selects, {config.acquisition.policy} acquires")
