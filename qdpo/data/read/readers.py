"""Readers of local files, by the ending of the file name."""

from collections.abc import Callable, Iterator

from qdpo.data.read.csv_rows import read_comma, read_tab
from qdpo.data.read.json_rows import read_json
from qdpo.data.read.progress import Numbered, Reading
from qdpo.data.read.table_rows import read_arrow, read_parquet

READERS: dict[str, Callable[[Reading], Iterator[Numbered]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".csv": read_comma,
    ".tsv": read_tab,
}
TABLES = {".parquet", ".arrow", ".feather"}
