"""`npedit review` and `npedit compare --people A B` in a process of their own, and their page in Chromium."""

import re
import signal
import subprocess
import sys
import time


class LocalPage:
    """The page and its process. `requests` are the addresses that the browser asked for."""

    def __init__(self, browser, log, *words):
        self.log, self.requests = log, []
        with log.open("w") as out:
            command = [sys.executable, "-m", "npedit", *map(str, words), "--port", "0"]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
        self.url = self._wait()
        self.tab = browser.new_page(viewport={"width": 1200, "height": 800})
        self.tab.set_default_timeout(30_000)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(self.url)

    def _wait(self):
        for _ in range(1200):
            if found := re.search(r"http://127[\d.:]+\d", self.log.read_text()):
                return found[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def press(self, key, words=""):
        """Press a key, and wait until the progress contains these words."""
        self.tab.keyboard.press(key)
        self.wait_for("#progress", words)

    def wait_for(self, place, words):
        self.tab.wait_for_function(
            "([place, words]) => document.querySelector(place)?.innerText.includes(words)", arg=[place, words]
        )

    def foreign_requests(self):
        """The addresses outside the page's server that were asked for."""
        return [url for url in self.requests if not re.match(rf"{re.escape(self.url)}/|data:|blob:", url)]

    def stop(self):
        """Press Ctrl-C; returns what was printed."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()
        return self.log.read_text()
