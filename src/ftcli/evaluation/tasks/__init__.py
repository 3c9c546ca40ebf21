from typing import Annotated

from pydantic import Field

from ftcli.evaluation.tasks.classification import Classification
from ftcli.evaluation.tasks.code import Code
from ftcli.evaluation.tasks.generation import Generation
from ftcli.evaluation.tasks.language_modelling import LanguageModelling
from ftcli.evaluation.tasks.lm_eval import LmEval
from ftcli.evaluation.tasks.multiple_choice import MultipleChoice
from ftcli.evaluation.tasks.preference import Preference
from ftcli.evaluation.tasks.retrieval import Retrieval

Task = Annotated[
    Classification | Code | Generation | LanguageModelling | LmEval | MultipleChoice | Preference | Retrieval,
    Field(discriminator="kind"),
]
