"""What an explorer says of texts, heads, tokens and layers, and what it does not offer, in a real Chromium."""

from __future__ import annotations

import re

import pytest
import torch
from browsing import Open, choose, hover, over_token, panel, point, settle
from made_up import NASTY, saliency
from playwright.sync_api import Locator, Page, expect

from stepsal.widgets import Explorer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("explorer-texts")]

RECORD_CANVAS = """
window.texts = []; window.strokes = [];
const { fillText, stroke } = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const width = this.measureText(text).width, at = this.textAlign;
  const left = at === "center" ? x - width / 2 : at === "right" ? x - width : x;
  window.texts.push({ canvas: this.canvas.className, text, left, right: left + width, y });
  return fillText.call(this, text, x, y);
};
CanvasRenderingContext2D.prototype.stroke = function () {
  window.strokes.push({ canvas: this.canvas.className, alpha: this.globalAlpha });
  return stroke.call(this);
};
"""


def inside(part: Locator, whole: Locator) -> bool:
    """Whether an element lies within another from top to bottom."""
    (a, b) = (x.bounding_box() for x in (part, whole))
    return a["y"] >= b["y"] - 1 and a["y"] + a["height"] <= b["y"] + b["height"] + 1


# ------------------------------------------------------------------------------------------------------ texts


def test_texts_of_both_steps_stand_beside_the_cell(open_page: Open) -> None:
    texts = [f"{NASTY[i % 4]} and step {i}" for i in range(12)]
    page = open_page(Explorer({"wrong": saliency(12, texts=texts), "correct": saliency(12, seed=1)}))
    page.set_viewport_size({"width": 1280, "height": 720})
    choose(page, compare="correct")
    where = panel(page)
    hover(where, 9, 4, 12)
    tip = where.locator(".stepsal-tip")
    expect(tip).to_be_in_viewport(ratio=1)
    assert tip.inner_text().split("\n")[0] == where.locator(".stepsal-readout").inner_text()
    assert tip.locator(".stepsal-tip-query").inner_text() == f"9 {texts[9]}"
    assert tip.locator(".stepsal-tip-key").inner_text() == f"draws on 4 {texts[4]}"
    assert page.locator(".stepsal-tip :is(script, img, b)").count() == 0
    row = point(where, 9, 4, 12)["y"] + where.locator(".stepsal-map").bounding_box()["y"]
    box = tip.bounding_box()
    assert not box["y"] < row < box["y"] + box["height"]  # the row that it speaks of stays in sight
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_both_steps_are_scrolled_to(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency(60, layers=2)}))
    where = panel(page)
    for query, key in ((57, 3), (30, 29), (20, 0), (59, 58)):
        hover(where, query, key, 60)
        text = where.locator(".stepsal-text")
        for mark, step in (("query", query), ("key", key)):
            row = where.locator(f".stepsal-step.stepsal-{mark}")
            assert row.get_attribute("data-step") == str(step)
            assert inside(row, text)
        assert not inside(where.locator('.stepsal-step[data-step="45"]'), text) or query > 40


def test_the_text_is_shaded_by_what_a_step_draws_from_it(open_page: Open) -> None:
    explorer = Explorer({"wrong": saliency(9)})
    page = open_page(explorer)
    where, shares = panel(page), explorer.scene.shown("wrong", explorer.state)
    hover(where, 6, 2, 9)
    drawn = "row => parseFloat(row.style.getPropertyValue('--stepsal-drawn') || '0')"
    told = [row.evaluate(drawn) for row in where.locator(".stepsal-step").all()]
    assert told == pytest.approx([65 * float(share) ** 0.5 for share in shares[6]], abs=2.51)
    page.mouse.move(5, 5)
    settle(where)
    assert [row.evaluate(drawn) for row in where.locator(".stepsal-step").all()] == [0] * 9


@pytest.mark.parametrize("metric", ["share of its row", "attention"])
def test_steps_are_ranked_by_what_is_drawn_on_them(open_page: Open, metric: str) -> None:
    explorer = Explorer({"wrong": saliency(30)}, attention={"wrong": saliency(30, seed=4, target="attention")})
    page = open_page(explorer)
    choose(page, metric=metric, band="deep")
    explorer.state = {"metric": "attention" if metric == "attention" else "share", "band": "deep"}
    ranking = explorer.scene.ranking("wrong", explorer.state)
    buttons = panel(page).locator(".stepsal-ranked")
    assert buttons.all_inner_texts() == [f"{step or 'Q'} ({total:.2f})" for step, total in ranking[:5]]
    buttons.nth(1).click()
    expect(panel(page).locator(".stepsal-hovered")).to_have_attribute("data-step", str(ranking[1][0]))


