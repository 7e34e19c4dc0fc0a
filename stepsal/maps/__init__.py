"""Step maps: `pooling` of token maps, the labelled result in `step_saliency`, its `averages` and its `files`."""

from stepsal.maps.averages import average
from stepsal.maps.step_saliency import StepSaliency, labels_of

__all__ = ["StepSaliency", "average", "labels_of"]
