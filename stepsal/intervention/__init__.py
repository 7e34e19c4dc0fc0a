"""StepFlow: repair the flow between steps while a model reads or writes (arXiv 2604.06695, Eq. 5-10).

Open `stepsal.stepflow(model, config)` around any pass, with a `StepFlowConfig` for its settings; it yields a `FlowLog`
of the edits. `stepsal.edit_gains` tells which heads an edit helps, and `stepsal.token_effects` compares the next-token
distributions with and without it. `active_flow` tells which `StepFlow` is open on a model, and `agreed_segmentation`
how steps are found under it.

Files: `hooks` (the context and its edits), `oeb` (Odds-Equal Bridge) and `smi` (Step Momentum Injection), the
mathematics as pure functions on tensors, `ledger` (sections and steps, on the host), `bridging` and `values` (inputs of
the edits, on the device), `config`, `heads`, `log`, `segmentation`, `effects`,
`gains` (with its value in `gain_table`).
"""

import lazy_loader

# The names stand in __init__.pyi; each is imported on first use, since the mathematics needs no model.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
