"""The built-in passes: an ordinary optc plugin. Nothing is imported until a pass is used."""

from __future__ import annotations

from collections.abc import Iterable

from optc import Entry, hookimpl


@hookimpl
def optc_passes() -> Iterable[Entry]:
    """Every built-in pass."""
    return [
        Entry("fuse", "Fold, fuse and simplify without changing what the model computes.", "optc_passes.fuse:Fuse"),
        Entry(
            "fold-batch-norm",
            "Fold inference batch norms into the convolution or linear layer beside them.",
            "optc_passes.batch_norm:FoldBatchNorm",
        ),
        Entry(
            "fold-layer-norm",
            "Fold layer norms' weight and bias into the linear layers that read them.",
            "optc_passes.layer_norm:FoldLayerNorm",
        ),
        Entry(
            "fold-layer-scale",
            "Fold multiplication by a constant per channel into the layer beside it.",
            "optc_passes.layer_scale:FoldLayerScale",
        ),
        Entry(
            "fold-constants",
            "Evaluate expressions of constants ahead of time.",
            "optc_passes.constants:FoldConstants",
        ),
        Entry(
            "fuse-residual",
            "Fuse residual additions into the convolution or linear layer before them.",
            "optc_passes.residual_fusion:FuseResidual",
        ),
        Entry(
            "fuse-activation",
            "Fuse activations into the convolution or linear layer before them.",
            "optc_passes.activation_fusion:FuseActivation",
        ),
        Entry(
            "merge-parallel-linears",
            "Compute linear layers over one input with one matrix product.",
            "optc_passes.parallel_linears:MergeParallelLinears",
        ),
        Entry(
            "merge-common-subexpressions",
            "Compute equal expressions once.",
            "optc_passes.subexpressions:MergeCommonSubexpressions",
        ),
        Entry(
            "merge-views",
            "Let chains of views, permutes and copies become one operator.",
            "optc_passes.views:MergeViews",
        ),
        Entry(
            "remove-identity",
            "Remove operators that hand on their input unchanged: dropout, no-op views and casts, copies, zero biases.",
            "optc_passes.identity:RemoveIdentity",
        ),
        Entry(
            "remove-dead-code",
            "Remove operators and constants that no output depends on.",
            "optc_passes.dead_code:RemoveDeadCode",
        ),
        Entry(
            "equalize",
            "Even out channels between layers (SmoothQuant, cross-layer equalization), before quant.",
            "optc_passes.equalize:Equalize",
        ),
        Entry(
            "quant",
            "Quantize convolutions, linear layers and what lies between them to int8.",
            "optc_passes.quant:Quant",
        ),
        Entry(
            "bf16",
            "Compute convolutions, matrix products and what lies between them in bfloat16.",
            "optc_passes.precision:Bf16",
        ),
        Entry(
            "fp16",
            "Compute convolutions, matrix products and what lies between them in float16.",
            "optc_passes.precision:Fp16",
        ),
        Entry(
            "channels_last",
            "Store 2-D convolutions' weights and activations in channels-last memory format.",
            "optc_passes.channels_last:ChannelsLast",
        ),
        Entry(
            "partition",
            "Cut the graph into pipeline stages so that the slowest one is as fast as it can be.",
            "optc_passes.partition:Partition",
        ),
    ]
