"""The tokenizer of the base model: byte-level BPE over the corpus, single digits, ChatML-style template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 3072
MAX_LENGTH = 1024
END, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = [END, TURN_START, TURN_END, PAD]
"""They have the ids 0, 1, 2, 3."""

# Every turn is written from the message alone, so that the text of a chat begins with the text of each of its prefixes. Tools stand in front,
# where they do not depend on what follows.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] %}
        {{- message['content'] }}
    {%- endif %}
    {%- for call in message['tool_calls'] or [] %}
        {{- '\\n<call>' if message['content'] or not loop.first else '<call>' }}
        {{- (call['function'] if 'function' in call else call) | tojson }}
        {{- '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train on `texts` and write tokenizer.json, tokenizer_config.json and chat_template.jinja to `folder`.

    All 256 bytes are in the alphabet, so there is no text that cannot be encoded. Ties between equally frequent merges are broken by the
    library in a fixed order, so the same texts give the same file.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIALS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": MAX_LENGTH, "clean_up_tokenization_spaces": False, "add_bos_token": False, "padding_side": "right",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
