from typing import Annotated

from pydantic import Field

from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.qlora import Qlora

Method = Annotated[Full | Lora | Qlora, Field(discriminator="kind")]
