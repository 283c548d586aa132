"""Which ATen operators compute in half precision and which do not, by ``torch.autocast``'s lists."""

from __future__ import annotations

from typing import Literal

from torch import fx
from torch._ops import OpOverload

from optc.ops import COMPOSITES

Role = Literal["product", "follows", "float32"]


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


PRODUCTS = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul mm bmm mv addmm",
    "addmv baddbmm addbmm einsum linalg_vecdot scaled_dot_product_attention",
    "embedding",  # computes nothing, but starts a residual stream, and its table is a weight
)
"""The arithmetic of layers: in half whatever type their operands have (autocast's list ``lower_precision_fp``)."""

FOLLOWERS = _names(
    # Views and copies.
    "view _unsafe_view view_as type_as reshape flatten unflatten permute transpose t squeeze unsqueeze expand",
    "expand_as slice select split split_with_sizes chunk unbind narrow index index_select gather take_along_dim cat",
    "concat stack clone contiguous alias detach lift_fresh_copy flip roll repeat repeat_interleave pad constant_pad_nd",
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle pixel_unshuffle",
    "channel_shuffle unfold im2col movedim tril triu diagonal where masked_fill dropout feature_dropout alpha_dropout",
    "native_dropout",
    # Arithmetic of one rounding, and activations.
    "add sub rsub mul div neg abs sign maximum minimum clamp clamp_min clamp_max addcmul lerp floor ceil round sqrt",
    "relu relu6 hardtanh hardswish hardsigmoid silu gelu sigmoid tanh elu celu selu leaky_relu prelu mish glu",
    "threshold",
    # Norms and softmax, which accumulate in float32 whatever they read, and round once.
    "layer_norm native_layer_norm group_norm native_group_norm instance_norm batch_norm",
    "_native_batch_norm_legit_no_training softmax _softmax",
    # Pools, and reductions to something no larger than what they reduce.
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d",
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean amax amin max min argmax argmin topk sort",
    "upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d",
    "eq ne lt le gt ge isnan isinf isfinite",
)
"""Operators that compute in the type of their operands, and in float32 where one of those is float32.

Autocast has layer norm, group norm, softmax and upsampling in float32, and casts for prelu.
"""

DELICATE = _names(
    "acos asin cosh erfinv exp exp2 expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus log_sigmoid",
    "rms_norm norm linalg_vector_norm linalg_matrix_norm cosine_similarity dist cdist renorm logsumexp log_softmax",
    "_log_softmax upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d prod cumprod cumsum logcumsumexp sum var std var_mean",
    "std_mean",
)
"""Operators whose result may leave half precision's range, or that lose digits in it (autocast's list ``fp32``)."""


def role(node: fx.Node) -> Role:
    """What a call does about its precision; an operator on no list is in float32."""
    name = operator_name(node)
    if node.target in COMPOSITES or name in PRODUCTS:
        return "product"
    return "follows" if name in FOLLOWERS else "float32"


def operator_name(node: fx.Node) -> str:
    """An ATen operator's name without namespace and overload; empty for any other call."""
    target = node.target
    return target._opname if isinstance(target, OpOverload) and target.namespace == "aten" else ""
