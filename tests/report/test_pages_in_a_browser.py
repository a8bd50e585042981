"""The pages in a real browser: offline, without console messages, on any screen, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparison_results import make_tables, two_seeds
from report_runs import WARM, add_teacher, enrich, make_run

from llkd_ray.comparison.report import PAGE, write_comparison
from llkd_ray.report.pages import write_report
from llkd_ray.storage.run_dir import REPORT, RunStore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
PAGE_BYTES = 1_500_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Its sandbox needs rights that containers lack; the pages are our own.
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A finished run, an unfinished one, one of many classes, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    labels = tuple(f"a_very_long_name_of_an_intent_{number:02d}" for number in range(77))
    stores = {
        "run": enrich(make_run(folder / "run")),
        "unfinished": make_run(folder / "unfinished" / "run", rounds=3, finished=False),
        "many": enrich(make_run(folder / "many" / "run", labels=labels), labels, sure=0.99999),
    }
    add_teacher(stores["run"], calibrator=WARM)
    for store in stores.values():
        write_report(store)
    files = {name: Path(store.path(REPORT)) for name, store in stores.items()}
    comparison = RunStore(str(folder / "comparison"))
    write_comparison(comparison, make_tables(two_seeds()), two_seeds(), settings="a: b", missing=0, trials=4)
    return files | {"comparison": Path(comparison.path(PAGE))}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", ["run", "unfinished", "many", "comparison"])
def test_page_is_quiet_offline_and_fits_the_screen(browser, pages, name, width, scheme):
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert pages[name].stat().st_size < PAGE_BYTES
    assert said == []
    assert asked == [pages[name].as_uri()]
    # With everything unfolded, too, only what scrolls by itself may be wider than the screen.
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in page.locator("figure svg").all():
        assert figure.get_attribute("aria-label")
        box = figure.bounding_box()
        assert 0 < box["width"] <= width
    assert contrast(page, "body", "body") >= 7
    assert contrast(page, ".soft", "body") >= 4.5
    assert contrast(page, ".card", ".card") >= 7
    context.close()


def contrast(page: Any, text: str, ground: str) -> float:
    """WCAG's contrast ratio between the colour of one element and the background of another."""
    inks = page.evaluate(
        "([text, ground]) => [getComputedStyle(document.querySelector(text)).color,"
        " getComputedStyle(document.querySelector(ground)).backgroundColor]",
        [text, ground],
    )
    lights = sorted(luminance(ink) for ink in inks)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(ink: str) -> float:
    """Of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in ink.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
