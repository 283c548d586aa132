"""optc's composite operators (``torch.ops.optc.*``). Importing this package registers them."""

from __future__ import annotations

from optc.ops import cpu, cuda
from optc.ops.composites import ACTIVATIONS, COMPOSITES, Activation, Composite, find_composite
from optc.ops.decompose import decompose, global_pools_as_means

cpu.register()
cuda.register()

__all__ = [
    "ACTIVATIONS",
    "COMPOSITES",
    "Activation",
    "Composite",
    "decompose",
    "find_composite",
    "global_pools_as_means",
]
