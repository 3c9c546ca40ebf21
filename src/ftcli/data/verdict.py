"""Whether a source's rows may be used, from what became of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ftcli.data.chunks import MAX_PROBLEMS, Tally, Work
from ftcli.errors import DataError, Problem


def refuse(tally: Tally, row_lengths: NDArray[np.int32], name: str, work: Work, *, may_be_empty: bool = False) -> None:
    """Raise what is wrong with the rows, if anything is.

    Args:
        tally: what became of them.
        row_lengths: tokens of each row before anything was cut.
        name: of the source.
        work: how they were tokenised.
        may_be_empty: no example is no error.

    Raises:
        DataError: rows are wrong, or longer than is allowed, or there is nothing to train on.
    """
    if tally.num_problems:
        rows = "1 row" if tally.num_problems == 1 else f"{tally.num_problems} rows"
        listed = "" if tally.num_problems <= MAX_PROBLEMS else f"; the first {MAX_PROBLEMS}"
        problems = condensed(Problem(*problem) for problem in tally.problems)
        raise DataError(f"{rows} of the first {tally.rows_read} in `{name}` cannot be used{listed}", problems)
    if work.policy in ("error", "split") and tally.num_overlong and (work.policy == "error" or "too long" in tally.dropped):
        raise _overlong(tally, row_lengths, name, work.max_length)
    problem = nothing_to_train(tally, name, work)
    if problem is not None and not (may_be_empty and tally.num_examples == 0):
        raise DataError(f"`{name}` cannot be used", [problem])


def condensed(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, rows with the same one told together."""
    alike: dict[tuple[str, str | None], list[str]] = {}
    for problem in problems:
        alike.setdefault((problem.what, problem.hint), []).append(problem.where)
    result = []
    for (what, hint), places in alike.items():
        more = "" if len(places) == 1 else f" and {len(places) - 1} more row{'s' if len(places) > 2 else ''}"
        result.append(Problem(places[0] + more, what, hint))
    return result


def nothing_to_train(tally: Tally, name: str, work: Work) -> Problem | None:
    """What is wrong with a source that trains nothing, or never teaches the model to stop."""
    if tally.num_examples == 0:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(tally.dropped.items())) or "it has no rows"
        hint = None
        if "no target" in tally.dropped:
            hint = "trained is what has a weight above 0; in a chat, turns of the role `assistant` without `train: false`"
        if "too long" in tally.dropped:
            hint = "set `data.max_length` higher"
        return Problem(name, f"trains nothing: of {tally.rows_read} rows none is left ({reasons})", hint)
    # An author who wants no EOS says so in the format.
    wants_stop = bool(work.tokenizer.stop_ids) and getattr(work.format, "append_eos", True)
    if wants_stop and tally.num_without_stop == tally.rows_read - sum(tally.dropped.values()):
        what = "no row has an end-of-turn or EOS token in every trained turn, so the model would not learn to stop"
        return Problem(name, what, "use another `model.template`: one that ends an assistant turn with a special token")
    return None


def _overlong(tally: Tally, row_lengths: NDArray[np.int32], name: str, max_length: int) -> DataError:
    """Rows are longer than `max_length`, and the recipe does not say what to do with them."""
    p50, p95, most = (int(value) for value in np.percentile(row_lengths, [50, 95, 100], method="inverted_cdf"))
    rows = "1 row" if tally.num_overlong == 1 else f"{tally.num_overlong} rows"
    are = "is" if tally.num_overlong == 1 else "are"
    listed = tally.overlong[:MAX_PROBLEMS]
    lengths = f"half of the rows have at most {p50} tokens, 95 % at most {p95}, the longest {most}"
    hint = "set `data.max_length` higher, or `data.on_overflow` to `drop`, `truncate_prompt` or `split`"
    problems = [Problem(where, f"{tokens} tokens, {tokens - max_length} too many") for where, tokens in listed]
    summary = f"{rows} of {len(row_lengths)} in `{name}` {are} longer than `data.max_length` ({max_length})"
    summary += "" if tally.num_overlong == len(listed) else f"; the first {len(listed)}"
    return DataError(summary, [Problem(name, lengths, hint), *problems])
