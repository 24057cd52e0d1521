"""`npedit prepare --engine ray`: the photos of a run are worked on by the processes of a Ray cluster, with Ray Data.

Photos and the set's folder are on a file system that all machines share. Ray restarts a worker that is killed, and runs
its photos again: the answers that it had received are in the store (`ray_answers.py`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from npedit.errors import UserError
from npedit.prepare.asking import Answers, CostCeiling, Meter
from npedit.prepare.engine import Engine, Job, Row, Work, ceiling_reason
from npedit.prepare.passes import Passes
from npedit.prepare.photos import Photo, ScanJob, scan_photo

SCAN_BLOCK = 64  # photos in one task of reading
HASHES = ("phash", "colours")
CONNECT_SECONDS = 5.0
# Ray reads these when it is imported.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayEngine(Engine):
    """A Ray cluster. `address` is HOST:PORT or "auto"; "" is $RAY_ADDRESS, or else a new cluster of this machine's
    processes, which ends with the run. If this process is connected already, that connection is used. `keys` are the
    environment variables that workers need for the servers.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, address: str = "", keys: Sequence[str] = ()):
        self.address, self.keys = address, [name for name in keys if os.environ.get(name)]
        self._processes = 1
        _import_ray()

    @contextmanager
    def open_answers(self, path: Path, meter: Meter) -> Iterator[tuple[Answers, Meter]]:
        """See `Engine.open_answers`. The connection to the cluster lasts as long."""
        ray = _import_ray()
        with cluster_connection(self.address):
            from npedit.prepare.ray_answers import RemoteAnswers, RemoteMeter, start_store

            self._processes = max(1, int(ray.available_resources().get("CPU", 1)))
            store = start_store(path, meter)
            try:
                total = RemoteMeter(store, meter.price_in, meter.price_out, meter.max_cost)
                total.refresh()
                yield RemoteAnswers(store), total
            finally:
                ray.kill(store)

    def scan(self, jobs: Sequence[ScanJob]) -> Iterator[Photo]:
        """See `Engine.scan`."""
        rows = [json.dumps([str(folder.absolute()), *rest]) for folder, *rest in jobs]
        yield from (value for _, value in _map_rows(scan_rows, rows, SCAN_BLOCK))

    def run(self, work: Work, jobs: Sequence[Job], passes: Passes) -> Iterator[tuple[Row, Any]]:
        """See `Engine.run`. Each process asks with several threads, together as many as the writer takes requests."""
        from ray.data import ActorPoolStrategy

        processes = min(self._processes, passes.writer.writer.workers, max(1, len(jobs)))
        threads = math.ceil(passes.writer.writer.workers / processes)
        pool = ActorPoolStrategy(
            size=processes, max_tasks_in_flight_per_actor=3, max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        )  # fmt: skip
        rows = [json.dumps([_without_hashes(photo), wanted]) for photo, wanted in jobs]
        block = max(1, min(4 * threads, math.ceil(len(jobs) / (4 * processes))))
        options = {"compute": pool, "fn_constructor_args": (work, passes, threads, self.keys)}
        stopped: tuple[Row, str] | None = None
        for number, value in _map_rows(PhotoWorker, rows, block, **options):
            passes.writer.meter.refresh()
            if value is None:
                stopped = jobs[number][0], ceiling_reason(passes.writer.meter)
            else:
                yield jobs[number][0], value
        if stopped:
            yield stopped


def _without_hashes(photo: Mapping[str, Any]) -> Row:
    """A photo as workers need it: with an absolute path, without hashes."""
    kept = {name: value for name, value in photo.items() if name not in HASHES}
    return {**kept, "path": os.path.abspath(photo["path"])}


# ----------------------------------------------------------------------------------------------------------- cluster


def _import_ray() -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"--engine ray: expected the package ray; got {error}; install it with pip install 'npedit[ray]'"
        ) from None
    return ray


