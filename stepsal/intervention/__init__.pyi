from .config import StepFlowConfig
from .gain_table import EditGains
from .hooks import StepFlow, active_flow, agreed_segmentation, stepflow
from .log import FlowLog

__all__ = ["EditGains", "FlowLog", "StepFlow", "StepFlowConfig", "active_flow", "agreed_segmentation", "stepflow"]
