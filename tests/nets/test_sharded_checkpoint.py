"""A checkpoint is read piece by piece: the same bits, and never all of it in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.support.side_by_side as two
from npedit.nets import distributed, sharded_checkpoint
from npedit.nets.learner import Learner, LearnerSettings
from npedit.nets.sharded_checkpoint import iterate_tensors, write_tensors

PIECE = 3000


def learner(seed: int) -> Learner:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    return Learner(net, LearnerSettings(betas=(0.5, 0.9)), 10)


def watch_pieces(note: Callable[[int, int], None]) -> None:
    """Call `note(bytes of a piece, tensors of earlier pieces that are still there)` when a piece is read."""
    load, seen = sharded_checkpoint._load_tensors, []

    def watched(folder: Path, tensors: dict[str, Tensor]) -> None:
        note(sum(t.nbytes for t in tensors.values()), sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(t) for t in tensors.values())
        load(folder, tensors)

    sharded_checkpoint._load_tensors = watched


def save_and_load(folder: Path) -> dict[str, Any]:
    """Write the state of a learner, and load it into another one."""
    with distributed.process_group():
        first, second = learner(0), learner(1)
        first.update([lambda: first.net(torch.ones(2, 16)).square().sum()])
        tensors, numbers = first.state()
        if distributed.is_main_process():
            folder.mkdir()
        distributed.all_gather(None)
        write_tensors(folder, {f"student/{k}": v for k, v in tensors.items()} | {"extra/x": torch.ones(3)})
        pieces: list[tuple[int, int]] = []
        sharded_checkpoint.PIECE_BYTES = PIECE
        watch_pieces(lambda size, left: pieces.append((size, left)))
        names = (
            (name.removeprefix("student/"), tensor)
            for name, tensor in iterate_tensors(folder, lambda name: None, "student/")
        )
        second.load_tensors(names, numbers)
        found = second.state()[0]
        return {
            "pieces": pieces,
            "wrong": [k for k in tensors if not torch.equal(tensors[k], found[k])],
            "names": found.keys() == tensors.keys(),
            "extra": [name for name, _ in iterate_tensors(folder, lambda name: None, ("extra/", "none/"))],
        }


def test_two_processes_load_a_learner_in_pieces_that_are_dropped_one_after_the_other(tmp_path: Path) -> None:
    ends = two.together(tmp_path, save_and_load, tmp_path / "checkpoint")
    for found in (end["value"] for end in ends):
        assert not found["wrong"] and found["names"] and found["extra"] == ["extra/x"]
        sizes, left = zip(*found["pieces"])
        assert len(sizes) > 5 and max(sizes) <= PIECE and max(left) <= 1, found["pieces"]
    assert ends[0] == ends[1]
    one = learner(1)
    assert dict(iterate_tensors(tmp_path / "checkpoint", lambda name: None)).keys() == {
        *(f"student/{name}" for name in one.state()[0]),
        *(f"student/optimizer.{key}.{n}" for key in ("step", "exp_avg", "exp_avg_sq") for n in one._masters),
        "extra/x",
    }


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [([], []), ([1], ["a"]), ([40, 60, 1], ["ab", "c"]), ([500, 1, 500], ["a", "b", "c"]), ([0, 100, 0], ["abc"])],
)
def test_groups_of_names(monkeypatch: pytest.MonkeyPatch, sizes: list[int], groups: list[str]) -> None:
    monkeypatch.setattr(sharded_checkpoint, "PIECE_BYTES", 100)
    found = sharded_checkpoint._group_names(dict(zip("abc", sizes, strict=False)))
    assert ["".join(group) for group in found] == groups
