"""Two processes train as one: the same losses and weights, the same bits after a stop, one end for all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import tests.support.side_by_side as two
from npedit.errors import UserError
from npedit.generator import sample_noise, seeded_generator
from npedit.nets import distributed, sharded_checkpoint
from npedit.recipe.config import Recipe
from npedit.runs import checkpoint
from npedit.training.parts import check_dtype, check_processes

WIDE = 1e-3  # what AdamW moves a weight by in one update


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    two.train(run, two.recipe())
    return run


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of two processes that each hold a half of every net."""
    folder = tmp_path_factory.mktemp("sharded")
    ends = two.together(folder, two.train, folder / "run", two.recipe("full"))
    assert all("value" in end for end in ends), ends
    return folder / "run"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / f"checkpoint-{step:06d}")[0]


def rows(run: Path) -> list[dict]:
    kept = ("loss/", "grad_norm/", "step", "skipped", "critic/inverse")
    return [{k: v for k, v in r.items() if k.startswith(kept)} for r in checkpoint.read_rows(run / checkpoint.METRICS)]


def assert_alike(run: Path, other: Path) -> None:
    """The same losses to rounding; weights that have drifted apart by less than a thousandth of one update's step in
    the mean, where an error of scale or of noise would make it whole steps. Measured: 3e-7 and 1e-6 of a step."""
    a, b = rows(run), rows(other)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for one, another in zip(a, b, strict=True):
        assert one == pytest.approx(another, rel=1e-5, abs=1e-7)
    a, b = weights(run, 4), weights(other, 4)
    assert a.keys() == b.keys()
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a if "/net." in k or "/ema." in k]).abs()
    assert apart.mean() < 0.001 * WIDE, apart.mean()
    torch.testing.assert_close(a["extra/sizes"], b["extra/sizes"], rtol=1e-4, atol=0)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


# ------------------------------------------------------------------------------------------------- two equal one


def test_two_processes_equal_one_and_share_the_items(alone: Path, tmp_path: Path) -> None:
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe())
    assert all("value" in end for end in ends), ends
    ids = [set(end["value"]["ids"]) for end in ends]
    assert len(ids[0]) == len(ids[1]) == 2 * (2 + 2 * 2) and not ids[0] & ids[1]
    assert_alike(tmp_path / "run", alone)
    assert {p.name for p in alone.iterdir()} == {p.name for p in (tmp_path / "run").iterdir()}
    assert checkpoint.read_manifest(tmp_path / "run")["processes"] == 2


def test_two_halves_equal_one(alone: Path, sharded: Path) -> None:
    assert_alike(sharded, alone)
    final = two.Flux.tiny(0).open_net(sharded / "final" / "transformer")
    state = weights(sharded, 4)
    assert all(torch.equal(p, state[f"student/ema.{n}"]) for n, p in final.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("near", [1, 2])
def test_hybrid_equals_one(alone: Path, tmp_path: Path, near: int) -> None:
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe("hybrid"), near=near)
    assert all("value" in end for end in ends), ends
    assert_alike(tmp_path / "run", alone)


@pytest.mark.slow
def test_adapters_beside_a_sharded_base_equal_those_of_one(tmp_path: Path) -> None:
    chosen = {"lora": {"rank": 4}, "memory": {"gradient_checkpointing": True, "offload": True, "cached_prompts": 8}}
    two.train(tmp_path / "one", two.recipe(**chosen))
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe("full", **chosen))
    assert all("value" in end for end in ends), ends
    assert_alike(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "lora"), [(False, False), (True, False), (True, True)])
def test_isolated_references_of_sharded_nets_equal_those_of_one(
    tmp_path: Path, checkpointing: bool, lora: bool
) -> None:
    """The last block of a reference pass is gathered for the backward pass too."""
    chosen = {"family": {"name": "flux", "isolated_references": True}, "lora": {"rank": 4} if lora else None}
    chosen |= {"memory": {"gradient_checkpointing": checkpointing}}
    two.train(tmp_path / "one", two.recipe(**chosen))
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe("full", **chosen))
    assert all("value" in end for end in ends), ends
    assert_alike(tmp_path / "run", tmp_path / "one")
    assert '"isolated_references": true' in (tmp_path / "run" / "final" / "npedit.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_split_samples_of_flow_grpo_equal_those_of_one(tmp_path: Path, shard: str) -> None:
    """Two processes have unequal numbers of samples in a policy update; one of them may have none."""
    settings = {"sampling_steps": 3, "group": 2, "split_samples": True, "clip": 0.2, "student": two.STUDENT}
    stage = {"step": "flow_grpo", "updates": 4, "batch_size": 2, "settings": settings}
    two.train(tmp_path / "one", two.recipe(stages=[stage]))
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe(shard, stages=[stage]))
    assert all("value" in end for end in ends), ends
    for one, both in zip(rows(tmp_path / "one"), rows(tmp_path / "run"), strict=True):
        assert one == pytest.approx(both, rel=1e-3, abs=1e-4)
    a, b = weights(tmp_path / "one", 4), weights(tmp_path / "run", 4)
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a if "/net." in k]).abs()
    assert apart.mean() < 0.001 * WIDE, apart.mean()  # measured: 6e-5 of a step


