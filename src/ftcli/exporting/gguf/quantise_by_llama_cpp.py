"""A GGUF file with its weights in another type, by llama.cpp; run as a program of its own, because what it cannot do may end it.

Reads `{"plain": ..., "path": ..., "kind": ..., "num_threads": ...}` from stdin.
"""

from __future__ import annotations

import ctypes
import json
import sys


def main() -> int:
    """Answer one question from stdin; 0 where the file was written."""
    from llama_cpp import llama_cpp as native

    asked = json.load(sys.stdin)
    settings = native.llama_model_quantize_default_params()
    settings.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{asked['kind'].upper()}")
    settings.nthread = asked["num_threads"]
    return int(native.llama_model_quantize(asked["plain"].encode(), asked["path"].encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main())
