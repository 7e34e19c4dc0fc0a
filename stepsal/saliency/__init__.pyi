from .footprint import Footprint, memory_needed
from .step_maps import step_attention, step_saliency

__all__ = ["Footprint", "memory_needed", "step_attention", "step_saliency"]
