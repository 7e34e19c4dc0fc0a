"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

`entry` has `step_saliency` and `step_attention`. The rest are their parts: `pattern` takes A and dL/dA at
`attn.hook_pattern`; `streamed` recomputes them block by block from q, k, v and the gradient of z (`blocks`), in linear
memory; `memory` chooses between the two; `own_position` makes one backward pass give the gradient of every target by
itself; `footprint` tells what a model and a long trace need before anything is loaded.
"""

from stepsal.saliency.entry import step_attention, step_saliency

__all__ = ["step_attention", "step_saliency"]
