"""A Chromium for the tests that need one; without it they are skipped, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from browsing import Open, picture, watched_page
from playwright.sync_api import Browser, Page, expect

from stepsal.widgets import Explorer


@pytest.fixture(scope="module")  # and not the session: Playwright keeps an event loop, which other tests can't bear
def browser() -> Iterator[Browser]:
    if chromium.executable() is None:
        pytest.skip("NO BROWSER: not tested in one; install chromium, or run `make browser` as root on Debian")
    with chromium.chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page on which nothing may go wrong; one from a file asks for nothing but itself."""
    urls: list[str] = []
    with watched_page(browser, 1280, 1100) as page:
        page.on("request", lambda request: urls.append(request.url))
        yield page
        picture(page, request)
    if urls and urls[0].startswith("file:"):
        assert set(urls) == {urls[0]}


@pytest.fixture
def open_page(page: Page, tmp_path: Path) -> Open:
    """Export an explorer, and open the file."""

    def opened(explorer: Explorer, **options: object) -> Page:
        page.goto(explorer.to_html(tmp_path / "maps.html", **options).as_uri())
        expect(page.locator(".stepsal-map").first).to_be_visible()
        return page

    return opened
