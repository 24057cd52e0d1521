"""Isolated references: an edit's time against the operations counted, for FLUX, Qwen-Image and Z-Image.

    python -m benchmarks.isolated_reference [--repeats 5] [--write docs/benchmarks.md]

`python -m benchmarks` runs it too. Each net has random weights and a quarter of the published net's width, few blocks,
and a quarter of the tokens that it has for a picture of 1024 x 1024 pixels. Width and tokens shrink by one factor, so
attention keeps its share of the operations. An edit here is the few-step sampling of one picture with one reference,
without VAE and text encoders, whose time is the same in both ways. The two ways take turns in one run. Operations are
counted by torch on its meta device: matrix products and attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import describe_machine, fill_tables, median, table, time_interleaved
from npedit import flow
from npedit.families.base import EncodedText, Family
from npedit.families.flux import Flux
from npedit.families.qwen_image import QwenImage
from npedit.families.z_image import ZImage
from npedit.generator import generate_few_step
from npedit.nets.device import pick_device

STEPS = (4, 8)
MARKER = "isolated references"
META = torch.device("meta")


@dataclass(frozen=True)
class Size:
    """The size of a net: `part` of the published width and of the tokens, 1 for the published ones. `blocks` is the
    depth: 1 is the smallest one with the published proportions of kinds of blocks, 0 the published depth."""

    part: float = 1 / 4
    blocks: int = 1
    side: int = 128  # of the latents, at part 1

    def __call__(self, published: int) -> int:
        """This part of a published number."""
        return max(1, round(published * self.part))

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """The shape of a picture's latents. A quarter of the tokens is half of the side."""
        side = 2 * round(self.side * self.part**0.5 / 2)
        return 1, 16, side, side


TINY = Size(1 / 24, 1, 32)  # for tests
PUBLISHED = Size(1, 0)
MAKERS: dict[str, Callable[[Size], tuple[nn.Module, EncodedText]]] = {}  # filled below


def flux_net(size: Size) -> tuple[nn.Module, EncodedText]:
    """A net like FLUX.1-dev's, whose prompts always have 512 tokens."""
    depth = {"num_layers": size.blocks, "num_single_layers": 2 * size.blocks} if size.blocks else {}
    net = FluxTransformer2DModel(
        num_attention_heads=size(24), joint_attention_dim=size(4096), pooled_projection_dim=size(768),
        guidance_embeds=True, **depth,
    )  # fmt: skip
    return net, EncodedText((torch.randn(1, size(512), size(4096)), torch.randn(1, size(768))))


def qwen_net(size: Size) -> tuple[nn.Module, EncodedText]:
    """A net like Qwen-Image's, with a prompt of 128 tokens."""
    depth = {"num_layers": 2 * size.blocks} if size.blocks else {}
    net = QwenImageTransformer2DModel(num_attention_heads=size(24), joint_attention_dim=size(3584), **depth)
    mask = torch.ones(1, size(128), dtype=torch.bool, device="cpu")
    return net, EncodedText((torch.randn(1, size(128), size(3584)), mask))


def z_image_net(size: Size) -> tuple[nn.Module, EncodedText]:
    """A net like Z-Image's, with a prompt of 128 tokens. Heads are narrower where 30 cannot be divided by the part."""
    depth = {"n_layers": 3 * size.blocks, "n_refiner_layers": 1} if size.blocks else {}
    heads = {"axes_dims": [16, 24, 24], "n_heads": size(60), "n_kv_heads": size(60)} if size.part < 1 else {}
    width = 64 * size(60)
    net = ZImageTransformer2DModel(dim=width, cap_feat_dim=size(2560), **depth, **heads)
    lengths = torch.tensor([size(128)], device="cpu")
    return net, EncodedText((torch.randn(1, size(128), size(2560)), lengths))


MAKERS |= {"FLUX": flux_net, "Qwen-Image": qwen_net, "Z-Image": z_image_net}
FAMILIES: dict[str, type[Family]] = {"FLUX": Flux, "Qwen-Image": QwenImage, "Z-Image": ZImage}


def isolation_table(repeats: int, size: Size = Size(), steps: Sequence[int] = STEPS, whole: Size = PUBLISHED) -> str:
    """The table of all nets and numbers of steps. Ratios are isolated : joint; the last column is that of nets of the
    size `whole`, on the meta device."""
    rows = [_row(name, count, repeats, size, whole) for name in MAKERS for count in steps]
    head = ("model", "steps", "GFLOP joint", "GFLOP isolated", "ratio of operations", "ratio of times", "difference")
    return table((*head, "ratio of operations, published size"), rows)


@torch.no_grad()
def _row(name: str, steps: int, repeats: int, size: Size, whole: Size) -> tuple[object, ...]:
    edits = _edits(name, steps, size, pick_device())
    seconds = time_interleaved({way: lambda turn, call=call: call() for way, call in edits.items()}, repeats)
    counted, published = _operations(name, steps, size), _operations(name, steps, whole)
    expected = counted["isolated"] / counted["joint"]
    measured = median(a / b for a, b in zip(seconds["isolated"], seconds["joint"]))
    return (
        name, steps, *(f"{counted[way] / 1e9:.0f}" for way in ("joint", "isolated")), f"{expected:.3f}",
        f"{measured:.3f}", f"{100 * (measured / expected - 1):+.1f} %",
        f"{published['isolated'] / published['joint']:.3f}",
    )  # fmt: skip


def _edits(name: str, steps: int, size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The same edit with joint and with isolated references."""
    torch.manual_seed(0)
    with device:
        net, text = MAKERS[name](size)
        reference, *noise = (torch.randn(size.latents) for _ in range(1 + steps))
    net.eval().requires_grad_(False)
    times = flow.few_step_times(steps, 3.0).tolist()
    ways = {"joint": FAMILIES[name].tiny(0), "isolated": FAMILIES[name].tiny(0)}
    ways["isolated"].isolate_references()
    return {way: partial(generate_few_step, family, net, text, reference, times, noise) for way, family in ways.items()}


def _operations(name: str, steps: int, size: Size) -> dict[str, int]:
    """The operations of an edit in both ways. Every step after the first has as many as the second."""
    one, two = _count_operations(name, 1, size), _count_operations(name, 2, size)
    return {way: one[way] + (steps - 1) * (two[way] - one[way]) for way in one}


@cache
@torch.no_grad()
def _count_operations(name: str, steps: int, size: Size) -> dict[str, int]:
    """The operations that torch counts in an edit on the meta device, which computes nothing."""
    counted = {}
    for way, call in _edits(name, steps, size, META).items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        counted[way] = counter.get_total_flops()
    return counted


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolated_reference")
    parser.add_argument("--repeats", type=int, default=5, help="how often each edit is timed; medians are shown")
    parser.add_argument("--write", default="", help="a page to write the table into")
    chosen = parser.parse_args()
    made = f"Measured on: {describe_machine()}.\n\n{isolation_table(chosen.repeats)}"
    Console(soft_wrap=True).print(made, markup=False, highlight=False)
    if chosen.write:
        page = Path(chosen.write)
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), {MARKER: made}), encoding="utf-8")


if __name__ == "__main__":
    main()