def test_steps_are_searched_and_jumped_to(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency(120, layers=3)}))
    where = panel(page)
    field, hovered = where.locator(".stepsal-search-words"), where.locator(".stepsal-hovered")
    field.press_sequentially("STEP 7]")  # and "]" is a letter here
    expect(where.locator(".stepsal-search-count")).to_have_text("none")
    expect(where.locator(".stepsal-title")).to_contain_text("layer 0")
    field.press("Backspace")
    expect(where.locator(".stepsal-search-count")).to_have_text("1 of 11")
    expect(where.locator(".stepsal-hit")).to_have_count(11)
    expect(hovered).to_contain_text("step 7")
    field.press("Enter")
    expect(hovered).to_contain_text("step 70")
    expect(hovered).to_be_in_viewport()
    field.press("Shift+Enter")
    field.press("Shift+Enter")
    expect(hovered).to_contain_text("step 79")
    where.get_by_role("button", name="to S").click()
    expect(hovered).to_contain_text("step 119")
    assert inside(hovered, where.locator(".stepsal-text"))
    where.get_by_role("button", name="to Q").click()
    expect(hovered).to_contain_text("step 0")


# ------------------------------------------------------------------------------------------------------ heads, tokens


def test_heads_of_a_layer_and_those_that_carry_a_cell(open_page: Open) -> None:
    heads = torch.rand(4, 6, 5, 5, generator=torch.Generator().manual_seed(3)).tril() ** 4
    explorer = Explorer({"wrong": saliency(layers=4, values=heads.mean(1), head_values=heads)})
    page = open_page(explorer)
    where = panel(page)
    choose(page, layer=2)
    assert where.locator(".stepsal-heads-of").inner_text() == "heads of layer 2, each with colours of its own"
    assert where.locator(".stepsal-head-maps").bounding_box()["width"] == 6 * 48
    hover(where, 3, 1)
    cell = heads[2, :, 3, 1]
    named = re.findall(r"head (\d) \(([\d.]+) %\)", where.locator(".stepsal-carriers").inner_text())
    order = cell.argsort(descending=True)[:4].tolist()
    assert [int(head) for head, _ in named] == order
    assert [float(part) for _, part in named] == pytest.approx(
        [100 * float(cell[h] / cell.sum()) for h in order], abs=0.6
    )
    choose(page, band="middle")
    expect(where.locator(".stepsal-heads-of")).to_contain_text("choose one layer")
    expect(where.locator(".stepsal-head-maps")).to_be_hidden()


def test_without_heads_there_is_nothing_of_them(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency()}))
    hover(panel(page), 3, 1)
    expect(panel(page).locator(".stepsal-heads")).to_be_hidden()


def test_the_token_view_names_its_tokens(open_page: Open, page: Page) -> None:
    page.add_init_script(RECORD_CANVAS)
    names = tuple(f" {word}" for word in ("Ann", "has", "7", "so", "Bob", "has", "9", "too", "The", "end"))
    tokens = torch.rand(8, 10, 10, generator=torch.Generator().manual_seed(5)).tril()
    open_page(Explorer({"wrong": saliency(token_texts=names, token_values=tokens)}))
    where = panel(page)
    where.locator(".stepsal-map").dblclick(position=point(where, 3, 1))
    expect(where.locator(".stepsal-tokens")).to_be_visible()
    written = page.evaluate("texts.filter(x => x.canvas === 'stepsal-tokens').map(x => x.text)")
    assert written == ["9", "too", "7", "so"]  # beside rows, above columns
    over_token(where, 1, 0)
    expect(where.locator(".stepsal-token-readout")).to_contain_text('" too" ← " 7"')


def test_what_was_not_kept_is_said(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency()}))
    where = panel(page)
    assert "z or double click" not in page.locator(".stepsal-help").inner_text()
    told = where.locator(".stepsal-token-readout")
    expect(told).to_be_hidden()
    where.locator(".stepsal-map").dblclick(position=point(where, 3, 1))
    expect(told).to_contain_text("keep_tokens=True")
    page.keyboard.press("Escape")
    expect(told).to_be_hidden()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("z")
    expect(told).to_contain_text("keep_tokens=True")


def test_some_steps_open_where_their_tokens_were_kept(open_page: Open) -> None:
    of_step, positions = saliency().step_ids, torch.tensor([2, 3, 6, 7])
    kept = sorted(set(of_step[positions].tolist()))
    tokens = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(5)).tril()
    page = open_page(Explorer({"wrong": saliency(token_values=tokens, token_positions=positions)}))
    where = panel(page)
    where.locator(".stepsal-map").dblclick(position=point(where, kept[1], kept[0]))
    expect(where.locator(".stepsal-tokens")).to_have_attribute("data-shape", "2x2")
    page.keyboard.press("Escape")
    where.locator(".stepsal-map").dblclick(position=point(where, kept[1], 0))
    expect(where.locator(".stepsal-token-readout")).to_contain_text("keep_tokens=[..]")
    expect(where.locator(".stepsal-tokens")).to_be_hidden()


