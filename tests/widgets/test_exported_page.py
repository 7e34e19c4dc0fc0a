"""The explorer's exported page in a real Chromium, held against `Scene`, which computes the same in Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import capture_explorer
import matplotlib as mpl
import numpy as np
import pytest
import torch
from browsing import LEFT, MAP, ROOT, Open, choose, hover, over_token, panel, point, settle
from made_up import NASTY, saliency
from matplotlib.colors import LogNorm, Normalize
from PIL import Image
from playwright.sync_api import Browser, expect

from stepsal.widgets import Explorer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("exported-page")]  # one browser for all of them


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    tokens = torch.rand(8, 10, 10, generator=torch.Generator().manual_seed(5)).tril()
    maps = {
        "wrong": saliency(token_values=tokens), "correct": saliency(seed=1), "long": saliency(7, seed=2),
        "deeper": saliency(layers=12, seed=4),
    }  # fmt: skip
    attention = saliency(seed=3, target="attention")
    return Explorer(maps, attention={"wrong": attention, "correct": attention})


@pytest.mark.parametrize(
    ("choices", "state"),
    [
        ({}, {}),
        ({"layer": 5}, {"layer": 5}),
        ({"layer": 5, "metric": "saliency"}, {"layer": 5, "metric": "saliency"}),
        ({"metric": "saliency", "shared": False}, {"metric": "saliency", "shared": False}),
        ({"band": "deep"}, {"band": "deep"}),
        ({"layer": 3, "scale": "linear"}, {"layer": 3, "scale": "linear"}),
        ({"layer": 3, "shared": False}, {"layer": 3, "shared": False}),
        ({"metric": "share of its row", "band": "middle"}, {"metric": "share", "band": "middle"}),
        ({"metric": "attention", "layer": 2}, {"metric": "attention", "layer": 2}),
        ({"compare": "correct", "layer": 4}, {"compare": "correct", "layer": 4}),
        ({"compare": "correct", "metric": "difference of shares"}, {"compare": "correct", "metric": "difference"}),
        ({"trace": "long", "metric": "share of its row"}, {"trace": "long", "metric": "share"}),
        ({"compare": "long", "metric": "attention"}, {"compare": "long", "metric": "attention"}),
        ({"compare": "long", "metric": "difference of shares"}, {"compare": "long", "metric": "difference"}),
        ({"compare": "deeper", "band": "deep", "shared": False},
         {"compare": "deeper", "band": "deep", "shared": False}),
        ({"trace": "deeper", "compare": "wrong", "layer": 11}, {"trace": "deeper", "compare": "wrong", "layer": 11}),
        ({"trace": "deeper", "compare": "wrong", "metric": "difference of shares", "band": "deep"},
         {"trace": "deeper", "compare": "wrong", "metric": "difference", "band": "deep"}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) or "first" if isinstance(x, dict) else "",
)  # fmt: skip
def test_the_browser_shows_what_python_computes(
    explorer: Explorer, open_page: Open, choices: dict[str, Any], state: dict[str, Any]
) -> None:
    explorer.state = explorer.scene.first_state()
    page = open_page(explorer)
    choose(page, **choices)
    explorer.state = state
    scene, whole = explorer.scene, explorer.state
    assert [p.get_attribute("data-label") for p in page.locator(".stepsal-panel").all()] == scene.traces(whole)
    for label in scene.traces(whole):
        values, where, n = scene.shown(label, whole), panel(page, label), scene.maps[label].n_steps
        assert where.locator(".stepsal-title").inner_text() == scene.title(label, whole)
        low, high = scene.color_range(label, whole)
        assert float(where.locator(".stepsal-low").inner_text()) == pytest.approx(low, rel=0.01)
        assert float(where.locator(".stepsal-high").inner_text()) == pytest.approx(high, rel=0.01)
        norm = LogNorm(low, high, clip=True) if low > 0 else Normalize(low, high)
        cmap = mpl.colormaps["RdBu_r" if scene.metric(label, whole) == "difference" else "magma_r"]
        for query, key in ((n - 1, 0), (n - 1, n - 2), (3, 1), (2, 2)):
            told = hover(where, query, key, n)
            value = float(values[query, key])
            number, rank = re.search(r": (\S+), rank (\d+) of", told).groups()
            assert float(number) == pytest.approx(value, rel=0.006)
            assert int(rank) == 1 + int((values[query, : query + 1].abs() > abs(value)).sum())
            at = point(where, query, key, n)
            pixel = where.locator(".stepsal-map").evaluate(
                "(canvas, at) => [...canvas.getContext('2d').getImageData(at.x, at.y, 1, 1).data]", at
            )
            assert pixel[:3] == pytest.approx([255 * x for x in cmap(float(norm(value)))[:3]], abs=6)
            assert pixel[3] == 255


def test_hovering_marks_both_steps_in_the_text(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where = panel(page)
    assert hover(where, 3, 1).startswith("step 3 (thinking) ← 1 (thinking)")
    assert where.locator(".stepsal-query .stepsal-words").all_inner_texts() == ["step 3"]
    assert where.locator(".stepsal-key .stepsal-words").all_inner_texts() == ["step 1"]
    page.mouse.move(5, 5)
    expect(where.locator(".stepsal-readout")).to_have_text("")
    expect(where.locator(".stepsal-query")).to_have_count(0)


def test_clicking_pins_until_it_is_clicked_again(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where = panel(page)
    hover(where, 4, 2)
    where.locator(".stepsal-map").click(position=point(where, 4, 2))
    page.mouse.move(5, 5)
    expect(where.locator(".stepsal-readout")).to_contain_text("step S (summary) ← 2 (thinking)")
    expect(where.locator(".stepsal-query")).to_contain_text("step 4")
    choose(page, layer=6)
    expect(where.locator(".stepsal-readout")).to_contain_text("step S (summary) ← 2 (thinking)")
    where.locator(".stepsal-map").click(position=point(where, 4, 2))
    page.mouse.move(5, 5)
    expect(where.locator(".stepsal-readout")).to_have_text("")


def test_a_step_of_the_text_tells_where_it_draws_from(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where, scene = panel(page), explorer.scene
    values = scene.shown("wrong", scene.first_state())
    for view in ("map", "arcs"):
        choose(page, view=view)
        before = where.locator(".stepsal-overlay").evaluate("canvas => canvas.toDataURL()")
        where.locator('.stepsal-step[data-step="2"]').hover()
        expect(where.locator(".stepsal-hovered")).to_have_count(1)
        named = {
            direction: re.findall(r"(\w+) \(", where.locator(f".stepsal-{direction} b").inner_text())
            for direction in ("incoming", "outgoing")
        }
        assert named["incoming"] == [str(j) if j else "Q" for j in values[2, :2].argsort(descending=True).tolist()]
        assert named["outgoing"] == [{3: "3", 4: "S"}[3 + i] for i in values[3:, 2].argsort(descending=True).tolist()]
        assert where.locator(".stepsal-overlay").evaluate("canvas => canvas.toDataURL()") != before
        page.mouse.move(5, 5)


def test_everything_works_by_keyboard(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where = panel(page)
    where.locator(".stepsal-map").focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):  # from the first cell of the last row
        page.keyboard.press(key)
    expect(where.locator(".stepsal-readout")).to_contain_text("step 3 (thinking) ← 2 (thinking)")
    page.keyboard.press("]")
    expect(where.locator(".stepsal-title")).to_contain_text("layer 1")
    page.keyboard.press("z")
    expect(where.locator(".stepsal-tokens")).to_be_visible()
    page.keyboard.press("Escape")
    expect(where.locator(".stepsal-tokens")).to_be_hidden()
    expect(where.locator(".stepsal-readout")).to_have_text("")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    where.locator(".stepsal-text").focus()
    expect(where.locator(".stepsal-readout")).to_contain_text("step 3 (thinking) ← Q (question)")  # pinned
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(where.locator(".stepsal-hovered")).to_contain_text("step 1")
    expect(where.locator(".stepsal-links")).to_contain_text("1 draws on Q")
    page.locator(".stepsal-control-slider").focus()
    page.keyboard.press("ArrowRight")
    expect(where.locator(".stepsal-title")).to_contain_text("layer 2")


def test_what_the_arcs_mark_goes_with_the_pointer(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where = panel(page)
    choose(page, view="arcs")
    where.locator(".stepsal-map").hover(position={"x": LEFT + 2.5 * MAP / 5, "y": 200})
    expect(where.locator(".stepsal-hovered")).to_contain_text("step 2")
    page.mouse.move(5, 5)
    expect(where.locator(".stepsal-hovered")).to_have_count(0)


@pytest.mark.parametrize("n", [20, 140])
def test_the_strongest_links_are_marked(open_page: Open, n: int) -> None:
    page = open_page(Explorer(saliency(n, layers=2)))
    overlay = panel(page, "made up").locator(".stepsal-overlay")
    blank = overlay.evaluate("canvas => canvas.toDataURL()")
    choose(page, top_k=2)
    assert overlay.evaluate("canvas => canvas.toDataURL()") != blank


def test_traces_of_other_depths(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer({"deep": saliency(layers=12), "part": saliency(layers=3, seed=1)}))
    choose(page, layer=7, compare="part")
    title = panel(page, "deep").locator(".stepsal-title")
    page.locator(".stepsal-thumbs").nth(1).click(position={"x": 48 + 20, "y": 20})  # of the other trace: its layer 1
    expect(title).to_contain_text("layer 1")
    choose(page, layer=7)
    choose(page, trace="part")
    expect(panel(page, "part").locator(".stepsal-title")).to_contain_text("layer 2")
    panel(page, "part").locator(".stepsal-map").focus()
    page.keyboard.press("[")
    expect(panel(page, "part").locator(".stepsal-title")).to_contain_text("layer 1")


def test_a_cell_opens_into_its_tokens(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    where = panel(page)
    choose(page, layer=3)
    where.locator(".stepsal-map").dblclick(position=point(where, 3, 1))
    expect(where.locator(".stepsal-tokens")).to_have_attribute("data-shape", "2x2")
    over_token(where, 1, 0)
    value = float(explorer.scene.maps["wrong"].token_values[3, 7, 2])
    told = where.locator(".stepsal-token-readout")
    expect(told).to_contain_text("←")
    assert float(told.inner_text().split(": ")[-1]) == pytest.approx(value, rel=0.006)


def test_thumbnails_profile_and_play_choose_layers(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    title, profile = panel(page).locator(".stepsal-title"), page.locator(".stepsal-profile")
    page.locator(".stepsal-thumbs").click(position={"x": 48 * 5 + 20, "y": 20})
    expect(title).to_contain_text("layer 5")
    expect(profile).to_have_attribute("data-layers", "5")
    profile.click(position={"x": 32 + 400 / 8 * 2.5, "y": 40})
    expect(title).to_contain_text("layer 2")
    expect(page.locator(".stepsal-control-slider")).to_have_value("2")
    choose(page, band="deep")
    expect(profile).to_have_attribute("data-layers", "6 7")
    page.locator(".stepsal-play").click()
    expect(title).to_contain_text("layer 4")
    page.locator(".stepsal-play").click()


def test_texts_are_never_interpreted(open_page: Open) -> None:
    nasty = saliency(
        len(NASTY), texts=NASTY, token_texts=tuple([NASTY[0]] * 8), token_values=torch.rand(8, 8, 8).tril()
    )
    page = open_page(Explorer({NASTY[1]: nasty, "plain": saliency(len(NASTY), seed=1)}))
    where = page.locator(".stepsal-panel").first
    assert where.locator(".stepsal-words").all_inner_texts() == NASTY
    assert page.locator(".stepsal-explorer :is(script, img, b:not(.stepsal-links *))").count() == 0
    expect(where.locator(".stepsal-title")).to_contain_text(NASTY[1])
    right_to_left = where.locator(".stepsal-words").nth(3)
    assert right_to_left.get_attribute("dir") == "auto"
    hover(where, 3, 1, n=4)
    where.locator(".stepsal-map").dblclick(position=point(where, 3, 1, 4))
    over_token(where, 0, 0)
    expect(where.locator(".stepsal-token-readout")).to_contain_text("<script>")


def test_light_and_dark(explorer: Explorer, open_page: Open) -> None:
    page = open_page(Explorer(explorer.scene.maps))
    shade = "e => ['color', 'backgroundColor'].map(n => getComputedStyle(e)[n].match(/\\d+/g).slice(0, 3).map(Number))"
    pixels = "[...c.getContext('2d').getImageData(0, 0, 23, 400).data]"  # of the labels alone: opaque where inked
    of_labels = f"c => {{ const p = {pixels}, i = p.findIndex((a, i) => i % 4 === 3 && a > 200); return p[i - 1]; }}"
    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        ink, paper = (sum(rgb) / 3 for rgb in page.locator(".stepsal-explorer").evaluate(shade))
        assert (ink > paper) is dark
        assert abs(ink - paper) > 150
        settle(page.locator(".stepsal-explorer"))  # the labels on the canvas have the new colour
        assert page.locator(".stepsal-map").evaluate(of_labels) == pytest.approx(ink, abs=12)


@pytest.mark.nightly
def test_the_captures_of_the_readme_are_made(browser: Browser, tmp_path: Path) -> None:
    capture_explorer.capture(browser, tmp_path)
    for ending in ("png", "gif"):
        new, published = (Image.open(p / f"explorer.{ending}") for p in (tmp_path, ROOT / "figures" / "captures"))
        assert new.size == published.size
        assert getattr(new, "n_frames", 1) == getattr(published, "n_frames", 1)
        for frame in range(0, getattr(new, "n_frames", 1), 6):
            for image in (new, published):
                image.seek(frame)
            pixels = [np.asarray(image.convert("RGB"), dtype=float) for image in (new, published)]
            assert np.abs(pixels[0] - pixels[1]).mean() < 4  # other fonts may be there
