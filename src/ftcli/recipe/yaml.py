"""YAML as a recipe means it: the values of YAML 1.2's core schema, and where in the file each of them stands.

PyYAML scans and parses; what it makes of the events (YAML 1.1: `on` is true, 1e-5 is text, 010 is 8, the last of two equal
keys wins) is not used. Only `true` and `false` are booleans, numbers are those of YAML 1.2, nothing becomes a date, and a key
that is there twice is a problem.

Source: YAML 1.2.2, section 10.3 (core schema); section 10.2 of YAML 1.1's type repository for the merge key `<<`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, DocumentStartEvent, Event, MappingStartEvent, NodeEvent, ScalarEvent

from ftcli.errors import Problem

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""

MAX_DEPTH = 64  # the recipe language needs 7; the walk over events is recursive
MAX_VALUES = 50_000  # after aliases are expanded: a small file can name billions

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_PREFIXED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Place:
    """A position in the file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """The top-level mapping, the place of everything in it, and what is wrong but does not end the reading."""

    data: dict[str, Any]
    places: dict[KeyPath, Place]
    problems: tuple[tuple[Place, Problem], ...]

    def place(self, path: KeyPath) -> Place | None:
        """Where `path` stands, or the nearest thing around it that stands somewhere."""
        return next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), None)


def dotted(path: KeyPath) -> str:
    """
    Example:
        >>> dotted(("data", "train", 0, "format"))
        'data.train.0.format'
    """
    return ".".join(map(str, path))


def where(path: KeyPath, place: Place | None) -> str:
    """A path and its place, as an error names them.

    Example:
        >>> where(("method", "rank"), Place(4, 3)), where((), Place(1, 1))
        ('method.rank (line 4, column 3)', 'line 1, column 1')
    """
    if place is None:
        return dotted(path)
    return f"{dotted(path)} ({_at(place)})" if path else _at(place)


class YamlError(Exception):
    """The text is not a YAML document that a recipe can be; `problem` says where and why."""

    def __init__(self, where: str, what: str, hint: str | None = None) -> None:
        self.problem = Problem(where, what, hint)
        super().__init__(str(self.problem))


@dataclass(frozen=True, slots=True)
class _Node:
    """A scalar's value, the items of a list, or the entries of a mapping (with the place of each key), at `place`."""

    value: Any
    place: Place


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    place: Place
    node: _Node


