"""The streamed engine: the same maps in memory that grows with the length of the trace, not with its square.

The bridge's attention builds the pattern of all positions, to offer it to hooks. Here no whole pattern is built:

    attn.hook_rot_q        q is taken (attn.q.hook_out without rotary embeddings)
    cache.update(k, v)     k and v are taken, as the attention uses them; it gets back the first key alone, so that its
                           own scores and pattern are [query_pos, 1]
    attn.o.hook_in         z of the real attention takes the place of what came out of that (`blocks.attend`)
    unembed.hook_in        the last residual stream is taken, and one position goes on to the unembedding; the loss is
                           computed from it in chunks

The seam besides hook points is the cache argument of the model's own forward: the smallest place at which the attention
lets go of keys and values. Hooks that would not see what they were made for are refused (`why_not`): those on scores,
patterns and logits, and backward hooks where tensors leave the bridge's own graph. All others take part; those inside a
block run a second time when its layer is computed again, and have to give the same then.

Under StepFlow the pattern is edited in the same blocks, by groups of keys, and its gradient goes through the edit in
closed form (`stepsal.intervention.oeb`); momentum is injected by StepFlow's own hook, behind z.

In the backward pass of a layer, A, dA and |A * dA| are recomputed block by block and pooled at once
(`blocks.attend_backward`). Layers are checkpointed: their input and z are kept, and the rest is computed again when
its turn comes, without the attention, which is the part that grows with the square. As many layers as memory allows are
not (`n_kept`).

What is taken for granted of a model (a scale, a soft-cap, sinks) is held against its own scores and pattern at the
first key in every pass. That can't show windows, which are read off its configuration.

One pass at a time for each model: the hooks of another would see both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from stepsal.bridge.attention import (
    ROUNDINGS,
    Attention,
    attention_of,
    expected_scores,
    unembed,
    unknown_layer_type,
)
from stepsal.bridge.check import bias_of_scores
from stepsal.bridge.devices import freed_at_once
from stepsal.bridge.gradients import differentiable
from stepsal.bridge.hooks import Hook, attention_hooks, first_hooks_on
from stepsal.bridge.unembedding import MAX_LOGITS, last_residual
from stepsal.intervention.hooks import active_flow
from stepsal.intervention.oeb import LayerBridge
from stepsal.maps.pooling import StepSums
from stepsal.saliency.blocks import Block, Visit, Workspace, attend, attend_backward, wide
from stepsal.saliency.objective import objective
from stepsal.saliency.request import MapRequest, PooledMaps, check_finite, explained
from stepsal.saliency.window import TokenWindow


def streamed_maps(
    model: TransformerBridge,
    request: MapRequest,
    *,
    n_rows: int = 128,
    n_kept: int = 0,
    workspace: Workspace | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> PooledMaps:
    """Sum |A * dL/dA| over step blocks in every requested layer, without ever holding a whole pattern.

    Args:
        model: any model that `stepsal.bridge.check.check_model` accepts.
        request: the trace, and the maps to make of it.
        n_rows: query rows per block.
        n_kept: number of layers, from the top, that are not checkpointed.
        workspace: buffers, to be reused for the next trace.
        on_layer: called whenever a layer has been pooled.

    Raises:
        ValueError: the engine can't serve the model, its hooks or the request; see `why_not`.
        FloatingPointError: a layer's scores, pattern or map holds NaN or inf; the message says where they come from.
    """
    streamed = StreamedPass(
        model, request, n_rows=n_rows, n_kept=n_kept, workspace=workspace or Workspace(), on_layer=on_layer
    )
    with explained(model, request.tokens), streamed.hooked():
        tokens = request.tokens.to(next(model.parameters()).device).clone()  # a copy made here is no inference tensor
        if request.target == "attention":
            with torch.no_grad():
                streamed.forward(tokens)
        else:
            streamed.backward(tokens, streamed.forward(tokens))
    maps = torch.stack([streamed.sums[layer] for layer in request.layers])
    windows = torch.stack([streamed.tokens[layer] for layer in request.layers]) if streamed.tokens else None
    return PooledMaps(maps.mean(1), maps, windows) if request.keep_heads else PooledMaps(maps, tokens=windows)


def why_not(model: TransformerBridge) -> str | None:
    """Return the reason why a model can't be streamed: an unknown kind of attention, or hooks that would be missed.

    Args:
        model: the model, with the hooks that are on it at present.

    Returns:
        The reason in words; None where the model can be streamed.

    Example:
        >>> from stepsal.saliency.streamed import why_not
        >>> why_not(stepsal.load("mini")) is None
        True
    """
    if kind := unknown_layer_type(model):
        return f"{model.cfg.model_name!r} has layers of type {kind!r}, which can't be streamed"
    if bias := bias_of_scores(model):
        return f"{bias}, which can't be streamed"
    names, points = [attention_hooks(model, layer) for layer in range(model.cfg.n_layers)], model.hook_dict
    unseen = [hooks[kind] for hooks in names for kind in ("scores", "pattern")] + ["unembed.hook_out"]
    flow = active_flow(model)
    for name in unseen:
        others = [hook for hook in points[name].fwd_hooks if flow is None or not flow.owns(hook)]
        if others or points[name].bwd_hooks:
            return f"there is a hook on {name}, which a streamed pass would not call with the whole of it"
    for name in [hooks[kind] for hooks in names for kind in ("q", "z")] + ["unembed.hook_in"]:
        if points[name].bwd_hooks:
            return f"there is a backward hook on {name}, past which a streamed pass takes the gradient"
    return None


class StreamedPass:
    """One forward and one backward pass over one trace, to be called inside the context `hooked`.

    Args:
        model: the model.
        request: the trace, and the maps to make of it.
        n_rows: query rows per block.
        n_kept: number of layers, from the top, that are not checkpointed.
        workspace: buffers.
        on_layer: called whenever a layer has been pooled.

    Attributes:
        sums: layer -> block sums, filled in the backward pass; in the forward pass for target="attention".
        tokens: layer -> token map of the requested positions, likewise.
    """

    def __init__(
        self,
        model: TransformerBridge,
        request: MapRequest,
        *,
        n_rows: int,
        n_kept: int,
        workspace: Workspace,
        on_layer: Callable[[], object],
    ) -> None:
        self.model, self.request = model, request
        self.n_rows, self.workspace, self.on_layer = n_rows, workspace, on_layer
        self.lowest, n_layers = request.layers[0], model.cfg.n_layers
        self.checkpointed = range(self.lowest, n_layers - n_kept) if request.target != "attention" else range(0)
        self.attentions = [attention_of(model, layer) for layer in range(n_layers)]
        self.sums: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}
        self._q: dict[int, Tensor] = {}
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._z: dict[int, Tensor] = {}  # of checkpointed layers, for the second time
        self._flow = active_flow(model)
        self._bridges: dict[int, LayerBridge | None] = {}

    # ------------------------------------------------------------------------------------------- the two passes

    def forward(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos d_model"]:
        """Return the residual stream before the unembedding."""
        final, agrees = last_residual(
            self.model,
            lambda: self.model(
                tokens[None],
                attention_mask=torch.ones(1, 1, len(tokens), 1, dtype=torch.bool, device=tokens.device),
                past_key_values=_KeysAndValues(self._kv),
                return_type="logits",
            ),
        )
        if not agrees:
            raise ValueError(
                f"the logits of {self.model.cfg.model_name!r} are not its unembedding of the last residual stream: "
                'use engine="pattern"'
            )
        return final[0]

    def backward(self, tokens: Int[Tensor, " pos"], final: Float[Tensor, "pos d_model"]) -> None:
        """Differentiate what the target asks for, summed; every requested layer is pooled on the way."""
        gradient = torch.zeros_like(final)  # [pos, d_model]; the last position predicts nothing
        size = max(1, MAX_LOGITS // self.model.cfg.d_vocab)
        tokens = tokens.to(final.device)
        for first in range(0, len(tokens) - 1, size):
            x = final[first : min(first + size, len(tokens) - 1)].detach().requires_grad_()
            logits = wide(unembed(self.model, x))  # [chunk, d_vocab]
            value = objective(logits, tokens[first + 1 : first + 1 + len(x)], self.request.target)
            gradient[first : first + len(x)] = torch.autograd.grad(value, x)[0]
            del logits, value
        final.backward(gradient)

    # ------------------------------------------------------------------------------------- hooks and checkpoints

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put the hooks and checkpoints of the pass on the model, and take them off at the end."""
        if reason := why_not(self.model):
            raise ValueError(f'{reason}: use engine="pattern"')
        gives: list[tuple[str, Hook]] = []
        takes: list[tuple[str, Hook]] = []
        for layer in range(self.model.cfg.n_layers):
            names = attention_hooks(self.model, layer)
            gives.append((names["z"], self._giving_z(layer)))
            takes.append((names["q"], self._taking_query(layer)))
            takes.append((names["scores"], self._checking(layer, "scores")))
            takes.append((names["pattern"], self._checking(layer, "pattern")))
        with ExitStack() as stack:
            if self._flow is not None:
                stack.enter_context(self._flow.streaming(constant_values=self.request.own_position))
            stack.enter_context(differentiable(self.model))
            stack.enter_context(freed_at_once(next(self.model.parameters()).device))
            stack.enter_context(self.model.hooks(fwd_hooks=takes))  # after other hooks: what the attention gets
            stack.enter_context(first_hooks_on(self.model, gives))  # before other hooks: what it gives
            for layer in self.checkpointed:
                stack.enter_context(_checkpointed(self.model.blocks[layer]))
            yield

    def _taking_query(self, layer: int) -> Hook:
        def hook(q: Tensor, hook: HookPoint) -> None:  # [batch=1, pos, head, d_head]
            self._q[layer] = q

        return hook

    def _checking(self, layer: int, kind: Literal["scores", "pattern"]) -> Hook:
        """Make a hook that compares `attention_of` with the model's own numbers, at the first key of every query."""

        def hook(x: Tensor, hook: HookPoint) -> None:  # scores or pattern [batch=1, head, pos, key=1]
            q, k = (
                self._q[layer][0].detach(),
                self._kv[layer][0][0, :, 0].detach(),
            )  # [pos, head, d_head], [kv_head, ..]
            eps = max(torch.finfo(x.dtype).eps, torch.finfo(q.dtype).eps)
            if not torch.isfinite(x).all():
                raise FloatingPointError(f"NaN or inf in the {kind} of layer {layer}")
            expected, tolerance = _at_first_key(self.attentions[layer], kind, wide(q), wide(k), eps)
            if ((wide(x.detach()[0, ..., 0]) - expected).abs() > tolerance).any():
                raise ValueError(
                    f"layer {layer} of {self.model.cfg.model_name!r} computes its {kind} in a way that the streamed "
                    'engine does not know: use engine="pattern"'
                )

        return hook

    def _giving_z(self, layer: int) -> Hook:
        def hook(z: Tensor, hook: HookPoint) -> Tensor:  # [batch=1, pos, head, d_head]
            q, (k, v) = self._q.pop(layer)[0].transpose(0, 1), self._kv.pop(layer)
            k, v = k[0], v[0]  # [kv_head, pos, d_head]
            common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            q, k, v = q.to(common), k.to(common), v.to(common)  # rotated queries and keys may be wider than values
            if layer == self.lowest:  # the graph starts here
                q, k, v = q.detach().requires_grad_(), k.detach(), v.detach()
            real: Tensor = _Attend.apply(q, k, v, self, layer)  # type: ignore[no-untyped-call]
            return real.transpose(0, 1)[None].to(z.dtype)

        return hook

    # ------------------------------------------------------------------------------------------ attention, pooled

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return z of a layer; where the layer is computed again, z of the first time."""
        if layer in self._z:
            return self._z.pop(layer)
        attention, flow = self.attentions[layer], self._flow
        bridge = None if flow is None else flow.layer_bridge(layer, wide(q[:0]))
        if self.request.target == "attention":
            with self._pooled(layer, q) as visit:
                z = attend(q, k, v, attention, self.n_rows, self.workspace, visit, bridge)
        else:
            z = attend(q, k, v, attention, self.n_rows, self.workspace, bridge=bridge)
            self._bridges[layer] = bridge
        if flow is not None and bridge is not None:
            flow.log_bridge(layer, bridge)
        if layer in self.checkpointed:
            self._z[layer] = z.detach()  # z itself would hold the pass, in a reference cycle that is not collected
        return z

    def attend_backward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v; three times None in the lowest layer, which needs none."""
        with self._pooled(layer, q) as visit:
            gradients = attend_backward(
                q, k, v, dz, self.attentions[layer], self.n_rows, self.workspace,
                own_position=self.request.own_position, differentiate=layer != self.lowest, visit=visit,
                bridge=self._bridges.pop(layer),
            )  # fmt: skip
        return gradients or (None, None, None)

    @contextmanager
    def _pooled(self, layer: int, q: Tensor) -> Iterator[Visit | None]:
        """Yield a callback that sums the blocks of a layer over steps, or None for a layer that is not requested."""
        if layer not in self.request.layers:
            yield None
            return
        step_ids, keep_heads = self.request.step_ids.to(q.device), self.request.keep_heads
        pool = StepSums(step_ids, self.request.n_steps, batch=(len(q),) if keep_heads else ())
        positions = self.request.token_positions
        window = None if positions is None else TokenWindow(positions, wide(q[:0]))

        def visit(product: Tensor, block: Block, group: slice) -> None:  # [head, row, key]
            size = torch.abs(product, out=self.workspace.take("size", product, *product.shape))
            if keep_heads:
                pool.add(size, block.first, block.first_key, group)
            else:
                pool.add(size.sum(0), block.first, block.first_key)
            if window is not None:
                window.add(size.sum(0), block)

        yield visit
        if window is not None:
            self.tokens[layer] = (window.values / len(q)).cpu()
        self.sums[layer] = (pool.sums if keep_heads else pool.sums / len(q)).cpu()
        check_finite(layer, self.sums[layer])
        self.on_layer()


