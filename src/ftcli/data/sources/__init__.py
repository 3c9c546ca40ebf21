from typing import Annotated

from pydantic import Field

from ftcli.data.sources.builtin import Builtin
from ftcli.data.sources.file import File
from ftcli.data.sources.hub import Hub
from ftcli.data.sources.own_text import OwnText

Source = Annotated[File | Hub | Builtin | OwnText, Field(discriminator="kind")]
