"""Small imagefolder data sets for the tests of `npedit.data`."""

import io
import json
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from npedit.data import imagefolder
from npedit.errors import UserError

SMALL = ((64, 64), (48, 80), (80, 48))


def row(name, **more):
    """One line of metadata."""
    return {"file_name": name, "instruction": "make it blue", "edit_type": "recolour", "target_caption": "blue", **more}


def write_metadata(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def plain(width, height, colour=(200, 120, 60)):
    return Image.new("RGB", (width, height), colour)


def encoded(kind, image=None):
    """A file's bytes; the picture is a photograph unless one is given."""
    buffer = io.BytesIO()
    (image or Image.fromarray(skimage.data.astronaut())).save(buffer, kind)
    return buffer.getvalue()


def opened(folder, seed=0, **more):
    settings = {"sizes": SMALL, "nothing_share": 0.0, "prefetch": 0} | more
    return imagefolder.Source(imagefolder.Settings(path=str(folder), **settings), seed)


def refused(folder, **more):
    """What the user is told about a folder that cannot be used."""
    with pytest.raises(UserError) as caught:
        opened(folder, **more)
    return str(caught.value)


def good_rows(folder):
    """29 good rows, and a function that appends one more, with its file if it has content."""
    for i in range(29):
        save(folder, f"{i}.png", plain(64, 64, (i, 100, 200)))
    rows = [row(f"{i}.png", id=f"good{i}") for i in range(29)]

    def add(name, content=None):
        if content is not None:
            (folder / name).write_bytes(content)
        rows.append(row(name, id="bad"))
        return write_metadata(folder, rows)

    return add


def spy_on_files(monkeypatch):
    """A list that grows by every path given to Pillow or to Path.open."""
    paths = []
    pillow, path_open = Image.open, Path.open

    def spy_pillow(fp, *args, **kwargs):
        paths.append(str(fp))
        return pillow(fp, *args, **kwargs)

    def spy_path(self, *args, **kwargs):
        paths.append(str(self))
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Image, "open", spy_pillow)
    monkeypatch.setattr(Path, "open", spy_path)
    return paths
