"""`ftcli export --to adapter` and `--to vllm`: adapters that plain PEFT loads, alone or many beside their base."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import GateError, RequestError
from ftcli.exporting.difference import logits_on
from ftcli.exporting.export import export
from ftcli.exporting.formats.adapter import Adapter
from ftcli.exporting.formats.vllm import Vllm
from ftcli.exporting.source import adapter_source, open_source
from ftcli.serving.models import serve_models


def test_an_adapter_is_loaded_by_peft_alone(make_adapter: Any) -> None:
    adapter = make_adapter("one", use_rslora=True)
    report = export([str(adapter)], Adapter(), adapter.parent / "out")
    check = report.checks[0]
    assert check.passed
    assert check.difference is not None
    assert check.difference.kl < 1e-9
    assert (adapter.parent / "out" / "tokenizer.json").is_file()


def test_an_adapter_that_computes_otherwise_is_not_exported(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.formats import adapter as adapter_format

    copy = adapter_format.copy_adapter

    def copy_wrong(source: Any, folder: Path, named: str) -> None:
        copy(source, folder, named)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    monkeypatch.setattr(adapter_format, "copy_adapter", copy_wrong)
    adapter = make_adapter("one")
    with pytest.raises(GateError, match="loaded by PEFT"):
        export([str(adapter)], Adapter(), adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_many_adapters_are_laid_out_beside_their_base(make_adapter: Any) -> None:
    first, second = make_adapter("one", r=4), make_adapter("three", r=12)
    output = first.parent / "out"
    report = export([str(first), str(second)], Vllm(), output)
    assert [check.passed for check in report.checks] == [True, True, None]
    script = (output / "serve.sh").read_text()
    assert "--generation-config . --chat-template ./chat_template.jinja --enable-lora" in script
    assert "--max-lora-rank 16 --max-loras 2 --lora-modules one=./adapters/one three=./adapters/three" in script
    assert "vllm serve ./base --host 127.0.0.1" in script
    config = json.loads((output / "adapters" / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base"
    assert (output / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "brings modules of its own: lm_head"),
        ({"rank_pattern": {"q_proj": 2}}, "different ranks"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(settings: dict[str, Any], message: str, make_adapter: Any) -> None:
    adapter = make_adapter("one", **settings)
    with pytest.raises(RequestError, match=message):
        export([str(adapter)], Vllm(), adapter.parent / "out")


def test_adapters_of_two_bases_are_not_served_together(make_adapter: Any, base: Path) -> None:
    import shutil

    shutil.copytree(base, base.parent / "other")
    first, second = make_adapter("one"), make_adapter("three", on=base.parent / "other")
    with pytest.raises(RequestError, match="are on 2 bases"):
        export([str(first), str(second)], Vllm(), base.parent / "out")


ALONE = """
import sys
import torch
from safetensors.torch import save_file
{code}
assert not [name for name in sys.modules if name.startswith("ftcli")]
with torch.no_grad():
    logits = model.float()(input_ids=torch.tensor([{ids}])).logits[0]
