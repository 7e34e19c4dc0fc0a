"""Tell where a model is and how much memory is free there, and give freed memory back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn

# parameters of glibc's `mallopt`, from its malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAPPED_ALONE = 2**20  # bytes from which on a tensor is mapped on its own, and so given back when it is freed
# where glibc's allocator ends up by itself once a large tensor has been freed: its largest threshold, and twice that
_LEARNED_MMAP_THRESHOLD = 2**25
_LEARNED_TRIM_THRESHOLD = 2**26


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices that hold a model's parameters, in the order of the parameters.

    Args:
        model: the model, on one or several devices.

    Example:
        >>> import torch
        >>> from stepsal.bridge.devices import devices_of
        >>> devices_of(torch.nn.Linear(2, 3))
        (device(type='cpu'),)
    """
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device; on a CPU at most what its container leaves this process.

    Args:
        device: a CPU or a CUDA device.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([int(psutil.virtual_memory().available), *free_in_control_groups()])


def free_in_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return the bytes that each control group of this process, such as a container, leaves it.

    That is the limit of the group minus the memory in use, file caches left out.

    Args:
        root: folder at which the control groups (of the second version) are mounted.
        own: the file that names the control groups of this process.

    Returns:
        One number for each group with a limit; none where there are no control groups.
    """
    remainders: list[int] = []
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
                remainders.append(max(0, int(limit) - used))
    except (OSError, ValueError):  # no control groups of the second version: nothing is known of a limit
        pass
    return remainders


@contextmanager
def freed_at_once(device: torch.device) -> Iterator[None]:
    """Give the memory of freed tensors back to the system, where glibc would keep it for itself.

    Its allocator learns from the first large tensor that is freed to take tensors of up to 32 MB from the heap, where
    short-lived ones between long-lived ones leave holes that fit nothing: a pass then peaks at three times what it
    holds. Inside this context tensors from 1 MB on are mapped on their own; at the end the allocator is put where it
    would have ended up by itself.

    Args:
        device: device of the tensors; nothing is done unless it is a CPU under Linux with glibc.
    """
    on_linux = device.type == "cpu" and sys.platform == "linux"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on_linux else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_ALONE)
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, _LEARNED_TRIM_THRESHOLD)
        mallopt(_M_MMAP_THRESHOLD, _LEARNED_MMAP_THRESHOLD)
