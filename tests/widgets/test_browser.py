"""The explorer and StepFlow's panel in a real Chromium: the exported page, and JupyterLab.

Pictures of what the tests saw are left in build/screenshots. What the browser says is held against `Scene`, which
computes the same in Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import capture_explorer
import chromium
import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, Normalize
from nbformat.sign import NotebookNotary
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, TimeoutError, expect
from test_widgets import NASTY, saliency

from stepsal.experiments.collect import Population
from stepsal.widgets import Explorer

if chromium.executable() is None:
    pytest.skip(
        "NO BROWSER: the explorer was not tested in one; install chromium, or run `make browser` as root on Debian",
        allow_module_level=True,
    )

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
LEFT, MAP = 32, 400  # of explorer.js
TOKEN = "of-the-tests"

Open = Callable[[Explorer], Page]

expect.set_options(timeout=20_000)  # a machine that runs other tests too may be slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page on which nothing may go wrong."""
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 1100}), []
    watch(page, wrong)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    picture(page, request)
    page.close()
    assert wrong == []
    if asked and asked[0].startswith("file:"):
        assert set(asked) == {asked[0]}  # an exported page asks for nothing but itself


def watch(page: Page, wrong: list[str]) -> None:
    """Collect what goes wrong on a page: errors, also on the console, and alerts."""
    page.set_default_timeout(60_000)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))


def picture(page: Page, request: pytest.FixtureRequest) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower()).strip('-')}.png")


@pytest.fixture
def open_page(page: Page, tmp_path: Path) -> Open:
    """Export an explorer, and open the file."""

    def opened(explorer: Explorer) -> Page:
        page.goto(explorer.to_html(tmp_path / "maps.html").as_uri())
        expect(page.locator(".stepsal-map").first).to_be_visible()
        return page

    return opened


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    tokens = torch.rand(8, 10, 10, generator=torch.Generator().manual_seed(5)).tril()
    maps = {
        "wrong": saliency(token_values=tokens), "correct": saliency(seed=1), "long": saliency(7, seed=2),
        "deeper": saliency(layers=12, seed=4),
    }  # fmt: skip
    attention = saliency(seed=3, target="attention")
    return Explorer(maps, attention={"wrong": attention, "correct": attention})


def panel(page: Page | Locator, label: str = "wrong") -> Locator:
    return page.locator(f'.stepsal-panel[data-label="{label}"]')


def point(where: Locator, query: int, key: int, n: int = 5) -> dict[str, float]:
    """The middle of a cell in the canvas."""
    cell = max(MAP / n, 2)
    scroll = where.locator(".stepsal-frame").evaluate("frame => [frame.scrollLeft, frame.scrollTop]")
    return {"x": LEFT + (key + 0.5) * cell - scroll[0], "y": (query + 0.5) * cell - scroll[1]}


def hover(where: Locator, query: int, key: int, n: int = 5) -> str:
    """The read-out over a cell."""
    where.locator(".stepsal-map").hover(position=point(where, query, key, n))
    readout = where.locator(".stepsal-readout")
    expect(readout).to_contain_text(re.compile(r"rank \d+ of \d+$"))
    settle(where)
    return readout.inner_text()