save_file(dict(logits=logits.contiguous()), "logits.safetensors")
"""


def what_the_card_loads(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of the model that the card's own lines load, in a process without ftcli."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    subprocess.run([sys.executable, "-c", ALONE.format(code=found[1], ids=ids)], cwd=folder, check=True, timeout=300)
    return load_file(folder / "logits.safetensors")["logits"]


def test_the_lines_of_the_card_load_the_adapter_where_there_is_no_ftcli(make_adapter: Any) -> None:
    """On a base that only ftcli knows by its name."""
    from ftcli.models.locate import model_folder

    adapter = make_adapter("one", on=model_folder("builtin:tiny"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "builtin:tiny"}))
    export([str(adapter)], Adapter(), adapter.parent / "out")
    source, ids = open_source(str(adapter)), list(range(5, 25))
    torch.testing.assert_close(what_the_card_loads(adapter.parent / "out", ids), logits_on(source.attached(), [ids]), rtol=1e-4, atol=1e-4)


def kind_of_ftcli(adapter: Path) -> None:
    rewrite(adapter / "adapter_config.json", peft_type="BOTTLENECK")


def head_of_its_own(adapter: Path) -> None:
    rewrite(adapter / "adapter_config.json", task_type="SEQ_CLS")


def scaled_positions(adapter: Path) -> None:
    (adapter / "base.json").write_text(json.dumps({"base": "base", "fingerprint": "plain:0", "rope": {"kind": "linear", "factor": 2.0}}))


def rows_beside_it(adapter: Path) -> None:
    save_file({"embedding": torch.zeros(1, 64)}, adapter / "added_tokens.safetensors", {"first": "260", "count": "1"})


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (kind_of_ftcli, "which is ftcli's own"),
        (head_of_its_own, "it is a classifier"),
        (scaled_positions, "trained with scaled positions"),
        (rows_beside_it, "rows of its new tokens"),
    ],
)
def test_an_adapter_that_peft_alone_would_not_load_is_refused(
    change: Callable[[Path], None], message: str, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter("one")
    change(adapter)
    monkeypatch.setattr("ftcli.models.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match=message):
        export([str(adapter)], Adapter(), adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_what_peft_says_of_a_folder_that_it_cannot_load_fails_the_export(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.formats import adapter as adapter_format

    copy = adapter_format.copy_adapter
    monkeypatch.setattr(adapter_format, "copy_adapter", lambda source, folder, base: copy(source, folder, "/nowhere/at/all"))
    adapter = make_adapter("one")
    with pytest.raises(GateError, match=r"FAILED: the files, loaded by PEFT \(.*/nowhere/at/all"):
        export([str(adapter)], Adapter(), adapter.parent / "out")


def test_an_adapter_of_a_quantised_base_is_loaded_on_one(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.models.quantisation import Quantization

    adapter = make_adapter("one")
    monkeypatch.setattr("ftcli.exporting.export.open_source", lambda target, device: adapter_source(adapter, None, "cpu", Quantization()))
    report = export([str(adapter)], Adapter(), adapter.parent / "out")
    assert report.checks[0].difference is not None
    assert report.checks[0].difference.kl < 1e-6
    assert report.checks[0].detail.startswith("on the base in nf4")
    opened = open_source(str(adapter.parent / "out"))
    assert opened.quantization == Quantization()
    assert serve_models(str(adapter.parent / "out"), {}).names == ["out"]
    card = (adapter.parent / "out" / "README.md").read_text()
    expected = "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)"
    assert expected in card
    served = export([str(adapter)], Vllm(), adapter.parent / "served").checks[0]
    assert served.passed is None
    assert served.difference is not None
    assert served.difference.kl > 1e-4
    assert "another model" in served.detail


def test_an_adapter_on_a_base_of_this_machine_is_not_made_for_the_hub(make_adapter: Any) -> None:
    adapter = make_adapter("one")
    with pytest.raises(RequestError, match="its base `base` is not on the hub"):
        export([str(adapter)], Adapter(), adapter.parent / "out", to_hub=True)
    assert export([str(adapter)], Vllm(), adapter.parent / "out", to_hub=True).kind == "vllm"


def test_vllm_ends_an_answer_where_training_did(make_adapter: Any, base: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    rewrite(base / "generation_config.json", eos_token_id=0)
    adapter = make_adapter("one")
    output = adapter.parent / "out"
    export([str(adapter)], Vllm(), output)
    stops = sorted([0, *AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(["</s>", "<|im_end|>"])])
    for folder in (output, output / "base"):
        assert sorted(GenerationConfig.from_pretrained(folder).eos_token_id) == stops
    assert (output / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()


def test_adapters_that_speak_otherwise_are_not_served_together(make_adapter: Any, base: Path) -> None:
    first, second = make_adapter("one"), make_adapter("three")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, second / name)
    (second / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    with pytest.raises(RequestError, match="`one` and `three` have different chat templates or stop tokens"):
        export([str(first), str(second)], Vllm(), base.parent / "out")


def test_the_disk_is_asked_for_one_base_however_many_adapters(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ftcli.exporting.export.check_disk", lambda output, num_bytes: asked.append(num_bytes))
    adapters = [make_adapter(name) for name in ("one", "three", "seven")]
    output = adapters[0].parent / "out"
    export([str(adapter) for adapter in adapters], Vllm(), output)
    weights = (output / "base" / "model.safetensors").stat().st_size
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert size < asked[0] < weights + sum(path.stat().st_size for adapter in adapters for path in adapter.iterdir()) + 3.5 * 2**20


def test_an_adapter_beside_its_base_is_opened_by_its_own_folder(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `next:` says; wherever one stands."""
    adapter = make_adapter("one")
    report = export([str(adapter)], Vllm(), adapter.parent / "out")
    assert report.next_commands[-1] == f"ftcli serve {adapter.parent / 'out' / 'adapters'}/NAME"
    monkeypatch.chdir("/")
    source = open_source(str(adapter.parent / "out" / "adapters" / "one"))
    assert source.base == str(adapter.parent / "out" / "base")
