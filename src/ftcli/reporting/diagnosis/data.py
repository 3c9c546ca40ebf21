"""What is wrong with the data: leaked rows, rows that were cut, a template that is not the model's, prompts that are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import FtcliError
from ftcli.reporting.diagnosis.facts import Facts, mapping, number
from ftcli.reporting.diagnosis.finding import Finding, Unjudged, Verdict
from ftcli.reporting.found_run import RESOLVED_RECIPE
from ftcli.reporting.rows import TURN_MARKERS

if TYPE_CHECKING:
    from ftcli.data.leakage import Hit, Text
    from ftcli.data.settings import EvaluationSource, TrainSource

LEAKED_SHARE, LEAKED_ROWS = 0.01, 5
SMALL_FILES = 2_000_000
"""Bytes of all data up to which rows are also looked for by their words: a few seconds."""
CUT_SHARE = 0.05
PROMPT_SHARE, PROMPT_WEIGHT = 0.3, 0.5
"""Of the weight of all targets; and a smaller weight a token is one that somebody chose with care."""


def leakage(facts: Facts) -> Verdict:
    """Rows of an evaluation source stand in the training data, too."""
    audit = mapping(facts.run.manifest.get("audit"))
    if "num_overlap" not in audit:
        return Unjudged("the manifest does not say which rows are in both")
    sizes = {report.get("name"): number(report.get("num_examples")) or 0 for report in facts.run.data if report["use"] == "evaluation"}
    leaked = {
        name: int(count)
        for name, count in mapping(audit["num_overlap"]).items()
        if isinstance(count, int) and (count >= LEAKED_ROWS or count >= LEAKED_SHARE * sizes.get(name, 0))
    }
    if not leaked:
        return _given_away(facts)
    pairs = [pair for pair in audit.get("overlap") or [] if isinstance(pair, list) and len(pair) == 2]
    return Finding(
        "leakage",
        "rows that the model is measured on are rows that it was trained on: the figures are better than the model",
        (
            *(
                f"{count} of {sizes.get(name, 0):.0f} examples of `{name}` are trained on, token for token"
                for name, count in leaked.items()
            ),
            *(f"{pair[0]} = {pair[1]}" for pair in pairs[:3]),
        ),
        (
            "take these rows out of the training file, and train again",
            "`ftcli data audit` also finds rows that differ by case, spaces, or a few words",
            "`data.holdout` takes evaluation rows out of the training source by their content",
        ),
    )


def _given_away(facts: Facts) -> Finding | None:
    """Rows that training rows hold word for word, in other case or punctuation or in the midst of a longer text, where the data is small
    and still where it was."""
    from ftcli.data.leakage import find_given_away
    from ftcli.recipe.load import load_recipe

    found: dict[str, tuple[list[Hit], int]] = {}
    try:
        data = load_recipe(facts.run.path / RESOLVED_RECIPE).recipe.data
        entries: list[TrainSource | EvaluationSource] = [*data.train, *data.evaluation]
        if sum(_size(entry) for entry in entries) > SMALL_FILES:
            return None
        learnt = [text for entry in data.train for text in _texts(entry)]
        # Rows that are held out of a source stand in its file, and are not trained on.
        for entry in (entry for entry in data.evaluation if entry.holdout is None):
            held_out = _texts(entry)
            found[entry.name or entry.source.label()] = find_given_away(learnt, held_out), len(held_out)
    except (FtcliError, OSError):
        return None  # the rows are not there any more, and no figure of the run needs them
    leaked = {name: both for name, both in found.items() if len(both[0]) >= max(LEAKED_ROWS, LEAKED_SHARE * both[1])}
    if not leaked:
        return None
    return Finding(
        "leakage",
        "rows that the model is measured on stand in the training data, written otherwise: the figures are better than the model",
        (
            *(f"{len(hits)} of {size} rows of `{name}` are trained on, word for word" for name, (hits, size) in leaked.items()),
            *(f"{hit.where} is in {hit.other} ({hit.kind})" for hits, _ in leaked.values() for hit in hits[:2]),
        ),
        ("take these rows out of the training file, and train again", "`ftcli data audit` lists them all"),
    )


def _size(entry: TrainSource | EvaluationSource) -> float:
    """Bytes of a source of local files; of others nobody knows, and reading them may mean to download them."""
    from ftcli.data.sources.builtin import Builtin
    from ftcli.data.sources.file import File

    if isinstance(entry.source, Builtin):
        return 0
    return sum(Path(path).stat().st_size for path in entry.source.files()) if isinstance(entry.source, File) else float("inf")


def _texts(entry: TrainSource | EvaluationSource) -> Sequence[Text]:
    from ftcli.data.leakage import read_text

    return [read_text(row, where) for where, row in islice(entry.source.rows(), entry.limit)]


def truncation(facts: Facts) -> Verdict:
    """Many rows of a training source are longer than the maximum length, and lost something by it."""
    for source in facts.sources:
        policy, read, cut = source.get("on_overflow"), number(source.get("rows_read")), number(source.get("num_overlong"))
        is_loss = policy in ("drop", "truncate_prompt", "truncate", "split") and not (policy == "split" and source.get("format") == "text")
        if not is_loss or not read or not cut or cut / read < CUT_SHARE:
            continue
        longest = mapping(facts.run.recipe.get("data")).get("max_length")
        lost = {"drop": "left out", "split": "cut in pieces"}.get(str(policy), "cut")
        without_stop = number(source.get("num_without_stop")) or 0
        return Finding(
            "length truncation",
            f"{100 * cut / read:.0f} % of the rows of `{source.get('name')}` are longer than data.max_length and were {lost}",
            (
                f"{cut:.0f} of {read:.0f} rows have more than {longest} tokens (on_overflow: {policy})",
                f"half of the rows have at most {source.get('length_p50')} tokens, 95 % at most {source.get('length_p95')}, "
                f"the longest {source.get('length_max')}",
                *([f"{without_stop:.0f} rows are left without an end"] if without_stop else []),
            ),
            (f"data.max_length: {source.get('length_p95')} keeps 95 % of them whole", "shorter rows: a shorter system prompt, fewer turns"),
        )
    return None


def template_mismatch(facts: Facts) -> Verdict:
    """Another chat template than the base has learnt, or markup of one inside the rows."""
    note, marked = mapping(facts.run.manifest.get("template")), _foreign_markup(facts)
    is_chat = any(source.get("format") in ("chat", "instruction") for source in facts.sources)
    if note.get("base_has_one") and not note.get("is_the_bases") and is_chat:
        return Finding(
            "template mismatch",
            "the rows are written with another chat template than the base was trained with",
            (f"model.template: {str(note.get('asked'))[:60]}, and the base has a template of its own", *_first_losses(facts)),
            ("leave model.template out: the base's own is taken", "keep it only for a base that has seen no chats"),
        )
    if marked:
        source, marks, where = marked
        return Finding(
            "template mismatch",
            f"the rows of `{source}` already hold turn markers of a chat template, as text",
            (f"{', '.join(f'`{mark}`' for mark in marks)} in {where}", *_first_losses(facts)),
            (
                "rows of bare messages: the template writes the markers",
                "for rows that are rendered already, format: {kind: text} and the template they were rendered with",
            ),
        )
    return None if note or facts.mask_samples else Unjudged("the manifest does not say which template was used")


def _foreign_markup(facts: Facts) -> tuple[str, list[str], str] | None:
    """(source, markers, where) of the first sampled row with turn markers that are not the template's doing."""
    for sample in facts.mask_samples:
        marks = sample.get("foreign_markers")
        if isinstance(marks, list) and marks:
            return str(sample.get("source")), [str(mark) for mark in marks], str(sample.get("where"))
    return None


