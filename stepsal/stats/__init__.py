"""Statistics with the trace, or the problem, as the unit."""

from stepsal.stats.changes import MeanChange, ShareChange, mean_change, share_change
from stepsal.stats.groups import compare_groups, mean_profile, strata_of
from stepsal.stats.paired import PairedDifference, Share, accuracy, paired_difference, pass_at_k
from stepsal.stats.prediction import auroc, tell_apart
from stepsal.stats.report import summarize
from stepsal.stats.resampling import FEWEST

__all__ = [
    "FEWEST",
    "MeanChange",
    "PairedDifference",
    "Share",
    "ShareChange",
    "accuracy",
    "auroc",
    "compare_groups",
    "mean_change",
    "mean_profile",
    "paired_difference",
    "pass_at_k",
    "share_change",
    "strata_of",
    "summarize",
    "tell_apart",
]
