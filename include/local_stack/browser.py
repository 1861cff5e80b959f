"""Chromium as a person would use it, for tests of the pages and their pictures (Playwright)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from include.errors import ConfigurationError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the stack is called, and nothing is kept.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT = 120_000  # milliseconds


def chromium() -> str | None:
    """Return the path of the machine's Chromium, if it has one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield a headless browser; raises `ConfigurationError` where the machine has none."""
    path = chromium()
    if path is None:
        raise ConfigurationError(f"No Chromium on the PATH: install one of {', '.join(NAMES)}.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


def new_page(
    running: Browser, url: str, *, dark: bool = False, width: int = 1280, height: int = 860
) -> Page:
    """Return a page of a new visitor of Airflow at `url`, in its light or dark theme."""
    context = running.new_context(
        base_url=url,
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        timezone_id="UTC",
        locale="en-US",
    )
    context.set_default_timeout(TIMEOUT)
    return context.new_page()