def _first_losses(facts: Facts) -> list[str]:
    return [f"training loss of the first steps: {facts.start:.4f} nats per target"] if facts.losses else []


def prompts_trained(facts: Facts) -> Verdict:
    """The mask lets prompts be learnt: by a weight, or because chats are read as plain text."""
    weight = number(mapping(facts.run.recipe.get("objective")).get("prompt_loss_weight")) or 0.0
    for source in facts.sources:
        tokens, targets = number(source.get("num_tokens")), number(source.get("num_targets"))
        if tokens is None or targets is None or not tokens:
            continue
        if source.get("format") == "text":
            if found := _turns_in_text(facts, str(source.get("name"))):
                return _trained(
                    source, f"{100 * targets / tokens:.0f} % of its tokens are targets", f"turn markers in its text: {found}", True
                )
            continue
        prompts = weight * (tokens - targets)
        share = prompts / (prompts + targets) if prompts else 0.0
        if share > PROMPT_SHARE and weight >= PROMPT_WEIGHT:
            shown = f"prompts have {100 * share:.0f} % of the weight in the loss (prompt_loss_weight {weight:g})"
            return _trained(source, shown, f"{tokens - targets:.0f} of {tokens:.0f} tokens are prompts", False)
    return None


def _turns_in_text(facts: Facts, name: str) -> str | None:
    """Turn markers in sampled rows of a text source that are all learnt."""
    for sample in facts.mask_samples:
        pieces: Any = sample.get("pieces")
        if sample.get("source") != name or not isinstance(pieces, list):
            continue
        text = "".join(str(piece[0]) for piece in pieces if isinstance(piece, list) and len(piece) == 2 and number(piece[1]))
        if marks := sorted(set(TURN_MARKERS.findall(text))):
            return ", ".join(f"`{mark}`" for mark in marks)
    return None


def _trained(source: Any, first: str, second: str, is_text: bool) -> Finding:
    return Finding(
        "prompts trained",
        f"the mask of `{source.get('name')}` lets the model learn the prompts, not only the answers",
        (first, second),
        (
            "format: {kind: chat}, with the turns as messages: only answers are learnt"
            if is_text
            else "objective.prompt_loss_weight: 0, or a small one such as 0.1 where answers are very short",
            "`ftcli check` shows rows with what is learnt of them",
        ),
    )
