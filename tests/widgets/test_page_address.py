"""What an exported page says of itself, and the choices in its address, in a real Chromium."""

from __future__ import annotations

from datetime import date

import pytest
from browsing import Open, choose, panel, point, settle
from made_up import NASTY, saliency
from playwright.sync_api import Page, expect

from stepsal.widgets import Explorer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("page-address")]


def test_a_page_says_what_it_shows(open_page: Open) -> None:
    maps = {"wrong": saliency(texts=[NASTY[1], "a", "b", "c", "d"]), "correct": saliency(seed=1)}
    page = open_page(Explorer(maps), title="Sums <b>of</b> names", verdicts={"wrong": f"12 {NASTY[0]}"})
    assert page.title() == "Sums <b>of</b> names"
    assert page.locator("h1").inner_text() == "Sums <b>of</b> names"
    facts = {name: page.locator(f".stepsal-fact-{name}").all_inner_texts() for name in ("model", "verdict", "question")}
    assert facts == {
        "model": ["made up"],
        "verdict": [f"wrong: 12 {NASTY[0]} · correct"],
        "question": [f"wrong: {NASTY[1]}", "correct: step 0"],
    }
    assert page.locator(".stepsal-fact-date").inner_text() == f"{date.today():%Y-%m-%d}"
    assert page.locator(".stepsal-explorer :is(script, img)").count() == 0
    how = page.locator(".stepsal-how-to-read")
    for word in ("row", "column", "darker", "each token's loss", "mean over its pairs of tokens"):
        expect(how).to_contain_text(word)
    assert "rows: step being written" in panel(page).locator(".stepsal-axes").inner_text()
    assert panel(page).locator(".stepsal-quantity").inner_text() == "share of its row, log"
    choose(page, metric="saliency", scale="linear")
    assert panel(page).locator(".stepsal-quantity").inner_text() == "saliency"


def test_one_answer_without_a_verdict(open_page: Open) -> None:
    page = open_page(Explorer(saliency()))
    assert page.locator(".stepsal-fact-verdict").inner_text() == "not given"
    with pytest.raises(ValueError, match=r"verdicts on \['other'\], but the maps are \['made up'\]"):
        open_page(Explorer(saliency()), verdicts={"other": "right"})


def seen(page: Page) -> dict[str, str]:
    where = panel(page)
    return {
        "title": where.locator(".stepsal-title").inner_text(), "told": where.locator(".stepsal-readout").inner_text(),
        "traces": str(page.locator(".stepsal-panel").count()),
        "links": page.locator(".stepsal-control-top-k").input_value(),
        "layer": page.locator(".stepsal-control-slider").input_value(),
    }  # fmt: skip


def test_a_view_is_sent_by_its_address(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency(), "correct": saliency(seed=1)}))
    plain = page.url
    assert "#" not in plain
    where = panel(page)
    choose(page, layer=5, compare="correct", metric="saliency", shared=False, top_k=3)
    where.locator(".stepsal-map").click(position=point(where, 4, 2))
    page.mouse.move(5, 5)
    settle(where)
    address, view = page.url, seen(page)
    assert address == f"{plain}#compare=2&layer=5&metric=1&shared=0&top_k=3&pinned=0.4.2"
    page.goto("about:blank")
    page.goto(address)
    settle(page.locator(".stepsal-explorer"))
    assert seen(page) == view
    assert not page.locator(".stepsal-control-shared").is_checked()
    page.evaluate("location.hash = '#layer=2'")  # as by the reader, in the address bar
    expect(panel(page).locator(".stepsal-title")).to_have_text("wrong · layer 2 · share of its row")
    expect(page.locator(".stepsal-control-slider")).to_have_value("2")
    choose(page, layer=0)
    assert page.url == plain


@pytest.mark.parametrize(
    "address",
    ["layer=99", "layer=-1", "layer=1.5", "layer=<b>", "metric=3", "pinned=0.1.2", "pinned=9.1.1", "zoom=0.1.1", "x=1",
     "trace=7&layer=8", "shared=7", "pinned", "layer", "top_k=9", "constructor=1", "=", "%"],
)  # fmt: skip
def test_addresses_that_make_no_sense_choose_nothing(open_page: Open, address: str) -> None:
    page = open_page(Explorer({"wrong": saliency(), "correct": saliency(seed=1)}))
    first, plain = seen(page), page.url
    page.goto("about:blank")
    page.goto(f"{plain}#{address}")
    settle(page.locator(".stepsal-explorer"))
    assert seen(page) == first
