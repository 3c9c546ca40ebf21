from typing import Annotated

from pydantic import Field

from ftcli.data.mixtures.balanced import Balanced
from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.shares import Shares

Mixture = Annotated[Balanced | Passes | Shares, Field(discriminator="kind")]
