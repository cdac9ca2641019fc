"""Write rows to Parquet, with pyarrow (extra ``parquet``)."""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from audiences_async.cli.rows import COLUMNS, COUNTS, TIMES, Row
from audiences_async.errors import ConfigurationError

_GROUP: Final = 2**15  # rows; as many are in memory


def check_available() -> None:
    """Refuse to write Parquet without the extra.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise ConfigurationError("--output parquet needs the extra 'parquet': pip install 'audiences_async[parquet]'")


def is_ours(path: Path) -> bool:
    """Return whether the file is Parquet with our columns."""
    pyarrow = _pyarrow()
    try:
        return tuple(pyarrow.parquet.read_schema(path).names) == COLUMNS
    except (pyarrow.ArrowException, OSError):
        return False


def write(file: BinaryIO, rows: Iterator[Row]) -> None:
    """Write the rows to *file*, one row group after the other. Times are in UTC, to the microsecond."""
    pyarrow = _pyarrow()
    schema = pyarrow.schema([pyarrow.field(name, _type(pyarrow, name), name != "account") for name in COLUMNS])
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for columns in _groups(rows):
            arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _groups(rows: Iterator[Row]) -> Iterator[Iterable[tuple[Any, ...]]]:
    """Yield the columns of each group of rows."""
    while group := list(islice(rows, _GROUP)):
        yield zip(*group, strict=True)


def _type(pyarrow: Any, column: str) -> Any:
    if column in TIMES:
        return pyarrow.timestamp("us", tz="UTC")
    return pyarrow.int64() if column in COUNTS else pyarrow.string()


def _pyarrow() -> Any:
    import pyarrow as pa  # noqa: PLC0415 - of an optional extra
    import pyarrow.parquet  # noqa: PLC0415

    pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps 15 MB more
    return pa
