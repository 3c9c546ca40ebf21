from typing import Annotated

from pydantic import Field

from ftcli.optim.schedules.constant import Constant
from ftcli.optim.schedules.cosine import Cosine
from ftcli.optim.schedules.infinite import Infinite
from ftcli.optim.schedules.linear import Linear
from ftcli.optim.schedules.rewarm import Rewarm
from ftcli.optim.schedules.wsd import WSD

Schedule = Annotated[Constant | Cosine | Infinite | Linear | Rewarm | WSD, Field(discriminator="kind")]
