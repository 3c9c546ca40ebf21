"""`ftcli runs`, and the report, card and plot of a run, on folders in every state a run can leave them in."""

from __future__ import annotations

import fcntl
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.fake_run import PROOFS, data_report, evaluation, train_record, write_fake_run, write_lines
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run as run_command
from ftcli.reporting.card import card_text, loading_snippet, write_card
from ftcli.reporting.found_run import is_run, read_run, runs_in
from ftcli.reporting.plot import inline_svg, plot_losses, smoothed
from ftcli.reporting.report import report_page, write_report

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Runs `ftcli runs ...` in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def _say(*arguments: str) -> tuple[int, str, str]:
        code = run_command(["runs", *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return _say


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "runs" / "orders")


def test_runs_are_listed_with_their_state(say: Say, run: Path) -> None:
    write_fake_run(run.parent / "second" / "nested", status="interrupted", num_logged=7)
    code, out, _ = say()
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split()[:6] == ["orders", "finished", "lora", "rank", "8", "builtin:tiny"]
    assert "40/40" in lines[1]
    assert "orders exact-match 92.0 %" in lines[1]
    assert lines[2].startswith("second/nested  interrupted")


def test_the_list_as_json(say: Say, run: Path) -> None:
    code, out, _ = say("ls", str(run.parent), "--json")
    listed = json.loads(out)
    assert code == 0
    assert [(entry["name"], entry["status"], entry["step"], entry["num_steps"]) for entry in listed] == [("orders", "finished", 40, 40)]
    assert say("--json")[1] == out.replace(str(run.parent) + "/", "runs/")


def test_no_runs_are_no_error_and_no_folder_is_one(say: Say) -> None:
    assert say() == (0, "", "no runs in `runs`\n")
    assert say("--json")[1] == "[]\n"
    assert say("ls", "nowhere") == (2, "", "error: the folder `nowhere` does not exist\n")


def test_a_run_that_says_running_without_its_lock_was_killed(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (run / ".lock").touch()
    assert read_run(run).state == "killed"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(run).state == "running"


def test_show_tells_everything(say: Say, run: Path) -> None:
    code, out, _ = say("show", "orders")
    assert code == 0
    parts = ("finished", "lora rank 8 on builtin:tiny", "40 of 40 in 1 min 01 s", "+90.0 points", "10 empty answer", "FAILED  generation")
    assert [part for part in parts if part not in out] == []
    assert re.search(r"1\.8555 █.*▁ 0\.0996", out)
    shown = json.loads(say("show", "orders", "--json")[1])
    assert shown["proofs"] == PROOFS
    assert shown["files"]["metrics.jsonl"] == (run / "metrics.jsonl").stat().st_size


def test_a_name_that_is_no_run_gets_a_hint(say: Say, run: Path) -> None:
    assert say("show", "ordres") == (
        2,
        "",
        "error: there is no such run\n\n  `ordres` does not exist\n    hint: did you mean `orders`?\n",
    )
    (run.parent / "empty").mkdir()
    assert "`runs/empty` is no run folder" in say("show", "runs/empty")[2]


def test_compare_shows_recipe_differences_and_metrics(say: Say, run: Path) -> None:
    write_fake_run(run.parent / "faster", lr="1e-3", num_logged=20)
    code, out, _ = say("compare", "orders", "faster")
    assert code == 0
    assert out.splitlines()[:2] == ["runs/orders -> runs/faster", "  train.lr: 2e-4 -> 1e-3"]
    assert re.search(r"^loss +0\.0996 +0\.4463$", out, re.MULTILINE)
    report = json.loads(say("compare", "orders", "faster", "--json")[1])
    assert report["differences"] == {"runs/faster": ["train.lr: 2e-4 -> 1e-3"]}
    assert report["metrics"]["orders exact-match"] == [0.92, 0.92]


def test_equal_recipes_are_said_to_be_equal_and_one_run_is_too_few(say: Say, run: Path) -> None:
    write_fake_run(run.parent / "again")
    assert "the recipes are equal" in say("compare", "orders", "again")[1]
    assert say("compare", "orders")[0] == 2


DAMAGES: dict[str, dict[str, str | None]] = {
    "nothing but metrics": {"manifest.json": None, "recipe.resolved.yaml": None},
    "half a manifest": {"manifest.json": '{"status": "runn'},
    "a manifest of another shape": {
        "manifest.json": '{"status": 3, "num_steps": "x", "proofs": 1, "data": {"a": 1}, "layout": [], "environment": "", "seconds": "1"}'
    },
    "strange proofs and reports": {"manifest.json": '{"proofs": [1, {}], "data": [{"dropped": 3, "num_examples": "many"}], "hashes": 2}'},
    "a list for a manifest": {"manifest.json": "[]"},
    "empty metrics": {"metrics.jsonl": ""},
    "no metrics": {"metrics.jsonl": None},
    "half a line": {"metrics.jsonl": '{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "tra'},
    "lines of other shapes": {"metrics.jsonl": '[]\n3\n{"step": 1}\n{"kind": "evaluate", "step": 2, "sources": 7}\n'},
    "values of other kinds": {"metrics.jsonl": '{"kind": "train", "step": 1, "loss": "x", "lr": null, "sources": {"a": "b"}}\n'},
    "not finite": {"metrics.jsonl": '{"kind": "train", "step": 1, "loss": NaN, "lr": 1, "sources": {}}\n'},
    "bytes": {"metrics.jsonl": "\udcff\udcfe\x00", "samples.jsonl": "\udcff"},
    "a recipe that is no mapping": {"recipe.resolved.yaml": "- 1\n"},
    "a recipe that is no YAML": {"recipe.resolved.yaml": "a: [1\n\t}"},
    "a recipe of other shapes": {"recipe.resolved.yaml": "method: 3\nmodel: [1]\ndata: {train: 7}\nname: 5\ntrain: x\n"},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_shown_as_far_as_it_can_be_read(name: str, say: Say, run: Path) -> None:
    for file, text in DAMAGES[name].items():
        (run / file).unlink()
        if text is not None:
            (run / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    other = write_fake_run(run.parent / "whole")
    for arguments in ([], ["show", "orders"], ["compare", "orders", "whole"], ["show", "orders", "--json"]):
        assert say(*arguments)[0] == 0
    write_report(run)  # and with it the plot
    write_card(run)
    assert runs_in(run.parent) == [run, other]


def test_a_merged_model_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert is_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_run(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_run(tmp_path / "file")
    assert runs_in(tmp_path / "file") == []


class Tags(HTMLParser):
    """Collects the tags of a page and checks that they close."""

    VOID = frozenset({"meta", "path", "use", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_well_formed_page_that_fetches_nothing(run: Path) -> None:
    write_report(run)
    page = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(tags.names)
    assert {"svg", "table", "details"} <= set(tags.names)
    addresses = set(re.findall(r"https?://[^\"'< ]+", page))
    assert all("w3.org" in address for address in addresses)  # names of XML namespaces


def test_the_report_tells_the_run_in_a_sentence_and_escapes_what_it_quotes(run: Path) -> None:
    page = report_page(read_run(run))
    assert "lora rank 8 on builtin:tiny, 40 steps in 1 min 01 s: orders loss 2.4000 to 0.2000 (-91.7 %)" in page
    assert "two &lt;teas&gt;" in page
    assert "<teas>" not in page
    assert page.count('class="bad"') == 1
    assert "mlflow" not in page


def test_the_report_of_a_hostile_run_holds_no_tag_of_its_own(run: Path) -> None:
    bad = "<script>alert(1)</script>"
    records = [train_record(1) | {"sources": {bad: 1.0, "$x^$": 2.0}}, evaluation(0, 1, 1, 1), evaluation(1, 1, 1, 1)]
    records[2]["sources"] = {bad: records[2]["sources"]["orders"]}
    write_lines(run / "metrics.jsonl", records)
    manifest = json.loads((run / "manifest.json").read_text())
    hostile = {"name": bad, "proofs": [{"name": bad, "passed": False, "detail": bad}], "environment": {bad: bad, "versions": {bad: bad}}}
    hostile |= {"data": [data_report(bad, bad, dropped={bad: 1}, first_target=bad)], "layout": {bad: bad}}
    (run / "manifest.json").write_text(json.dumps({**manifest, **hostile}))
    (run / "recipe.resolved.yaml").write_text(f"name: x\nmethod: {{kind: '{bad}'}}\nmodel: {{base: '{bad}'}}\n")
    write_lines(run / "samples.jsonl", [{"step": 0, "source": bad, "prompt": bad, "reference": bad, "answer": bad}])
    assert "<script" not in report_page(read_run(run))
    prose = re.sub(r"```python.*?```", "", card_text(read_run(run)), flags=re.DOTALL)
    assert re.findall(r"(?<!\\)<script", prose) == []


def test_the_plot_is_the_same_every_time_and_well_formed(run: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot_losses(run / "metrics.jsonl", run / name)
    assert (run / "a.svg").read_bytes() == (run / "b.svg").read_bytes()
    text = (run / "a.svg").read_text()
    ElementTree.fromstring(text)
    for label in ("loss, nats per target", "step", "learning rate", "train: orders", "evaluation: stories (retained)"):
        assert f">{label}<" in text
    assert list(run.glob(".partial*")) == []


def test_the_plot_is_a_png_by_its_name(run: Path) -> None:
    plot_losses(run / "metrics.jsonl", run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_a_page_takes_its_colours() -> None:
    svg = inline_svg([train_record(step) for step in range(1, 4)])
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "no step has been logged" in inline_svg([])


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert smoothed([3.0] * 5, 2.0) == pytest.approx([3.0] * 5)
    assert smoothed(list(range(21)), 2.0)[10] == pytest.approx(10.0)


def test_the_card_has_the_hubs_metadata_and_no_path_of_this_machine(run: Path) -> None:
    import yaml

    recipe = (run / "recipe.resolved.yaml").read_text()
    (run / "recipe.resolved.yaml").write_text(recipe.replace('"builtin:tiny"', "org/base-1.5B, revision: abc"))
    write_card(run)
    text = (run / "README.md").read_text()
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base-1.5B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["ftcli", "lora"],
    }
    assert 'from_pretrained("org/base-1.5B", revision="abc")' in text
    assert "| orders | exact-match | 2.0 % | 92.0 % | +90.0 points |" in text
    assert "**failed**: generation stops" in text
    (run / "recipe.resolved.yaml").write_text(recipe.replace('"builtin:tiny"', '"/home/someone/models/llama"'))
    text = card_text(read_run(run))
    assert "/home" not in text
    assert "base_model" not in text
    assert "`llama`" in text


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        ("{}", None),
        ("{format: int8}", "BitsAndBytesConfig(load_in_8bit=True"),
        ("{format: fp4, double_quant: false, compute_dtype: bfloat16}", 'bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False'),
    ],
)
def test_the_snippet_loads_a_quantised_base_as_it_was(run: Path, quantize: str, expected: str | None) -> None:
    recipe = (run / "recipe.resolved.yaml").read_text().replace("rank: 8", f"rank: 8, quantize: {quantize}")
    (run / "recipe.resolved.yaml").write_text(recipe)
    snippet = loading_snippet(read_run(run))
    compile(snippet, "snippet", "exec")
    assert (expected is None) == ("BitsAndBytesConfig" not in snippet)
    assert expected is None or expected in snippet


def test_the_snippet_of_an_ensemble_loads_a_member_and_that_of_a_classifier_its_head(run: Path) -> None:
    (run / "adapter" / "adapter_config.json").unlink()
    for member in ("member-0", "member-1"):
        (run / "adapter" / member).mkdir()
        (run / "adapter" / member / "adapter_config.json").write_text("{}")
    snippet = loading_snippet(read_run(run))
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained(base, "adapter/member-0")  # one of 2 members' in snippet
    recipe = (run / "recipe.resolved.yaml").read_text() + "objective: {kind: classification, readout: head, labels: [a, b, c]}\n"
    (run / "recipe.resolved.yaml").write_text(recipe)
    snippet = loading_snippet(read_run(run))
    compile(snippet, "snippet", "exec")
    assert "AutoModelForSequenceClassification.from_pretrained(" in snippet
    assert "num_labels=3" in snippet
    assert "pipeline_tag: text-classification" in card_text(read_run(run))


def test_the_snippet_of_a_whole_model_runs(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "adapter" / "adapter_config.json").unlink()
    write_tiny_chat_model(run / "model")
    monkeypatch.chdir(run)
    exec(compile(loading_snippet(read_run(run)).replace("=100", "=3"), "snippet", "exec"), {})
    assert "user: Hello</s>assistant: " in capfd.readouterr().out
