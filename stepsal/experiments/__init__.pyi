from . import calibrate, collect, evaluate, store
from .calibration import Calibration
from .population import Population
from .results import Evaluation
from .store import Store
from .variants import Variant

__all__ = [
    "Calibration",
    "Evaluation",
    "Population",
    "Store",
    "Variant",
    "calibrate",
    "collect",
    "evaluate",
    "store",
]
