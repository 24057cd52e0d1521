"""What `npedit edit --keep-resolution` costs for photographs of several megapixels: seconds and peak memory.

    python -m benchmarks.full_size                                      print the table
    python -m benchmarks.full_size --picture docs/images/full-size.jpg  draw one edit, enlarged

Each size is measured in a process of its own. "Peak memory" is what is added to the original, which is in memory before
with 4 bytes a pixel. The edits and the VAE are imitated (`tests/support/imitated_edits.py`), so that only the work at
full size is measured.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

MEGAPIXELS = (4, 12, 24)
SHORT = 1024  # pixels of the working size's short side
DRAWN_SHORT = 144  # pixels of the working size's short side in the picture; the photograph has 400
PANEL = (260, 170, 470, 388)  # the part of the photograph that the picture shows
PANEL_SIZE = (280, 290)


def measure(megapixels: int) -> str:
    """A table row: size, seconds and memory of `keep_unchanged`, and the share that is the original's bit by bit."""
    import numpy as np
    import torch

    from npedit.full_size import keep_unchanged, mask_image
    from npedit.nets.device import peak_memory_gb, try_reset_peak_memory
    from tests.support.imitated_edits import at_working_size, decoded, edited, photograph

    cpu, small = torch.device("cpu"), photograph("coffee", 1.5)
    full = small.resize((round(1225 * megapixels**0.5), round(816 * megapixels**0.5)))
    reference = at_working_size(small, SHORT)
    after = decoded(edited(reference, "recolour")[0], "loss")
    if not try_reset_peak_memory(cpu):
        raise SystemExit("expected Linux, where the peak memory of a process can be reset; got another system")
    before, began = peak_memory_gb(cpu), time.monotonic()
    result, change = keep_unchanged(full, reference, after)
    seconds, peak = time.monotonic() - began, peak_memory_gb(cpu)
    kept = float((np.asarray(mask_image(change, full.size)) == 0).mean())
    size = f"{result.width} x {result.height}"
    return f"| {megapixels} | {size} | {seconds:.1f} | {1024 * (peak - before):.0f} | {kept:.2f} |"


def draw(path: Path) -> None:
    """Write four panels: the original, the edit scaled back, the edit with the rest kept at full size, the mask."""
    import skimage.data
    from PIL import Image

    from npedit.full_size import keep_unchanged, mask_image, scale_back
    from tests.support.imitated_edits import at_working_size, decoded, edited

    original = Image.fromarray(skimage.data.coffee())
    reference = at_working_size(original, DRAWN_SHORT)
    after = decoded(edited(reference, "recolour")[0], "loss")
    kept, change = keep_unchanged(original, reference, after)
    panels = (original, scale_back(original, reference, after), kept, mask_image(change, original.size))
    width, height = PANEL_SIZE
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel.crop(PANEL).resize(PANEL_SIZE).convert("RGB"), (k * (width + 8), 0))
    sheet.save(path, quality=88)


def main() -> None:
    """Print the table, one of its rows, or draw the picture."""
    if sys.argv[1:2] == ["--picture"]:
        draw(Path(sys.argv[2]))
        return
    if len(sys.argv) > 1:
        sys.stdout.write(measure(int(sys.argv[1])) + "\n")
        return
    sys.stdout.write("| megapixels | size | seconds | peak memory (MiB) | share of the original |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- |\n")
    sys.stdout.flush()
    for megapixels in MEGAPIXELS:
        subprocess.run([sys.executable, "-m", "benchmarks.full_size", str(megapixels)], check=True)


if __name__ == "__main__":
    main()
