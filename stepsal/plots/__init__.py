"""Draw step maps, token maps, flow arcs, layer profiles and estimates, and save figures with their data.

Every plot takes `ax=None` and returns the Axes it drew on. What is to be shown is settled first, by pure functions
(`map_view`, `flow_view`, `profile_view`, `forest_view`, `shared_norm`), and only then drawn, by seaborn where it can,
so that tests and figure data can look at the state instead of the pixels. Nothing here changes matplotlib's settings
on import; wrap figures in `style()`.

    import matplotlib.pyplot as plt
    from stepsal import plots

    # wrong, correct: from `stepsal.step_saliency`
    with plots.style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(plots.DOUBLE_COLUMN, 3.2), layout="constrained")
        norm = plots.shared_norm([wrong.mean_over("shallow"), correct.mean_over("shallow")])
        plots.step_map(wrong, "shallow", ax=left, norm=norm, colorbar=False)
        plots.step_map(correct, "shallow", ax=right, norm=norm)
"""

from stepsal.plots.arcs import flow_arcs
from stepsal.plots.distributions import distribution
from stepsal.plots.estimates import (
    EstimatesView,
    forest,
    forest_view,
    layer_profile,
    profile_view,
)
from stepsal.plots.heads import head_map
from stepsal.plots.maps import step_map, token_map
from stepsal.plots.panels import note, panel_grid, share_legend, state_finding, stretch
from stepsal.plots.save import save_figure
from stepsal.plots.theme import (
    CMAP,
    DOUBLE_COLUMN,
    EMPTY,
    GROUP_COLORS,
    INK,
    LINE_COLORS,
    ROLE_COLORS,
    SINGLE_COLUMN,
    VARIANT_COLORS,
    hue_colors,
    hue_markers,
    style,
)
from stepsal.plots.views import (
    FlowView,
    MapView,
    RoleSpan,
    flow_view,
    map_view,
    role_labels,
    role_spans,
    shared_norm,
    step_labels,
)

__all__ = [
    "CMAP",
    "DOUBLE_COLUMN",
    "EMPTY",
    "GROUP_COLORS",
    "INK",
    "LINE_COLORS",
    "ROLE_COLORS",
    "SINGLE_COLUMN",
    "VARIANT_COLORS",
    "EstimatesView",
    "FlowView",
    "MapView",
    "RoleSpan",
    "distribution",
    "flow_arcs",
    "flow_view",
    "forest",
    "forest_view",
    "head_map",
    "hue_colors",
    "hue_markers",
    "layer_profile",
    "map_view",
    "note",
    "panel_grid",
    "profile_view",
    "role_labels",
    "role_spans",
    "save_figure",
    "share_legend",
    "shared_norm",
    "state_finding",
    "step_labels",
    "step_map",
    "stretch",
    "style",
    "token_map",
]
