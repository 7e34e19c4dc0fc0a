"""Step maps: pooling of token maps, and the labelled result."""

from stepsal.maps.step_saliency import StepSaliency, average, labels_of

__all__ = ["StepSaliency", "average", "labels_of"]