def decode(content: bytes) -> str:
    """The text of a recipe file.

    Raises:
        YamlError: it is not UTF-8; names the byte offset.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlError("byte 0", "the file is UTF-16", "save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # "utf-8-sig" counts from behind the mark; this decoding counts from the beginning of the file
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise YamlError(f"byte {offset} (line {line})", f"0x{content[offset]:02x} is not UTF-8", "save the file as UTF-8") from None


def parse(text: str) -> Document:
    """The document that `text` is.

    Raises:
        YamlError: it is not YAML, not one document, not a mapping, or too deep or too large.
    """
    reader = _Reader(text)
    root = reader.document()
    if not isinstance(root.value, dict):
        found = "is empty" if root.value is None else f"is {describe(reader.expand(root, ()))}, not a mapping"
        raise YamlError(_at(root.place), f"the document {found}", "a recipe begins with `version: 1`")
    data = reader.expand(root, ())
    return Document(data, reader.places, tuple(reader.problems))


def parse_value(text: str) -> Any:
    """The value that `text` is where a value stands: a scalar, or a list or mapping in brackets.

    Raises:
        YamlError: it is not YAML.
    """
    reader = _Reader(text)
    value = reader.expand(reader.document(), ())
    if reader.problems:
        raise YamlError("", reader.problems[0][1].what, reader.problems[0][1].hint)
    return value


def describe(value: Any) -> str:
    """A value as an error names it.

    Example:
        >>> describe("on"), describe(True), describe(3), describe([]), describe(None)
        ('text `on`', '`true`', '`3`', 'an empty list', 'nothing (null)')
    """
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "`true`" if value else "`false`"
        case str():
            return f"text `{value if len(value) <= 60 else value[:57] + '...'}`" if value else "an empty text"
        case dict():
            return f"a mapping ({', '.join(list(value)[:4])}{', ...' if len(value) > 4 else ''})" if value else "an empty mapping"
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case _:
            return f"`{value}`"


class _Reader:
    """Turns PyYAML's events into nodes, and nodes into plain data with places."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[tuple[Place, Problem]] = []
        self._anchors: dict[str | None, _Node | None] = {}
        self._num_values = 0
        self._loader = yaml.SafeLoader("")
        try:
            self._loader = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise YamlError(f"line {line}", f"the character U+{ord(text[error.position]):04X} is not allowed in YAML") from None

    def document(self) -> _Node:
        """The only document of the text."""
        self._next()  # stream start
        event = self._next()
        if not isinstance(event, DocumentStartEvent):
            return _Node(None, Place(1, 1))
        root = self._node(self._next(), ())
        self._next()  # document end
        event = self._next()
        if isinstance(event, DocumentStartEvent):
            raise YamlError(_at(_place(event)), "a second document begins here", "a recipe is one document; remove `---`")
        return root

    def _next(self) -> Event:
        try:
            return self._loader.get_event()  # type: ignore[no-untyped-call, no-any-return]
        except yaml.MarkedYAMLError as error:
            raise _syntax_error(error, self.text) from None
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" that is no character
            raise YamlError("", f"the text is not YAML: {error}") from None

    def _node(self, event: Event, path: KeyPath) -> _Node:
        place = _place(event)
        if len(path) > MAX_DEPTH:
            raise YamlError(_at(place), f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            node = self._anchors.get(event.anchor)
            if node is None:
                why = "stands inside its own anchor" if event.anchor in self._anchors else "names no anchor above it"
                raise YamlError(_at(place), f"alias `*{event.anchor}` {why}")
            return _Node(node.value, place)
        assert isinstance(event, NodeEvent)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        node = _Node(self._value(event, path), place)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _value(self, event: NodeEvent, path: KeyPath) -> Any:
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", "tag:yaml.org,2002:str") or (tag is not None and not isinstance(event, ScalarEvent)):
            name = tag.replace("tag:yaml.org,2002:", "!!")
            raise YamlError(_at(_place(event)), f"tag `{name}` is not allowed", "write the plain value")
        if isinstance(event, ScalarEvent):
            if any("\ud800" <= character <= "\udfff" for character in event.value):
                raise YamlError(_at(_place(event)), "the text holds half of a surrogate pair")
            return event.value if tag is not None or event.style is not None else self._scalar(event)
        if isinstance(event, MappingStartEvent):
            return self._mapping(path)
        return [self._node(item, (*path, index)) for index, item in enumerate(self._until_end())]

    def _until_end(self) -> Iterator[Event]:
        while not isinstance(event := self._next(), CollectionEndEvent):
            yield event

    def _mapping(self, path: KeyPath) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        merged: list[_Node] = []
        for event in self._until_end():
            is_merge = isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None
            key = self._node(event, (*path, "?"))
            value_path = (*path, str(key.value) if not isinstance(key.value, list | dict) else "?")
            value = self._node(self._next(), value_path)
            if is_merge:
                merged.append(value)
            elif not isinstance(key.value, str):
                found = "a list or a mapping" if isinstance(key.value, list | dict) else describe(key.value)
                self._problem(path, key.place, f"a key is {found}, allowed: text", "put the key in quotes")
            elif key.value in entries:
                first = entries[key.value].place.line
                self._problem(value_path, key.place, f"the same key is already on line {first}", "keep one of the two")
            else:
                entries[key.value] = _Entry(key.value, key.place, value)
        for node in merged:
            self._merge(node, entries)
        return entries

    def _merge(self, node: _Node, entries: dict[str, _Entry]) -> None:
        """Adds the entries of a mapping, or of a list of mappings, whose keys are not there yet."""
        for source in node.value if isinstance(node.value, list) else [node]:
            if not isinstance(source.value, dict):
                raise YamlError(_at(node.place), "`<<` takes a mapping or a list of mappings")
            for key, entry in source.value.items():
                entries.setdefault(key, entry)

    def _problem(self, path: KeyPath, place: Place, what: str, hint: str) -> None:
        self.problems.append((place, Problem(where(path, place), what, hint)))

    def _scalar(self, event: ScalarEvent) -> Any:
        if _NOT_FINITE.fullmatch(event.value):
            raise YamlError(_at(_place(event)), f"`{event.value}` is not a number that a recipe can use")
        value = scalar(event.value)
        if value in (float("inf"), float("-inf")):
            raise YamlError(_at(_place(event)), f"`{event.value[:20]}` is too large for a number")
        return value

    def expand(self, node: _Node, path: KeyPath) -> Any:
        """Plain data of `node`, aliases as copies; notes the place of every path on the way."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise YamlError(_at(node.place), f"more than {MAX_VALUES} values, counting what aliases repeat")
        self.places.setdefault(path, node.place)
        if isinstance(node.value, dict):
            for key, entry in node.value.items():
                self.places[(*path, key)] = entry.place
            return {key: self.expand(entry.node, (*path, key)) for key, entry in node.value.items()}
        if isinstance(node.value, list):
            return [self.expand(item, (*path, index)) for index, item in enumerate(node.value)]
        return node.value


def scalar(text: str) -> Any:
    """The value of a plain scalar in YAML 1.2's core schema.

    Example:
        >>> [scalar(text) for text in ("1e-5", "2E4", ".5", "010", "0x10", "on", "True", "~", "12:30:00", "2026-01-01", "1_000")]
        [1e-05, 20000.0, 0.5, 10, 16, 'on', True, None, '12:30:00', '2026-01-01', '1_000']
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _PREFIXED_INT.fullmatch(text):
        return int(text, 0)
    if _INT.fullmatch(text):
        return int(text) if len(text) < 1000 else float(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or YAML 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds U+0085, U+2028 and U+2029 like spaces in every style but this one
    style = '"' if len(text.splitlines()) > 1 or text.endswith(tuple("\n\r\x85\u2028\u2029")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _pattern, _tag in ((_FLOAT, "float"), (_PREFIXED_INT, "int"), (_INT, "int")):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789"))


def dump(data: dict[str, Any]) -> str:
    """YAML that reads back as `data`, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _place(event: Event) -> Place:
    mark = event.start_mark
    assert mark is not None, "events of a parsed text have marks"
    return Place(mark.line + 1, mark.column + 1)


def _at(place: Place) -> str:
    return f"line {place.line}, column {place.column}"


_SYNTAX_HINTS = (
    ("mapping values are not allowed", "a text with `: ` in it needs quotes; or the line is indented too far"),
    ("could not find expected ':'", "a key needs `: ` behind it"),
    ("expected <block end>", "the line is indented differently from its neighbours"),
    ("expected ',' or", "the bracket opened on line {opened} is not closed"),
    ("unexpected end of stream", "the quotation mark on line {opened} is not closed"),
    ("cannot start any token", "put the text in quotes"),
)


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> YamlError:
    """PyYAML's complaint with the place and, for the usual slips, what to do."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return YamlError("", f"the text is not YAML: {error.problem}")
    position = _at(Place(mark.line + 1, mark.column + 1))
    lines = text.split("\n")
    line = lines[mark.line] if mark.line < len(lines) else ""
    is_indentation = "\t" in line[: len(line) - len(line.lstrip())]
    if is_indentation or line[mark.column : mark.column + 1] == "\t":
        what = "a tab in the indentation" if is_indentation else "a tab between values"
        return YamlError(position, what, "YAML is written with spaces")
    what = re.sub(r"'([^']*)'", r"`\1`", error.problem or error.context or "not YAML")
    if "${" in line and "expected ',' or" in (error.problem or ""):
        return YamlError(position, what, "between brackets a text with `${...}` needs quotes")
    opened = (error.context_mark or mark).line + 1
    hint = next((hint.format(opened=opened) for start, hint in _SYNTAX_HINTS if start in (error.problem or "")), None)
    return YamlError(position, what, hint)
