"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

`step_maps` has `step_saliency` and `step_attention`. The rest are their parts: `pattern` takes A and dL/dA at
`attn.hook_pattern`; `streamed` recomputes them block by block from q, k, v and the gradient of z (`blocks`, pure
tensors), in linear memory; `request` is what both are given and give back; `memory` chooses between the two;
`own_position` makes one backward pass give the gradient of every target by itself; `footprint` tells what a model and a
long trace need before anything is loaded.
"""

import lazy_loader

# Imported on first use, so that the tensor mathematics of `blocks` comes without a model.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
