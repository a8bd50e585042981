"""No check can hurt another: what breaks, hangs or finds several mistakes is told, and the next one comes."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.doctor.findings import Check, Finding, describe_error, format_bytes, ok, run_checks


def raising(error: BaseException) -> Check:
    def look() -> Finding:
        raise error

    return Check("broken", look)


FINE = Check("fine", lambda: ok("fine", "as it should be"))


def test_a_check_that_breaks_stops_no_other():
    checks = [
        FINE,
        raising(KeyError("a\nb")),
        raising(ConfigError("a.b: wrong; mend it\nc.d: wrong, too")),
        Check("empty", lambda: None),
        FINE,
    ]
    fine, broken, first, second, last = run_checks(checks)
    assert [one.state for one in (fine, broken, first, second, last)] == ["ok", *["problem"] * 3, "ok"]
    assert broken.found.startswith("the check itself broke: KeyError")
    assert "\n" not in broken.found
    assert (first.found, second.found) == ("a.b: wrong; mend it", "c.d: wrong, too")


def test_a_check_that_hangs_is_left_alone():
    release = threading.Event()
    hanging = Check("hanging", lambda: ok("hanging", str(release.wait(60))))
    try:
        hung, fine = run_checks([hanging, FINE], limit_s=0.2)
    finally:
        release.set()
    assert (hung.check, hung.state, hung.found) == ("hanging", "problem", "no answer in 0.2 s")
    assert fine.state == "ok"


def test_sizes_are_told_in_what_they_are_large_in():
    assert [format_bytes(size) for size in (3 << 20, 1 << 29, 5 << 40)] == [
        "3.0 MiB",
        "0.5 GiB",
        "5,120.0 GiB",
    ]


@given(st.text(), st.integers(1, 400))
def test_an_error_is_one_line_of_bounded_length(said, most):
    shown = describe_error(ValueError(said), most)
    assert len(shown.splitlines()) == 1
    assert len(shown) <= len("ValueError: ") + most + 1
