"""A picture and a short animation of the explorer at work, for the README.

    python scripts/capture_explorer.py            # writes figures/captures/explorer.png and explorer.gif

It drives the exported page of notebook 09's two traces in a headless Chromium, as a reader would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from io import BytesIO
from pathlib import Path
from unittest import mock

from chromium import chromium
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page

import stepsal
from stepsal import StepSaliency
from stepsal.tasks import chain
from stepsal.widgets import Explorer

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 960, 1000
DAY = date(2026, 11, 26)  # the date on the page, so that pictures stay the same from day to day


def maps_of_notebook_09() -> dict[str, StepSaliency]:
    """Make the maps of the notebook's first explorer anew, from what its figure says of the two traces."""
    said = json.loads((ROOT / "figures" / "data" / "explorer_figure.json").read_text())["provenance"]
    model = stepsal.load("mini")
    problem = chain.sample(said["problem_seed"], length=said["length"])
    first, last = said["sampling_seeds"]
    answers = stepsal.generate_batch(
        model,
        [problem.question] * (last - first + 1),
        temperature=said["temperature"],
        seed=first,
        max_new_tokens=said["max_new_tokens"],
    )
    shown = said["sample_shown"]
    return {name: stepsal.step_saliency(model, answers[shown[name]]) for name in ("wrong", "correct")}


class Film:
    """Collect pictures of a page, each with the pointer, which a headless browser does not show."""

    def __init__(self, page: Page) -> None:
        self.page, self.pointer = page, (480.0, 600.0)
        self.frames: list[Image.Image] = []
        self.times: list[int] = []

    def take(self, milliseconds: int) -> None:
        """Take a picture of the page as it is, to be shown for a time."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        frame = Image.open(BytesIO(self.page.screenshot())).convert("RGB")
        x, y = self.pointer
        arrow = [(0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12)]
        ImageDraw.Draw(frame).polygon([(x + dx, y + dy) for dx, dy in arrow], fill="black", outline="white")
        self.frames.append(frame)
        self.times.append(milliseconds)

    def move(self, x: float, y: float, milliseconds: int = 900) -> None:
        """Move the pointer to a place, in a few pictures."""
        (x0, y0), steps = self.pointer, 4
        for i in range(1, steps + 1):
            self.pointer = (x0 + (x - x0) * i / steps, y0 + (y - y0) * i / steps)
            self.page.mouse.move(*self.pointer)
            self.take(milliseconds if i == steps else 60)

    def cell(self, query: int, key: int, milliseconds: int = 900) -> None:
        """Move the pointer to a cell of the first map."""
        box = self.page.locator(".stepsal-map").first.bounding_box()
        self.move(box["x"] + 32 + (key + 0.5) * 400 / 18, box["y"] + (query + 0.5) * 400 / 18, milliseconds)

    def choose(self, milliseconds: int = 1200, **choices: str) -> None:
        """Choose labels in the controls of these names."""
        for name, label in choices.items():
            select = self.page.locator(f".stepsal-control-{name}")
            box = select.bounding_box()
            self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, milliseconds=200)
            select.select_option(label=label)
            self.take(milliseconds)

    def save(self, path: Path) -> None:
        """Write the pictures as an animated GIF."""
        strip = Image.new("RGB", (WIDTH, HEIGHT * len(self.frames)))
        for i, frame in enumerate(self.frames):
            strip.paste(frame, (0, HEIGHT * i))
        colors = strip.quantize(
            255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )  # one palette, so that only changes are stored
        frames = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in self.frames]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=self.times, loop=0, optimize=True)


def capture(browser: Browser, folder: Path) -> None:
    """Write the picture and the animation into a folder."""
    explorer = Explorer(maps_of_notebook_09())
    explorer.state = {"compare": "correct", "metric": "share", "layer": 0, "top_k": 1}
    with tempfile.TemporaryDirectory() as temporary, mock.patch("stepsal.widgets.export.date") as calendar:
        calendar.today.return_value = DAY
        path = explorer.to_html(Path(temporary) / "maps.html")
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(path.as_uri())
    film = Film(page)
    film.take(900)
    slider = page.locator(".stepsal-control-slider")
    box = slider.bounding_box()
    for layer in range(8):
        film.pointer = (box["x"] + 8 + layer * (box["width"] - 16) / 7, box["y"] + 8)
        slider.fill(str(layer))
        film.take(450)
    slider.fill("6")
    film.cell(10, 7)
    film.cell(15, 1)
    page.mouse.down()
    page.mouse.up()
    film.take(1200)
    still = film.frames[-1]
    row = page.locator('.stepsal-step[data-step="14"]').first.bounding_box()
    film.move(row["x"] + 200, row["y"] + 12, milliseconds=1500)
    film.choose(metric="difference of shares", milliseconds=1800)
    film.choose(metric="share of its row")
    film.choose(view="arcs", milliseconds=1800)
    page.close()
    folder.mkdir(parents=True, exist_ok=True)
    film.save(folder / "explorer.gif")
    still.save(folder / "explorer.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "figures" / "captures")
    with chromium() as browser:
        capture(browser, parser.parse_args().folder)
