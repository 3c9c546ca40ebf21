"""What a run says: lines, tables, and which of them go where."""

from __future__ import annotations

import io
from typing import Any

import pytest
from tests.fake_run import PROOFS, evaluation, source_values, train_record

from ftcli.reporting.live import Reporter, RunHeader, evaluation_table, format_evaluation_line, format_train_line, next_commands

HEADER = RunHeader(
    name="orders",
    folder="runs/orders",
    base="builtin:tiny",
    method="lora",
    num_steps=40,
    global_batch_size=8,
    trainable_parameters=10_000,
    total_parameters=1_000_000,
    sources=(("orders", 1990, 45678),),
)
SUMMARY = {"status": "finished", "steps": 40, "seconds": 75, "folder": "runs/orders", "artefact": "adapter", "proofs": PROOFS}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def tell(reporter: Reporter) -> None:
    """A whole run, in short."""
    reporter.start(HEADER)
    reporter.evaluation(evaluation(0, 2.4, 1.31, 0.02))
    for step in (10, 40):
        reporter.log({**train_record(step), "num_steps": 40, "seconds_left": 75.0})
    reporter.evaluation(evaluation(40, 0.2, 1.36, 0.92))
    reporter.finish(SUMMARY)


def test_the_losses_of_sources_stand_in_the_line_when_there_are_several() -> None:
    record = train_record(10)
    assert format_train_line(record).endswith(f"orders {record['loss']:.4f}  stories 1.3000")
    assert "orders" not in format_train_line({**record, "sources": {"orders": record["loss"]}})


@pytest.mark.parametrize("missing", ["lr", "grad_norm", "target_tokens_per_second", "sources"])
def test_a_line_does_without_what_is_not_known(missing: str) -> None:
    record = train_record(10)
    assert format_train_line({**record, missing: None}).startswith("step 10  ")


def test_what_holds_the_model_back_stands_in_the_line() -> None:
    assert "kl 0.0123  ewc 0.0001" in format_train_line({"step": 3, "loss": 1.0, "regularizers": {"kl": 0.01234, "ewc": 0.0001}})


def test_loss_that_is_not_a_number_is_shown() -> None:
    assert "loss nan" in format_train_line({**train_record(10), "loss": float("nan")})


def test_every_measure_has_its_change() -> None:
    before, after = evaluation(0, 2.0, 1.0, 0.02)["sources"], evaluation(40, 1.0, 1.1, 0.92)["sources"]
    changes = {(row.source, row.measure): row.change for row in evaluation_table(before, after)}
    assert changes["orders", "loss"] == "-50.0 %"
    assert changes["orders", "exact-match"] == "+90.0 points"
    assert changes["stories", "bits_per_byte"] == "+10.0 %"
    assert ("orders", "targets") not in changes


def test_sources_on_one_side_only_are_in_the_table() -> None:
    rows = evaluation_table({"old": source_values(1.0, "target")}, {"new": source_values(2.0, "retained")})
    assert [row.cells() for row in rows if row.measure == "loss"] == [
        ("new (retained)", "loss", "-", "2.0000", ""),
        ("old", "loss", "1.0000", "-", ""),
    ]
    assert evaluation_table({}, {}) == []


def test_changes_from_zero_or_to_infinity_are_not_made_up() -> None:
    infinite = source_values(1.0, "target") | {"perplexity": float("inf")}
    rows = evaluation_table({"s": source_values(0.0, "target")}, {"s": infinite})
    assert [(row.measure, row.change) for row in rows] == [("loss", ""), ("perplexity", ""), ("bits_per_byte", "")]


def test_the_evaluation_line_names_every_source() -> None:
    line = format_evaluation_line(evaluation(40, 0.2, 1.36, 0.92))
    orders, stories = "orders loss 0.2000, 0.1000 bits per byte, exact-match 92.0 %", "stories loss 1.3600, 0.6800 bits per byte"
    assert line == f"step 40  evaluation  {orders}  {stories}"


