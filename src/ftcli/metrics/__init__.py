from typing import Annotated

from pydantic import Field

from ftcli.metrics.bleu import Bleu
from ftcli.metrics.chrf import Chrf
from ftcli.metrics.exact_match import ExactMatch
from ftcli.metrics.json_match import JsonMatch
from ftcli.metrics.json_valid import JsonValid
from ftcli.metrics.number_match import NumberMatch
from ftcli.metrics.regex_match import RegexMatch
from ftcli.metrics.rouge import Rouge
from ftcli.metrics.token_f1 import TokenF1

Metric = Annotated[
    Bleu | Chrf | ExactMatch | JsonMatch | JsonValid | NumberMatch | RegexMatch | Rouge | TokenF1, Field(discriminator="kind")
]