# --------------------------------------------------------------------------------------------------- stop and go on


def train_with_small_pieces(run: Path, made: Recipe) -> None:
    """Read the checkpoint in many pieces."""
    sharded_checkpoint.PIECE_BYTES = 50_000
    two.train(run, made)


def test_a_signal_to_one_stops_both_and_they_go_on(sharded: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends = two.together(tmp_path, two.train, run, two.recipe("full"), (1, 3), "SIGTERM")
    assert [end.get("exit") for end in ends] == [75, 75], ends
    assert checkpoint.latest_complete_checkpoint(run).name == "checkpoint-000003"
    shutil.copytree(run, tmp_path / "one")
    ends = two.together(tmp_path, train_with_small_pieces, run, two.recipe("full"))
    assert all("value" in end for end in ends), ends
    assert_same_bits(weights(run, 4), weights(sharded, 4))
    two.train(tmp_path / "one", two.recipe())  # what two wrote, one reads
    assert_alike(tmp_path / "one", alone)


def test_what_one_wrote_two_read(alone: Path, tmp_path: Path) -> None:
    run = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-000004")
    ends = two.together(tmp_path, two.train, run, two.recipe("full"))
    assert all("value" in end for end in ends), ends
    assert_alike(run, alone)


def test_one_that_fails_ends_all_with_its_error(tmp_path: Path) -> None:
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe(), (1, 1), "crash")
    assert ends == [{"exit": 1}, {"error": "Crash: no more"}]


# ------------------------------------------------------------------------------------------------- what is agreed on


def pieces() -> dict[str, object]:
    with distributed.process_group():
        rank = distributed.rank()
        params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
        params[0].grad = torch.full((3,), 1.0 + rank)
        if rank:
            params[1].grad = torch.ones(3)
        distributed.average_gradients(params)
        net = nn.Linear(2, 1, bias=False)
        nn.init.constant_(net.weight, float(rank + 1))
        distributed.distribute_model(net)
        return {
            "gathered": distributed.all_gather(rank * 10),
            "first": distributed.broadcast_object(rank),
            "merged": distributed.merge_metrics(
                distributed.all_gather({"loss": float(rank), "mem/x": rank, f"only/{rank}": 7.0})
            ),
            "gradients": [None if p.grad is None else p.grad.tolist() for p in params],
            "norm": float(distributed.norm_over_global_batch(torch.tensor([3.0, 4.0]))),
            "bad norm": str(
                float(distributed.norm_over_global_batch(torch.tensor([1.0, float("nan") if rank else 1.0])))
            ),
            "noise": sample_noise(torch.zeros(2, 1, 2, 2), 2, seeded_generator("n"))[1].tolist(),
            "start": net.weight.tolist(),
        }


def test_pieces(tmp_path: Path) -> None:
    ends = [end["value"] for end in two.together(tmp_path, pieces)]
    noise = [end.pop("noise") for end in ends]
    assert torch.equal(
        torch.tensor(noise[0] + noise[1]), sample_noise(torch.zeros(4, 1, 2, 2), 2, seeded_generator("n"))[1]
    )
    assert ends[0] == ends[1]
    assert ends[0] == {
        "gathered": [0, 10],
        "first": 0,
        "merged": {"loss": 0.5, "mem/x": 1, "only/0": 7.0, "only/1": 7.0},
        "gradients": [[1.5] * 3, [0.5] * 3, None],
        "norm": pytest.approx((2 * 25) ** 0.5 / 2),  # of four items, whose gradients of the mean are half as large
        "bad norm": "nan",
        "start": [[1.0, 1.0]],
    }


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_batch_that_cannot_be_shared() -> None:
    check_processes(two.recipe(), 4)
    with pytest.raises(UserError, match=r"stages\.0\.batch_size: expected a multiple of the 3 processes.*got 4"):
        check_processes(two.recipe(), 3)


def test_a_type_that_the_device_lacks() -> None:
    check_dtype("family", torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"family\.dtype.*\(cpu\).*float8_e4m3fn.*use float32"):
        check_dtype("family", torch.float8_e4m3fn, torch.device("cpu"))


def test_an_environment_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR.* missing; start with torchrun"), distributed.process_group():
        pass


def few(folder: Path) -> None:
    """A data set of one photo."""
    from tests.support.photo_sets import plain, row, save, write_metadata

    save(folder, "a.png", plain(32, 32))
    write_metadata(folder, [row("a.png", source_caption="a photo")])


def test_more_processes_than_data(tmp_path: Path) -> None:
    few(tmp_path / "photos")
    data = {"name": "imagefolder", "path": str(tmp_path / "photos"), "sizes": [[32, 32]]}
    ends = two.together(tmp_path, two.train, tmp_path / "run", two.recipe(data=data))
    errors = [end["error"] for end in ends if "error" in end]
    assert len(errors) == 1 and "at least one item per process; got 1 items and 2 processes" in errors[0], ends
