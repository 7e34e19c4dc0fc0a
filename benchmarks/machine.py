"""What a table of timings has to say about the machine that made it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def facts() -> dict[str, str | int]:
    """Processor, cores, threads, accelerator and package versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, str | int] = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
    }
    return found | {name: metadata.version(name) for name in ("torch", "transformers", "transformer-lens", "stepsal")}