def settle(where: Locator) -> None:
    """What was asked for is painted."""
    where.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def choose(page: Page, **choices: Any) -> None:
    """By the page's own controls."""
    for name, value in choices.items():
        name = "slider" if name == "layer" else name
        control = page.locator(f".stepsal-control-{name.replace('_', '-')}")
        if name in ("slider", "top_k"):
            control.fill(str(value))
        elif name == "shared":
            control.set_checked(value)
        else:
            control.select_option(label=value)
    settle(page.locator(".stepsal-explorer"))


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize(
    ("choices", "state"),
    [
        ({}, {}),
        ({"layer": 5}, {"layer": 5}),
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
    where, values = panel(page), explorer.scene.maps["wrong"].values[0]
    for view in ("map", "arcs"):
        choose(page, view=view)
        before = where.locator(".stepsal-overlay").evaluate("canvas => canvas.toDataURL()")
        where.locator('.stepsal-step[data-step="2"]').hover()
        expect(where.locator(".stepsal-hovered")).to_have_count(1)
        named = {
            way: re.findall(r"(\w+) \(", where.locator(f".stepsal-{way} b").inner_text())
            for way in ("incoming", "outgoing")
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
    tokens = where.locator(".stepsal-tokens")
    expect(tokens).to_have_attribute("data-shape", "2x2")
    tokens.hover(position={"x": 8, "y": 24})  # the second row, the first column
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
    profile.click(position={"x": 30 + 400 / 8 * 2.5, "y": 40})
    expect(title).to_contain_text("layer 2")
    expect(page.locator(".stepsal-control-slider")).to_have_value("2")
    choose(page, band="deep")
    expect(profile).to_have_attribute("data-layers", "6 7")
    page.locator(".stepsal-play").click()
    expect(title).to_contain_text("layer 4", timeout=5000)
    page.locator(".stepsal-play").click()


def test_texts_are_never_interpreted(open_page: Open) -> None:
    found = saliency(
        len(NASTY), texts=NASTY, token_texts=tuple([NASTY[0]] * 8), token_values=torch.rand(8, 8, 8).tril()
    )
    page = open_page(Explorer({NASTY[1]: found, "plain": saliency(len(NASTY), seed=1)}))
    where = page.locator(".stepsal-panel").first
    assert where.locator(".stepsal-words").all_inner_texts() == NASTY
    assert page.locator(".stepsal-explorer :is(script, img, b:not(.stepsal-links *))").count() == 0
    expect(where.locator(".stepsal-title")).to_contain_text(NASTY[1])
    right_to_left = where.locator(".stepsal-words").nth(3)
    assert right_to_left.get_attribute("dir") == "auto"
    hover(where, 3, 1, n=4)
    where.locator(".stepsal-map").dblclick(position=point(where, 3, 1, 4))
    where.locator(".stepsal-tokens").hover(position={"x": 4, "y": 4})
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


def test_a_thousand_steps_scroll(open_page: Open) -> None:
    n = 1000
    page = open_page(Explorer(saliency(n, layers=2)))
    where, frame = panel(page, "made up"), page.locator(".stepsal-frame")
    assert hover(where, 100, 30, n).startswith("step 100 (thinking) ← 30 ")
    frame.evaluate("frame => frame.scrollTo(1000, 1500)")
    settle(where)
    assert hover(where, 800, 600, n).startswith("step 800 (thinking) ← 600 ")
    expect(where.locator(".stepsal-query")).to_be_in_viewport()  # the text follows
    where.locator(".stepsal-map").focus()
    page.keyboard.press("ArrowDown")
    expect(where.locator(".stepsal-readout")).to_contain_text("step 801 (thinking) ← 600 ")
    where.locator(".stepsal-text").evaluate("text => text.scrollTo(0, text.scrollHeight)")
    expect(where.locator('.stepsal-step[data-step="999"]')).to_be_in_viewport()


# -------------------------------------------------------------------------------------------- in JupyterLab


MORE_CELLS = (
    """
looped = Explorer(maps)
looped.state = {"layer": 3}
looped""",
    """
import json, time
for i in range(8):
    looped.state = {"layer": i, "band": "deep", "metric": "share", "pinned": {"trace": "wrong", "query": 9, "key": i}}
    time.sleep(0.02)
state = ipywidgets.Label()
state.add_class("stepsal-told-state")
tell, sleep = ipywidgets.Button(description="tell"), ipywidgets.Button(description="sleep")
tell.on_click(lambda _: setattr(state, "value", json.dumps(looped.state)))
sleep.on_click(lambda _: time.sleep(3))
ipywidgets.VBox([tell, sleep, state])""",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab with settings of its own, on a copy of notebook 09, which it trusts; without news and lazy cells."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "jupyter"):
        (folder / name).mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    notebook = nbformat.read(ROOT / "notebooks" / "09_explorer.ipynb", as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nFIGURES = {str(folder / 'figures')!r}"
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in MORE_CELLS]
    nbformat.write(notebook, folder / "notebooks" / "09_explorer.ipynb")
    NotebookNotary(data_dir=str(folder / "jupyter")).sign(notebook)
    for plugin, settings in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"CONFIG_DIR": "config", "DATA_DIR": "jupyter", "RUNTIME_DIR": "runtime"}
    environment = os.environ | {f"JUPYTER_{name}": str(folder / place) for name, place in places.items()}
    environment |= {f"JUPYTERLAB_{name.upper()}_DIR": str(folder / name) for name in ("settings", "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
               f"--IdentityProvider.token={TOKEN}"]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None:
                    break
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/api/status?token={TOKEN}")
                    yield url
                    return
                time.sleep(0.1)
            raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'log.txt').read_text()}")
        finally:
            process.terminate()
            process.wait()


def open_notebook(page: Page, server: str) -> None:
    page.goto(f"{server}/lab/tree/notebooks/09_explorer.ipynb?token={TOKEN}", timeout=60_000)
    expect(page.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute("data-status", "idle", timeout=60_000)


@pytest.fixture(scope="module")
def notebook(browser: Browser, server: str) -> Iterator[Page]:
    """Notebook 09 in JupyterLab, all cells run."""
    page, wrong = browser.new_page(viewport={"width": 1400, "height": 1200}), []
    watch(page, wrong)
    open_notebook(page, server)
    failed = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    prompt = page.locator(".jp-CodeCell").last.locator(".jp-InputArea-prompt")
    for _ in range(3):  # JupyterLab may not be ready for a command while it says that the kernel is idle
        with contextlib.suppress(AssertionError, TimeoutError):
            page.keyboard.press("Escape")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            expect(prompt).not_to_have_text("[ ]:", timeout=20_000)
            break
    finished = prompt.filter(has_text=re.compile(r"\[\d+\]:"))
    expect(finished.or_(failed).first).to_be_attached(timeout=300_000)
    assert failed.all_inner_texts() == []
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def first(notebook: Page, request: pytest.FixtureRequest) -> Iterator[Locator]:
    """The notebook's first explorer."""
    yield notebook.locator(".stepsal-widget").first
    picture(notebook, request)


def test_saved_widgets_are_shown_without_running_anything(page: Page, server: str) -> None:
    open_notebook(page, server)
    expect(page.locator(".stepsal-map").first).to_be_visible(timeout=30_000)
    first = page.locator(".stepsal-widget").first
    expect(panel(first).locator(".stepsal-title")).to_have_text("wrong · layer 6 · share of its row")
    first.locator(".noUi-handle").first.press("ArrowLeft")  # the slider works, though no kernel knows of it
    expect(panel(first).locator(".stepsal-title")).to_have_text("wrong · layer 5 · share of its row")


def test_sliders_and_switches_in_jupyterlab(first: Locator) -> None:
    title = panel(first).locator(".stepsal-title")
    expect(title).to_have_text("wrong · layer 6 · share of its row")
    first.locator(".noUi-handle").first.press("ArrowRight")
    expect(title).to_have_text("wrong · layer 7 · share of its row")
    metric, _, view, _, beside = (first.locator(".widget-dropdown select").nth(i) for i in range(5))
    metric.select_option("difference of shares")
    expect(title).to_have_text("wrong − correct · layer 7 · difference of shares")
    expect(first.locator(".stepsal-panel")).to_have_count(1)
    metric.select_option("saliency")
    expect(first.locator(".stepsal-panel")).to_have_count(2)
    first.get_by_role("button", name="shallow").click()
    expect(title).to_have_text("wrong · shallow layers 0–1 · saliency")
    view.select_option("arcs")
    view.select_option("map")
    beside.select_option("nothing")
    expect(first.locator(".stepsal-panel")).to_have_count(1)
    first.locator(".noUi-handle").first.press("ArrowLeft")  # moving the slider leaves the band
    expect(title).to_have_text("wrong · layer 6 · saliency")


def state_in_python(notebook: Page) -> dict[str, Any]:
    """Of the explorer of the last cells."""
    told = notebook.locator(".stepsal-told-state")
    before = told.inner_text()
    notebook.get_by_role("button", name="tell").click()
    if not before:
        expect(told).not_to_be_empty(timeout=20_000)
    notebook.wait_for_timeout(500)
    return json.loads(told.inner_text())


def test_python_and_the_reader_may_both_choose(notebook: Page, request: pytest.FixtureRequest) -> None:
    """Choices that a cell makes in a row all arrive, and what a busy kernel hears late takes nothing back."""
    last = notebook.locator(".stepsal-widget").last
    title = panel(last).locator(".stepsal-title")
    expect(title).to_have_text("wrong · deep layers 6–7 · share of its row")
    state = state_in_python(notebook)
    assert (state["layer"], state["band"], state["pinned"]["key"]) == (7, "deep", 7)
    slider = last.locator(".noUi-handle").first
    assert slider.get_attribute("aria-valuenow") == "7.0"
    notebook.get_by_role("button", name="sleep").click()
    for _ in range(5):
        slider.press("ArrowLeft")
    expect(title).to_have_text("wrong · layer 2 · share of its row")
    notebook.wait_for_timeout(4000)
    expect(title).to_have_text("wrong · layer 2 · share of its row")
    state = state_in_python(notebook)
    assert (state["layer"], state["band"]) == (2, None)
    picture(notebook, request)


def test_steps_are_marked_and_pins_reach_python(notebook: Page, first: Locator) -> None:
    population = Population.open(ROOT / "data" / "population_mini")
    traces = population.traces
    maps = population.saliency(int(traces[(traces.n_steps == 18) & ~traces.truncated & ~traces.correct].trace.iloc[0]))
    where = panel(first)
    first.locator(".widget-dropdown select").first.select_option("saliency")
    first.get_by_role("button", name="one layer").click()
    expect(where.locator(".stepsal-title")).to_contain_text(re.compile(r"layer \d · saliency"))
    layer = int(re.search(r"layer (\d)", where.locator(".stepsal-title").inner_text())[1])
    told = hover(where, 12, 7, 18)
    assert float(re.search(r": (\S+),", told)[1]) == pytest.approx(float(maps.layer(layer)[12, 7]), rel=0.006)
    for mark, step in (("query", 12), ("key", 7)):
        expect(where.locator(f".stepsal-{mark} .stepsal-words")).to_have_text(" ".join(maps.step_texts[step].split()))
    where.locator(".stepsal-map").click(position=point(where, 12, 7, 18))
    expect(notebook.locator(".stepsal-told")).to_have_text("pinned: {'trace': 'wrong', 'query': 12, 'key': 7}")


def test_arrows_move_in_the_map_and_not_in_the_notebook(notebook: Page, first: Locator) -> None:
    where = panel(first)
    where.locator(".stepsal-map").click(position=point(where, 9, 3, 18))
    selected = "all => all.map(cell => cell.classList.contains('jp-mod-selected'))"
    before = notebook.locator(".jp-Notebook .jp-Cell").evaluate_all(selected)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        notebook.keyboard.press(key)
    expect(where.locator(".stepsal-readout")).to_contain_text("step 10 (thinking) ← 5 (thinking)")
    assert notebook.locator(".jp-Notebook .jp-Cell").evaluate_all(selected) == before
    assert sum(before) == 1


def theme(notebook: Page, name: str) -> None:
    notebook.get_by_role("menuitem", name="Settings", exact=True).click()
    notebook.get_by_text("Theme", exact=True).click()
    notebook.get_by_text(f"JupyterLab {name}", exact=True).click()
    expect(notebook.locator("body")).to_have_attribute("data-jp-theme-light", "true" if name == "Light" else "false")
    expect(notebook.locator("#jupyterlab-splash")).to_have_count(0)


def test_the_theme_of_jupyterlab_is_followed(notebook: Page, first: Locator) -> None:
    labels = "[...c.getContext('2d').getImageData(0, 0, 23, 400).data]"  # opaque where a label is inked
    of_labels = f"c => {{ const p = {labels}, i = p.findIndex((a, i) => i % 4 === 3 && a > 200); return p[i - 1]; }}"
    canvas = panel(first).locator(".stepsal-map")
    settle(first)
    assert canvas.evaluate(of_labels) < 100
    theme(notebook, "Dark")
    settle(first)
    assert canvas.evaluate(of_labels) > 150
    theme(notebook, "Light")
    settle(first)
    assert canvas.evaluate(of_labels) < 100


def test_a_generation_is_stopped_and_run_again(notebook: Page, request: pytest.FixtureRequest) -> None:
    where = notebook.locator(".stepsal-panel-live")
    status = where.locator(".stepsal-status")
    expect(status).to_have_text("done")
    where.locator(".stepsal-run").click()
    where.locator(".stepsal-stop").click()  # which waits until it can be clicked
    expect(status).to_have_text("stopped")
    expect(where.locator(".stepsal-stop")).to_be_disabled()
    where.locator(".stepsal-run").click()
    expect(status).to_have_text("done", timeout=60_000)
    expect(where.locator(".stepsal-parting")).to_contain_text("They part in step 2, after 6 tokens")
    expect(where.locator(".stepsal-map")).to_have_count(2)
    for label in ("without StepFlow", "with StepFlow"):
        expect(panel(where, label).locator(".stepsal-step")).not_to_have_count(0)
    where.scroll_into_view_if_needed()
    picture(notebook, request)
