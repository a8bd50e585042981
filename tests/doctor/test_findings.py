"""No check can hurt another: what breaks, hangs or finds several mistakes is told, and the next one comes."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.doctor.findings import Check, Finding, carry_out, in_one_line, ok, readable


def raising(error: BaseException) -> Check:
    def look() -> Finding:
        raise error

    return Check("broken", look)


FINE = Check("fine", lambda: ok("fine", "as it should be"))


def test_findings_come_in_order():
    second = Check("second", lambda: ok("second", "too"))
    assert [one.check for one in carry_out([FINE, second])] == ["fine", "second"]


def test_a_check_that_breaks_is_a_problem_in_one_line_and_stops_no_other():
    broken, fine = carry_out([raising(KeyError("a\nb")), FINE])
    assert broken.state == "problem"
    assert broken.found.startswith("the check itself broke: KeyError")
    assert "\n" not in broken.found
    assert fine.state == "ok"


def test_every_mistake_of_a_config_is_a_finding_in_its_own_words():
    first, second, fine = carry_out([raising(ConfigError("a.b: wrong; mend it\nc.d: wrong, too")), FINE])
    assert (first.state, first.found) == ("problem", "a.b: wrong; mend it")
    assert second.found == "c.d: wrong, too"
    assert fine.state == "ok"


def test_a_check_that_hangs_is_left_alone():
    release = threading.Event()
    hanging = Check("hanging", lambda: ok("hanging", str(release.wait(60))))
    try:
        hung, fine = carry_out([hanging, FINE], limit_s=0.2)
    finally:
        release.set()
    assert (hung.check, hung.state, hung.found) == ("hanging", "problem", "no answer in 0.2 s")
    assert fine.state == "ok"


def test_nothing_to_look_at_is_no_finding():
    assert list(carry_out([Check("empty", lambda: None)])) == []


def test_sizes_are_told_in_what_they_are_large_in():
    assert [readable(size) for size in (3 << 20, 1 << 29, 5 << 40)] == [
        "3.0 MiB",
        "0.5 GiB",
        "5,120.0 GiB",
    ]


@given(st.text(), st.integers(1, 400))
def test_an_error_is_one_line_of_bounded_length(said, most):
    shown = in_one_line(ValueError(said), most)
    assert len(shown.splitlines()) == 1
    assert len(shown) <= len("ValueError: ") + most + 1
