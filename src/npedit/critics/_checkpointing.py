"""Gradient checkpointing of a frozen critic: its layers keep only their inputs, and the backward pass runs them again.

transformers' own switch acts only in training mode, which turns dropout on. Here the model stays in evaluation mode.
Values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # a frozen critic draws nothing


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block, each layer of the vision towers and language models in `model` keeps only its inputs for the
    backward pass. The backward pass may come after the block."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    forwards = [vars(layer).get("forward") for layer in layers]  # set only where a hook has replaced the class's
    for layer in layers:
        vars(layer)["forward"] = partial(recompute, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward
