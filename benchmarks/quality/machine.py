"""What a figure was measured on."""

from __future__ import annotations

import platform
from datetime import date
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Return date, processor, card and versions."""
    import transformers

    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
