"""Describe the machine that made a table of timings."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def facts() -> dict[str, str | int]:
    """Return processor, cores, threads, accelerator and package versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    hardware: dict[str, str | int] = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
    }
    return hardware | {
        name: metadata.version(name) for name in ("torch", "transformers", "transformer-lens", "stepsal")
    }
