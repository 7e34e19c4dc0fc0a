"""Hundreds of steps in an explorer, in a real Chromium."""

from __future__ import annotations

import pytest
from browsing import LEFT, MAP, Open, choose, hover, panel, settle
from made_up import saliency
from playwright.sync_api import Page, expect

from stepsal.widgets import Explorer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("explorer-long")]


def press(page: Page, name: str, times: int = 1) -> None:
    for _ in range(times):
        page.get_by_role("button", name=name, exact=True).click()
    settle(page.locator(".stepsal-explorer"))


def test_all_steps_fit_and_are_zoomed_into(open_page: Open) -> None:
    n = 300
    page = open_page(Explorer({"wrong": saliency(n, layers=2)}))
    where, frame, minimap = panel(page), page.locator(".stepsal-frame"), page.locator(".stepsal-minimap")
    scrolls = "e => e.scrollHeight > e.clientHeight || e.scrollWidth > e.clientWidth"
    assert not frame.evaluate(scrolls)
    expect(minimap).to_be_hidden()
    assert hover(where, 200, 60, n).startswith("step 200 (thinking) ← 60 ")
    assert hover(where, 299, 100, n).startswith("step S (summary) ← 100 ")
    press(page, "+", 3)
    assert frame.evaluate(scrolls)
    assert float(frame.get_attribute("data-cell")) == pytest.approx(8 * MAP / n)
    expect(minimap).to_be_visible()
    minimap.click(position={"x": 14, "y": 42})  # a quarter of the columns, three quarters of the rows
    settle(where)
    left, top = frame.evaluate("e => [e.scrollLeft, e.scrollTop]")
    assert (left + MAP / 2) / (8 * MAP) == pytest.approx(0.25, abs=0.02)
    assert (top + MAP / 2) / (8 * MAP) == pytest.approx(0.75, abs=0.02)
    press(page, "fit")
    assert not frame.evaluate(scrolls)


def test_the_summary_row_stays_in_sight(open_page: Open) -> None:
    n = 300
    explorer = Explorer({"wrong": saliency(n, layers=2)})
    page = open_page(explorer)
    where, canvas = panel(page), page.locator(".stepsal-map")
    press(page, "+", 4)
    page.locator(".stepsal-frame").evaluate("e => e.scrollTo(0, 0)")
    settle(where)
    cell = 16 * MAP / n
    canvas.hover(position={"x": LEFT + 4.5 * cell, "y": MAP - 5})
    expect(where.locator(".stepsal-readout")).to_contain_text("step S (summary) ← 4 (thinking)")
    pixel = "(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    kept = canvas.evaluate(pixel, [LEFT + int(4.5 * cell), MAP - 5])
    page.locator(".stepsal-frame").evaluate("e => e.scrollTo(0, 99999)")
    settle(where)
    assert canvas.evaluate(pixel, [LEFT + int(4.5 * cell), MAP - 5]) == kept  # where the row itself is in sight


def test_jumps_reach_the_map_too(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency(300, layers=2)}))
    press(page, "+", 4)
    page.locator(".stepsal-frame").evaluate("e => e.scrollTo(0, 0)")
    page.locator(".stepsal-search-words").fill("step 150")
    settle(page.locator(".stepsal-explorer"))
    top = page.locator(".stepsal-frame").evaluate("e => e.scrollTop")
    assert top <= 150 * 16 * MAP / 300 <= top + MAP


def test_a_thousand_steps_scroll(open_page: Open) -> None:
    n = 1000
    page = open_page(Explorer(saliency(n, layers=2)))
    where, frame = panel(page, "made up"), page.locator(".stepsal-frame")
    press(page, "+", 3)
    frame.evaluate("frame => frame.scrollTo(0, 0)")
    settle(where)
    assert hover(where, 100, 30, n).startswith("step 100 (thinking) ← 30 ")
    frame.evaluate("frame => frame.scrollTo(1800, 2400)")
    settle(where)
    assert hover(where, 800, 600, n).startswith("step 800 (thinking) ← 600 ")
    expect(where.locator(".stepsal-query")).to_be_in_viewport()  # the text follows
    where.locator(".stepsal-map").focus()
    page.keyboard.press("ArrowDown")
    expect(where.locator(".stepsal-readout")).to_contain_text("step 801 (thinking) ← 600 ")
    where.locator(".stepsal-text").evaluate("text => text.scrollTo(0, text.scrollHeight)")
    expect(where.locator('.stepsal-step[data-step="999"]')).to_be_in_viewport()


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param((1440, 900), "light", id="1440x900-light"),
        pytest.param((1280, 720), "dark", id="1280x720-dark"),
        pytest.param((1440, 900), "dark", id="1440x900-dark", marks=pytest.mark.nightly),
        pytest.param((1280, 720), "light", id="1280x720-light", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("traces", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("n", [20, 300])
def test_the_page_fits_its_window(open_page: Open, n: int, traces: int, size: tuple[int, int], scheme: str) -> None:
    maps = {name: saliency(n, layers=28, seed=i) for i, name in enumerate(["wrong", "correct"][:traces])}
    explorer = Explorer(maps)
    explorer.state = {"compare": "correct"} if traces == 2 else {}
    page = open_page(explorer, verdicts={"wrong": "12, and 7 is right"})
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)
    hover(panel(page), n - 3, n // 3, n)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for label in maps:
        expect(panel(page, label).locator(".stepsal-map")).to_be_in_viewport(ratio=1)
    expect(panel(page).locator(".stepsal-tip")).to_be_in_viewport(ratio=1)
    choose(page, layer=1)
    hover(panel(page), n - 3, n // 3, n)
