"""Chat templates of ftcli's own, for tokenizers that have none."""

from __future__ import annotations

# The tools are announced, and calls and results written, as JSON between tags: what most open models have seen.
_TOOLS = """\
{%- macro call_text(calls) -%}
{%- for call in calls %}{{ "<tool_call>\\n" }}{{ (call.function if call.function is defined else call) | tojson }}{{ "\\n</tool_call>" }}\
{%- if not loop.last %}{{ "\\n" }}{% endif %}{% endfor -%}
{%- endmacro -%}
{%- macro tools_text(tools) -%}
{{ "Functions that can be called, one JSON description a line:\\n" }}
{%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor -%}
{{ "To call one, answer with <tool_call>{\\"name\\": ..., \\"arguments\\": {...}}</tool_call>." }}
{%- endmacro -%}
"""

_CHATML = """\
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {%- if messages and messages[0].role == "system" %}{{- messages[0].content + "\\n\\n" }}{% endif %}
    {{- tools_text(tools) + "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and tools and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" }}
        {%- if message.content %}{{- message.content }}{% endif %}
        {%- if message.tool_calls %}
            {%- if message.content %}{{- "\\n" }}{% endif %}
            {{- call_text(message.tool_calls) }}
        {%- endif %}
        {{- ANSWER_END if message.role == "assistant" else "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{% endif %}
"""

# Headers on lines of their own: a byte-level tokenizer cuts between the newline and the words, so a prompt that is encoded
# alone, to generate from, has the same tokens as at the front of a training example.
_PLAIN = """\
{%- if tools %}{{- "System:\\n" + tools_text(tools) + "\\n\\n" }}{% endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "Assistant:\\n" }}
        {%- if message.content %}{{- message.content }}{% endif %}
        {%- if message.tool_calls %}
            {%- if message.content %}{{- "\\n" }}{% endif %}
            {{- call_text(message.tool_calls) }}
        {%- endif %}
        {{- eos_token + "\\n\\n" }}
    {%- else %}
        {{- message.role | capitalize + ":\\n" + message.content + "\\n\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant:\\n" }}{% endif %}
"""

NAMES = ("chatml", "plain")


def own_template(name: str, *, adds_bos: bool, has_chatml_tokens: bool) -> str:
    """The Jinja text of one of `NAMES`.

    Args:
        name: `chatml`, or `plain`, which needs no special token but EOS.
        adds_bos: the tokenizer puts a BOS in front of a text, so the template does so, too.
        has_chatml_tokens: `<|im_end|>` is a token. Where it is not, a ChatML turn ends in EOS, too, so that generation can stop.
    """
    bos = "{{- bos_token }}" if adds_bos else ""
    if name == "plain":
        return _TOOLS + bos + _PLAIN
    end = '"<|im_end|>\\n"' if has_chatml_tokens else '"<|im_end|>" + eos_token + "\\n"'
    return _TOOLS + bos + _CHATML.replace("ANSWER_END", end)
