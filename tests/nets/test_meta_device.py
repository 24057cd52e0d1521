"""Floating-point operations counted on the meta device."""

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from npedit.nets.meta_device import META, MemoryCounter, current_part


def _run(device):
    q = torch.randn(2, 4, 16, 8, device=device, requires_grad=True)
    w = torch.randn(8, 32, device=device, requires_grad=True)
    x = torch.randn(1, 3, 8, 8, device=device)
    conv = torch.randn(5, 3, 3, 3, device=device, requires_grad=True)
    out = (F.scaled_dot_product_attention(q, q, q).reshape(-1, 8) @ w).sum() + F.conv2d(x, conv).sum()
    out.backward()


def test_operations_of_an_update_are_those_that_torch_counts_on_real_tensors() -> None:
    """Products, a convolution and attention, forwards and backwards."""
    with MemoryCounter() as counted:
        token = current_part.set("student")
        _run(META)
        current_part.reset(token)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as real:
        _run("cpu")
    # Torch's fused attention recomputes the scores in its backward pass: one product of 2 * 2 * 4 * 16 * 16 * 8 more.
    assert counted.flops["student"] == real.get_total_flops() + 2 * 2 * 4 * 16 * 16 * 8