@pytest.mark.parametrize(
    ("traces", "attention", "offered"),
    [
        (1, False, ["share of its row", "saliency"]),
        (1, True, ["share of its row", "saliency", "attention"]),
        (2, False, ["share of its row", "saliency", "difference of shares"]),
    ],
)
def test_only_metrics_that_there_are_are_offered(open_page: Open, traces: int, attention: bool, offered: list) -> None:
    maps = {name: saliency(seed=i) for i, name in enumerate(["wrong", "correct"][:traces])}
    explorer = Explorer(maps, attention={"wrong": saliency(target="attention")} if attention else None)
    page = open_page(explorer)
    options = page.locator(".stepsal-control-metric option")
    assert options.all_inner_texts() == offered
    assert ("attention" in explorer.metric_choice.options) is attention
    page.locator(".stepsal-control-metric").select_option(label=offered[-1])
    if traces == 1:
        expect(panel(page).locator(".stepsal-title")).to_contain_text(offered[-1])


# ------------------------------------------------------------------------------------------------------ arcs, layers


def test_arcs_have_a_number_a_threshold_and_set_the_pinned_step_apart(open_page: Open, page: Page) -> None:
    page.add_init_script(RECORD_CANVAS)
    explorer = Explorer({"wrong": saliency(20, layers=2)})
    open_page(explorer)
    frame, shares = page.locator(".stepsal-frame"), explorer.scene.shown("wrong", explorer.state)
    choose(page, view="arcs")
    expect(page.locator(".stepsal-control-top-k")).to_have_value("2")  # who asks for arcs gets some
    for threshold in (0, 10, 20):
        choose(page, threshold=threshold)
        strongest = shares.tril(-1).topk(2).values
        n_arcs = int(((strongest > 0) & (strongest >= threshold / 100)).sum())
        expect(frame).to_have_attribute("data-arcs", str(n_arcs))
    choose(page, threshold=0, top_k=0)
    expect(frame).to_have_attribute("data-arcs", "0")
    assert page.evaluate("texts.filter(x => x.canvas === 'stepsal-map').at(-1).text").startswith("links is 0")
    choose(page, view="map", top_k=2)
    where = panel(page)
    where.locator(".stepsal-map").click(position=point(where, 15, 3, 20))
    page.mouse.move(5, 5)
    page.evaluate("strokes.length = 0")
    choose(page, view="arcs")
    alphas = page.evaluate("strokes.filter(x => x.canvas === 'stepsal-map').map(x => x.alpha)")
    assert len([alpha for alpha in alphas if alpha > 0.25]) == 2  # those of the pinned step
    assert len(alphas) > 30


def test_the_labels_of_the_profile_are_whole_after_every_draw(open_page: Open, page: Page) -> None:
    page.add_init_script(RECORD_CANVAS)
    open_page(Explorer({"wrong": saliency(layers=12), "correct": saliency(layers=12, seed=1)}))
    for choices in ({"layer": 3}, {"compare": "correct"}, {"band": "deep"}, {"view": "arcs"}, {"view": "map"}):
        page.evaluate("texts.length = 0")
        choose(page, **choices)
        labels = page.evaluate("texts.filter(x => x.canvas === 'stepsal-profile')")
        assert len(labels) >= 5
        assert re.fullmatch(r"0\.\d\d", labels[1]["text"])  # the top: digits on both sides of the point
        for label in labels:
            assert label["left"] >= 0, label
            assert label["right"] <= 440, label
            assert 8 <= label["y"] <= 99, label


def test_a_missing_line_of_the_profile_says_why(open_page: Open) -> None:
    page = open_page(Explorer({"wrong": saliency(4)}))
    key = page.locator(".stepsal-profile-key")
    expect(key).to_contain_text("lock-in of thinking rows: not defined (fewer than three thinking steps)")
    expect(key.locator(".stepsal-line").nth(1)).to_have_text("summary on thinking")


def test_the_corner_neither_sets_the_scale_nor_is_shown_as_a_share(open_page: Open) -> None:
    values = saliency(20).values.clone()
    values[:, 0, 0] = 1000
    explorer = Explorer({"wrong": saliency(20, values=values)})
    page = open_page(explorer)
    where = panel(page)
    rgb = "c => [...c.getContext('2d').getImageData(42, 10, 1, 1).data].slice(0, 3)"
    red, green, blue = where.locator(".stepsal-map").evaluate(rgb)
    assert red == green == blue  # no colour of the scale
    choose(page, metric="saliency")
    assert float(where.locator(".stepsal-high").inner_text()) <= 1