@contextmanager
def cluster_connection(address: str) -> Iterator[None]:
    """A connection to a cluster for the time of the block.

    Raises:
        UserError: the cluster is out of reach, or does not take this process.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    _check_address(address)
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, **local)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreachable_cluster(address, " ".join(str(error).split())[:300]) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that something listens at HOST:PORT; Ray itself tries for a minute."""
    host, colon, port = address.rpartition(":")
    if address in ("local", "auto"):
        return
    if "://" in address or not colon or not port.isdecimal():
        raise UserError(
            f"--ray-address: expected HOST:PORT of the cluster's head, or auto; got {address!r}; run the command on a "
            "machine of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable_cluster(address, f"{type(error).__name__}: {error}") from None


def _unreachable_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--ray-address: expected a Ray cluster at {address}; got: {reason}; start one with ray start --head, or "
        "correct the address"
    )


# ----------------------------------------------------------------------------------------------------------- workers


def _map_rows(function: Any, rows: Sequence[str], block: int, **options: Any) -> Iterator[tuple[int, Any]]:
    """(number of the row, the function's value) as Ray Data finishes them, from tasks of `block` rows.

    Raises:
        UserError: a row has none, or the cluster is gone.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    _quiet_ray_data()
    if not rows:
        return
    items = [{"number": number, "row": row} for number, row in enumerate(rows)]
    table = ray.data.from_items(items, override_num_blocks=math.ceil(len(rows) / block))
    found = table.map_batches(function, batch_size=None, num_cpus=1, **options)
    try:
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            for number, text in zip(batch["number"].to_pylist(), batch["value"].to_pylist()):
                value = json.loads(text)
                if "error" in value:
                    raise UserError(value["error"])
                yield number, value["value"]
    except RayTaskError:
        raise  # an error of the program, with the worker's traceback
    except RayError as error:
        raise UserError(
            f"--engine ray: expected the cluster to run to the end; got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; run the same command again: no answered question is asked again"
        ) from None


def _quiet_ray_data() -> None:
    """Ray Data prints no plan and no progress bars: npedit shows the progress."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _values(batch: Mapping[str, Any], values: Sequence[Any]) -> dict[str, list[Any]]:
    return {"number": list(batch["number"]), "value": [json.dumps(value) for value in values]}


def _attempt(function: Callable[[], Any]) -> dict[str, Any]:
    """{"value": the function's value}, None at the cost ceiling; {"error": the message} of an error for users."""
    try:
        return {"value": function()}
    except CostCeiling:
        return {"value": None}
    except UserError as error:
        return {"error": str(error)}


def scan_rows(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """`scan_photo` of each row, in a task of Ray Data."""
    return _values(batch, [_attempt(partial(_scan_row, row)) for row in batch["row"]])


def _scan_row(row: str) -> Photo:
    folder, name, kept, max_pixels, min_side = json.loads(row)
    _require_folder(Path(folder))
    return scan_photo(Path(folder), name, kept, max_pixels, min_side)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"--engine ray: expected the folder of photos on each machine of the cluster; got none at {folder} on "
            f"{socket.gethostname()}; use a file system that all machines share, and an absolute path"
        )


class PhotoWorker:
    """A process of Ray Data that asks about photos with `threads` threads."""

    def __init__(self, work: Work, passes: Passes, threads: int, keys: Sequence[str]):
        self.work, self.passes, self.keys = work, passes, keys
        self.threads = ThreadPoolExecutor(threads)
        self.stopping = threading.Event()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        return _values(batch, list(self.threads.map(lambda row: _attempt(partial(self._run, row)), batch["row"])))

    def _run(self, row: str) -> Any:
        self._check_keys()
        photo, wanted = json.loads(row)
        _require_folder(Path(photo["path"]).parent)
        try:
            return None if self.stopping.is_set() else self.work(photo, wanted, self.passes)
        except (CostCeiling, UserError):
            self.stopping.set()
            self.passes.stop_retrying()
            raise

    def _check_keys(self) -> None:
        for name in self.keys:
            if not os.environ.get(name):
                raise UserError(
                    f"--engine ray: expected {name} in the environment of each machine's Ray; got none on "
                    f"{socket.gethostname()}; set it before ray start"
                )
