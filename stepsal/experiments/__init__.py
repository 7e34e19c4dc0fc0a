"""Experiments in folders: populations of mapped traces, evaluations of variants, calibration of StepFlow."""

import lazy_loader

# Each class is imported on first use, so that reading what an experiment left loads no model.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
