"""Reads rows of a Parquet or Arrow file, a thousand at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qdpo.data.read.progress import Numbered, Reading
from qdpo.errors import DataError


@contextmanager
def _whole_table(reading: Reading, kind: str) -> Iterator[None]:
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise DataError(
            f"{reading.path} is not a complete {kind} file ({first}). Download or write it again."
        ) from None


def read_parquet(reading: Reading) -> Iterator[Numbered]:
    """Rows of a Parquet file, a thousand at a time."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _whole_table(reading, "Parquet"), pyarrow.parquet.ParquetFile(reading.path) as table:
        yield from _table_rows(table.iter_batches(batch_size=1000), table.metadata.num_rows, reading)


def read_arrow(reading: Reading) -> Iterator[Numbered]:
    """Rows of an Arrow file, as `datasets` saves it (a stream) or as Feather."""
    import pyarrow

    with _whole_table(reading, "Arrow"), pyarrow.memory_map(str(reading.path)) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(file)
            batches: Any = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = iter(stream)
        yield from _table_rows(_in_thousands(batches), None, reading)


def _in_thousands(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from (batch.slice(start, 1000) for start in range(0, batch.num_rows, 1000))


def _table_rows(batches: Iterator[Any], count: int | None, reading: Reading) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # else pyarrow follows the offsets of a damaged file, and crashes
        nested = any(_has_keys(field.type) for field in batch.schema)
        for row in batch.to_pylist():
            number += 1
            yield number, {name: written(cell) for name, cell in row.items()} if nested else row
        if count:
            reading.gauge.share = number / count
    reading.gauge.share = 1.0


def _has_keys(kind: Any) -> bool:
    import pyarrow.types  # type: ignore[import-untyped]

    if pyarrow.types.is_struct(kind):
        return True
    return bool(pyarrow.types.is_nested(kind)) and any(_has_keys(kind.field(n).type) for n in range(kind.num_fields))


def written(cell: Any) -> Any:
    """A cell without the nulls that a table's schema puts in the place of keys that the writer left out.

    A struct of a table has the keys of all rows: a tool call `{"city": "Paris"}` is stored with `"ticker": null` if
    another row has a ticker.
    """
    if isinstance(cell, dict):
        return {key: written(value) for key, value in cell.items() if value is not None}
    return list(map(written, cell)) if isinstance(cell, list) else cell
