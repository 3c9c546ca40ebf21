"""Rows come out of files as they are, with the line they stand on, and what is no row is refused by file and line."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ftcli.data.sources import bytes as source_bytes
from ftcli.data.sources.file import File
from ftcli.errors import DataError, MissingExtraError, Problem

ROWS = [{"a": "1", "b": "x"}, {"a": "2", "b": "ü \u2028 y"}]


def rows_of(path: Path, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(File(path=str(path), **settings).rows())


def refusal(path: Path) -> Problem | None:
    """The one problem of a file that is refused."""
    try:
        rows_of(path)
    except DataError as error:
        return error.problems[0]
    return None


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("r.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), [1, 2]),
        ("r.ndjson", "\n\n" + "\r\n".join(json.dumps(row) for row in ROWS), [3, 4]),
        ("r.json", json.dumps(ROWS, ensure_ascii=False), [1, 1]),
        ("r.json", "\n [\n" + ",\n\n".join(json.dumps(row) for row in ROWS) + "]\n", [3, 5]),
        ("r.json", "\n".join(json.dumps(row) for row in ROWS), [1, 2]),
        ("r.csv", "a,b\n1,x\n2,ü \u2028 y\n", [2, 3]),
        ("r.csv", '\r\n"a",b\r\n\r\n1,x\r\n2,"ü \u2028 y"', [4, 5]),
        ("r.tsv", "a\tb\n1\tx\n2\tü \u2028 y", [2, 3]),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_kind_gives_the_rows_and_their_lines(
    tmp_path: Path, name: str, content: str, lines: list[int], compression: str, mark: bytes
) -> None:
    data = mark + content.encode()
    if compression == ".gz":
        data = gzip.compress(data, mtime=0)
    elif compression == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # two frames, as parallel compressors write them
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path = write(tmp_path / (name + compression), data)
    assert rows_of(path) == [(f"{path.name}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]


def test_csv_rows_that_span_lines_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", 'a,b\n"1\n\n2","""x"", y"\n3,z\n')
    assert rows_of(path) == [("r.csv:2", {"a": "1\n\n2", "b": '"x", y'}), ("r.csv:5", {"a": "3", "b": "z"})]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", [(2, " a\nb\n\n\nc")]),
        ("paragraph", [(2, " a\nb"), (6, "c")]),
        ("line", [(2, " a"), (3, "b"), (6, "c")]),
    ],
)
def test_txt_is_one_text_or_its_paragraphs_or_its_lines(tmp_path: Path, split: str, expected: list[tuple[int, str]]) -> None:
    path = write(tmp_path / "t.txt", b"\xef\xbb\xbf\r\n a\r\nb\r\n \r\n\r\nc\r\n\r\n".replace(b" \r\n\r\nc", b"\r\n\r\nc"))
    assert rows_of(path, split=split) == [(f"t.txt:{line}", {"text": text}) for line, text in expected]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    assert rows_of(tmp_path / "r.parquet") == [("r.parquet:1", ROWS[0]), ("r.parquet:2", ROWS[1])]


def test_json_array_over_many_chunks_equals_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": number, "text": 'ü\\"]}, 😀\n' * (number % 40), "f": 1.5e3, "deep": [{"x": [None, True]}]} for number in range(60)]
    path = write(tmp_path / "r.json", json.dumps(rows, indent=1, ensure_ascii=False))
    expected = rows_of(path)
    assert [row for _, row in expected] == rows
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(source_bytes, "CHUNK_BYTES", size)
        assert rows_of(path) == expected


