from typing import Annotated

from pydantic import Field

from ftcli.methods.adalora import Adalora
from ftcli.methods.adamix import Adamix
from ftcli.methods.bitfit import Bitfit
from ftcli.methods.bottleneck_adapter import BottleneckAdapter
from ftcli.methods.features import Features
from ftcli.methods.freeze import Freeze
from ftcli.methods.full import Full
from ftcli.methods.head_only import HeadOnly
from ftcli.methods.hft import Hft
from ftcli.methods.ia3 import Ia3
from ftcli.methods.lisa import Lisa
from ftcli.methods.lora import Lora
from ftcli.methods.norms import Norms
from ftcli.methods.p_tuning import PTuning
from ftcli.methods.peft import Peft
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt
from ftcli.methods.qlora import Qlora

Method = Annotated[
    Adalora
    | Adamix
    | Bitfit
    | BottleneckAdapter
    | Features
    | Freeze
    | Full
    | HeadOnly
    | Hft
    | Ia3
    | Lisa
    | Lora
    | Norms
    | Peft
    | Prefix
    | Prompt
    | PTuning
    | Qlora,
    Field(discriminator="kind"),
]
