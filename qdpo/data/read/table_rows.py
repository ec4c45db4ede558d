"""Reads rows of a Parquet or Arrow file, a thousand at a time."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qdpo.data.read.progress import DEEPEST, Numbered, Reading, size_of
from qdpo.errors import DataError

BATCH_BYTES = 32 * 2**20
BOMB_BYTES, BOMB_RATIO = 2**30, 200


@contextmanager
def _whole_table(reading: Reading, kind: str) -> Iterator[None]:
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        first = str(error).split("\n")[0]
        raise DataError(
            f"{reading.path} is not a complete {kind} file ({first}). Download or write it again."
        ) from None


def read_parquet(reading: Reading) -> Iterator[Numbered]:
    """Rows of a Parquet file, a thousand at a time."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _whole_table(reading, "Parquet"), pyarrow.parquet.ParquetFile(reading.path) as table:
        about = table.metadata
        _check_names(reading, table.schema_arrow)
        unpacked = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
        if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * reading.path.stat().st_size:
            raise DataError(
                f"{reading.path} unpacks to more than {BOMB_RATIO} times its size ({unpacked / 2**30:.1f} GiB), as "
                "no data does. Write it again from its source."
            )
        rows = max(1, min(1000, BATCH_BYTES * max(1, about.num_rows) // max(1, unpacked)))
        yield from _table_rows(table.iter_batches(batch_size=rows), about.num_rows, reading)


def read_arrow(reading: Reading) -> Iterator[Numbered]:
    """Rows of an Arrow file, as `datasets` saves it (a stream) or as Feather."""
    import pyarrow

    with _whole_table(reading, "Arrow"), pyarrow.memory_map(str(reading.path)) as file:
        stream: Any = None
        try:
            stream = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(file)
            batches: Any = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = iter(stream)
        _check_names(reading, stream.schema if stream is not None else table.schema)
        yield from _table_rows(_in_thousands(batches), None, reading)


def _check_names(reading: Reading, schema: Any) -> None:
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise DataError(
            f"{reading.path} has several columns with the name {repeated[0]!r}. Rename or remove one of each."
        )
    deep = [field.name for field in schema if _levels(field.type) > DEEPEST]
    if deep:
        raise DataError(f"{reading.path}: column {deep[0]!r} nests more than {DEEPEST} levels. Remove the column.")


def _levels(kind: Any) -> int:
    """Levels of lists and structs in a type."""
    level, levels = [kind], 0
    while level and levels <= DEEPEST:
        level = [inner.field(n).type for inner in level for n in range(inner.num_fields)]
        levels += bool(level)
    return levels


def _in_thousands(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from (batch.slice(start, 1000) for start in range(0, batch.num_rows, 1000))


def _table_rows(batches: Iterator[Any], count: int | None, reading: Reading) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # else pyarrow follows the offsets of a damaged file, and crashes
        nested = any(_has_keys(field.type) for field in batch.schema)
        for part in _parts(batch, reading.max_bytes):
            for row in part.to_pylist():
                number += 1
                if part.num_rows == 1 and size_of(row) > reading.max_bytes:
                    yield number, reading.too_large(number)
                else:
                    yield number, {name: written(cell) for name, cell in row.items()} if nested else row
        if count:
            reading.gauge.share = min(1.0, number / count)
    reading.gauge.share = 1.0


def _parts(batch: Any, most: int) -> Iterator[Any]:
    """The batch in slices of at most `most` bytes, or of one row."""
    if batch.num_rows < 2 or batch.nbytes <= most:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half), most)
    yield from _parts(batch.slice(half), most)


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
