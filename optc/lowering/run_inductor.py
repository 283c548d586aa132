"""Runs this model with torch and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import ctypes
import json
import platform
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL = Path(__file__).resolve().with_name("model.pt2")
KEEP_MEMORY = True
"""Whether freed memory stays with the process, for the next call: else large activations cost time at each call."""


def facts() -> dict[str, Any]:
    """What the model was compiled for, and its inputs."""
    with zipfile.ZipFile(MODEL) as archive:
        found: dict[str, Any] = json.loads(archive.read("model/extra/optc.json"))
        return found


def missing_instructions() -> list[str]:
    """What the model was compiled for and this CPU lacks: it would end the process. Only Linux on x86 tells."""
    manifest, cpu = MODEL.with_name("manifest.json"), Path("/proc/cpuinfo")
    if not manifest.exists():  # the files were taken out of their folder
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    required = json.loads(manifest.read_text())["required_isa"]
    missing = [each for each in required if flags and not set(each.split("|")).intersection(flags[1].split())]
    return [each.replace("|", " or ") for each in missing]


def load() -> "torch._C._aoti.AOTIModelPackageLoader":
    """The compiled model; ``load().run([tensor, ...])`` gives a list of tensors."""
    made = facts()
    if made["torch"] != torch.__version__:
        sys.exit(
            f"{MODEL.name} was compiled with torch {made['torch']}, this is {torch.__version__}: optimize it again here"
        )
    if made["architecture"] != platform.machine():
        sys.exit(f"{MODEL.name} was compiled for {made['architecture']}, this is {platform.machine()}")
    if made["device"] == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{MODEL.name} was compiled for a GPU, and this PyTorch sees none")
    if made["device"] == "cuda" and tuple(made["capability"]) != (here := torch.cuda.get_device_capability()):
        sys.exit(f"{MODEL.name} was compiled for compute capability {made['capability']}, this GPU has {list(here)}")
    if missing := missing_instructions():
        sys.exit(f"{MODEL.name} was compiled for a CPU with {', '.join(missing)}: optimize the model again here")
    if made["device"] == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # as it was checked: PyTorch's default for convolutions is TF32
    if KEEP_MEMORY and made["device"] == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc has it, with M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
            libc.mallopt(-3, 2**25)
            libc.mallopt(-1, 2**31 - 1)
    return torch._C._aoti.AOTIModelPackageLoader(str(MODEL), "model", False, 1, -1)


def main(files: list[str]) -> None:
    """Run ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    model, made = load(), facts()
    inputs = made["inputs"]
    if files and len(files) != len(inputs):
        sys.exit(f"give one .npy file for each of {', '.join(value['name'] for value in inputs)}")
    given = [np.load(file, allow_pickle=False) for file in files]
    batch = given[0].shape[0] if given and given[0].ndim else 1
    tensors = []
    for index, value in enumerate(inputs):
        shape = [batch if size is None else size for size in value["shape"]]
        array = given[index] if given else np.zeros(shape)
        if list(array.shape) != shape:
            sys.exit(f"input {value['name']} has the shape {list(array.shape)}, the model takes {shape}")
        tensors.append(torch.tensor(array, dtype=getattr(torch, value["dtype"]), device=made["device"]))
    for index, output in enumerate(model.run(tensors)):
        print(f"output {index} shape: {tuple(output.shape)}")
        for row in output.reshape(len(output), -1).float() if files and output.ndim else ():
            top = row.topk(min(5, len(row)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            print("top 5:", ", ".join(f"{place}: {value:.4f}" for place, value in pairs))


if __name__ == "__main__":
    main(sys.argv[1:])
