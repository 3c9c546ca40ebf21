from typing import Annotated

from pydantic import Field

from ftcli.models.grow.blocks import GrowBlocks
from ftcli.models.grow.depth import GrowDepth
from ftcli.models.grow.experts import GrowExperts
from ftcli.models.grow.width import GrowWidth

Grow = Annotated[GrowBlocks | GrowDepth | GrowExperts | GrowWidth, Field(discriminator="kind")]
