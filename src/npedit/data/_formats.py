"""Reading metadata files: JSON lines, csv and parquet, a row at a time."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from npedit.data._metadata import FieldName, Row, check_columns, parse_row, read_json_lines
from npedit.errors import UserError

log = logging.getLogger(__name__)

LONGEST_CSV_FIELD = 1 << 24  # characters
PARQUET_ROWS = 4096  # that are decoded at once


def read_metadata(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, values by column) of each row of a metadata file. The rows of a parquet file are numbered from 1.

    Raises:
        UserError: names file and line: the file cannot be read, or a line is broken.
    """
    readers = {".csv": read_csv, ".parquet": read_parquet}
    return readers.get(file.suffix, read_json_lines)(file)


def read_csv(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a csv file with a header. An empty field counts as missing. Errors as in `read_metadata`."""
    csv.field_size_limit(LONGEST_CSV_FIELD)
    line = 1
    try:
        with metadata.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for values in reader:
                line = reader.line_num
                if None in values:
                    raise UserError(
                        f"{metadata}:{line}: expected {len(reader.fieldnames or ())} fields, as in the header; got "
                        f"{len(values[None]) + len(values) - 1}; put texts with commas in quotes"
                    )
                yield line, {name: text or None for name, text in values.items()}
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{metadata}:{line + 1}: expected csv in UTF-8; got a line that cannot be read ({error}); correct it"
        ) from error
    except OSError as error:
        raise UserError(f"expected a readable {metadata}; got {error}; check its permissions") from error


def read_parquet(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file, without columns of binary data. Errors as in `read_metadata`."""
    line = 0
    try:
        with pq.ParquetFile(metadata) as file:
            names = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
            for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                for values in batch.to_pylist():
                    line += 1
                    yield line, values
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{metadata}: expected a parquet file; got one that cannot be read after row {line} ({error}); write it "
            "again"
        ) from error


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_is_binary(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def column_names(file: Path) -> set[str]:
    """The names of the columns that any row of a metadata file has. Errors as in `read_metadata`."""
    return {name for _, values in read_metadata(file) for name in values}


def edited_columns(files: Sequence[Path], columns: Mapping[FieldName, str]) -> dict[Path, list[str]]:
    """The columns of edited images in each file, which are never opened. Errors as in `read_metadata`, and of columns
    that need a mapping."""
    found = {}
    for file in files:
        if present := column_names(file):
            found[file] = sorted(check_columns(columns, present, file))
    if not found:
        raise UserError(f"expected at least one row; got an empty {files[0]}; write one line of JSON an image")
    return found


def read_rows(folder: Path, files: Sequence[Path], columns: Mapping[FieldName, str]) -> Iterator[Row]:
    """The rows of these metadata files in `folder`. `columns` maps our field names to the data set's column names.

    Raises:
        UserError: names file and line: a line cannot be read, a field is missing, the edit type is unknown, a removal
            has no object.
    """
    for file in files:
        for line, values in read_metadata(file):
            yield parse_row(values, line, file, columns, folder)
