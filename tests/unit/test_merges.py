"""What a method says of merging is what its merge does."""

from __future__ import annotations

import pytest

from ftcli.methods.adamix import Adamix
from ftcli.methods.bottleneck_adapter import BottleneckAdapter
from ftcli.methods.features import Features
from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.method import MethodSettings
from ftcli.methods.peft import Peft
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt


@pytest.mark.parametrize(
    ("method", "merges"),
    [(Full(), True), (Lora(), True), (Peft(type="loha"), True), (Peft(type="lily"), False), (Peft(type="beft"), False)]
    + [(method, False) for method in (Prompt(), Prefix(), BottleneckAdapter(), Adamix(), Features())],
    ids=lambda value: getattr(value, "type", getattr(value, "kind", str(value))),
)
def test_methods_say_whether_they_merge(method: MethodSettings, merges: bool) -> None:
    assert method.merges is merges
