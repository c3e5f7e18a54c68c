"""Rows of a user's file: JSON lines, JSON, CSV, TSV, Parquet. Every fault names the file and the line or row."""

import csv
import io
import json
import pathlib
import sys

from ft_jax.errors import UserError, nearest
from ft_jax.io.assets import sha256


def is_file_spec(spec):
    """Whether a source spec names a data file by its suffix."""
    return pathlib.PurePath(spec).suffix.lower() in READERS


def existing(path):
    """The path of an existing file; UserError names the nearest file of that folder."""
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a data file")
    try:
        beside = [p.name for p in path.parent.iterdir()]
    except OSError:
        raise UserError(f"no data file {path}: the folder {path.parent} does not exist or cannot be read") from None
    raise UserError(f"no data file {path}{nearest(path.name, beside)}")


def fingerprint(path):
    """SHA-256 of the file's bytes and its suffix, which decides how they are read."""
    path = existing(path)
    try:
        return f"{sha256(path)}{path.suffix.lower()}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def rows(path):
    """``([(number, row)], unit)``: every row as a dict with its line or row number, counted from 1.

    UserError for an empty file, undecodable bytes, broken JSON, CSV or Parquet, and rows that are no objects.
    """
    path = existing(path)
    read, unit = READERS[path.suffix.lower()]
    try:
        found = list(read(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, {_line_of(path, error.start)}: bytes that are not UTF-8 "
                        f"(0x{error.object[error.start]:02x}); convert the file first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not found:
        raise UserError(f"{path} is empty: it holds no rows")
    return found, unit


def _text(path):
    # The whole file is decoded at once, so that an error's offset counts from the file's beginning.
    return path.read_bytes().decode("utf-8").removeprefix("\ufeff")


def _line_of(path, offset):
    lines = path.read_bytes()[:offset].count(b"\n")
    return f"line {lines + 1}"


def _jsonl(path):
    # Not str.splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, _object(_json(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json_list(path):
    value = _json(_text(path), str(path)) if path.stat().st_size else []
    if not isinstance(value, list):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not a list of objects (one a line is .jsonl)")
    for number, row in enumerate(value, 1):
        yield number, _object(row, f"{path}, row {number}")


def _json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f" (line {error.lineno}, column {error.colno})" if "line" not in where else f" (column {error.colno})"
        raise UserError(f"{where}: not JSON: {error.msg}{at}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep") from None


def _object(value, where):
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}, not an object with named fields")
    return value


def _delimited(delimiter):
    def read(path):
        # The csv module's default limit of 128 KiB for one field is shorter than a long document.
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise UserError(f"{path}, row {number}: more cells than the header has columns "
                                    f"({len(reader.fieldnames)})")
                yield number, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None

    return read


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        start = 1
        for batch in table.iter_batches():
            yield from enumerate(batch.to_pylist(), start)
            start += len(batch)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from None


READERS = {
    ".jsonl": (_jsonl, "line"),
    ".json": (_json_list, "row"),
    ".csv": (_delimited(","), "row"),
    ".tsv": (_delimited("\t"), "row"),
    ".parquet": (_parquet, "row"),
}
