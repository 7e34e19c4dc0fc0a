"""Helpers of the tests in a real Chromium: pages on which nothing may go wrong, and the parts of an explorer on them.

Pictures of what the tests saw are left in build/screenshots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
LEFT, MAP = 32, 400  # of drawing.js

Open = Callable[..., Page]

expect.set_options(timeout=60_000)  # a machine that runs other things too may be slow; nobody waits where all is well


@contextmanager
def watched_page(browser: Browser, width: int, height: int) -> Iterator[Page]:
    """A page that must not complain: no error, also on the console, and no alert."""
    page, complaints = browser.new_page(viewport={"width": width, "height": height}), []
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()
    assert complaints == [], complaints


def picture(page: Page, request: pytest.FixtureRequest) -> None:
    """Leave a screenshot under the name of the test."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower()).strip('-')}.png")


def panel(page: Page | Locator, label: str = "wrong") -> Locator:
    return page.locator(f'.stepsal-panel[data-label="{label}"]')


def point(where: Locator, query: int, key: int, n: int = 5) -> dict[str, float]:
    """The middle of a cell in the canvas."""
    scroll = where.locator(".stepsal-frame").evaluate("e => [e.scrollLeft, e.scrollTop, Number(e.dataset.cell)]")
    cell = scroll[2]
    assert cell >= MAP / n
    return {"x": LEFT + (key + 0.5) * cell - scroll[0], "y": (query + 0.5) * cell - scroll[1]}


def hover(where: Locator, query: int, key: int, n: int = 5) -> str:
    """The read-out over a cell."""
    where.locator(".stepsal-map").hover(position=point(where, query, key, n))
    readout = where.locator(".stepsal-readout")
    expect(readout).to_contain_text(re.compile(r"rank \d+ of \d+$"))
    settle(where)
    return readout.inner_text()


def over_token(where: Locator, row: int, column: int) -> None:
    """Point at a pair of tokens of the cell that is open."""
    tokens = where.locator(".stepsal-tokens")
    side, room = (float(tokens.get_attribute(f"data-{name}")) for name in ("side", "room"))
    tokens.hover(position={"x": room + (column + 0.5) * side, "y": room + (row + 0.5) * side})


def choose(page: Page, **choices: Any) -> None:
    """Choose by the page's own controls."""
    for name, value in choices.items():
        name = "slider" if name == "layer" else name
        control = page.locator(f".stepsal-control-{name.replace('_', '-')}")
        if name in ("slider", "top_k", "threshold"):
            control.fill(str(value))
        elif name == "shared":
            control.set_checked(value)
        else:
            control.select_option(label=value)
    settle(page.locator(".stepsal-explorer"))


def settle(where: Locator) -> None:
    """What was asked for is painted."""
    where.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
