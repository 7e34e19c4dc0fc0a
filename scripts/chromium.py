"""Drive the Chromium that is installed, without a window, for what is to be seen or measured in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def executable() -> str | None:
    """Return the path of the first browser that is installed, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Open a browser, and close it at the end.

    Raises:
        FileNotFoundError: none is installed.
    """
    from playwright.sync_api import sync_playwright

    path = executable()
    if path is None:
        raise FileNotFoundError(f"no browser; install one of {', '.join(NAMES)} (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
