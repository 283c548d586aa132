"""Bicubic resizing to fewer rows or columns, in the one layout in which onnxruntime computes it."""

from __future__ import annotations

import onnx_ir as ir

from optc.lowering.onnx_blocks import register


def keep_channels_first(model: ir.Model) -> None:
    """Flatten each image before a bicubic Resize to fewer rows or columns, and give it its shape again.

    Between integer convolutions onnxruntime would move the transposes of these over the Resize, and then refuse it:
    its kernel for channels-last images only makes them larger. It moves no transpose over a Flatten, and neither of the
    two copies anything. A Reshape alone it drops where the batch is fixed.
    """
    for node in list(model.graph):
        if node.op_type == "Resize" and node.attributes["mode"].as_string() == "cubic" and _shrinks(node):
            x = node.inputs[0]
            image = _image(x)
            shape = register(model, "image_" + "_".join(map(str, image)), ir.tensor([-1, *image]))
            flat = ir.Node("", "Flatten", [x], [ir.AttrInt64("axis", 2)])
            again = ir.Node("", "Reshape", [flat.outputs[0], shape])
            model.graph.insert_before(node, [flat, again])
            node.replace_input_with(0, again.outputs[0])


def _shrinks(node: ir.Node) -> bool:
    """Whether the result has fewer rows or columns, where that is known."""
    before, after = _image(node.inputs[0]), _image(node.outputs[0])
    return any(new < old for old, new in zip(before, after, strict=False))


def _image(value: ir.Value | None) -> list[int]:
    """Channels, rows and columns; empty where they are not known."""
    sizes = [] if value is None or value.shape is None else list(value.shape)[1:]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else []