def test_long_json_array_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "word " * 200}) for _ in range(30_000)) + "]")
    assert path.stat().st_size > 28 << 20
    tracemalloc.start()
    assert sum(1 for _ in File(path=str(path)).rows()) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("r.jsonl", b"", "r.jsonl", "is empty"),
        ("r.jsonl", b"\n \n", "r.jsonl", "has no rows"),
        ("r.csv", b"a,b\n", "r.csv", "has no rows"),
        ("r.json", b"[]", "r.json", "has no rows"),
        ("r.jsonl", b'{"a": 1}\n{"a": }\n', "r.jsonl:2", "is not valid JSON: Expecting value at column 7"),
        ("r.jsonl", b'{"a": NaN}', "r.jsonl:1", "NaN is not a number of JSON"),
        ("r.jsonl", b'{"a": 1} {"a": 2}', "r.jsonl:1", "something follows the value"),
        ("r.jsonl", b'[{"a": 1}]', "r.jsonl:1", "the row is a list, not an object"),
        ("r.jsonl", b'"text"', "r.jsonl:1", "the row is a text, not an object"),
        ("r.jsonl", b"[\n", "r.jsonl:1", "a file that is one array is named .json"),
        ("r.jsonl", b'{"a": "\\ud800"}', "r.jsonl:1", "lone surrogate"),
        ("r.jsonl", b"[" * 100_000, "r.jsonl:1", "nested too deeply"),
        ("r.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "r.jsonl:1", "is not valid JSON"),
        (
            "r.jsonl",
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            "r.jsonl:2",
            'byte 0xe9 at offset 19 is not UTF-8; it looks like latin-1: \'{"a": "caf\xe9"}\'',
        ),
        ("r.json", b'[{"a": 1},\n{"a": "caf\xe9"}]', "r.json:2", "byte 0xe9 at offset 21"),
        ("r.csv", b"a\nx\ncaf\xe9\n", "r.csv:3", "byte 0xe9 at offset 7"),
        ("r.txt", b"caf\xe9", "r.txt:1", "byte 0xe9 at offset 3"),
        ("r.txt", b"\x93quoted\x94", "r.txt:1", "windows-1252: '\u201cquoted\u201d'"),
        ("r.csv", "a,b\n".encode("utf-16"), "r.csv", "is UTF-16, not UTF-8"),
        ("r.json", b'{"a": [1, 2], "b": [3, 4]}', "r.json:1", r"one object of columns \(a, b\)"),
        ("r.json", b'{"version": 1, "data": [{"a": 1}]}', "r.json:1", "the rows seem to be under `data`"),
        ("r.json", b'{"a": 1}', "r.json:1", "holds one object, not a list of rows"),
        ("r.json", b"42", "r.json:1", "holds a number, not a list"),
        ("r.json", b'[{"a": 1}\n{"a": 2}]', "r.json:2", "expecting `,` or `]`"),
        ("r.json", b'[{"a": 1}', "r.json:1", "found the end"),
        ("r.json", b'[\n{"a": "' + b"x" * 100 + b'\n"}]', "r.json:2", "Invalid control character"),
        ("r.csv", b"a,b\n1,2\n1\n", "r.csv:3", "the row has 1 columns, the header 2"),
        ("r.csv", b'a,b\n"1\n2",2\n1,2,3\n', "r.csv:4", "the row has 3 columns, the header 2"),
        ("r.csv", b"a,a\n1,2\n", "r.csv:1", "names column `a` twice"),
        ("r.csv", b"a,\n1,2\n", "r.csv:1", "no name for column 2"),
        ("r.csv", b'a,b\n1,"x\n', "r.csv:2", "cannot be read as a row"),
        ("r.csv", b'a,b\n1,"x"y\n', "r.csv:2", "cannot be read as a row"),
        ("r.csv", b"a;b\n1;2\n", "r.csv:1", "has `;` in it"),
        ("r.csv", b"a\tb\n1\t2\n", "r.csv:1", "has a tab in it"),
        ("r.jsonl.gz", b"no gzip", "r.jsonl.gz", "is not a whole gzip file"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "r.jsonl.gz", "is not a whole gzip file"),
        ("r.jsonl.zst", b"no zstd", "r.jsonl.zst", "is not a whole zstd file"),
        ("r.parquet", b"no parquet", "r.parquet", "is not a parquet file"),
        ("r.xlsx", b"x", "", "`r.xlsx` is of an unknown kind"),
    ],
)
def test_what_is_no_row_is_refused_by_file_and_line(tmp_path: Path, name: str, content: bytes, where: str, what: str) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=what) as caught:
        rows_of(path)
    assert caught.value.problems[0].where == (where or str(path))


def test_place_of_a_wrong_byte_is_known_in_later_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'\xef\xbb\xbf[\n{"a": "\xc3\xbc"},\n{"a": "caf\xe9"}]'
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(source_bytes, "CHUNK_BYTES", size)
        problem = refusal(write(tmp_path / "r.json", content))
        assert problem is not None
        assert problem.where == "r.json:3"
        assert f"at offset {content.index(0xE9)} " in problem.what


def test_zst_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"ftcli\[zst\]"):
        rows_of(write(tmp_path / "r.jsonl.zst", b"x"))


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean `.*/orders.jsonl`"):
        rows_of(tmp_path / "order.jsonl")
    with pytest.raises(DataError, match=r"data files in `.*`: orders.jsonl"):
        rows_of(tmp_path / "zzz")
    with pytest.raises(DataError, match=r"there is no folder `.*/dta`"):
        rows_of(tmp_path / "dta" / "orders.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        rows_of(tmp_path / "*.csv")


def test_globs_and_folders_read_their_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a/1.jsonl"):
        write(tmp_path / name, json.dumps({"name": name}))
    write(tmp_path / "b/notes.md", "not data")
    assert [row["name"] for _, row in rows_of(tmp_path / "b")] == ["b/10.jsonl", "b/2.jsonl"]
    everywhere = rows_of(tmp_path / "**" / "*.jsonl")
    assert everywhere == [(f"{name}:1", {"name": name}) for name in ("a/1.jsonl", "b/10.jsonl", "b/2.jsonl")]


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "b.jsonl", "{}")
    write(tmp_path / "README.txt", "read me")
    with pytest.raises(DataError, match=r"several kinds: 2 .jsonl, 1 .txt") as caught:
        rows_of(tmp_path)
    assert caught.value.problems[0].hint == "a glob such as `*.jsonl` picks one kind"


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "r[1].jsonl", '{"a": 1}')) == [("r[1].jsonl:1", {"a": 1})]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/d/orders.jsonl", "orders"),
        ("/d/orders.v2.jsonl.gz", "orders.v2"),
        ("/d/part-*.csv", "part"),
        ("/d/**/*.csv", "d"),
        ("/d/x.txt", "x"),
    ],
)
def test_label_is_the_name_without_its_suffixes(path: str, label: str) -> None:
    assert File(path=path).label() == label


