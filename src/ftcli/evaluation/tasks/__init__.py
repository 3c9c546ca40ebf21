from typing import Annotated

from pydantic import Field

from ftcli.evaluation.tasks.generation import Generation
from ftcli.evaluation.tasks.language_modelling import LanguageModelling
from ftcli.evaluation.tasks.multiple_choice import MultipleChoice
from ftcli.evaluation.tasks.preference import Preference

Task = Annotated[Generation | LanguageModelling | MultipleChoice | Preference, Field(discriminator="kind")]
