"""Reading one file of rows: JSON Lines, JSON, CSV, TSV, text, Parquet or Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from edgekd.data.table import Table, from_records
from edgekd.errors import DataError

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def read_file(path: Path) -> Table:
    """The rows of a file, read as its suffix says (`.gz` allowed on text formats).

    Raises:
        DataError: the file cannot be read, is empty, or is not what its suffix says.
    """
    try:
        table = READERS[file_type(path)](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if len(table) == 0:
        raise DataError(f"{path} has no rows; give a file with at least one example")
    return table


def file_type(path: Path) -> str:
    """`.csv` for `rows.csv` and `rows.csv.gz`; an empty string for what cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = "".join(suffixes[-2:-1]) if zipped else "".join(suffixes[-1:])
    known = suffix in READERS and not (zipped and suffix in (".parquet", ".arrow"))
    return suffix if known else ""


def read_bytes(path: Path) -> bytes:
    """The contents of a file, unpacked if its name ends in `.gz`.

    Raises:
        DataError: the packed file is damaged.
    """
    content = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}); fetch it again") from None


def _read_text(path: Path) -> str:
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path} is empty; give a file with at least one example")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        # A two-byte encoding starts with a byte order mark; anything else is most often Latin-1.
        guess = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} (line {line}); "
            f"save it as utf-8, e.g. with `iconv -f {guess} -t utf-8`"
        ) from None


def _lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters it takes for line ends.
    numbered = enumerate(text.split("\n"), start=1)
    return [(number, line.strip("\r")) for number, line in numbered if line.strip()]


def _read_jsonl(path: Path) -> Table:
    return _parse_jsonl(path, _read_text(path))


def _parse_jsonl(path: Path, text: str) -> Table:
    records, numbers, bad = [], [], []
    lines = _lines(text)
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.append((number, str(error)))
            continue
        if isinstance(record, dict):
            records.append(record)
            numbers.append(number)
        else:
            bad.append((number, f'expected an object like {{"text": …}}, got {type(record).__name__}'))
    if bad:
        raise DataError(
            f"{path}, line {bad[0][0]}: not a JSON object: {bad[0][1]}; {len(bad):,} of {len(lines):,} lines affected; "
            "put one JSON object on each line"
        )
    return from_records(path.name, records, numbers, path.parent)


def _read_json(path: Path) -> Table:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return _parse_jsonl(path, text)
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("data", "rows", "examples") if key in content), content)
    if isinstance(content, list) and all(isinstance(record, dict) for record in content):
        return from_records(path.name, content, (), path.parent)
    lists = isinstance(content, dict) and all(isinstance(values, list) for values in content.values())
    if lists and len({len(values) for values in content.values()}) == 1:
        return Table(path.name, content, (), {}, path.parent)
    raise DataError(f"{path} is JSON but not rows; write a list of objects, or an object of equally long lists")


def _read_csv(path: Path) -> Table:
    text = _read_text(path)
    header = text.split("\n", 1)[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    return _parse_csv(path, text, delimiter, csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Table:
    text = _read_text(path)
    # Many corpora (GLUE) write tab-separated text with bare quotes in it.
    if _has_bare_quotes(text):
        return _parse_csv(path, text, "\t", csv.QUOTE_NONE)
    try:
        return _parse_csv(path, text, "\t", csv.QUOTE_MINIMAL)
    except DataError:
        return _parse_csv(path, text, "\t", csv.QUOTE_NONE)


def _has_bare_quotes(text: str) -> bool:
    """Whether every line is a whole row as it stands, and some field opens with a quote that it does not close.

    Read as quoted, such a field would swallow all rows up to the next quote without a word.
    """
    rows = [line.split("\t") for _, line in _lines(text)]
    if len({len(row) for row in rows}) != 1:
        return False
    return any(field.startswith('"') and not _QUOTED.fullmatch(field) for row in rows for field in row)


def _parse_csv(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Table:
    rows, lines = [], []
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes") from None
    finally:
        csv.field_size_limit(limit)
    header = [name.strip() for name in rows[0]]
    if len(set(header)) < len(header):
        raise DataError(f"{path} names a column twice in its first line: {', '.join(header)}; rename one")
    table = Table(path.name, {name: [] for name in header}, lines[1:], {}, path.parent)
    uneven = [index for index, row in enumerate(rows[1:]) if len(row) != len(header)]
    if uneven:
        count, line = len(rows[uneven[0] + 1]), lines[uneven[0] + 1]
        raise DataError(
            f"{path}, row {uneven[0] + 1} (line {line}): {count} fields where the first line names {len(header)}; "
            f"{len(uneven):,} of {len(rows) - 1:,} rows affected; quote fields that hold the separator"
        )
    for name, values in zip(header, zip(*rows[1:], strict=True), strict=False):
        table.columns[name].extend(values)
    return table


def _read_txt(path: Path) -> Table:
    lines = _lines(_read_text(path))
    return Table(path.name, {"text": [line for _, line in lines]}, [number for number, _ in lines], {}, path.parent)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return _from_arrow(path, file.read())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _read_arrow(path: Path) -> Table:
    import pyarrow

    content = pyarrow.py_buffer(path.read_bytes())
    for opened in (pyarrow.ipc.open_file, pyarrow.ipc.open_stream):
        try:
            with opened(content) as reader:
                return _from_arrow(path, reader.read_all())
        except pyarrow.ArrowInvalid as error:
            problem = str(error)
    raise DataError(f"{path} is not a readable Arrow file: {problem}")


def _from_arrow(path: Path, table: Any) -> Table:
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{path} names a column twice: {', '.join(table.column_names)}; rename one")
    return from_arrow(path.name, table, path.parent)


def from_arrow(name: str, table: Any, folder: Path) -> Table:
    """A `pyarrow.Table`, with the class names `datasets` keeps in its schema."""
    classes = {}
    try:
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        classes = {key: tuple(value["names"]) for key, value in features.items() if value.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # metadata of another writer: the numbers stay numbers
    return Table(name, {key: table.column(key) for key in table.column_names}, (), classes, folder)


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