def test_fingerprint_follows_the_bytes_and_not_the_name(tmp_path: Path) -> None:
    first = File(path=str(write(tmp_path / "a.jsonl", '{"a": 1}'))).fingerprint()
    assert File(path=str(write(tmp_path / "b.jsonl", '{"a": 1}'))).fingerprint() == first
    assert File(path=str(write(tmp_path / "c.txt", '{"a": 1}'))).fingerprint() != first
    os.utime(write(tmp_path / "a.jsonl", '{"a": 2}'), ns=(1, 1))
    assert File(path=str(tmp_path / "a.jsonl")).fingerprint() != first
    assert File(path=str(tmp_path / "c.txt")).fingerprint() != File(path=str(tmp_path / "c.txt"), split="line").fingerprint()


@pytest.mark.real
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_invalid_json_is_refused_with_its_line_and_valid_json_is_understood(shared: Path, tmp_path: Path, suffix: str) -> None:
    files = sorted((shared / "data/robustness/json_suite/test_parsing").glob("*.json"))
    assert len(files) > 300
    for file in files:
        kind, path = file.name[0], write(tmp_path / (file.stem + suffix), file.read_bytes())
        problem = refusal(path)
        nothing = problem is not None and problem.what in ("is empty", "has no rows")
        no_row = problem is not None and re.search("not an object|not a list of ", problem.what) is not None
        if kind == "n":
            assert problem is not None, path.name
            assert nothing or re.match(re.escape(path.name) + r":\d+$", problem.where), str(problem)
        # Valid JSON over several lines is not JSON Lines
        elif kind == "y" and suffix == ".json":
            assert problem is None or nothing or no_row, str(problem)


@pytest.mark.real
def test_every_value_of_the_json_suite_is_read_or_refused_inside_a_row(shared: Path, tmp_path: Path) -> None:
    for file in sorted((shared / "data/robustness/json_suite/test_parsing").glob("[ny]_*.json")):
        content = file.read_bytes()
        path = write(tmp_path / file.name, b'[\n{"a": ' + content.removeprefix(b"\xef\xbb\xbf") + b"}]")
        if file.name[0] == "y":
            assert rows_of(path) == [(f"{file.name}:2", {"a": json.loads(content)})]
        else:
            with pytest.raises(DataError, match=r"is not valid JSON|is not UTF-8"):
                rows_of(path)


@pytest.mark.real
def test_csv_spectrum_is_read_as_its_json_says(shared: Path) -> None:
    folder = shared / "data/robustness/csv_spectrum"
    paths = sorted((folder / "csvs").glob("*.csv"))
    assert len(paths) == 11
    for path in paths:
        expected = json.loads((folder / "json" / f"{path.stem}.json").read_text(encoding="utf-8"))
        if b"\r" not in path.read_bytes():  # the stored files named crlf have lost theirs
            expected = [{column: value.replace("\r\n", "\n") for column, value in row.items()} for row in expected]
        assert [row for _, row in rows_of(path)] == expected, path.name


@pytest.mark.real
def test_the_same_rows_in_other_files_are_the_same_rows(shared: Path) -> None:
    def bare(path: str) -> list[dict[str, Any]]:
        return [row for _, row in rows_of(shared / "data" / path)]

    alpaca = bare("formats/alpaca.json")
    assert alpaca == bare("formats/alpaca.jsonl.gz") == bare("formats/alpaca.parquet")
    assert bare("formats/banking77_600.csv") == bare("formats/banking77_600.tsv")
    gsm8k = bare("gsm8k_train.jsonl")
    assert all(row in gsm8k for row in bare("formats/gsm8k_messages.parquet")[:20])
    (grimm,) = bare("formats/grimm_bom_crlf.txt")
    assert grimm["text"].startswith("THE GOLDEN BIRD\n\n\nA certain king")
    assert "\r" not in grimm["text"]
