from ftcli.exporting.formats.adapter import Adapter
from ftcli.exporting.formats.gguf import Gguf
from ftcli.exporting.formats.gptq import Gptq
from ftcli.exporting.formats.hf import Hf
from ftcli.exporting.formats.int4 import Int4
from ftcli.exporting.formats.int8 import Int8
from ftcli.exporting.formats.ollama import Ollama
from ftcli.exporting.formats.onnx import Onnx
from ftcli.exporting.formats.vllm import Vllm

FORMATS = {entry.kind: entry for entry in (Hf, Adapter, Gguf, Onnx, Int8, Int4, Gptq, Ollama, Vllm)}