def test_without_a_terminal_there_is_one_plain_line_per_log() -> None:
    stream = io.StringIO()
    with Reporter(stream=stream) as reporter:
        tell(reporter)
        reporter.update(1, 2, "tokenising")
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    logged = [line.split("  ")[0] for line in text.splitlines() if line.startswith("step ")]
    assert logged == ["step 0", "step 10/40", "step 40/40", "step 40"]
    assert "stories (retained)  loss           1.3100  1.3600        +3.8 %" in text
    assert "FAILED  generation stops: 7 of 8 answers end within 64 tokens" in text
    assert "ftcli merge runs/orders" in text
    assert "tokenising" not in text


def test_a_terminal_has_a_live_line_that_is_gone_at_the_end(on_terminal: Terminal) -> None:
    with Reporter(stream=on_terminal) as reporter:
        tell(reporter)
    text = on_terminal.getvalue()
    assert "step 10/40" in text
    assert "step 10/40" not in text.rsplit("\x1b[2K", 1)[1]
    assert "exact-match" in text.rsplit("\x1b[2K", 1)[1]


def test_the_cursor_is_visible_while_the_run_goes_on(on_terminal: Terminal) -> None:
    # a run that is killed with -9 cannot bring it back
    reporter = Reporter(stream=on_terminal)
    reporter.log({**train_record(10), "num_steps": 40})
    text = on_terminal.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    reporter.close()


def test_a_dumb_terminal_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    tell(Reporter(stream=stream))
    assert "\x1b" not in stream.getvalue()


def test_a_silent_reporter_says_nothing(on_terminal: Terminal) -> None:
    tell(Reporter(stream=on_terminal, silent=True))
    late = Reporter(stream=on_terminal)
    late.silent = True  # a process learns only later that it is not the main one
    tell(late)
    late.update(1, 10, "tokenising")
    assert on_terminal.getvalue() == ""


def test_short_work_has_no_bar_and_long_work_has_one(on_terminal: Terminal) -> None:
    clock = Clock()
    with Reporter(stream=on_terminal, clock=clock) as reporter:
        for done in (1, 2, 3):
            reporter.update(done, 3, "short")
        assert on_terminal.getvalue() == ""
        reporter.update(0, 10, "long")
        clock.seconds = 4.0
        reporter.update(4, 10, "long")
        assert "long  4/10  6.0 s left" in on_terminal.getvalue()
        clock.seconds = 10.0
        reporter.update(10, 10, "long")
    assert on_terminal.getvalue().endswith("long: 10 in 10.0 s\n")


def test_the_table_after_a_resume_takes_what_it_is_given() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.evaluation(evaluation(40, 0.2, 1.36, 0.92))
    reporter.finish({**SUMMARY, "before": evaluation(0, 2.4, 1.31, 0.02)["sources"]})
    assert "2.4000  0.2000" in stream.getvalue()


def test_a_run_without_evaluation_has_no_table() -> None:
    stream = io.StringIO()
    Reporter(stream=stream).finish({**SUMMARY, "proofs": []})
    assert "measure" not in stream.getvalue()


def test_an_interrupted_run_suggests_nothing() -> None:
    stream = io.StringIO()
    Reporter(stream=stream).finish({"status": "interrupted", "steps": 3, "folder": "runs/orders"})
    assert stream.getvalue() == "\ninterrupted after 3 steps: runs/orders\n"


def test_only_an_adapter_is_to_be_merged_and_names_are_quoted() -> None:
    commands = [command for command, _ in next_commands("runs/my run", "model")]
    assert commands[0] == "ftcli chat 'runs/my run'"
    assert not any("merge" in command for command in commands)


def test_what_has_no_plain_weights_is_not_to_be_merged() -> None:
    assert any("merge" in command for command, _ in next_commands("runs/a", "adapter"))
    assert not any("merge" in command for command, _ in next_commands("runs/a", "adapter", merges=False))


def test_a_markup_in_a_name_is_text(on_terminal: Terminal) -> None:
    record: dict[str, Any] = {**train_record(1), "sources": {"[red]a[/]": 1.0, "b": 2.0}}
    with Reporter(stream=on_terminal) as reporter:
        reporter.log(record)
        reporter.note("[bold]x[/]")
    assert "[red]a[/]" in on_terminal.getvalue()
    assert "[bold]x[/]" in on_terminal.getvalue()
