"""The time of an edit in few steps, compared with text-to-image sampling by the base model in many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.measure import median, table, time_interleaved
from npedit import flow
from npedit.editor import Editor
from npedit.generator import generate_images, sample_noise, seeded_generator

BASE_STEPS, GUIDANCE = 20, 5.0  # as the toy's base model is measured
WORDS = "paint the circle red"


def inference_table(repeats: int, sizes: Sequence[int] = (1, 16)) -> str:
    """The table of milliseconds a picture, for batches of these sizes."""
    editor = Editor.open("embedded")
    rows = [row for size in sizes for row in _rows(editor, size, repeats)]
    return table(("what", "pictures at a time", "ms a picture", "times as fast as the base model"), rows)


@torch.no_grad()
def _rows(editor: Editor, size: int, repeats: int) -> list[tuple[str, int, str, str]]:
    family, (height, width) = editor.family, editor.sizes[0]
    times = flow.few_step_times(BASE_STEPS, family.noise_shift(height, width)).tolist()
    references = torch.rand(size, 3, height, width, generator=seeded_generator("bench", size)).to(family.device)
    noise = sample_noise(family.encode(references), 1, seeded_generator("noise", size))[0]
    base = f"base model, {BASE_STEPS} steps, guidance {GUIDANCE:g}"

    def edit(steps: int, turn: int) -> None:
        editor.edit_tensor(references, [WORDS] * size, turn, steps)

    calls = {f"edit, {n} step{'s' * (n > 1)}": partial(edit, n) for n in sorted({1, 2, editor.steps})}
    calls[base] = lambda turn: generate_images(family, [WORDS] * size, noise, times, GUIDANCE)
    seconds = time_interleaved(calls, repeats)
    return [
        (name, size, f"{1000 * median(taken) / size:.1f}", f"{median(b / a for a, b in zip(taken, seconds[base])):.1f}")
        for name, taken in seconds.items()
    ]
