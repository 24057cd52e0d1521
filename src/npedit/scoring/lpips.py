"""LPIPS (Zhang et al., arXiv 1801.03924), version 0.1 over AlexNet: how far apart two pictures look.

In plain torch, since the package of the paper's authors needs torchvision. The weights are theirs and are not in this
package; a folder must hold the two files under their usual names:

- `alexnet-owt-7be5be79.pth`, AlexNet trained on ImageNet, as torchvision names it;
- `alex.pth`, the linear heads: `weights/v0.1/alex.pth` in the package lpips (`pip download --no-deps lpips`, a zip).
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from npedit.errors import UserError

TRUNK, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
CHANNELS = (64, 192, 384, 256, 256)
RELU_LAYERS = (1, 4, 7, 9, 11)  # a feature is read behind each ReLU
MIN_SIDE = 31  # pixels a side: below, a deeper layer has nothing left
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]


class Lpips:
    """The distance. 0 is equal; the metric has no upper bound, and 1 is far."""

    tag = "alex"

    def __init__(self, trunk: nn.Sequential, heads: list[Float[Tensor, "1 c 1 1"]], device: torch.device):
        self.trunk = trunk.requires_grad_(False).eval().to(device)
        self.heads = [head.to(device) for head in heads]
        self.device = device

    @classmethod
    def load(cls, folder: str | Path, device: torch.device) -> Self:
        """Open a folder with the two files.

        Raises:
            UserError: one is missing, or is not what its name says.
        """
        trunk = alexnet_features()
        try:
            found = torch.load(Path(folder) / TRUNK, map_location="cpu", weights_only=True)
            trunk.load_state_dict({k.removeprefix("features."): v for k, v in found.items() if "features." in k})
            found = torch.load(Path(folder) / HEADS, map_location="cpu", weights_only=True)
            heads = [found[f"lin{i}.model.1.weight"].float().view(1, c, 1, 1) for i, c in enumerate(CHANNELS)]
        except (OSError, RuntimeError, KeyError, AttributeError, EOFError, UnpicklingError) as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"expected LPIPS' weights in a folder, {TRUNK} and {HEADS}; got {folder}: {said}; "
                "see docs/metrics.md for where they are from"
            ) from None
        return cls(trunk, heads, device)

    def distance(self, a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"]) -> float:
        """LPIPS of two pictures in [0, 1]: the mean over places of each layer's difference, summed over layers.

        Raises:
            ValueError: a side is shorter than `MIN_SIDE` pixels.
        """
        return float(sum(layer.double().mean() for layer in self._layer_differences(a, b)))

    def distance_map(self, a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
        """The same at each pixel, each layer scaled to the picture's size (`spatial` in the authors' package). Errors
        as in `distance`."""
        size = tuple(a.shape[1:])
        layers = [
            F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0, 0]
            for x in self._layer_differences(a, b)
        ]
        return torch.stack(layers).sum(0).cpu()

    @torch.no_grad()
    def _layer_differences(
        self, a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"]
    ) -> list[Float[Tensor, "1 h2 w2"]]:
        if min(a.shape[1:]) < MIN_SIDE:
            raise ValueError(f"expected pictures of {MIN_SIDE} pixels a side or more; got {tuple(a.shape[1:])}")
        shift, scale = (torch.tensor(m, device=self.device)[:, None, None] for m in (SHIFT, SCALE))
        x = (torch.stack([a, b]).to(self.device).float() * 2 - 1 - shift) / scale
        found: list[Tensor] = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in RELU_LAYERS:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                found.append(((unit[0] - unit[1]).square() * self.heads[len(found)][0]).sum(0, keepdim=True))
        return found


def alexnet_features() -> nn.Sequential:
    """AlexNet's convolutions with random weights, up to the last ReLU (Krizhevsky, arXiv 1404.5997); its parameters are
    named by number, as in torchvision's `features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
