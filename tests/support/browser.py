"""A headless Chromium, and the page of `npedit serve` in it."""

import io
import os
import re
import shutil
from contextlib import contextmanager

import httpx
import numpy as np
from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@contextmanager
def open_browser():
    """A browser with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class EditPage:
    """The page as a person uses it. `requests` are the addresses that the browser asked for."""

    def __init__(self, browser, url):
        self.url, self.requests = url, []
        self.tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.tab.set_default_timeout(30_000)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(url)

    def wait(self):
        """Until the page is ready."""
        self.tab.wait_for_selector("#edit")
        return self

    def upload(self, file):
        self.tab.locator("#photo input[type=file]").set_input_files(file)
        self.tab.wait_for_selector("#photo img")

    def fill(self, instruction, seed=0, count=1):
        self.tab.fill("#instruction textarea", instruction)
        self.tab.fill("#seed input", str(seed))
        self.tab.fill("#count input[type=number]", str(count))
        self.tab.press("#count input[type=number]", "Tab")

    def edit(self, edits):
        """Click on Edit, and wait until the history has so many edits."""
        self.tab.click("#edit")
        self.wait_for_edits(edits)

    def wait_for_edits(self, edits):
        self.tab.wait_for_function("n => document.querySelectorAll('#history .gallery-item').length == n", arg=edits)

    def message(self):
        """The text of the message that is shown; it is closed."""
        text = self.tab.wait_for_selector(".toast-body").inner_text()
        self.tab.locator(".toast-close").first.click()
        self.tab.wait_for_selector(".toast-body", state="detached")
        return text

    def pictures(self, place):
        """The pixels of the pictures of one component."""
        sources = self.tab.locator(f"{place} img").evaluate_all("all => all.map(one => one.src)")
        cookies = {c["name"]: c["value"] for c in self.tab.context.cookies()}
        return [pixels(httpx.get(source, cookies=cookies).content) for source in sources]

    def captions(self, place):
        return self.tab.locator(f"{place} .caption-label").all_inner_texts()

    def foreign_requests(self):
        """The addresses outside the server that were asked for."""
        return [url for url in self.requests if not re.match(rf"{re.escape(self.url)}/|data:|blob:", url)]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
