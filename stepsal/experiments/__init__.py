"""Experiments in folders: populations of mapped traces, evaluations of variants, calibration of StepFlow."""
