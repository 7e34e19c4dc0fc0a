"""StepFlow: repair the flow between steps while a model reads or writes (arXiv 2604.06695, Eq. 5-10).

`stepflow` is the entry. The mathematics stands in `oeb` (Odds-Equal Bridge) and `smi` (Step Momentum Injection), pure
functions on tensors; `hooks` applies them at hook points, `config` and `log` are its settings and its account.
"""

from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.hooks import active_flow, agreed_segmentation, stepflow
from stepsal.intervention.log import FlowLog

__all__ = ["FlowLog", "StepFlowConfig", "active_flow", "agreed_segmentation", "stepflow"]
