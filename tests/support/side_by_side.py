"""Two processes that train together, for tests: started quickly, and each tells how it ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.families.flux import Flux
from npedit.nets import distributed
from npedit.recipe.config import Recipe, make_recipe
from npedit.steps.base import Parts
from npedit.training import trainer
from npedit.training.parts import build_source

STUDENT = {"lr": 0.001, "warmup_updates": 2}
FAKE = {"lr": 0.001, "ema": 0.0}


class Crash(Exception):
    """Ends one process without warning."""


def recipe(shard: str = "none", **changes: Any) -> Recipe:
    """Two updates of the warm-up, two of the method, a batch of four over all processes."""
    editing = {"student": STUDENT, "fake": FAKE, "fake_updates": 2, "steps": 2, "balance": "match", "ramp_updates": 0}
    raw = {
        "name": "small",
        "family": {"name": "flux"},
        "critic": {"name": "llava_onevision"},
        "data": {"name": "toy", "nothing_share": 0.0},
        "stages": [
            {"step": "reference_copy", "updates": 2, "batch_size": 4, "settings": {"student": STUDENT, "steps": 2}},
            {"step": "np_edit", "updates": 2, "batch_size": 4, "settings": editing},
        ],
        "trainer": {"save_every": 1, "keep": 4, "sample_items": 2, "steps": 2, "shard": shard},
    }
    return make_recipe(raw | changes)


def parts(made: Recipe) -> Parts:
    family = Flux.tiny(0)
    if made.family.isolated_references:
        family.isolate_references()
    return Parts(family, LlavaOnevision.tiny(0), "short", torch.device("cpu"), made.lora, made.memory)


def train(run: Path, made: Recipe, at: tuple[int, int] | None = None, event: str = "") -> dict[str, Any]:
    """Train; at the end of update `at[1]`, process `at[0]` crashes or hears SIGTERM, as `event` says.

    Returns:
        the ids of the items that this process was given.
    """
    ids: list[str] = []

    def source(made: Recipe) -> Any:
        opened = build_source(made)
        plain = opened.batch

        def batch(index: int, size: int, rank: int = 0, world: int = 1) -> Any:
            found = plain(index, size, rank, world)
            if world > 1:  # else it is for pictures of the run or a fingerprint, which are the same for all
                ids.extend(found.ids)
            return found

        opened.batch = batch
        return opened

    def on_event(name: str, facts: dict) -> None:
        if (name, at) == ("update", (distributed.rank(), facts["step"])):
            if event == "crash":
                raise Crash("no more")
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train(made, run, parts=parts, source=source, on_event=on_event)
    return {"ids": ids}


def together(folder: Path, job: Callable[..., Any], *given: Any, count: int = 2, near: int = 2) -> list[dict[str, Any]]:
    """Run `job(*given)` in `count` processes, `near` of them to a machine.

    Returns:
        for each: {"value": what it returned}, {"exit": code} or {"error": class and message}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["npedit.training.trainer", "npedit.families.flux", "npedit.critics.llava_onevision"]
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": near, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        context.Process(target=_work, args=(folder, common | {"RANK": i, "LOCAL_RANK": i % near}, job, given))
        for i in range(count)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(600)
    return [json.loads((folder / f"outcome-{i}.json").read_text()) for i in range(count)]


def _work(folder: Path, env: dict[str, Any], job: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    try:
        outcome = {"value": job(*given)}
    except SystemExit as stop:
        outcome = {"exit": stop.code}
    except Exception as error:  # noqa: BLE001 it is the outcome
        outcome = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"outcome-{env['RANK']}.json").write_text(json.dumps(outcome))
