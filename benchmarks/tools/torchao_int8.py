"""torchao: PT2E quantization with the x86 quantizer, compiled by Inductor, as PyTorch's tutorial for CPUs has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from optc import Runner
from tools.peer import Peer, Task, int8_saturates, require_bfloat16
from tools.pytorch import compiled

FILE = "model.pt2"


class TorchaoInt8(Peer):
    """Static int8 of all that the x86 quantizer annotates; the rest in float32."""

    autocast = False

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Prepare, calibrate, convert, compile; the converted graph is kept for loading."""
        example = (task.calibration[0],)
        with torch.no_grad():
            exported = torch.export.export(task.loaded.module, example, strict=False).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=int8_saturates()))
            prepared = prepare_pt2e(exported, quantizer)
            for batch in task.calibration:
                prepared(batch)
            converted = convert_pt2e(prepared)
            torch.export.save(torch.export.export(converted, example, strict=False), folder / FILE)
        self.load(task, folder)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """Compile the converted graph and run it once."""
        module = torch.export.load(folder / FILE).module()
        runner = compiled(module, task, folder, torch.float32, autocast=self.autocast)
        runner.precision = "int8 and bfloat16" if self.autocast else "int8"
        return runner


class TorchaoInt8Bfloat16(TorchaoInt8):
    """The same compiled under autocast, so that the rest is in bfloat16: the tutorial's int8-mixed-bf16."""

    autocast = True

    def prepare(self) -> None:
        """Refuse a type that the CPU has to emulate."""
        require_bfloat16()
