"""llama.cpp's own quantisation of GGUF files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ffprune.core.errors import FfpruneError


class QuantizationFailed(FfpruneError):
    """llama.cpp did not quantise a file."""


_QUANTIZE = """
import ctypes, os, sys
import llama_cpp
source, target, file_type = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(file_type)
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))
"""


def quantize(source: Path, path: Path, file_type: int) -> None:
    """Quantise a file into another, in a process of its own: llama.cpp may abort, and it talks.

    Args:
        source: a GGUF file in float32.
        path: the file to write.
        file_type: llama.cpp's number for the whole.

    Raises:
        QuantizationFailed: llama.cpp refused or crashed.
    """
    command = [sys.executable, "-c", _QUANTIZE, str(source), str(path), str(file_type)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise QuantizationFailed(
            f"llama.cpp did not quantise the model (status {done.returncode}): {' '.join(done.stderr.split()[-30:])}",
            "Nothing was written",
            "Use --type q8_0, which needs no llama.cpp, or another version of llama-cpp-python",
        )
