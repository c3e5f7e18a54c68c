"""Where examples come from: ``load(spec, split)`` gives random access to rows, whatever the spec names."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from ft_jax.data import bundled, files, procedural
from ft_jax.data.splits import SPLITS, part
from ft_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows by index. ``fingerprint`` is known without reading the rows, which are read at the first access.

    ``read() -> (rows, numbers)``: ``numbers[i]`` is the line or row of the file, from 1 (None: i + 1).
    """

    name: str
    fingerprint: str
    read: Callable
    unit: str = "row"

    @functools.cached_property
    def _read(self) -> tuple[Sequence, Sequence | None]:
        return self.read()

    def __len__(self):
        return len(self._read[0])

    def __getitem__(self, index):
        return self._read[0][index]

    def where(self, index):
        """``"reviews.csv, row 7"``: where a row stands, for messages."""
        numbers = self._read[1]
        return f"{self.name}, {self.unit} {index + 1 if numbers is None else numbers[index]}"


def load(spec, split="train", *, text_field="text", validation_fraction=0.0, test_fraction=0.0):
    """The ``Source`` that a spec names.

    ``imdb`` and the other bundled names; a path that ends in .jsonl .json .csv .tsv .parquet; ``tfds:name[:config]``;
    ``procedural:name(key=value,…)``. The two fractions split a *file* by the hash of ``text_field`` (equal texts
    stay together); without them the whole file is the split. UserError names the nearest known thing.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"a data source is a name or a path, not {spec!r}; known: {', '.join(sorted(bundled.NAMES))}")
    kind, colon, rest = spec.partition(":")
    if colon and kind == "procedural":
        rows = procedural.Rows(rest, split)
        return Source(spec, rows.fingerprint, lambda: (rows, None))
    if colon and kind == "tfds":
        return _tfds(spec, rest, split)
    if files.is_file_spec(spec):
        return _file(spec, split, text_field, validation_fraction, test_fraction)
    if spec not in bundled.NAMES:
        forms = "a file (.jsonl .json .csv .tsv .parquet), tfds:name or procedural:name(…)"
        raise UserError(f"no data source {spec!r}{nearest(spec, bundled.NAMES)}; otherwise {forms}")
    if split not in (known := bundled.splits(spec)):
        raise UserError(f"{spec} has no split {split!r}; it has {', '.join(known)}")
    return Source(f"{spec} ({split})", bundled.fingerprint(spec, split), lambda: (bundled.rows(spec, split), None))


def _file(spec, split, text_field, validation, test):
    for key, value in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise UserError(f"{key} must be at least 0 and less than 1, not {value}")
    if validation + test >= 1:
        raise UserError(f"validation_fraction {validation} and test_fraction {test} leave nothing to train on")
    whole = not validation and not test
    if not whole and split not in SPLITS:
        raise UserError(f"{spec} is split by fractions into {', '.join(SPLITS)}, and has no {split!r}")
    path = files.existing(spec)
    identity = files.fingerprint(path)
    if not whole:
        identity += f":{split}:{text_field}:{validation}:{test}"
    unit = files.READERS[path.suffix.lower()][1]

    def read():
        found, _ = files.rows(path)
        if not whole:
            # A row without its text is kept in every split, to be reported with its number where it is used.
            found = [(n, row) for n, row in found
                     if row.get(text_field) is None or part(str(row[text_field]), validation, test) == split]
            if not found:
                raise UserError(f"{path}: none of its rows falls into the {split} split (validation_fraction "
                                f"{validation}, test_fraction {test}); give a larger fraction or more rows")
        return [row for _, row in found], [n for n, _ in found]

    return Source(str(spec), identity, read, unit)


def _tfds(spec, rest, split):
    """A TFDS builder read through ``data_source`` (array_record files, no TensorFlow)."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"{spec} needs the package tensorflow-datasets, which is not installed") from None
    name = rest.replace(":", "/")
    try:
        builder = tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"TFDS knows no data set {name!r}{nearest(name.split('/')[0], known)}") from None
    except (ValueError, AttributeError, ImportError) as error:
        raise UserError(f"{spec}: {str(error).splitlines()[0]}") from None
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # Each builder fetches in its own way and fails with its own errors; the cause is what helps.
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{spec} could not be prepared in {builder.data_dir}: {cause}") from error
    base = split.partition("[")[0]
    if base not in builder.info.splits and base != "all":
        raise UserError(f"{spec} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
    try:
        data = builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{spec}, split {split!r}: {str(error).splitlines()[0]}") from None
    rows = _Decoded(spec, data)
    return Source(f"{spec} ({split})", f"{_tfds_identity(builder)}:{split}", lambda: (rows, None))


def _tfds_identity(builder):
    """Hash of the prepared data's description and of the names, sizes and times of its files."""
    digest = hashlib.sha256(builder.info.full_name.encode())
    for path in sorted(pathlib.Path(builder.data_dir).iterdir()):
        state = path.stat()
        digest.update(f"{path.name}:{state.st_size}:{state.st_mtime_ns}".encode())
    return digest.hexdigest()


class _Decoded:
    """TFDS rows with bytes as text and numpy scalars as Python numbers."""

    def __init__(self, spec, data):
        self.spec, self.data = spec, data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {key: self._plain(value, key, index) for key, value in self.data[int(index)].items()}

    def _plain(self, value, key, index):
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{self.spec}, row {index + 1}: the field {key!r} is not UTF-8 text") from None
        return value.item() if isinstance(value, np.generic) else value
