"""StepFlow: repair the flow between steps while a model reads or writes (arXiv 2604.06695, Eq. 5-10).

`stepflow` is the entry. The mathematics stands in `oeb` (Odds-Equal Bridge) and `smi` (Step Momentum Injection), pure
functions on tensors. `ledger` keeps account of sections and steps on the host, `bridging` and `values` hold
on the device what a pass needs of them, and `hooks` applies the edits. `config` has the settings and `log` the account,
`segmentation` settles how steps are found, and `effects` compares the next-token distributions with and without it.
"""

from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.hooks import StepFlow, active_flow, agreed_segmentation, stepflow
from stepsal.intervention.log import FlowLog

__all__ = ["FlowLog", "StepFlow", "StepFlowConfig", "active_flow", "agreed_segmentation", "stepflow"]
