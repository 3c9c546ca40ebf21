"""Chat templates that a merge recipe may name, in the published formats of the models they come from."""

from __future__ import annotations

_ALPACA = """\
{%- for message in messages %}
    {%- if message.role == "system" %}{{- message.content + "\\n\\n" }}
    {%- elif message.role == "user" %}{{- "### Instruction:\\n" + message.content + "\\n\\n" }}
    {%- else %}{{- "### Response:\\n" + message.content + eos_token + "\\n\\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "### Response:\\n" }}{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}
"""
_MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "[INST] " + message.content + " [/INST]" }}
    {%- elif message.role == "system" %}{{- message.content + "\\n\\n" }}
    {%- else %}{{- " " + message.content + eos_token }}{%- endif %}
{%- endfor %}
"""
_EXAONE = """\
{%- for message in messages %}
    {{- "[|" + message.role + "|]" + message.content }}
    {{- "\\n" if message.role == "user" else "[|endofturn|]\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "[|assistant|]" }}{%- endif %}
"""

TEMPLATES = {"alpaca": _ALPACA, "llama3": _LLAMA3, "mistral": _MISTRAL, "exaone": _EXAONE}
"""By mergekit's names; `chatml` is ftcli's own."""
