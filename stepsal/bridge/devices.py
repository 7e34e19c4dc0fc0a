"""Where a model is, and how much memory is free there."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that hold a model's parameters, that of the first one first."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had where the model runs."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([int(psutil.virtual_memory().available), *left_in_control_groups()])


def left_in_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the control groups of this process, such as a container, leave it: limit minus use, caches left out."""
    found: list[int] = []
    try:
        (line,) = (line for line in own.read_text().splitlines() if line.startswith("0::"))
        folder = root / line.removeprefix("0::").lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
            if limit != "max":
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(counts.get("inactive_file", 0))
                found.append(max(0, int(limit) - used))
    except (OSError, ValueError):  # no control groups of the second version: nothing is known of a limit
        pass
    return found
