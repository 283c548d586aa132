"""optc's own backends, model sources and datasets: an ordinary plugin that uses no private door."""

from __future__ import annotations

from collections.abc import Iterable

from optc.plugins.hookspecs import Entry, hookimpl


@hookimpl
def optc_backends() -> Iterable[Entry]:
    """The runtimes optc lowers to itself."""
    return [
        Entry(
            "eager",
            "PyTorch eager with fused kernels: oneDNN on CPU, cuDNN on GPU.",
            "optc.lowering.eager:EagerBackend",
        ),
        Entry(
            "inductor",
            "PyTorch's AOTInductor: machine code compiled ahead of time, one .pt2 package.",
            "optc.lowering.inductor:InductorBackend",
        ),
        Entry(
            "null",
            "Runs nothing and returns zeros: measures the harness's own overhead.",
            "optc.lowering.null:NullBackend",
        ),
        Entry(
            "onnxruntime",
            "ONNX Runtime on CPU or CUDA: one portable .onnx file.",
            "optc.lowering.onnxruntime:OnnxRuntimeBackend",
            ("onnxruntime",),
            "optc[cpu]",
        ),
        Entry(
            "onnxruntime-tensorrt",
            "ONNX Runtime with TensorRT on CUDA: one .onnx file, engines built at every load.",
            "optc.lowering.onnxruntime_tensorrt:OnnxRuntimeTensorRtBackend",
            ("onnxruntime",),
            "optc[gpu]",
        ),
        Entry(
            "pipeline",
            "One process for each stage of a partitioned model: torch.distributed over NCCL or gloo.",
            "optc.lowering.pipeline:PipelineBackend",
        ),
        Entry(
            "tensorrt",
            "NVIDIA TensorRT through Torch-TensorRT: one strongly typed engine for the GPU at hand.",
            "optc.lowering.tensorrt:TensorRtBackend",
        ),
    ]


@hookimpl
def optc_model_sources() -> Iterable[Entry]:
    """Where models come from, in the order of look-up."""
    # The order of look-up: first what is recognised by its form alone, then timm, which wins over torchvision.
    return [
        Entry(
            "pt2",
            "a file written by torch.export.save: path/to/model.pt2",
            "optc.frontend.pt2_source:Pt2Source",
        ),
        Entry(
            "factory",
            "your own code: package.module:factory returns an nn.Module or (module, example_inputs)",
            "optc.frontend.factory_source:FactorySource",
        ),
        Entry(
            "timm",
            "PyTorch Image Models by name: vit_huge_patch14_224, resnet50, convnext_tiny.fb_in22k, ...",
            "optc.frontend.timm_source:TimmSource",
        ),
        Entry(
            "torchvision",
            "torchvision's image classifiers by name: alexnet, resnet50, vit_h_14, ...",
            "optc.frontend.torchvision_source:TorchvisionSource",
        ),
    ]


@hookimpl
def optc_datasets() -> Iterable[Entry]:
    """Datasets that ship with optc or its dependencies."""
    return [
        Entry(
            "digits",
            "scikit-learn's bundled handwritten digits: 1797 real 8x8 images, 10 classes, no download",
            "optc.data.digits:DigitsDataset",
        ),
        Entry(
            "synthetic",
            "seeded noise with the spectrum of natural images, unlabeled: stands in where there is no data",
            "optc.data.synthetic:SyntheticDataset",
        ),
    ]
