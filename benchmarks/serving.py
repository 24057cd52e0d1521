"""`npedit serve` under load, with the embedded editor: throughput, latency, memory, bad requests, and its end.

    python -m benchmarks.serving [--requests 2000] [--rounds 5] [--write docs/benchmarks.md]

One client and eight clients take turns; each client waits for an answer before its next request. Then come the mixed
requests: seven of ten are good, each with an instruction and a seed of its own, two are bad, and in one the client goes
away during or after its upload. Memory is the resident memory of the server's process while no request is open. At the
end the server gets SIGTERM while eight clients wait.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.__main__ import print_plain
from benchmarks.measure import MIB, describe_machine, fill_tables, table
from benchmarks.serving_requests import GONE, MEGAPIXELS, Client, Load, Outcome, make_load, mixed_request
from benchmarks.serving_requests import MIB as REQUEST_MIB

CLIENTS = 8
WARM_REQUESTS = 200  # after so many mixed requests memory is measured first
SECONDS_TO_START = 120


@dataclass
class Server:
    """A running `npedit serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def resident(self) -> int:
        """Bytes of resident memory, once no request is open."""
        self.wait_until_idle()
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s*(\d+) kB", status)[1])  # type: ignore[index]

    def open_files(self) -> int:
        """How many files and connections the process has open, once no request is open."""
        self.wait_until_idle()
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_until_idle(self) -> None:
        """Return when no edit waits and no batch runs."""
        before = -1.0
        while (edited := self.metric("npedit_batch_items_sum")) != before or self.metric("npedit_waiting"):
            before = edited
            time.sleep(1)

    def metric(self, name: str) -> float:
        """A figure of `/metrics`."""
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics", timeout=60).text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server of the embedded editor on a free port; it is ended at the end."""
    limits = ("--max-mib", str(REQUEST_MIB), "--max-megapixels", str(MEGAPIXELS))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as out:
            command = [sys.executable, "-m", "npedit", "serve", "--port", "0", *limits]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield Server(process, _wait_for_address(process, log), log)
        finally:
            process.kill()
            process.wait()


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://[\w.:\[\]]+", log.read_text()):
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"expected a server; got: {log.read_text()}")


def send(server: Server, load: Load, clients: int, numbers: Sequence[int],
         call: Callable[[Client, int], Outcome]) -> tuple[list[Outcome], float]:  # fmt: skip
    """What became of the requests of these numbers, and the seconds of all. So many clients share them."""
    shares = [numbers[first::clients] for first in range(clients)]

    def one(share: Sequence[int]) -> list[Outcome]:
        client = Client(server.url, load)
        with contextlib.closing(client):
            return [call(client, number) for number in share]

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        outcomes = list(itertools.chain.from_iterable(pool.map(one, shares)))
    return outcomes, time.perf_counter() - begun


# ------------------------------------------------------------------------------------------------------- throughput


@dataclass
class Speed:
    """Rounds of one number of clients: edits per second of each round, and seconds of each request."""

    per_second: list[float]
    seconds: list[float]


def measure_speed(server: Server, load: Load, rounds: int, requests: int = 24) -> dict[int, Speed]:
    """Speed by number of clients. One and `CLIENTS` clients take turns; the first turn is not counted."""
    found = {count: Speed([], []) for count in (1, CLIENTS)}
    for turn in range(rounds + 1):
        for count, speed in found.items():
            outcomes, taken = send(server, load, count, range(requests * (1 if count == 1 else 4)), Client.edit)
            if any(outcome.status != 200 for outcome in outcomes):
                raise RuntimeError(f"expected edits; got {Counter(o.status for o in outcomes)}")
            if turn:
                speed.per_second.append(len(outcomes) / taken)
                speed.seconds += [outcome.seconds for outcome in outcomes]
    return found


def speed_table(found: dict[int, Speed]) -> str:
    """One row for each number of clients."""
    base = found[1].per_second
    rows = []
    for count, speed in found.items():
        ratio = statistics.median(a / b for a, b in zip(speed.per_second, base))
        cuts = statistics.quantiles(speed.seconds, n=100)
        shown = [f"{1000 * cuts[p - 1]:.0f}" for p in (50, 95, 99)]
        rows.append((count, f"{statistics.median(speed.per_second):.1f}", f"{ratio:.2f}", *shown))
    head = ("clients", "edits/s", "times the speed of one client", "median, ms", "95 %, ms", "99 %, ms")
    return table(head, rows)


# ------------------------------------------------------------------------------------------------- mixed requests


@dataclass
class Mixed:
    """The mixed requests: what became of each, resident memory and open files after the first ones and at the end,
    and how many pictures the model edited."""

    outcomes: list[Outcome]
    resident: tuple[int, int]
    open_files: tuple[int, int]
    edited: int

    @property
    def growth(self) -> float:
        """By which share the resident memory grew."""
        return self.resident[1] / self.resident[0] - 1


def measure_mixed(server: Server, load: Load, requests: int, warm: int = WARM_REQUESTS) -> Mixed:
    """Send so many mixed requests with `CLIENTS` clients."""
    before = server.metric("npedit_batch_items_sum")
    outcomes, _ = send(server, load, CLIENTS, range(warm), mixed_request)
    resident, files = server.resident(), server.open_files()
    more, _ = send(server, load, CLIENTS, range(warm, requests), mixed_request)
    ended = server.resident(), server.open_files()
    edited = int(server.metric("npedit_batch_items_sum") - before)
    return Mixed(outcomes + more, (resident, ended[0]), (files, ended[1]), edited)


def wrong_answers(outcomes: Sequence[Outcome], load: Load) -> Counter[tuple[str, int]]:
    """(kind, status) of requests with another status than their kind must have, and how many."""
    wanted = {kind: status for kind, (_, status) in load.bad.items()} | {"edit": 200, "client goes away": GONE}
    return Counter((o.kind, o.status) for o in outcomes if o.status != wanted[o.kind])


def mixed_table(mixed: Mixed, load: Load) -> str:
    """What came of the mixed requests."""
    wrong = wrong_answers(mixed.outcomes, load)
    sent = Counter(outcome.kind for outcome in mixed.outcomes)
    right = sent - Counter({kind: sum(n for (k, _), n in wrong.items() if k == kind) for kind in sent})
    first, last = (f"{count / MIB:.0f} MiB" for count in mixed.resident)
    rows = [
        ("mixed requests", f"{len(mixed.outcomes):,}"),
        ("good ones; of them answered with a picture", f"{sent['edit']:,}; {right['edit']:,}"),
        *(
            (f"{kind}; answered with {status}", f"{sent[kind]}; {right[kind]}")
            for kind, (_, status) in load.bad.items()
        ),
        ("clients that went away", sent["client goes away"]),
        ("pictures that the model edited", f"{mixed.edited:,}: the good ones, and some whose client went away"),
        (f"resident memory after {WARM_REQUESTS} requests, and at the end", f"{first}, {last} ({mixed.growth:+.2%})"),
        ("open files and connections then", "{}, {}".format(*mixed.open_files)),
    ]
    return table(("what", "figure"), rows)


# --------------------------------------------------------------------------------------------------------- the end


@dataclass
class End:
    """What happened at SIGTERM: the statuses of the clients' answers, the exit code, the seconds until the end."""

    statuses: Counter[int]
    code: int
    seconds: float


def measure_end(server: Server, load: Load) -> End:
    """Send SIGTERM while `CLIENTS` clients wait for an edit each."""
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, server, load, CLIENTS, range(CLIENTS), Client.edit_slowly)
        while server.metric("npedit_requests_in_progress") < CLIENTS + 1 and not sent.done():
            pass  # a connection whose request has not come yet is closed at once; the request that asks counts too
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(120)
        seconds = time.monotonic() - begun
        outcomes, _ = sent.result()
    return End(Counter(outcome.status for outcome in outcomes), code, seconds)


def end_sentence(end: End, log: str) -> str:
    """The end in words."""
    statuses = ", ".join(f"{n} x {status or 'no answer'}" for status, n in sorted(end.statuses.items()))
    return (
        f"SIGTERM while {CLIENTS} clients waited: {statuses}; exit code {end.code} after {end.seconds:.1f} s. "
        f"Tracebacks in the server's log of the whole test: {log.count('Traceback')}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--requests", type=int, default=2000, help="mixed requests")
    parser.add_argument("--rounds", type=int, default=5, help="of one and of eight clients")
    parser.add_argument("--write", default="", help="a page to write the tables into")
    chosen = parser.parse_args(arguments)
    load = make_load()
    with serving() as server:
        speed = speed_table(measure_speed(server, load, chosen.rounds))
        mixed = mixed_table(measure_mixed(server, load, chosen.requests), load)
        end = end_sentence(measure_end(server, load), server.log.read_text())
    text = f"Measured on: {describe_machine()}.\n\n{speed}\n\n{mixed}\n\n{end}"
    print_plain(text)
    if chosen.write:
        page = Path(chosen.write)
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), {"serving": text}), encoding="utf-8")


if __name__ == "__main__":
    main()
