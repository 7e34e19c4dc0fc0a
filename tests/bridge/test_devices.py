"""Free memory as a container leaves it, the devices of a model, and memory that is given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stepsal.bridge import devices
from stepsal.bridge.devices import devices_of, free_bytes, free_in_control_groups, freed_at_once


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, inner = tmp_path / "self", tmp_path / "root" / "pod" / "box"
    inner.mkdir(parents=True)
    own.write_text("0::/pod/box\n")
    for group, limit, used in ((inner, "max", 70), (inner.parent, "100", 90), (tmp_path / "root", "max", 500)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 60\ninactive_file 30\n")
    assert free_in_control_groups(tmp_path / "root", own) == [40]
    assert free_in_control_groups(tmp_path / "root", tmp_path / "none") == []
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [40])
    assert free_bytes(torch.device("cpu")) == 40


def test_devices_stand_in_the_order_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    assert devices_of(model) == (torch.device("meta"), torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_giving_memory_back_changes_nothing_else(device: str) -> None:
    with freed_at_once(torch.device(device)):
        assert torch.ones(2**20).sum() == 2**20
    with pytest.raises(KeyboardInterrupt), freed_at_once(torch.device(device)):
        raise KeyboardInterrupt
