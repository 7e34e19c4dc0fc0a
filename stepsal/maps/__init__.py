"""Step maps: one value for each pair of steps and each layer, with labels.

`StepSaliency` is the result of `stepsal.step_saliency` and `stepsal.step_attention`; `average` averages several
results, and `labels_of` gives the labels that a trace puts on its maps.

Files: `step_saliency` (the labelled result), `pooling` (token maps to step maps), `averages`.
"""

from stepsal.maps.averages import average
from stepsal.maps.step_saliency import StepSaliency, labels_of

__all__ = ["StepSaliency", "average", "labels_of"]
