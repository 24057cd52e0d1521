"""Small files in the forms of public data sets of edits, with edited images that no library can decode."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NO_PICTURE = b"bytes that no library can decode"


def photo(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """A parquet file with the Hub's struct for pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    as_struct = [{k: {"bytes": v, "path": None} if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(as_struct), path, compression="none", use_dictionary=False)
    return path


def write_file(path: Path, content: bytes | str | list | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    return write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path, name: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def pixels_of(folder: Path, row: dict) -> bytes:
    return (folder / row["file_name"]).read_bytes()


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path
