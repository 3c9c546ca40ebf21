"""Merge recipes beyond one merge of models: those whose result is an adapter, and those that look for the best merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftcli.errors import Problem, RecipeError, RequestError
from ftcli.merging.engine import Say, working_folder
from ftcli.merging.hold import held
from ftcli.merging.lora.recipe import AdapterRecipe, is_adapter_recipe, read_adapter_recipe
from ftcli.merging.outcome import check_output
from ftcli.recipe.yaml import Document, KeyPath, YamlError, decode, dotted, parse, where

if TYPE_CHECKING:
    from ftcli.merging.search.recipe import AnySearch

SEARCHES = ("greedy_soup", "search", "learned_weights", "adapter_soup")
"""Merge methods that look for the best merge; `wise_ft` does with `evaluate`."""


class Special(Protocol):
    """A merge that is not one pass of the engine."""

    def plan(self) -> list[str]:
        """What would be done, in lines for people."""

    def run(self, output: Path, *, threads: int | None, verify: bool, say: Say, note: Callable[[str], None]) -> dict[str, Any]:
        """Do it; the report as JSON has it, with `lines` for people."""


class _Adapters:
    def __init__(self, recipe: AdapterRecipe) -> None:
        self._recipe = recipe

    def plan(self) -> list[str]:
        return self._recipe.plan()

    def run(self, output: Path, *, threads: int | None, verify: bool, say: Say, note: Callable[[str], None]) -> dict[str, Any]:
        check_output(output)
        say(0, 1, "merge adapters")
        with held(working_folder(output), output):
            check_output(output)
            report = self._recipe.run(output)
        return {**report, "lines": [report["line"], f"adapter: {output}"]}


class _Search:
    def __init__(self, recipe: AnySearch, document: Document, text: str, path: Path) -> None:
        self._recipe, self._document, self._text, self._path = recipe, document, text, path

    def plan(self) -> list[str]:
        with placed(self._document):
            return self._plan()

    def run(self, output: Path, *, threads: int | None, verify: bool, say: Say, note: Callable[[str], None]) -> dict[str, Any]:
        with placed(self._document):
            return self._run(output, threads, verify, say, note)

    def _plan(self) -> list[str]:
        from ftcli.merging.search.recipe import AdapterSoup

        if isinstance(self._recipe, AdapterSoup):
            from ftcli.merging.search.domains import open_soup

            adapters, base = open_soup(self._recipe, self._path)
            return [f"adapter_soup: the {self._recipe.k} of {len(adapters)} adapters of {base} nearest to {self._recipe.texts}"]
        from ftcli.merging.search.run import plan_search

        return plan_search(self._recipe, self._path)

    def _run(self, output: Path, threads: int | None, verify: bool, say: Say, note: Callable[[str], None]) -> dict[str, Any]:
        from ftcli.merging.search.recipe import AdapterSoup

        if isinstance(self._recipe, AdapterSoup):
            from ftcli.merging.search.domains import run_adapter_soup

            return run_adapter_soup(self._recipe, self._path, output, say=say)
        from ftcli.merging.search.run import run_search

        return run_search(self._recipe, self._text, self._path, output, threads=threads, verify=verify, say=say, note=note)


def is_search(data: Mapping[str, Any]) -> bool:
    """Does a merge recipe's document ask for a search?"""
    name = data.get("merge_method")
    return name in SEARCHES or (name == "wise_ft" and ("evaluate" in data or "alphas" in data))


def open_special(path: Path) -> Special | None:
    """The merge that the recipe at `path` asks for, if it is of one of these kinds.

    A file that cannot be read is of none: whoever reads merge recipes says what is wrong with it.

    Raises:
        RecipeError: it is of one of them, and something in it is wrong; names every problem.
        RequestError: what it names cannot be merged so.
    """
    try:
        text = decode(path.read_bytes())
        document = parse(text)
    except (OSError, YamlError):
        return None
    if is_search(document.data):
        from ftcli.merging.search.recipe import read_search_recipe

        return _Search(read_search_recipe(document, path), document, text, path)
    if not is_adapter_recipe(document.data):
        return None
    if document.problems:
        raise RecipeError(f"merge recipe `{path}` cannot be used", [problem for _, problem in document.problems])
    try:
        with placed(document):
            return _Adapters(read_adapter_recipe(document.data, path.resolve().parent))
    except RecipeError as error:
        raise RecipeError(f"merge recipe `{path}`: {error.summary}", error.problems) from None


@contextmanager
def placed(document: Document) -> Iterator[None]:
    """Errors in what `document` says name its line and column, too."""
    try:
        yield
    except RequestError as error:
        problems = [_placed(problem, document) for problem in error.problems]
        if problems == list(error.problems):
            raise
        raise type(error)(error.summary, problems, hint=error.hint) from None


def _placed(problem: Problem, document: Document) -> Problem:
    """The problem with the place of the key that it names, or of the model or file."""
    found = dict(_paths(document.data, ()))
    paths = {dotted(path): path for path in found}
    key = problem.where
    if "(line " in key:
        return problem
    named = next((path for path, value in found.items() if isinstance(value, str) and value and f"/{key}".endswith(f"/{value}")), None)
    while key and key not in paths:
        key = key.rpartition(".")[0]
    path = paths.get(key, named)
    return problem if path is None else replace(problem, where=where((problem.where,), document.place(path)))


def _paths(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Everything in the data, by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from _paths(inner, (*path, key))
