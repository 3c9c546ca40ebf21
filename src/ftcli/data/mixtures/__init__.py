from typing import Annotated

from pydantic import Field

from ftcli.data.mixtures.balanced import Balanced
from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.replay import Replay
from ftcli.data.mixtures.shares import Shares
from ftcli.data.mixtures.stream import Stream

Mixture = Annotated[Balanced | Passes | Replay | Shares | Stream, Field(discriminator="kind")]
