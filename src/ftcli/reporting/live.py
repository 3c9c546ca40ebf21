"""What a run says while it goes: one live line on a terminal, one plain line per log anywhere else.

The formatting functions are pure; `Reporter` only decides where their text goes and when.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ftcli.units import format_count, format_seconds

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

BAR_AFTER_SECONDS = 2.0
"""Work that is done sooner gets no bar: it would only flicker."""
_MEASURES = ("loss", "perplexity", "bits_per_byte")
_NOT_METRICS = frozenset({*_MEASURES, "targets", "role", "loss_sum", "loss_error", "bytes", "num_bytes", "examples"})


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What is about to be trained, for the first lines of a run."""

    name: str
    folder: str
    base: str
    method: str
    num_steps: int
    global_batch_size: int
    layout: str = ""
    device: str = ""
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    sources: tuple[tuple[str, int, int], ...] = ()
    """(name, examples, targets) of each training source."""
    first_step: int = 1
    """Above 1 where a run goes on from a checkpoint."""


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One measure of one evaluation source, before and after training, as numbers and as text."""

    source: str
    role: str
    measure: str
    before: float | None
    after: float | None
    change: str
    """Signed, with its unit: per cent for losses, points for shares; empty where one side is missing."""

    def cells(self) -> tuple[str, str, str, str, str]:
        """Source, measure, before, after, change: the row as it is printed."""
        source = f"{self.source} (retained)" if self.role == "retained" else self.source
        return source, self.measure.replace("_", " "), self.text(self.before), self.text(self.after), self.change

    def text(self, value: float | None) -> str:
        """`value` in the unit of this measure."""
        return format_measure(self.measure, value)


def is_metric(name: str) -> bool:
    """Whether a value of an evaluation record is a score of generated answers, a share in 0..1."""
    return name not in _NOT_METRICS


def format_measure(measure: str, value: float | None) -> str:
    """One value of an evaluation record as people read it.

    Example:
        >>> format_measure("loss", 1.23456), format_measure("exact-match", 0.9), format_measure("perplexity", None)
        ('1.2346', '90.0 %', '-')
    """
    if value is None:
        return "-"
    if is_metric(measure):
        return f"{100 * value:.1f} %"
    if measure == "perplexity":
        return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"
    return f"{value:.4f}"


def format_change(measure: str, before: float | None, after: float | None) -> str:
    """How far a measure moved: points for shares, per cent of the value before for the rest.

    Example:
        >>> format_change("loss", 2.0, 1.5), format_change("exact-match", 0.02, 0.92), format_change("loss", None, 1.0)
        ('-25.0 %', '+90.0 points', '')
    """
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    if is_metric(measure):
        return f"{100 * (after - before):+.1f} points"
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def evaluation_table(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[EvaluationRow]:
    """One row per evaluation source and measure: the record before training beside the one after it.

    Args:
        before: the `sources` of the first evaluation record; may be empty.
        after: the `sources` of the last one.
    """
    rows = []
    for source in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(source, {}), after.get(source, {})
        role = str(new.get("role") or old.get("role") or "target")
        metrics = [name for name in {**old, **new} if is_metric(name)]
        for measure in (*_MEASURES, *metrics):
            first, last = _number(old.get(measure)), _number(new.get(measure))
            if first is not None or last is not None:
                rows.append(EvaluationRow(source, role, measure, first, last, format_change(measure, first, last)))
    return rows


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def format_train_line(record: Mapping[str, Any]) -> str:
    """One log line of a training record: no control characters, always the same fields in the same order.

    Args:
        record: the `train` record of metrics.jsonl; `num_steps` and `seconds_left` are used where they are given.

    Example:
        >>> format_train_line({"step": 10, "num_steps": 120, "loss": 2.5, "lr": 2e-4, "target_tokens_per_second": 1234, "seconds_left": 75})
        'step  10/120  loss 2.5000  lr 2.00e-04  1.2k targets/s  1 min 15 s left'
    """
    parts = [_step_text(record)]
    for key, text in (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("grad_norm", "grad norm {:.2f}")):
        if record.get(key) is not None:
            parts.append(text.format(record[key]))
    if (rate := record.get("target_tokens_per_second")) is not None:
        parts.append(f"{format_count(rate)} targets/s")
    if (left := record.get("seconds_left")) is not None:
        parts.append(f"{format_seconds(left)} left")
    held = [f"{name} {loss:.4f}" for name, loss in (record.get("regularizers") or {}).items()]
    return "  ".join([*parts, *held, *_source_losses(record.get("sources") or {})])


def format_evaluation_line(record: Mapping[str, Any]) -> str:
    """One line for all sources of an evaluation record.

    Example:
        >>> values = {"loss": 0.5, "perplexity": 1.65, "bits_per_byte": 0.21, "exact-match": 0.9}
        >>> format_evaluation_line({"step": 100, "sources": {"orders": values}})
        'step 100  evaluation  orders loss 0.5000, 0.2100 bits per byte, exact-match 90.0 %'
    """
    return "  ".join([f"step {record['step']}", "evaluation", *_evaluation_parts(record.get("sources") or {})])


def _evaluation_parts(sources: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, values in sources.items():
        parts = [f"{name} loss {format_measure('loss', _number(values.get('loss')))}"]
        if (bits := _number(values.get("bits_per_byte"))) is not None:
            parts.append(f"{bits:.4f} bits per byte")
        metrics = {key: _number(value) for key, value in values.items() if is_metric(key)}
        parts += [f"{key.replace('_', ' ')} {format_measure(key, value)}" for key, value in metrics.items() if value is not None]
        yield ", ".join(parts)


def _step_text(record: Mapping[str, Any]) -> str:
    num_steps = record.get("num_steps")
    return f"step {record['step']}" if num_steps is None else f"step {record['step']:>{len(str(num_steps))}}/{num_steps}"


def _source_losses(sources: Mapping[str, float | None]) -> list[str]:
    """The loss of each source; none for a single one, whose loss is the loss."""
    if len(sources) < 2:
        return []
    return [f"{name} {loss:.4f}" for name, loss in sources.items() if loss is not None]


def header_lines(header: RunHeader) -> list[str]:
    """What a run says before its first step."""
    method = header.method
    if header.trainable_parameters is not None:
        share = f", {100 * header.trainable_parameters / header.total_parameters:.2f} %" if header.total_parameters else ""
        method += f" ({format_count(header.trainable_parameters)} trainable parameters{share})"
    steps = f"{header.num_steps} of {header.global_batch_size} examples"
    if header.first_step > 1:
        steps += f", going on at step {header.first_step}"
    sources = [f"{name} ({format_count(examples)} examples, {format_count(targets)} targets)" for name, examples, targets in header.sources]
    facts = [
        ("run", f"{header.name} -> {shown_path(header.folder)}"),
        ("base", header.base),
        ("method", method),
        ("data", ", ".join(sources)),
        ("steps", steps),
        ("layout", header.layout),
        ("device", header.device),
    ]
    return [f"{label:<8}{text}" for label, text in facts if text]


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows as aligned text without rules or colours; the columns in `left` hold words, the others numbers.

    Example:
        >>> plain_table(["source", "loss"], [["orders", "1.5"], ["s", "12.25"]])
        ['source   loss', 'orders    1.5', 's       12.25']
    """
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        cells = [text.ljust(widths[column]) if column in left else text.rjust(widths[column]) for column, text in enumerate(row)]
        return "  ".join(cells).rstrip()

    return [line(row) for row in [headings, *rows]]


