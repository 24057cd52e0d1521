"""`npedit serve` in a process of its own."""

import re
import subprocess
import sys
import time


class Server:
    """A running `npedit serve`: its address, its process and what it printed."""

    def __init__(self, log, *arguments, env=None):
        self.log = log
        with log.open("w") as out:
            command = [sys.executable, "-m", "npedit", "serve", "--port", "0", *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        self.url = self._wait()

    def _wait(self):
        for _ in range(1800):
            if found := re.search(r"http://[\w.:\[\]]+", self.log.read_text()):
                return found[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(self.log.read_text())

    def stop(self, number):
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)
