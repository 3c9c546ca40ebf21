from typing import Annotated

from pydantic import Field

from ftcli.objectives.causal_lm import CausalLM
from ftcli.objectives.classification import Classification

Objective = Annotated[CausalLM | Classification, Field(discriminator="kind")]
