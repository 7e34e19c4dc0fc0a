"""Measure how long the explorer takes from an input to the paint that answers it, in a headless Chromium.

    python benchmarks/explorer_paint.py

The maps are random numbers, since only their number matters: 60 layers of 200 steps for the inputs, 28 layers of 1000
steps for opening a page and scrolling in it. A time begins at the time stamp that the browser gave to the event, and
ends in the first task after the frame in which the explorer has drawn, so it holds all waiting, computing, drawing and
painting. "first" are inputs that show what was not shown before, when nothing of it is kept yet. Opening begins with
the navigation, and ends when the map is painted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import machine
import pandas as pd
import torch
from playwright.sync_api import Browser, Page

from stepsal.maps import StepSaliency
from stepsal.widgets import Explorer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "scripts"))
from chromium import chromium  # noqa: E402

Inputs = list[Callable[[], object]]
VIEWPORT = {"width": 1280, "height": 1100}
TURNS = 20
WATCH = """
window.times = [];
let begun = null;
for (const type of ["pointermove", "keydown", "click", "change", "scroll"]) {
  addEventListener(type, (event) => { begun ??= event.timeStamp; }, true);
}
document.addEventListener("stepsal-painted", () => {
  const start = begun, channel = new MessageChannel();
  begun = null;
  channel.port1.onmessage = () => { if (start !== null) times.push(performance.now() - start); };
  channel.port2.postMessage(0); // is heard after the frame
});
"""
OPENED = """() => new Promise((done) => requestAnimationFrame(() => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => done(performance.now());
  channel.port2.postMessage(0);
}))"""


def saliency(n_layers: int, n_steps: int) -> StepSaliency:
    """Return random maps that fall off with the distance between steps."""
    distance = (torch.arange(n_steps)[:, None] - torch.arange(n_steps)).clamp(min=0)
    values = torch.rand(n_layers, n_steps, n_steps).tril() / (1 + distance)
    return StepSaliency(
        values=values, layers=tuple(range(n_layers)), n_layers=n_layers, model_name="random", target="token",
        reduce="density",
        roles=("question", *["thinking"] * (n_steps - 11), *["summary"] * 10),
        step_texts=tuple(f"Step {i}: then {i} plus {i + 1} is {2 * i + 1}, which we keep." for i in range(n_steps)),
        step_lengths=(20,) * n_steps, step_ids=torch.arange(n_steps).repeat_interleave(20),
        token_texts=("x",) * (20 * n_steps),
    )  # fmt: skip


def measure(page: Page, name: str, inputs: Inputs, turns: int = TURNS, new: int = 0) -> list[dict[str, object]]:
    """Time the inputs, one after the other and again, each after the answer to the one before.

    Args:
        page: where the explorer is.
        name: of this kind of input.
        inputs: what to do in the page, in turn.
        turns: number of inputs.
        new: so many of the first ones show what was not shown before.
    """
    page.evaluate("times.length = 0")
    for turn in range(turns):
        inputs[turn % len(inputs)]()
        page.wait_for_function("n => times.length >= n", arg=turn + 1)
    times = page.evaluate("times")
    return [{"input": name, "first": turn < new, "ms": ms} for turn, ms in enumerate(times)]


def by_keys(page: Page, control: str, key: str) -> Inputs:
    """Return the press of a key in a control."""
    return [lambda: page.locator(f".stepsal-control-{control}").press(key)]


def by_choice(page: Page, control: str, *options: str) -> Inputs:
    """Return the choice of each of some options of a control."""
    select = page.locator(f".stepsal-control-{control}")
    return [partial(select.select_option, label=option) for option in options]


def all_inputs(page: Page) -> list[dict[str, object]]:
    """Time every kind of input."""
    box = page.locator(".stepsal-map").first.bounding_box()
    over_cells = [partial(page.mouse.move, box["x"] + 50 + 7 * i, box["y"] + 380 - 3 * i) for i in range(TURNS)]
    rows = measure(page, "hover a cell", over_cells)
    page.mouse.move(2, 2)
    rows += measure(page, "layer slider", by_keys(page, "slider", "ArrowRight"))
    rows += measure(page, "metric", by_choice(page, "metric", "saliency", "share of its row"), new=1)
    rows += measure(page, "band", by_choice(page, "band", "deep", "middle", "shallow"), new=3)
    rows += measure(page, "scale", by_choice(page, "scale", "linear", "log"), new=1)
    rows += measure(page, "view", by_choice(page, "view", "arcs", "map"), new=1)
    rows += measure(page, "one scale for all layers", by_keys(page, "shared", "Space"), new=1)
    return rows + measure(page, "links", by_keys(page, "top-k", "ArrowRight"), turns=3)  # arcs had 2


def thousand_steps(browser: Browser, path: Path) -> list[dict[str, object]]:
    """Time the opening of a page of 1000 steps, and two inputs in it."""
    rows: list[dict[str, object]] = []
    for _ in range(5):
        page = browser.new_page(viewport=VIEWPORT)
        page.goto(path.as_uri(), wait_until="commit")
        page.locator(".stepsal-map").wait_for()
        rows.append({"input": "open", "first": True, "ms": page.evaluate(OPENED)})
        for _ in range(3):
            page.get_by_role("button", name="+", exact=True).click()  # all of them fit: there is nothing to scroll
        page.evaluate(WATCH)
        frame = page.locator(".stepsal-frame")
        scrolling = [partial(frame.evaluate, "(e, to) => e.scrollTo(to, to)", 60 * i) for i in range(1, TURNS + 1)]
        rows += measure(page, "scroll the map", scrolling)
        rows += measure(page, "layer slider", by_keys(page, "slider", "ArrowRight"))
        page.close()
    return rows


def main() -> None:
    """Measure everything, and write the table to `results/`."""
    torch.manual_seed(0)
    rows = []
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        explorer = Explorer({"one": saliency(60, 200), "other": saliency(60, 200)})
        for shown, compare in (("one trace", None), ("two traces", "other")):
            explorer.state = {"compare": compare}
            page = browser.new_page(viewport=VIEWPORT)
            page.goto(explorer.to_html(Path(folder) / "inputs.html").as_uri())
            page.evaluate(WATCH)
            rows += [{"shown": shown} | row for row in all_inputs(page)]
            page.close()
        path = Explorer(saliency(28, 1000)).to_html(Path(folder) / "long.html")
        rows += [{"shown": "1000 steps"} | row for row in thousand_steps(browser, path)]
        about = {
            "browser": f"Chromium {browser.version}, headless, no GPU",
            "page_of_1000_steps_MB": round(path.stat().st_size / 1e6, 1),
        }
    table = pd.DataFrame(rows)
    summary = table.groupby(["shown", "input", "first"], sort=False)["ms"].agg(["count", "median", "max"]).round(1)
    summary.reset_index().to_csv(RESULTS / "explorer_paint.csv", index=False)
    (RESULTS / "explorer_paint.json").write_text(json.dumps(about | machine.facts(), indent=2) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
