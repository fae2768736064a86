"""Reading one file: the same rows whatever the format, and errors that say where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgekd.data.files import READERS, read_file
from edgekd.data.source import find_source
from edgekd.errors import DataError

ROWS = [{"text": 'a, "b"', "label": "x"}, {"text": "zwei\u2028Zeilen ü", "label": "y"}]


def write(path: Path) -> None:
    kind = path.suffix
    if kind in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == ".csv":
        path.write_text('text,label\r\n"a, ""b""",x\r\nzwei\u2028Zeilen ü,y\r\n', encoding="utf-8-sig", newline="")
    elif kind == ".tsv":
        path.write_text('text\tlabel\n"a, ""b"""\tx\nzwei\u2028Zeilen ü\ty\n', encoding="utf-8", newline="")
    elif kind == ".txt":
        path.write_text('a, "b"\n\nzwei\u2028Zeilen ü\n', encoding="utf-8")
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path)
    table = read_file(path)
    assert table.values("text") == [row["text"] for row in ROWS]
    if suffix != ".txt":
        assert table.values("label") == ["x", "y"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json", ".txt"])
def test_packed_text_reads_as_unpacked(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path)
    packed = tmp_path / f"rows{suffix}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_file(packed).columns == read_file(path).columns


def test_arrow_files_are_read_in_both_forms(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert read_file(tmp_path / "a.arrow").values("label") == ["x", "y"]


def test_json_of_columns_and_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": ["p", "q"], "label": [0, 1]}')
    assert read_file(path).values("text") == ["p", "q"]
    path.write_text('{"text": "p"}\n{"text": "q"}\n')
    assert read_file(path).values("text") == ["p", "q"]


def test_semicolons_and_bare_quotes_are_understood(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\nja, doch;1\n")
    assert read_file(tmp_path / "a.csv").values("text") == ["ja, doch"]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open quote\t1\nsecond\t0\n')
    assert read_file(tmp_path / "a.tsv").values("text") == ['"open quote', "second"]


def test_quotes_that_open_rows_do_not_swallow_the_rows_between_them(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one said\t1\ntwo\t0\n"three said\t1\nfour\t0\n')
    assert read_file(tmp_path / "a.tsv").values("text") == ['"one said', "two", '"three said', "four"]
    (tmp_path / "b.tsv").write_text('text\tlabel\n"a ""b"" c"\t1\n"two\nlines"\t0\n"tab\tinside"\t1\n')
    assert read_file(tmp_path / "b.tsv").values("text") == ['a "b" c', "two\nlines", "tab\tinside"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b" \n", "is empty"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n[1]\n', r"line 2: not a JSON object: .*; 2 of 3 lines affected"),
        ("a.jsonl", b"[1]\n", r"line 1: .*expected an object .*got list"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b'{"a": 1}', "is JSON but not rows"),
        ("a.csv", "text\nok\ncafé\n".encode("latin1"), r"not UTF-8: byte 0xe9 at offset 11 \(line 3\).*utf-8"),
        ("a.csv", "text\nok\n".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("a.csv", b"text,label\na,1\nb,c,1\nd,e,1\n", r"row 2 \(line 3\): 3 fields .* 2; 2 of 3 rows affected"),
        ("a.csv", b'text,label\n"open,1\n', "check the quotes"),
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.parquet", b"PAR?", "not a readable Parquet file"),
        ("a.arrow", b"nothing of the kind", "not a readable Arrow file"),
        ("a.csv.gz", b"text\n", "not a complete gzip file"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_parquet_with_a_column_twice_or_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    texts = pa.array(["a", "b"])
    pq.write_table(pa.table([texts, texts], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="names a column twice: text, text; rename one"):
        read_file(tmp_path / "twice.parquet")
    raw = pa.array([b"\xff", b"b"])
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, *raw.buffers()[1:])}), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="column 'text' holds text that is not UTF-8"):
        read_file(tmp_path / "raw.parquet").values("text")


def test_what_is_no_plain_file_is_not_said_to_be_missing() -> None:
    with pytest.raises(DataError, match="/dev/null is neither a folder nor a plain file"):
        find_source("/dev/null", {})
