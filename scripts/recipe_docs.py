"""Write docs/recipes.md from the recipe's own docstrings: `python scripts/recipe_docs.py > docs/recipes.md`.

With the word `evaluation`, docs/evaluation-recipes.md from those of evaluation recipes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from ftcli.evaluation.recipe import TITLE, EvaluationRecipe
from ftcli.recipe.schema import json_schema, schema_of

INTRODUCTION = """\
# The recipe, key by key

Made from the code by `python scripts/recipe_docs.py`; `ftcli schema` prints the same for editors.

A recipe is a YAML file. Unknown keys are errors, `on` and `yes` are text and not true, `1e-5` is a number. Relative paths count
from the recipe's folder; `${NAME}` in paths and names is replaced from the environment, and an unset one is an error. Any key can
be changed on the command line: `--set train.lr=1e-4`, `--set data.train.0.weight=2`.
"""

EVALUATION = """\
# The evaluation recipe, key by key

Made from the code by `python scripts/recipe_docs.py evaluation`; `ftcli schema evaluation` prints the same for editors. What the kinds of
task measure is told in [evaluation.md](evaluation.md).

Used by `ftcli eval RUN --recipe FILE`. One with every kind of task, the keys that most need, and gates (paths count from its folder):

```yaml
version: 1
tasks:
  - name: orders
    kind: generation
    source: {kind: builtin, name: orders, split: test}
    metrics: [{kind: json-match}, {kind: exact-match}]
    max_new_tokens: 64
  - name: stories
    kind: language-modelling
    source: {kind: builtin, name: stories, split: test}
    retained: true
  - name: quiz
    kind: multiple-choice
    source: {kind: file, path: quiz.jsonl}
    question: question
    choices: choices
    answer: answer
    prompt: "Question: {question}\\nAnswer:"
    separator: " "
    normalise: bytes
    shots: {count: 5, choose: fixed}
  - name: taste
    kind: preference
    source: {kind: file, path: pairs.jsonl}
  - name: reviews
    kind: classification
    source: {kind: builtin, name: reviews, split: test}
    labels: [negative, positive]
    group_by: label
  - name: programs
    kind: code
    source: {kind: file, path: programs.jsonl}
    samples: 4
    temperature: 0.8
    k: [1, 4]
  - name: search
    kind: retrieval
    source: {kind: file, path: queries.jsonl}
    corpus: {kind: file, path: passages.jsonl}
    pooling: mean
  - name: harness
    kind: lm-eval
    task: tasks/mine.yaml
gates:
  - orders.json_match >= 0.9
  - stories.bits_per_byte <= base + 0.02 @ p<0.05
```
"""


def main(document: str = "recipe") -> None:
    schema = json_schema() if document == "recipe" else schema_of(EvaluationRecipe, TITLE)
    print(INTRODUCTION if document == "recipe" else EVALUATION)
    print(section("Recipe", {key: schema[key] for key in ("properties", "required", "description") if key in schema}))
    for name in in_order(schema):
        print(section(name, schema["$defs"][name]))


def in_order(schema: dict[str, Any]) -> list[str]:
    """Names of all parts of the recipe, as one meets them reading it from the top."""
    names = list(dict.fromkeys(references({key: value for key, value in schema.items() if key != "$defs"})))
    for name in names:  # grows while it is read
        names += [other for other in dict.fromkeys(references(schema["$defs"][name])) if other not in names]
    return names


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rsplit("/", 1)[-1]
        for key, value in node.items():
            if key != "discriminator":
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def section(heading: str, definition: dict[str, Any]) -> str:
    kind = definition["properties"].get("kind", {}).get("const")
    lines = [f"## {heading}", "", *([f"`kind: {kind}`", ""] if kind else []), definition.get("description", "").split("\n\nSource:")[0], ""]
    if set(definition["properties"]) == {"kind"}:
        return "\n".join(lines)
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for key, value in definition["properties"].items():
        if key != "kind":
            default = "required" if key in definition.get("required", ()) else f"`{shown(value.get('default'))}`"
            text = " ".join(value.get("description", "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {kind_of(value)} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return value.get("kind", "{}")
    return json.dumps(value)


def kind_of(value: dict[str, Any]) -> str:
    """The type in words, with limits."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{item}`" for item in value.get("enum", [value.get("const")]))
    for choice in ("anyOf", "oneOf"):
        if choice in value:
            return " or ".join(dict.fromkeys(kind_of(option) for option in value[choice]))
    if value.get("type") == "array":
        return f"list of {kind_of(value['items'])}" if "items" in value else "list"
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    words = [f"{word} {value[key]:g}" for key, word in limits.items() if key in value]
    return " ".join([{"string": "text", "object": "mapping"}.get(value.get("type", ""), value.get("type", "any")), *words])


if __name__ == "__main__":
    main(*sys.argv[1:2])
