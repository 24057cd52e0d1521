"""The kept answers and the cost of a run whose workers are other processes: one Ray actor holds both.

The actor `AnswerStore` runs on the machine of the command and is the only process that writes answers.jsonl. A worker
sends each answer to the actor before using the answer, and the call returns when the answer is on the disk. So a worker
that is killed loses only answers that it had not received, or was just sending.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from npedit.errors import UserError
from npedit.judges.cache import AnswerCache
from npedit.prepare.asking import CostCeiling, Meter

LOCK_SECONDS = 20.0  # how long an earlier run's store, which is just ending, may hold the file


class AnswerStore:
    """`AnswerCache` and `Meter` in a process of their own. `prices` are (in, out, ceiling)."""

    def __init__(self, path: str, prices: tuple[float, float, float]):
        self.path, self.meter = Path(path), Meter(*prices)

    def open(self) -> None:
        """Open the file and count its answers.

        Raises:
            UserError: another process holds the file, or it cannot be read or written.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self.cache = AnswerCache(self.path)
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self.meter.add(self.cache.total_token_usage())

    def get(self, key: str) -> Mapping[str, Any] | None:
        """See `AnswerCache.get`."""
        return self.cache.get(key)

    def put(self, record: Mapping[str, Any]) -> None:
        """See `AnswerCache.put`."""
        self.cache.put(record)

    def add(self, usage: Mapping[str, int]) -> None:
        """See `Meter.add`."""
        self.meter.add(usage)

    def set_aside(self, name: str, prompt_tokens: int, answer_tokens: int) -> float:
        """See `Meter.set_aside`. What a killed worker had set aside stays set aside: its request may have been paid."""
        return self.meter.set_aside(name, prompt_tokens, answer_tokens)

    def release(self, amount: float) -> None:
        """See `Meter.release`."""
        self.meter.release(amount)

    def totals(self) -> tuple[dict[str, int], dict[str, int]]:
        """(tokens of all answers, requests of this run by pass)."""
        return dict(self.meter.usage), dict(self.meter.requests)


def start_store(path: Path, meter: Meter) -> Any:
    """The handle of an `AnswerStore` on this machine, opened.

    Raises:
        UserError: see `AnswerStore.open`.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(AnswerStore)
    store = actor.remote(str(path.absolute()), (meter.price_in, meter.price_out, meter.max_cost))
    fetch(store.open.remote())
    return store


class RemoteAnswers:
    """The answers of an `AnswerStore`, from any process of the cluster."""

    def __init__(self, store: Any):
        self.store = store

    def get(self, key: str) -> Mapping[str, Any] | None:
        """See `AnswerCache.get`."""
        return fetch(self.store.get.remote(key))

    def put(self, record: Mapping[str, Any]) -> None:
        """See `AnswerCache.put`."""
        fetch(self.store.put.remote(record))


class RemoteMeter(Meter):
    """The meter of an `AnswerStore`, from any process of the cluster. `refresh` fetches its counts."""

    def __init__(self, store: Any, price_in: float, price_out: float, max_cost: float):
        super().__init__(price_in, price_out, max_cost)
        self.store = store

    def __reduce__(self) -> Any:
        return RemoteMeter, (self.store, self.price_in, self.price_out, self.max_cost)

    def add(self, usage: Mapping[str, int]) -> None:
        """See `Meter.add`. An actor serves the calls of one process in their order, so that the tokens are counted
        before the amount is released."""
        self.store.add.remote(dict(usage))

    def set_aside(self, name: str, prompt_tokens: int, answer_tokens: int) -> float:
        """See `Meter.set_aside`."""
        return fetch(self.store.set_aside.remote(name, prompt_tokens, answer_tokens))

    def release(self, amount: float) -> None:
        """See `Meter.release`."""
        self.store.release.remote(amount)

    def refresh(self) -> None:
        """Fetch the counts, from which `cost`, `usage` and `requests` are read."""
        usage, requests = fetch(self.store.totals.remote())
        self.usage, self.requests = Counter(usage), Counter(requests)


def fetch(reference: Any) -> Any:
    """The result of a call to an actor.

    Raises:
        UserError, CostCeiling: what the call raised; or UserError: the actor is gone.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError | CostCeiling) else error) from None
    except RayError as error:
        raise UserError(
            f"--engine ray: expected the process that keeps the answers; got {type(error).__name__}: it has ended; run "
            "the same command again: no answered question is asked again"
        ) from None