def _at_first_key(
    attention: Attention,
    kind: Literal["scores", "pattern"],
    q: Float[Tensor, "pos head d_head"],
    k: Float[Tensor, "kv_head d_head"],
    eps: float,
) -> tuple[Float[Tensor, "head pos"], Float[Tensor, "head pos"]]:
    """Compute scores or pattern for the first key alone, and the tolerance for those of the model."""
    scores, tolerance = (x.squeeze(-1) for x in expected_scores(attention, q, k[None], eps))
    if kind == "scores":
        return scores, tolerance
    sinks = -torch.inf if attention.sinks is None else wide(attention.sinks.detach())[:, None]
    pattern = torch.sigmoid(scores - sinks)  # a softmax over one key and the sink
    return pattern, pattern * (1 - pattern) * tolerance + ROUNDINGS * eps * pattern


class _Attend(torch.autograd.Function):
    """The attention output z of a layer, with a backward pass that computes the saliency, too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, streamed: StreamedPass, layer: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.streamed, ctx.layer = streamed, layer
        return streamed.attend(layer, q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.streamed.attend_backward(ctx.layer, *ctx.saved_tensors, gradients[0]), None, None


class _KeysAndValues(DynamicCache):
    """A cache that puts keys and values of each layer into a dictionary, and gives back those of the first position."""

    def __init__(self, keys_and_values: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._keys_and_values = keys_and_values

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._keys_and_values[layer_idx] = (key_states, value_states)  # [batch, kv_head, pos, d_head]
        return key_states[:, :, :1], value_states[:, :, :1].to(key_states.dtype)  # as a real cache gives them back


@contextmanager
def _checkpointed(block: torch.nn.Module) -> Iterator[None]:
    """Compute a block again in the backward pass instead of keeping what it computed."""
    own, forward = block.__dict__.get("forward"), block.forward

    def on_a_copy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.clone(), *args, **kwargs)  # a hook may edit the input in place, which is needed again

    block.__dict__["forward"] = partial(checkpoint, on_a_copy, use_reentrant=False)
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if own is not None:
            block.__dict__["forward"] = own
