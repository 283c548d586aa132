"""Runs in Olive's environment: ``python olive_recipe.py SOURCE.onnx FOLDER [--reduce-range]``.

It calibrates on FOLDER/calibration.npy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from olive.data.registry import Registry
from olive.workflows import run
from torch.utils.data import Dataset


class Images(Dataset):  # type: ignore[misc]
    """Calibration batches by the name of the model's input; the label is Olive's custom and not used."""

    def __init__(self, file: str) -> None:
        self.batches = np.load(file)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        return {"input": self.batches[index]}, 0


@Registry.register_dataset()
def calibration_images(file: str, **_: Any) -> Images:
    """Called by Olive for the ``load_dataset_config`` below."""
    return Images(file)


def main(source: str, folder: Path, reduce_range: bool) -> None:
    """Run the recipe; the model is written below ``folder/output``."""
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": source},
            "systems": {
                "local": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                }
            },
            "data_configs": [
                {
                    "name": "calibration",
                    "type": "DataContainer",
                    "load_dataset_config": {
                        "type": "calibration_images",
                        "params": {"file": str(folder / "calibration.npy")},
                    },
                    "pre_process_data_config": {"type": "skip_pre_process"},
                    "post_process_data_config": {"type": "skip_post_process"},
                    "dataloader_config": {"type": "no_auto_batch_dataloader"},
                }
            ],
            "passes": {
                "peephole": {"type": "OnnxPeepholeOptimizer"},
                "quantization": {
                    "type": "OnnxStaticQuantization",
                    "data_config": "calibration",
                    "per_channel": True,
                    "reduce_range": reduce_range,
                    "quant_format": "QDQ",
                },
            },
            "host": "local",
            "target": "local",
            "evaluate_input_model": False,
            "cache_dir": str(folder / "cache"),
            "output_dir": str(folder / "output"),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--reduce-range" in sys.argv[3:])
