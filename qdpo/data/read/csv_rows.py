"""Reads rows of a CSV or TSV file unchanged: every cell is text, and "NA" stays a word."""

import csv
import sys
from collections.abc import Iterator

from qdpo.data.read.filetext import lines
from qdpo.data.read.progress import Numbered, Reading
from qdpo.errors import DataError


def _read_csv(reading: Reading, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a cell above 128 kB
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number  # csv's own count stops before the line that it cannot read
        for line_number, line in lines(Reading(reading.path, reading.gauge)):
            number = line_number
            assert isinstance(line, str)  # a cell may span several lines, so none can be left out
            yield line

    reader = csv.DictReader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                expected = len(reader.fieldnames or [])
                yield (
                    number,
                    reading.bad_line(
                        number,
                        f": the row and the header ({expected} cells) differ in length. Put texts with commas, tabs or "
                        "line breaks in double quotes.",
                    ),
                )
            else:
                yield number, row
    except csv.Error as error:
        raise DataError(f"{reading.path}, line {number} is not CSV ({error}). Check its quotes.") from None


def read_comma(reading: Reading) -> Iterator[Numbered]:
    """Rows of a CSV file, whose first line names the columns."""
    return _read_csv(reading, ",")


def read_tab(reading: Reading) -> Iterator[Numbered]:
    """Rows of a TSV file, whose first line names the columns."""
    return _read_csv(reading, "\t")
