from . import calibrate, collect, evaluate, store
from .calibration import Calibration
from .guided import Guidance, guide
from .population import Population
from .results import Evaluation
from .store import Store
from .variants import Variant

__all__ = [
    "Calibration",
    "Evaluation",
    "Guidance",
    "Population",
    "Store",
    "Variant",
    "calibrate",
    "collect",
    "evaluate",
    "guide",
    "store",
]
