from typing import Annotated

from pydantic import Field

from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.shares import Shares

Mixture = Annotated[Passes | Shares, Field(discriminator="kind")]
