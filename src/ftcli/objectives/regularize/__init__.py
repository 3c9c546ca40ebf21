from typing import Annotated

from pydantic import Field

from ftcli.objectives.regularize.ewc import EWC
from ftcli.objectives.regularize.kl import KL
from ftcli.objectives.regularize.l2_sp import L2SP

Regularizer = Annotated[EWC | KL | L2SP, Field(discriminator="kind")]
