"""Axes-level plots: step maps, token maps, flow arcs, layer profiles, estimates with intervals."""

from stepsal.plots.maps import *  # noqa: F403
from stepsal.plots.maps import LINE_COLORS, ROLE_COLORS, step_labels, style
from stepsal.plots.save import save_figure