def shown_path(path: str | Path) -> str:
    """A path as one would type it here: relative where it lies under the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def next_commands(folder: str | Path, artefact: str | None, objective: str | None = None, merges: bool = True) -> list[tuple[str, str]]:
    """(command, what it does): what one would try after a run.

    Args:
        artefact: `adapter` or `model`, what the run left in its folder.
        objective: its kind; a classifier does not answer with text.
        merges: there are plain weights that compute what the adapter does.
    """
    run = shlex.quote(shown_path(folder))
    answers = [(f"ftcli chat {run}", "talk to it"), (f"ftcli generate {run} 'Once upon a time'", "answer one prompt")]
    if objective == "classification":
        answers = [(f"ftcli predict {run} --data rows.jsonl", "give the rows of a file their labels")]
    commands = [
        *answers,
        (f"ftcli runs show {run}", "see proofs, data and losses again"),
    ]
    if artefact == "adapter" and merges:
        commands.append((f"ftcli merge {run}", "fold the adapter into plain weights"))
    return commands


@dataclass(slots=True)
class _Work:
    """One piece of work with a known end: when it began, and whether its bar is on the screen."""

    what: str
    began: float
    shown: bool = False


@dataclass(slots=True)
class Reporter:
    """Tells the user how a run goes. Use it as a context manager, so that the terminal is left as it was found.

    Args:
        stream: where the text goes; the default is standard output. With `--json` give standard error.
        silent: says nothing at all: the other processes of a distributed run.
        shows_next: ends with the next commands to try; not where the run folder does not stay.
        clock: seconds that only grow; given by tests.
    """

    stream: TextIO | None = None
    silent: bool = False
    shows_next: bool = True
    clock: Callable[[], float] = time.monotonic
    _live: Live | None = field(default=None, init=False)
    _console: Console | None = field(default=None, init=False)
    _work: _Work | None = field(default=None, init=False)
    _before: dict[str, Any] | None = field(default=None, init=False)
    _after: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        stream = self.stream if self.stream is not None else sys.stdout
        self.stream = stream
        if not self.silent and stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}:
            from rich.console import Console

            self._console = Console(file=stream, highlight=False)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _terminal(self) -> Console | None:
        """The terminal to draw on; a process may learn only later that it is to be silent."""
        return None if self.silent else self._console

    def close(self) -> None:
        """Takes the live line off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """One line that stays."""
        self._print(text)

    def start(self, header: RunHeader) -> None:
        """What is about to be trained."""
        for line in header_lines(header):
            self._print(line, style="bold" if line.startswith("run ") else None)

    def log(self, record: dict[str, Any]) -> None:
        """The `train` record of metrics.jsonl, with `num_steps` and `seconds_left` beside it."""
        if self._terminal is None:
            self._print(format_train_line(record))
        else:
            self._show(self._train_line(record))

    def evaluation(self, record: dict[str, Any]) -> None:
        """The `evaluate` record of metrics.jsonl; the first and the last make the final table."""
        sources = record.get("sources") or {}
        self._before = sources if self._before is None else self._before
        self._after = sources
        self._print(format_evaluation_line(record))

    def update(self, done: int, total: int | None, what: str) -> None:
        """How far a piece of work is: a bar with the time left, on a terminal and for longer work only.

        Args:
            total: None where nobody knows how much there is.
        """
        if self._terminal is None:
            return
        if self._work is None or self._work.what != what:
            self._work = _Work(what, self.clock())
        seconds = self.clock() - self._work.began
        if total is not None and done >= total:
            self._end_work(self._work, seconds, total)
        elif seconds >= BAR_AFTER_SECONDS:
            self._work.shown = True
            self._show(self._bar_line(done, total or 0, f"{what}  {_done_of(done, total, seconds)}"))

    progress = update

    def finish(self, summary: dict[str, Any]) -> None:
        """The result: what was saved, before -> after, proofs, and what to try next.

        Args:
            summary: `status`, `steps`, `seconds`, `folder`, `artefact`; `before` and `after` (the `sources` of evaluation
                records) where the reporter has not seen them itself, as after a resume; `proofs` as in the manifest.
        """
        self.close()
        rows = evaluation_table(summary.get("before") or self._before or {}, summary.get("after") or self._after or {})
        self._print("")
        self._print(result_line(summary))
        if held := summary.get("regularizers"):
            told = ", ".join(f"{name} {value:.4g}" for name, value in held.items())
            self._print(f"held near the start; nats a target that it added to the loss at the end: {told}")
        if rows:
            self._print("")
            self._print_table(["source", "measure", "before", "after", "change"], [row.cells() for row in rows])
        proofs = summary.get("proofs") or []
        if proofs:
            self._print("")
        for proof in proofs:
            self._print_proof(proof)
        if self.shows_next and summary.get("status") == "finished" and summary.get("folder"):
            self._print("")
            self._print("next:")
            commands = next_commands(summary["folder"], summary.get("artefact"), summary.get("objective"), summary.get("merges", True))
            width = max(len(command) for command, _ in commands)
            for command, purpose in commands:
                self._print(f"  {command:<{width}}  # {purpose}")

    def _print_proof(self, proof: Mapping[str, Any]) -> None:
        mark, style = ("passed", "green") if proof.get("passed") else ("FAILED", "bold red")
        self._print(f"{mark}  {proof.get('name')}: {proof.get('detail')}", style=style)

    def _print(self, text: str, style: str | None = None) -> None:
        if self._terminal is not None:
            self._terminal.print(text, style=style, markup=False, soft_wrap=True)
        elif self.stream is not None and not self.silent:
            self.stream.write(text + "\n")
            self.stream.flush()

    def _print_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        repeated = [row[0] if index == 0 or rows[index - 1][0] != row[0] else "" for index, row in enumerate(rows)]
        if self._terminal is None:
            # every line names its source, so that a line can be searched for
            for line in plain_table(headings, rows, left=(0, 1)):
                self._print(line)
        else:
            self._terminal.print(_rich_table(headings, [(name, *row[1:]) for name, row in zip(repeated, rows, strict=True)]))

    def _end_work(self, work: _Work, seconds: float, total: int) -> None:
        self._work = None
        if work.shown:
            self.close()
            self._print(f"{work.what}: {total:,} in {format_seconds(seconds)}")

    def _show(self, table: Table) -> None:
        """Puts one line at the bottom of the screen, in place of the one before it."""
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
            assert self._console is not None
            # a run that is killed with -9 cannot bring the cursor back
            self._console.show_cursor(True)
        self._live.update(table, refresh=True)

    def _train_line(self, record: Mapping[str, Any]) -> Table:
        return self._bar_line(record["step"], record.get("num_steps") or record["step"], format_train_line(record))

    def _bar_line(self, done: int, total: int, text: str) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(Text(text), ProgressBar(total=total, completed=done, width=16))
        return line


def _done_of(done: int, total: int | None, seconds: float) -> str:
    """How much is done, of how much, and the time left where it can be known."""
    if total is None:
        return f"{done:,}"
    left = f"{format_seconds(seconds / done * (total - done))} left" if done else ""
    return f"{done:,}/{total:,}  {left}"


def result_line(summary: Mapping[str, Any]) -> str:
    """One sentence: how the run ended and where its result is.

    Example:
        >>> result_line({"status": "finished", "steps": 120, "seconds": 75, "folder": "runs/orders", "artefact": "adapter"})
        'finished after 120 steps in 1 min 15 s: runs/orders/adapter'
    """
    text = f"{summary.get('status', 'finished')} after {summary.get('steps', 0)} steps"
    if summary.get("seconds") is not None:
        text += f" in {format_seconds(summary['seconds'])}"
    if summary.get("folder"):
        where = Path(shown_path(summary["folder"]))
        text += f": {where / summary['artefact'] if summary.get('artefact') else where}"
    return text


def _rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < 2 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
