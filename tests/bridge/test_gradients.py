"""The state of a model while it is differentiated, and that all of it comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepsal.bridge.gradients import differentiable, evaluating


def mixed() -> nn.Sequential:
    """A model with some parameters frozen and modules in different modes."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    return model


def state(model: nn.Module) -> tuple:
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("context", [evaluating, differentiable])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_restored(context: object, error: type[BaseException]) -> None:
    model = mixed()
    before = state(model)
    with context(model):
        assert not any(module.training for module in model.modules())
    assert state(model) == before
    with pytest.raises(error), context(model):
        raise error
    assert state(model) == before


def test_activations_have_gradients_and_parameters_none() -> None:
    model, x = mixed(), torch.randn(2, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), differentiable(model):
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        output.sum().backward()
    assert output.dtype == torch.float32
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
