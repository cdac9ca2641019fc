"""Write rows to Parquet, with pyarrow (extra ``parquet``)."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from audiences_async.cli.rows import COLUMNS, COUNTS, TIMES, Row
from audiences_async.errors import ConfigurationError

_BATCH: Final = 2**9  # rows that are Python objects, which take four times the memory, at the same time
_GROUP: Final = 8  # batches in a row group; with twice as many a job would take 4 MB more
_REPETITIVE: Final = ["account", "type"]  # a dictionary of any other column would take 10 MB


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
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=_REPETITIVE) as writer:
        batches = _batches(rows, schema, pyarrow)
        while group := list(islice(batches, _GROUP)):
            writer.write_table(pyarrow.Table.from_batches(group))


def _batches(rows: Iterator[Row], schema: Any, pyarrow: Any) -> Iterator[Any]:
    while batch := list(islice(rows, _BATCH)):
        columns = zip(zip(*batch, strict=True), schema.types, strict=True)
        yield pyarrow.RecordBatch.from_arrays([pyarrow.array(values, kind) for values, kind in columns], schema=schema)


def _type(pyarrow: Any, column: str) -> Any:
    if column in TIMES:
        return pyarrow.timestamp("us", tz="UTC")
    return pyarrow.int64() if column in COUNTS else pyarrow.string()


def _pyarrow() -> Any:
    import pyarrow as pa  # noqa: PLC0415 - of an optional extra
    import pyarrow.parquet  # noqa: PLC0415

    pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps 15 MB more
    return pa
