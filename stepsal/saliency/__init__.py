"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

Call `stepsal.step_saliency` for saliency, `stepsal.step_attention` for attention alone as a baseline, and
`stepsal.saliency.memory_needed` for the memory that a model and its maps take, before anything is loaded.

Files: `step_maps` (the two functions), `pattern` (the engine that takes A and dL/dA at `attn.hook_pattern`), `streamed`
(the engine that recomputes them from q, k, v and the gradient of z, in linear memory) with its tensor mathematics in
`blocks`, `request` (input and output of the engines), `memory` (the choice between them), `own_position` (one backward
pass for the gradients of all targets), `footprint`.
"""

import lazy_loader

# Imported on first use, so that the tensor mathematics of `blocks` comes without a model.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
