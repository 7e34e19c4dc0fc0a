"""The streamed engine: the same maps in memory that grows with the length of the trace, not with its square.

The bridge's attention builds the pattern of all positions, because it offers it to hooks. Here nobody sees a whole one:

    attn.hook_rot_q        q is taken
    cache.update(k, v)     k and v are taken, as the attention uses them; it gets back the first key alone, so that its
                           own scores and pattern are [query_pos, 1]
    attn.o.hook_in         z of the real attention takes the place of what came out of that (`attention.attend`)
    unembed.hook_in        the last residual stream is taken, and one position goes on to the unembedding; the loss is
                           computed from it in chunks

The seam besides hook points is the cache argument of the model's own forward: the smallest place at which the attention
lets go of keys and values. Hooks that would not see what they were made for are refused (`why_not`): those on scores,
patterns and logits, and backward hooks where tensors leave the bridge's own graph. All others take part; those inside a
block run a second time when its layer is computed again, and have to give the same then.

In the backward pass of a layer, A, dA and |A * dA| are recomputed block by block and pooled at once
(`attention.attend_backward`). Layers are checkpointed: their input and z are kept, and the rest is computed again when
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
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from stepsal.bridge.attention import attention_of, unembed, unknown_layer_type
from stepsal.bridge.hooks import attention_hooks, first_hooks_on
from stepsal.maps.pooling import StepSums
from stepsal.saliency.blocks import Block, Visit, Workspace, attend, attend_backward, wide
from stepsal.saliency.common import PooledMaps, check_finite, differentiable, freed_at_once

LOGITS = 2**23  # elements of the largest [chunk, d_vocab] tensor


class StreamedPass:
    """One forward and one backward pass over one trace; see `streamed_maps`.

    Attributes:
        sums: layer -> block sums, filled in the backward pass; in the forward pass for target="attention".
    """

    def __init__(
        self,
        model: TransformerBridge,
        step_ids: Int[Tensor, " pos"],
        n_steps: int,
        *,
        layers: tuple[int, ...],
        target: str,
        keep_heads: bool = False,
        n_rows: int = 128,
        n_kept: int = 0,
        workspace: Workspace | None = None,
        on_layer: Callable[[], Any] = lambda: None,
    ) -> None:
        self.model, self.step_ids, self.n_steps = model, step_ids, n_steps
        self.layers, self.target, self.keep_heads = layers, target, keep_heads
        self.n_rows, self.workspace, self.on_layer = n_rows, workspace or Workspace(), on_layer
        n_layers = model.cfg.n_layers
        self.checkpointed = range(layers[0], n_layers - n_kept) if target != "attention" else range(0)
        self.attentions = [attention_of(model, layer) for layer in range(n_layers)]
        self.sums: dict[int, Tensor] = {}
        self._q: dict[int, Tensor] = {}
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._z: dict[int, Tensor] = {}  # of checkpointed layers, for the second time

    def forward(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos d_model"]:
        """The residual stream before the unembedding; to be called, and differentiated, inside `hooked`."""
        final: list[Tensor] = []

        def take(x: Tensor, hook: HookPoint) -> Tensor:  # [batch=1, pos, d_model]
            final.append(x)
            return x[:, -1:]

        with self.model.hooks(fwd_hooks=[("unembed.hook_in", take)]):
            logits = self.model(
                tokens[None],
                attention_mask=torch.ones(1, 1, len(tokens), 1, dtype=torch.bool, device=tokens.device),
                past_key_values=_KeysAndValues(self._kv),
                return_type="logits",
            )
        with torch.no_grad():
            expected = unembed(self.model, final[0][:, -1:])
            if not torch.allclose(expected, logits.to(expected.device), rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ValueError(
                    f"the logits of {self.model.cfg.model_name!r} are not its unembedding of the last residual stream: "
                    'use engine="pattern"'
                )
        return final[0][0]

    def backward(self, tokens: Int[Tensor, " pos"], final: Float[Tensor, "pos d_model"]) -> None:
        """Differentiate the summed loss; every requested layer is pooled on the way."""
        gradient = torch.zeros_like(final)  # [pos, d_model]; the last position predicts nothing
        size = max(1, LOGITS // self.model.cfg.d_vocab)
        tokens = tokens.to(final.device)
        for first in range(0, len(tokens) - 1, size):
            x = final[first : min(first + size, len(tokens) - 1)].detach().requires_grad_()
            logits = wide(unembed(self.model, x))  # [chunk, d_vocab]
            loss = F.cross_entropy(logits, tokens[first + 1 : first + 1 + len(x)], reduction="sum")
            gradient[first : first + len(x)] = torch.autograd.grad(loss, x)[0]
            del logits, loss
        final.backward(gradient)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks and checkpoints of the pass, gone at the end."""
        if reason := why_not(self.model):
            raise ValueError(f'{reason}: use engine="pattern"')
        n_layers, blocks = self.model.cfg.n_layers, self.model.blocks
        with ExitStack() as stack:
            stack.enter_context(differentiable(self.model))
            stack.enter_context(freed_at_once(next(self.model.parameters()).device))
            hooks: list[tuple[str, Callable[..., None]]] = []
            for layer in range(n_layers):
                names = attention_hooks(layer)
                hooks.append((names["q"], self._take_query(layer)))  # after other hooks: what the attention gets
                hooks.append((names["scores"], self._check_hook(layer, "scores")))
                hooks.append((names["pattern"], self._check_hook(layer, "pattern")))
            stack.enter_context(self.model.hooks(fwd_hooks=hooks))
            given = [(attention_hooks(layer)["z"], self._attend_hook(layer)) for layer in range(n_layers)]
            stack.enter_context(first_hooks_on(self.model, given))  # before other hooks: what it gives
            for layer in self.checkpointed:
                stack.enter_context(_checkpointed(blocks[layer]))
            yield

    def _take_query(self, layer: int) -> Callable[..., None]:
        def hook(q: Tensor, hook: HookPoint) -> None:  # [batch=1, pos, head, d_head]
            self._q[layer] = q

        return hook

    def _check_hook(self, layer: int, kind: str) -> Callable[..., None]:
        """Hold what `attention_of` says against the model's own numbers, at the first key of every query."""

        def hook(x: Tensor, hook: HookPoint) -> None:  # scores or pattern [batch=1, head, pos, key=1]
            attention, q, k = self.attentions[layer], wide(self._q[layer][0]), wide(self._kv[layer][0][0, :, :1])
            eps = max(torch.finfo(x.dtype).eps, torch.finfo(self._q[layer].dtype).eps)
            q, k = q.detach(), k.detach().repeat_interleave(q.shape[1] // len(k), dim=0).squeeze(1)  # k [head, d_head]
            expected = attention.scale * torch.einsum("phd,hd->hp", q, k)
            wrong = 1e-3 * attention.scale * q.norm(dim=-1).T * k.norm(dim=-1, keepdim=True)  # of the matrix product
            if attention.softcap is not None:
                expected = attention.softcap * torch.tanh(expected / attention.softcap)
            wrong = wrong + 8 * eps * expected.abs()  # of rounding
            if kind == "pattern":  # with one key, a sigmoid of the distance to the sink
                sinks = -torch.inf if attention.sinks is None else wide(attention.sinks.detach())[:, None]
                expected = torch.sigmoid(expected - sinks)
                wrong = expected * (1 - expected) * wrong + 8 * eps * expected
            if ((wide(x.detach()[0, ..., 0]) - expected).abs() > wrong).any():
                raise ValueError(
                    f"layer {layer} of {self.model.cfg.model_name!r} computes its {kind} in a way that the streamed "
                    'engine does not know: use engine="pattern"'
                )

        return hook

    def _attend_hook(self, layer: int) -> Callable[..., Tensor]:
        def hook(z: Tensor, hook: HookPoint) -> Tensor:  # [batch=1, pos, head, d_head]
            q, (k, v) = self._q.pop(layer)[0].transpose(0, 1), self._kv.pop(layer)
            k, v = k[0], v[0]  # [kv_head, pos, d_head]
            if layer == self.layers[0]:  # the graph starts here
                q, k, v = q.detach().requires_grad_(), k.detach(), v.detach()
            real: Tensor = _Attend.apply(q, k, v, self, layer)  # type: ignore[no-untyped-call]
            return real.transpose(0, 1)[None].to(z.dtype)

        return hook

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self._z:
            return self._z.pop(layer)
        attention = self.attentions[layer]
        if self.target == "attention":
            with self._pooled(layer, q) as visit:
                return attend(q, k, v, attention, self.n_rows, self.workspace, visit)
        z = attend(q, k, v, attention, self.n_rows, self.workspace)
        if layer in self.checkpointed:
            self._z[layer] = z.detach()  # z itself will hold the pass, in a circle that nobody could collect
        return z

    def attend_backward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        with self._pooled(layer, q) as visit:
            gradients = attend_backward(
                q, k, v, dz, self.attentions[layer], self.n_rows, self.workspace,
                own_position=self.target == "token", differentiate=layer != self.layers[0], visit=visit,
            )  # fmt: skip
        return gradients or (None, None, None)

    @contextmanager
    def _pooled(self, layer: int, q: Tensor) -> Iterator[Visit | None]:
        """What sums the blocks of a layer over steps, and puts its map away at the end; None if nobody asked for it."""
        if layer not in self.layers:
            yield None
            return
        pool = StepSums(self.step_ids.to(q.device), self.n_steps, batch=(len(q),) if self.keep_heads else ())

        def visit(product: Tensor, block: Block, group: slice) -> None:  # [head, row, key]
            size = torch.abs(product, out=self.workspace.take("size", product, *product.shape))
            if self.keep_heads:
                pool.add(size, block.first, block.first_key, group)
            else:
                pool.add(size.sum(0), block.first, block.first_key)

        yield visit
        self.sums[layer] = (pool.sums if self.keep_heads else pool.sums / len(q)).cpu()
        check_finite(layer, self.sums[layer])
        self.on_layer()


class _Attend(torch.autograd.Function):
    """z of a layer, whose backward pass is the one that knows the saliency."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, streamed: StreamedPass, layer: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.streamed, ctx.layer = streamed, layer
        return streamed.attend(layer, q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.streamed.attend_backward(ctx.layer, *ctx.saved_tensors, gradients[0]), None, None


class _KeysAndValues(DynamicCache):
    """A cache that keeps the keys and values of each layer elsewhere, and gives back the first position alone."""

    def __init__(self, taken: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._taken = taken

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._taken[layer_idx] = (key_states, value_states)  # [batch, kv_head, pos, d_head]
        return key_states[:, :, :1], value_states[:, :, :1]


@contextmanager
def _checkpointed(block: torch.nn.Module) -> Iterator[None]:
    """Compute a block again in the backward pass instead of keeping what it computed."""
    own, forward = block.__dict__.get("forward"), block.forward

    def on_a_copy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.clone(), *args, **kwargs)  # a hook may edit its input in place, and it is needed again

    block.__dict__["forward"] = partial(checkpoint, on_a_copy, use_reentrant=False)
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if own is not None:
            block.__dict__["forward"] = own


def why_not(model: TransformerBridge) -> str | None:
    """What keeps a model from being streamed: hooks that would not see what they were made for, or its own ways."""
    if kind := unknown_layer_type(model):
        return f"{model.cfg.model_name!r} has layers of type {kind!r}, which can't be streamed"
    names, points = [attention_hooks(layer) for layer in range(model.cfg.n_layers)], model.hook_dict
    unseen = [hooks[kind] for hooks in names for kind in ("scores", "pattern")] + ["unembed.hook_out"]
    for name in unseen:
        if points[name].fwd_hooks or points[name].bwd_hooks:
            return f"there is a hook on {name}, which a streamed pass would not call with the whole of it"
    for name in [hooks[kind] for hooks in names for kind in ("q", "z")] + ["unembed.hook_in"]:
        if points[name].bwd_hooks:
            return f"there is a backward hook on {name}, past which a streamed pass takes the gradient"
    return None


def streamed_maps(
    model: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    step_ids: Int[Tensor, " pos"],
    n_steps: int,
    *,
    layers: tuple[int, ...],
    target: str,
    keep_heads: bool = False,
    n_rows: int = 128,
    n_kept: int = 0,
    workspace: Workspace | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> PooledMaps:
    """Sum |A * dL/dA| over step blocks in every layer of `layers`; see `stepsal.step_saliency` for the meaning.

    Args:
        target: "token", "sequence", or "attention" for A alone, without a backward pass.
        n_rows: query rows per block.
        n_kept: layers, from the top, that are not checkpointed.
        workspace: buffers to use again for the next trace.
        on_layer: called whenever a layer has been pooled.

    Raises:
        ValueError: a model or hooks that the engine can't serve; see `why_not`.
        FloatingPointError: NaN or inf in the map of a layer.
    """
    streamed = StreamedPass(
        model, step_ids, n_steps, layers=layers, target=target, keep_heads=keep_heads, n_rows=n_rows, n_kept=n_kept,
        workspace=workspace, on_layer=on_layer,
    )  # fmt: skip
    with streamed.hooked():
        tokens = tokens.to(next(model.parameters()).device).clone()  # a copy made here is no inference tensor
        if target == "attention":
            with torch.no_grad():
                streamed.forward(tokens)
        else:
            streamed.backward(tokens, streamed.forward(tokens))
    maps = torch.stack([streamed.sums[layer] for layer in layers])
    return PooledMaps(sums=maps.mean(1) if keep_heads else maps, head_sums=maps if keep_heads else None, tokens=None)
