from typing import Annotated

from pydantic import Field

from ftcli.optim.optimizers.adafactor import Adafactor
from ftcli.optim.optimizers.adamw import AdamW
from ftcli.optim.optimizers.adamw8bit import AdamW8bit
from ftcli.optim.optimizers.apollo import Apollo
from ftcli.optim.optimizers.galore import GaLore
from ftcli.optim.optimizers.lion import Lion
from ftcli.optim.optimizers.muon import Muon
from ftcli.optim.optimizers.sgd import SGD

Optimizer = Annotated[Adafactor | AdamW | AdamW8bit | Apollo | GaLore | Lion | Muon | SGD, Field(discriminator="kind")]
