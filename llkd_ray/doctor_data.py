"""Doctor's checks of files: corpus, test set, the place for runs, and the runs that are there."""

from __future__ import annotations

import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llkd_ray.config import Config, ConfigError, SourceConfig
from llkd_ray.doctor_machine import room_on_disk
from llkd_ray.findings import Check, Finding, in_one_line, ok, problem, readable, warning

if TYPE_CHECKING:
    from llkd_ray.store import RunStore

SAMPLE_ROWS = 200
RUNS_SHOWN = 5
RUNS_LOOKED_AT = 200
"""The last by name; an object store answers a few questions for each."""


def data_checks(config: Config) -> list[Check]:
    checks = [Check("corpus", partial(check_source, config, config.corpus, "corpus"))]
    if config.test is not None:
        checks.append(Check("test", partial(check_source, config, config.test, "test")))
    return checks


def storage_checks(config: Config) -> list[Check]:
    return [
        Check("storage", partial(check_storage, config.run.dir)),
        Check("disk", partial(check_disk, config)),
        Check("runs", partial(check_runs, config)),
    ]


# --- what is read


def check_source(config: Config, source: SourceConfig, field: str) -> Finding:
    """What ``--plan`` finds: the files, their columns, and a sample of rows; of gold, what is known."""
    from llkd_ray.plan import look_at

    lines: list[str] = []
    part = look_at(config, source, field, SAMPLE_ROWS, lines.append)
    sample = part.sample
    found = "; ".join(line.removeprefix(f"{field}: ") for line in lines)
    if source.gold is not None:
        known = sum(example.gold >= 0 for example in sample.kept)
        found += f"; gold is known of {known} of {len(sample.kept)}"
        if not known:
            return warning(field, found, f"correct {field}.gold, or leave it out")
    # A tenth: more than bad rows usually are, and less than a wrong column or label makes of them.
    if sample.refused.total() > sample.read / 10:
        return warning(
            field,
            found,
            f"see that {field}.text, {field}.gold and labels.names fit; a run quarantines such rows",
        )
    return ok(field, found)


# --- what is written


def check_storage(folder: str) -> Finding:
    """Whether a file can be written where runs go, read again and deleted."""
    from llkd_ray.store import RunStore

    name, content = f".doctor-{uuid.uuid4().hex}", b"written by doctor; may be deleted"
    made = _missing_folders(folder)
    try:
        store = RunStore(folder)
        store.write_bytes(name, content)  # leaves nothing where it fails
        try:
            back = store.read_bytes(name)
        finally:
            store.delete(name)
    except Exception as error:  # pyarrow has many kinds, of which some are ValueErrors
        return problem(
            "storage",
            f"run.dir {folder!r} cannot be used ({in_one_line(error)})",
            "give a folder that you may write to, or an address with the right bucket, endpoint and keys",
        )
    finally:
        for one in made:  # the innermost first; a folder that somebody else uses by now stays
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
    if back != content:
        return problem(
            "storage", f"run.dir {folder!r} does not give back what was written", "use another place"
        )
    return ok("storage", f"run.dir {folder!r}: a file was written, read and deleted")


def _missing_folders(folder: str) -> list[Path]:
    """Those of a local path that are not there yet, the innermost first."""
    if "://" in folder:
        return []
    path = Path(folder).expanduser().resolve()
    return [one for one in (path, *path.parents) if not one.exists()]


def check_disk(config: Config) -> Finding | None:
    """Whether a run's files find room; only a local disk tells."""
    if "://" in config.run.dir:
        return None
    path = Path(config.run.dir).expanduser().resolve()
    place = next(one for one in (path, *path.parents) if one.is_dir())
    corpus, is_known = _bytes_of(config)
    need = room_on_disk(config, corpus)
    usage = shutil.disk_usage(place)
    share = "the corpus twice, the student's weights four times, 1 GiB for the rest"
    unknown = "" if is_known else "; the size of the corpus is unknown"
    takes = f"a run takes about {readable(need)} ({share}){unknown}"
    found = f"run.dir's disk has {readable(usage.free)} free; {takes}"
    remedy = "make room, or set run.dir to another disk or an object store"
    if usage.free < need:
        return problem("disk", found, remedy)
    if usage.free < 2 * need:
        return warning("disk", f"{found}: for no second one", remedy)
    return ok("disk", found)


def _bytes_of(config: Config) -> tuple[int, bool]:
    """Of the files of corpus and test set, as they lie there, and whether that is known."""
    from llkd_ray.sources import expand

    total, is_known = 0, True
    for field, source in (("corpus", config.corpus), ("test", config.test)):
        for uri in () if source is None else source.uris:
            if uri.startswith("hf://"):
                is_known = False
                continue
            try:
                total += sum(unit.size for unit in expand(uri, field))
            except ConfigError:
                is_known = False  # said by the check of the source
    return total, is_known


# --- runs


def check_runs(config: Config) -> Finding:
    """Whether the run's directory is free, and which runs could be gone on with."""
    from llkd_ray.session import require_free
    from llkd_ray.store import CONFIG, RunStore, join_uri

    if config.run.name is None:
        return _unfinished(config)
    run_dir = join_uri(config.run.dir, config.run.name)
    store = RunStore(run_dir)
    if not store.exists(CONFIG):
        return ok("runs", f"run.name {config.run.name!r} is free")
    require_free(store, lambda line: None)  # a ConfigError where a driver is at work there
    if _is_finished(store):
        return problem("runs", f"run.name: {run_dir} holds a finished run", "choose another run.name")
    return problem(
        "runs",
        f"run.name: {run_dir} holds a run that is not finished",
        f"go on with it: python jobs/distill.py --resume {run_dir}; or choose another run.name",
    )


def _unfinished(config: Config) -> Finding:
    from llkd_ray.store import CONFIG, RunStore, join_uri

    names = RunStore(config.run.dir).folders("")[-RUNS_LOOKED_AT:]
    stores = ((name, RunStore(join_uri(config.run.dir, name))) for name in names)
    runs = {name: _is_finished(store) for name, store in stores if store.exists(CONFIG)}
    left = [name for name, is_finished in runs.items() if not is_finished]
    found = f"run.dir holds {len(runs)} run(s)"
    if not left:
        return ok("runs", found)
    more = ", …" if len(left) > RUNS_SHOWN else ""
    return ok(
        "runs",
        f"{found}; not finished: {', '.join(left[-RUNS_SHOWN:])}{more}; where nobody is at work, "
        f"go on by python jobs/distill.py --resume {join_uri(config.run.dir, left[-1])}",
    )


def _is_finished(store: RunStore) -> bool:
    """A run writes its report last of all."""
    from llkd_ray.report import REPORT

    return store.exists(REPORT)
