from typing import Annotated

from pydantic import Field

from ftcli.metrics.exact_match import ExactMatch
from ftcli.metrics.json_match import JsonMatch
from ftcli.metrics.number_match import NumberMatch

Metric = Annotated[ExactMatch | JsonMatch | NumberMatch, Field(discriminator="kind")]
