from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.recipe.yaml import MAX_DEPTH, Place, YamlError, decode, describe, dump, parse, parse_value, scalar


def problem_of(text: str | bytes) -> str:
    with pytest.raises(YamlError) as caught:
        parse(decode(text) if isinstance(text, bytes) else text)
    problem = caught.value.problem
    return f"{problem.where}: {problem.what}" + (f" / {problem.hint}" if problem.hint else "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("True", True),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("n", "n"),
        ("1e-5", 1e-5),
        ("2E4", 20000.0),
        (".5", 0.5),
        ("+1.5e+3", 1500.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-01-31", "2026-01-31"),
        ("~", None),
        ("", None),
        ("null", None),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    assert parse(f"a: {text}\n").data == {"a": value}


def test_every_path_has_its_line_and_column() -> None:
    document = parse("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n")
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    assert document.place(("b",)) == Place(2, 1)
    assert document.place(("b", 0)) == Place(3, 5)
    assert document.place(("b", 1, "d")) == Place(5, 6)
    assert document.place(("b", 1, "missing")) == Place(4, 5), "the nearest thing around it"


def test_a_repeated_key_names_both_lines_and_the_reading_goes_on() -> None:
    document = parse("train:\n  lr: 1\n  seed: 2\n  lr: 3\nx: 4\nx: 5\n")
    assert [str(problem) for _, problem in document.problems] == [
        "  train.lr (line 4, column 3): the same key is already on line 2\n    hint: keep one of the two",
        "  x (line 6, column 1): the same key is already on line 5\n    hint: keep one of the two",
    ]
    assert document.data == {"train": {"lr": 1, "seed": 2}, "x": 4}


def test_a_key_that_is_no_text_is_a_problem() -> None:
    problems = [str(problem) for _, problem in parse("a: {1: x}\ntrue: y\n? [b]\n: z\n").problems]
    assert problems == [
        "  a (line 1, column 5): a key is `1`, allowed: text\n    hint: put the key in quotes",
        "  line 2, column 1: a key is `true`, allowed: text\n    hint: put the key in quotes",
        "  line 3, column 3: a key is a list or a mapping, allowed: text\n    hint: put the key in quotes",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\n\tb: 1\n", "line 2, column 1: a tab in the indentation / YAML is written with spaces"),
        ("a:\n  b: 1\n\tc: 2\n", "line 3, column 1: a tab in the indentation / YAML is written with spaces"),
        ("a: 1\t\t# x\n", "line 1, column 5: a tab between values / YAML is written with spaces"),
        ("", "line 1, column 1: the document is empty / a recipe begins with `version: 1`"),
        ("# only a comment\n", "line 1, column 1: the document is empty / a recipe begins with `version: 1`"),
        ("- 1\n- 2\n", "line 1, column 1: the document is a list of 2, not a mapping / a recipe begins with `version: 1`"),
        ("hello\n", "line 1, column 1: the document is text `hello`, not a mapping / a recipe begins with `version: 1`"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: a second document begins here / a recipe is one document; remove `---`"),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here / a text with `: ` in it needs quotes; or the line is"),
        ("a: [1\nb: 2\n", "line 2, column 2: expected `,` or `]`, but got `:` / the bracket opened on line 1 is not closed"),
        ('a: "x\n', "line 2, column 1: found unexpected end of stream / the quotation mark on line 1 is not closed"),
        ("a: @x\n", "line 1, column 4: found character `@` that cannot start any token / put the text in quotes"),
        ("a: *b\n", "line 1, column 4: alias `*b` names no anchor above it"),
        ("a: &b [*b]\n", "line 1, column 8: alias `*b` stands inside its own anchor"),
        ("a: !!python/name:os.system x\n", "line 1, column 4: tag `!!python/name:os.system` is not allowed / write the plain value"),
        ("a: .nan\n", "line 1, column 4: `.nan` is not a number that a recipe can use"),
        ("a: 1e999\n", "line 1, column 4: `1e999` is too large for a number"),
        ("<<: 1\n", "line 1, column 5: `<<` takes a mapping or a list of mappings"),
        ('a: "\\ud800"\n', "line 1, column 4: the text holds half of a surrogate pair"),
        ("a: 1\nb: \x00\n", "line 2: the character U+0000 is not allowed in YAML"),
        (b"a: 1\nb: caf\xe9\n", "byte 11 (line 2): 0xe9 is not UTF-8 / save the file as UTF-8"),
        (b"\xef\xbb\xbfa: \xff\n", "byte 6 (line 1): 0xff is not UTF-8 / save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "byte 0: the file is UTF-16 / save it as UTF-8"),
    ],
)
def test_what_is_no_yaml_is_said_with_its_place(text: str | bytes, problem: str) -> None:
    assert problem_of(text).startswith(problem)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm() -> None:
    assert parse(decode(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")).data == {"a": 1, "b": {"c": "x"}}


def test_aliases_are_copies_and_merged_keys_keep_their_own_lines() -> None:
    document = parse("x: &a\n  k: 1\n  j: [2]\ny: *a\nz:\n  <<: *a\n  k: 3\n")
    assert document.data["y"] == {"k": 1, "j": [2]}
    assert document.data["y"]["j"] is not document.data["x"]["j"]
    assert document.data["z"] == {"k": 3, "j": [2]}
    assert document.place(("y",)) == Place(4, 1)
    assert document.place(("z", "j")) == Place(3, 3)


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    assert problem_of("\n".join(lines)).endswith("more than 50000 values, counting what aliases repeat")


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "a: " + "{x: " * 5000])
def test_deep_nesting_is_refused(text: str) -> None:
    assert problem_of(text).endswith(f"nested deeper than {MAX_DEPTH} levels")


def test_a_value_of_the_command_line_is_yaml() -> None:
    assert parse_value("{kind: lora, rank: 8}") == {"kind": "lora", "rank": 8}
    assert parse_value("1e-4") == 1e-4
    assert parse_value("") is None
    with pytest.raises(YamlError):
        parse_value("{a: 1, a: 2}")


def test_long_values_are_shortened() -> None:
    assert describe("x" * 100) == f"text `{'x' * 57}...`"


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
    | st.sampled_from(["on", "1e-5", "010", "~", "null", ".5", "1_0", "0o7", "12:30", "2026-01-01", "<<", "=", "- a", "a: b", "#", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), plain_data, min_size=1, max_size=4))
def test_what_is_dumped_reads_back_the_same(data: dict[str, Any]) -> None:
    assert parse(dump(data)).data == data


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab01: -[]{}&*!|>'\"%@`,?#\n\t~.<\\", max_size=40))
def test_any_text_is_a_document_or_a_yaml_error(text: str) -> None:
    with contextlib.suppress(YamlError):
        assert isinstance(parse(text).data, dict)
