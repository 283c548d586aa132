"""Optimize a model of your own from Python: fuse and quantize it, prove it, run it, save it."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import optc

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 10),
).eval()
batches = [torch.randn(8, 3, 64, 64) for _ in range(4)]

# Without backend=, every runtime here is tried and the fastest kept.
optimized = optc.optimize(
    model, batches[0][:1], ["fuse", "quant"], backend="onnxruntime", calibration=batches, measure=False
)
for record in optimized.report.passes:
    for change in record.applied:
        print(f"{record.name}: {change.node} {change.detail}")

x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    print("largest difference:", float((optimized(x) - model(x)).abs().max()))
with tempfile.TemporaryDirectory() as folder:
    artifact = optimized.save(Path(folder) / "small-int8")
    print("artifact:", ", ".join(sorted(file.name for file in artifact.iterdir())))
    print("runs again:", optc.load(artifact).precision)
