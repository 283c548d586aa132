"""The group ``fuse``: every exact rewrite, in the order that lets each see what the ones before it uncovered."""

from __future__ import annotations

from optc import PassManager
from optc_passes.activation_fusion import FuseActivation
from optc_passes.batch_norm import FoldBatchNorm
from optc_passes.constants import FoldConstants
from optc_passes.dead_code import RemoveDeadCode
from optc_passes.identity import RemoveIdentity
from optc_passes.layer_norm import FoldLayerNorm
from optc_passes.layer_scale import FoldLayerScale
from optc_passes.parallel_linears import MergeParallelLinears
from optc_passes.residual_fusion import FuseResidual
from optc_passes.subexpressions import MergeCommonSubexpressions
from optc_passes.views import MergeViews


class Fuse(PassManager):
    """All exact rewrites. Running it again changes nothing."""

    name = "fuse"
    summary = "Fold, fuse and simplify without changing what the model computes."

    def __init__(self) -> None:
        super().__init__(
            (
                # Dead operators would count as users, no-op ones would stand between, equal ones would fold twice.
                RemoveDeadCode(),
                RemoveIdentity(),
                MergeCommonSubexpressions(),
                FoldConstants(),
                # Norms and scales first: what they leave behind is what the fusions below look for.
                FoldBatchNorm(),
                FoldLayerScale(),
                MergeViews(),
                RemoveIdentity(),
                FoldLayerNorm(),
                # The residual first: convolution, add and relu together become one operator.
                FuseResidual(),
                FuseActivation(),
                # After activations are fused, so that a linear layer with one keeps it and is not merged.
                MergeParallelLinears(),
                MergeCommonSubexpressions(),
                RemoveDeadCode(),
            )
        )
