from typing import Annotated

from pydantic import Field

from ftcli.data.formats.chat import Chat
from ftcli.data.formats.completion import Completion
from ftcli.data.formats.instruction import Instruction
from ftcli.data.formats.label import Label
from ftcli.data.formats.text import Text

Format = Annotated[Chat | Completion | Instruction | Label | Text, Field(discriminator="kind")]
