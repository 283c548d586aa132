"""Train a classifier from scratch on scikit-learn's handwritten digits, at the input size the model was made for.

    python examples/train_digits.py --model alexnet -o alexnet-digits.safetensors

``optc optimize alexnet --weights alexnet-digits.safetensors --data digits`` then has a real accuracy to keep. The test
split is only looked at when training is over. A checkpoint that exists is left alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from optc.data.dataset import SPLIT_SEED, Dataset, open_dataset
from optc.data.evaluate import evaluate
from optc.data.preprocess import normalize
from optc.errors import OptcError
from optc.frontend.load import load_model
from optc.machine import BF16_FLAGS, isa
from optc.program import Preprocessing

BATCH = 32
EPOCHS = 4
LEARNING_RATE = 5e-4
DROPOUT = 0.2
ROTATION, SCALE, SHIFT = math.radians(8), 0.07, 0.1
"""Limits of the random changes made to training images: radians, share of the size, share of half the width."""


def train(
    name: str, dataset: Dataset, epochs: int = EPOCHS, images: int | None = None, seed: int = 0
) -> tuple[nn.Module, Preprocessing]:
    """Train a model from random weights; return it, in eval mode, with how its images are prepared.

    Args:
        name: a timm or torchvision name.
        epochs: passes over the training split.
        images: train on this many images only.
        seed: seeds weights, order and random changes.
    """
    loaded = load_model(name, weights="random", num_classes=dataset.num_classes, seed=seed)
    model, preprocessing = loaded.module, loaded.info.preprocessing
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    grey, labels = grey_images(dataset, preprocessing, images)
    validation = dataset.split("validation", preprocessing)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = min(module.p, DROPOUT)  # AlexNet's 0.5 is meant for a thousand times the images.
    if not any("Norm" in type(module).__name__ for module in model.modules()):
        scale_to_unit_variance(model, as_inputs(grey[:BATCH], preprocessing))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05, fused=True)
    steps = epochs * math.ceil(len(grey) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for indices in torch.randperm(len(grey)).split(BATCH):
            with half_where_fast():
                scores = model(as_inputs(shaken(grey[indices]), preprocessing))
            loss = functional.cross_entropy(scores.float(), labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(indices)
        model.eval()
        with half_where_fast():
            accuracy = evaluate(model, validation, BATCH).top1
        print(
            f"epoch {epoch}/{epochs}  loss {total / len(grey):.3f}  validation accuracy {accuracy:.1%}"
            f"  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return model, preprocessing


def half_where_fast() -> torch.autocast:
    """Autocast to bfloat16, or to nothing on a CPU that would emulate it, many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not set(BF16_FLAGS).isdisjoint(isa() or ()))


def grey_images(dataset: Dataset, preprocessing: Preprocessing, limit: int | None) -> tuple[Tensor, Tensor]:
    """The training split as grey images, shape (N, 1, H, W) in [0, 1], and labels, shape (N,)."""
    _, height, width = preprocessing.input_size
    plain = replace(preprocessing, input_size=(1, height, width), mean=(0.0,), std=(1.0,))
    batches = list(dataset.split("train", plain).batches(256, limit))
    labels = [labels for _, labels in batches if labels is not None]
    return torch.cat([images for images, _ in batches]), torch.cat(labels)


def shaken(images: Tensor) -> Tensor:
    """Each image turned, scaled and shifted a little, at random; shape (N, 1, H, W)."""
    turn, scale, right, down = torch.rand(4, len(images)) * 2 - 1
    cos = torch.cos(ROTATION * turn) * (1 + SCALE * scale)
    sin = torch.sin(ROTATION * turn) * (1 + SCALE * scale)
    rows = torch.stack([cos, -sin, SHIFT * right, sin, cos, SHIFT * down], dim=1)
    grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def as_inputs(grey: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Model inputs from grey images: repeated over the channels, normalised, channels last."""
    images = grey.expand(-1, preprocessing.input_size[0], -1, -1)
    return normalize(images, preprocessing).to(memory_format=torch.channels_last)


@torch.no_grad()
def scale_to_unit_variance(model: nn.Module, inputs: Tensor) -> None:
    """Initialise a network without normalisation layers so that every layer's output has variance one on ``inputs``.

    D. Mishkin and J. Matas, "All you need is a good init", ICLR 2016, with He's normal weights in place of orthogonal
    ones. From torchvision's own initialisation AlexNet needs several times the epochs.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    model.eval()
    spread: list[Tensor] = []
    for layer in layers:
        hook = layer.register_forward_hook(lambda module, args, output: spread.append(output.std()))
        model(inputs)
        hook.remove()
        layer.weight /= spread[-1]
    layers[-1].weight *= 0.1  # So that training starts from nearly equal scores.


def save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write weights and metadata as safetensors, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks: AlexNet's gradients are made anew each step, half of it page faults."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def main() -> int:
    """Train, test and save; return the exit code."""
    parser = argparse.ArgumentParser(description="Train a classifier on scikit-learn's handwritten digits.")
    parser.add_argument("--model", default="alexnet", help="timm or torchvision name (default: alexnet)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write, .safetensors")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help=f"passes over the images (default: {EPOCHS}; a ViT needs 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds weights, order and random changes (default: 0)")
    options = parser.parse_args()
    if options.output.exists():
        print(f"{options.output} exists; delete it to train again")
        return 0
    keep_freed_memory()
    dataset = open_dataset("digits")
    print(f"training {options.model} on {dataset.label}: {dataset.summary}", flush=True)
    try:
        model, preprocessing = train(options.model, dataset, options.epochs, seed=options.seed)
    except OptcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    accuracy = evaluate(model, dataset.split("test", preprocessing), BATCH)
    print(f"test accuracy {accuracy.top1:.2%} ({accuracy.correct} of {accuracy.total} images)")
    metadata = {
        "model": options.model,
        "num_classes": str(dataset.num_classes),
        "classes": json.dumps(dataset.class_names),
        "dataset": dataset.label,
        "split_seed": str(SPLIT_SEED),
        "test_accuracy": f"{accuracy.top1:.6f}",
    }
    save(model, options.output, metadata)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
