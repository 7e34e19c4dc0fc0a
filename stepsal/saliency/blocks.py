"""Causal attention and its gradient in blocks of query rows, with A * dL/dA handed out on the way.

For one head, with s[t, k] = scale * q_t . k_k (soft-capped to c tanh(s / c) where the model does so) over the keys k
that row t sees,

    A[t, :] = softmax(s[t, :]),        z_t = sum_k A[t, k] v_k.

Given dz_t = dL/dz_t, everything else follows row by row:

    dA[t, k] = dz_t . v_k                                  (the gradient in the saliency)
    ds[t, k] = A[t, k] (dA[t, k] - delta_t),   delta_t = sum_j A[t, j] dA[t, j]
    dq_t     = scale * sum_k ds[t, k] k_k                  (ds times 1 - tanh^2 under a soft-cap)
    dk_k     = scale * sum_t ds[t, k] q_t
    dv_k     = sum_t A[t, k] dz_t

A block of rows sees all its keys at once, so that its rows of A are recomputed exactly, and A, dA and A * dA exist for
one block only: O(rows * pos) memory instead of O(pos^2). An attention sink adds exp(sink) to the denominator of the
softmax, which scales a row by sigmoid(logsumexp(s[t, :]) - sink); its column of dA is zero, and nothing else changes.

**The gradient that stays at its own position.** Where the gradient of each L_t in L = sum_t L_t is to be had by itself,
keys and values of other positions are constants (see `own_position`), and the two sums over t keep a single term:

    dk_t = scale * ds[t, t] q_t,        dv_t = A[t, t] dz_t.

A fused kernel would need these as corrections, with A[t, t] = exp(s[t, t] - lse_t) from the log-sum-exp of the row.
Here they lie on the diagonal of the block, and two of the five matrix products of the backward pass are not needed at
all: the gradient of every target by itself costs less than that of their sum.

Under grouped-query attention all query heads of a group are one matrix product against the keys they share, which are
never repeated. Arithmetic is float32 (or float64), whatever the model's dtype; how exact a float32 product is on an
accelerator is for `torch.set_float32_matmul_precision` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stepsal.bridge.attention import Attention
from stepsal.intervention.oeb import (
    LayerBridge,
    RowGroups,
    bridge_scales,
    of_bridge_and_segment,
    row_means,
    with_bridge_and_segment,
)


class Block(NamedTuple):
    """A block of query rows first .. stop - 1, which see the keys first_key .. stop - 1."""

    first: int
    stop: int
    first_key: int


class Workspace:
    """Buffers for blocks, reused between layers and traces and as large as the largest block so far.

    Blocks come with the largest first (`row_blocks`), so that a pass allocates each buffer once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor that is valid until the next call with the same name.

        Args:
            name: name of the buffer.
            like: a tensor with the requested dtype and device.
            shape: the requested shape.

        Example:
            >>> import torch
            >>> from stepsal.saliency.blocks import Workspace
            >>> Workspace().take("scores", torch.zeros(1), 2, 3).shape
            torch.Size([2, 3])
        """
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


Visit = Callable[[Float[Tensor, "head row key"], Block, slice], None]
"""Callback `f(product, block, heads)` for A * dL/dA (or A) of a block, for heads that share their keys.

The tensor is overwritten after the call.
"""


class BlockEdit(NamedTuple):
    """The edit of one block by StepFlow, for its gradient.

    Attributes:
        groups: groups of the keys and rows of the block.
        ceiling: ceiling of tau_B of each head and row.
        masses: p(B) and p(S) before the edit.
        scales: factors of B and of S.
    """

    groups: RowGroups
    ceiling: Float[Tensor, "group row"]
    masses: Float[Tensor, "2 group row"]
    scales: Float[Tensor, "2 group row"]

    def delta(self, product: Float[Tensor, "group row key"], workspace: Workspace) -> Float[Tensor, "group row key"]:
        """Return what dL/dA is reduced by at each key to become dL/ds over A: in B, S and O each their own number.

        Args:
            product: A * dL/dA, of A after the edit.
            workspace: buffers; the result is valid until the next block.
        """
        members, of_rows = self.groups
        means = row_means(self.masses, self.scales, self.ceiling, product @ members, of_rows)
        return _by_key(means, members, workspace)


def edit_block(
    pattern: Float[Tensor, "group row key"], bridge: LayerBridge, heads: slice, block: Block, workspace: Workspace
) -> BlockEdit | None:
    """Edit rows of A in place, as StepFlow does with whole patterns.

    Args:
        pattern: rows of A.
        bridge: the edit of the layer, whose masses are filled in.
        heads: heads of the rows.
        block: rows and keys.
        workspace: buffers.

    Returns:
        The edit, for its gradient; None where nothing is edited.
    """
    if block.stop <= bridge.first or not any(bridge.heads[heads]):
        return None
    rows = slice(block.first, block.stop)
    groups = RowGroups(bridge.groups.members[block.first_key : block.stop], bridge.groups.of_rows[rows])
    ceiling = bridge.ceiling[heads, rows]
    by_group = pattern @ groups.members  # [group of heads, row, group of keys]
    masses = of_bridge_and_segment(by_group, groups.of_rows)
    scales, after = bridge_scales(masses, ceiling)
    factors = with_bridge_and_segment(torch.ones_like(by_group), groups.of_rows, scales)
    pattern.mul_(_by_key(factors, groups.members, workspace))
    bridge.masses[:, heads, rows] = torch.stack((masses[0], after))
    return BlockEdit(groups, ceiling, masses, scales)


def _by_key(
    by_group: Float[Tensor, "group row key_group"], members: Float[Tensor, "key key_group"], workspace: Workspace
) -> Float[Tensor, "group row key"]:
    """Return for each key the number of its group; valid until the next call with the same workspace."""
    by_key = workspace.take("by key", by_group, *by_group.shape[:2], len(members))
    torch.mm(by_group.flatten(0, 1), members.T, out=by_key.flatten(0, 1))
    return by_key


def row_blocks(n_pos: int, n_rows: int, window: int | None = None) -> Iterator[Block]:
    """Yield blocks of query rows, from the last block to the first; the first may be shorter.

    Args:
        n_pos: number of positions.
        n_rows: largest number of rows in a block.
        window: number of keys that a row sees, itself included; None for all up to itself.

    Example:
        >>> from stepsal.saliency.blocks import row_blocks
        >>> list(row_blocks(5, 3))
        [Block(first=2, stop=5, first_key=0), Block(first=0, stop=2, first_key=0)]
    """
    for stop in range(n_pos, 0, -n_rows):
        first = max(0, stop - n_rows)
        yield Block(first, stop, 0 if window is None else max(0, first - window + 1))


@torch.no_grad()
def attend(
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "kv_head pos d_head"],
    v: Float[Tensor, "kv_head pos d_head"],
    attention: Attention,
    n_rows: int,
    workspace: Workspace,
    visit: Visit | None = None,
    bridge: LayerBridge | None = None,
) -> Float[Tensor, "head pos d_head"]:
    """Return z, the attention output of each head, in the dtype of q.

    The result has no graph; `attend_backward` gives its gradients. Without `visit`, z comes from a fused kernel where
    there is one for this attention.

    Args:
        q: queries, with rotary embeddings and norms applied.
        k: keys, with rotary embeddings and norms applied.
        v: values.
        attention: scale, window, soft-cap and sinks of the layer.
        n_rows: query rows per block.
        workspace: buffers.
        visit: called with A of each block, as it is after `bridge`.
        bridge: edit of the pattern by StepFlow; its masses are filled in.

    Example:
        >>> import torch
        >>> from stepsal.bridge.attention import Attention
        >>> from stepsal.saliency.blocks import Workspace, attend
        >>> q = torch.zeros(1, 3, 2)  # equal attention to all visible keys
        >>> attend(q, q, torch.tensor([[[0.0, 1], [2, 1], [4, 1]]]), Attention(1.0), 2, Workspace())
        tensor([[[0., 1.],
                 [1., 1.],
                 [2., 1.]]])
    """
    if visit is None and bridge is None and (z := _fused(q, k, v, attention)) is not None:
        return z
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    for heads, kv_head in _groups(q, k):
        if visit is None and (bridge is None or not any(bridge.heads[heads])):
            own = slice(kv_head, kv_head + 1)
            if (of_heads := _fused(q[heads], k[own], v[own], attention)) is not None:
                z[heads] = of_heads
                continue
        keys, values = wide(k[kv_head]), wide(v[kv_head])
        for block in row_blocks(q.shape[1], n_rows, attention.window):
            pattern, _ = _pattern(q[heads], keys, attention, heads, block, workspace)
            if bridge is not None:
                edit_block(pattern, bridge, heads, block, workspace)
            z[heads, block.first : block.stop] = (pattern @ values[block.first_key : block.stop]).to(z.dtype)
            if visit is not None:
                visit(pattern, block, heads)
    return z


@torch.no_grad()
def attend_backward(
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "kv_head pos d_head"],
    v: Float[Tensor, "kv_head pos d_head"],
    dz: Float[Tensor, "head pos d_head"],
    attention: Attention,
    n_rows: int,
    workspace: Workspace,
    *,
    own_position: bool,
    differentiate: bool = True,
    visit: Visit | None = None,
    bridge: LayerBridge | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of q, k and v, and hand out A * dL/dA block by block.

    Args:
        q: queries, as for `attend`.
        k: keys.
        v: values.
        dz: gradient of z.
        attention: scale, window, soft-cap and sinks of the layer.
        n_rows: query rows per block.
        workspace: buffers.
        own_position: keep, for keys and values, only the gradient from the query at their own position.
        differentiate: False leaves the gradients out, where A * dL/dA is all that is needed.
        visit: called with A * dL/dA of each block, of A as it is after `bridge`.
        bridge: edit of the pattern by StepFlow.

    Returns:
        (dq, dk, dv) in the dtype and shape of q, k and v; None without `differentiate`.
    """
    like = wide(q[:0])
    dq, dk, dv = (torch.zeros(x.shape if differentiate else 0, dtype=like.dtype, device=x.device) for x in (q, k, v))
    for heads, kv_head in _groups(q, k):
        keys, values = wide(k[kv_head]), wide(v[kv_head])
        for block in row_blocks(q.shape[1], n_rows, attention.window):
            rows, seen = slice(block.first, block.stop), slice(block.first_key, block.stop)
            pattern, slope = _pattern(q[heads], keys, attention, heads, block, workspace)  # [group, row, key]
            edit = None if bridge is None else edit_block(pattern, bridge, heads, block, workspace)
            dz_rows = wide(dz[heads, rows])  # [group, row, d_head]
            shape = pattern.shape
            product = workspace.take("scores", like, *shape)  # the scores have become the pattern
            torch.mm(dz_rows.flatten(0, 1), values[seen].T, out=product.flatten(0, 1))
            product.mul_(pattern)  # A * dA
            if visit is not None:
                visit(product, block, heads)
            if not differentiate:
                continue
            delta = product.sum(-1, keepdim=True) if edit is None else edit.delta(product, workspace)
            ds = product.addcmul_(pattern, delta, value=-1)
            if slope is not None:
                ds.mul_(slope)
            dq[heads, rows] = attention.scale * (ds.flatten(0, 1) @ keys[seen]).view(dz_rows.shape)
            q_rows = wide(q[heads, rows])
            if own_position:
                own_ds, own_pattern = (
                    x.diagonal(block.first - block.first_key, 1, 2).unsqueeze(-1) for x in (ds, pattern)
                )  # [group, row, 1]
                dk[kv_head, rows] = attention.scale * (own_ds * q_rows).sum(0)
                dv[kv_head, rows] = (own_pattern * dz_rows).sum(0)
            else:
                dk[kv_head, seen].addmm_(ds.flatten(0, 1).T, q_rows.flatten(0, 1), alpha=attention.scale)
                dv[kv_head, seen].addmm_(pattern.flatten(0, 1).T, dz_rows.flatten(0, 1))
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)) if differentiate else None


def _fused(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor | None:
    """Return z of plain causal attention by a kernel that never builds the pattern; None if there is no such kernel."""
    n_pos = q.shape[1]
    if attention.softcap is not None or attention.sinks is not None or n_pos > (attention.window or n_pos):
        return None
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0)[None] for x in (k, v))  # [batch=1, head, pos, d_head]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        try:
            return scaled_dot_product_attention(q[None], k, v, is_causal=True, scale=attention.scale)[0]
        except RuntimeError:  # no such kernel for this device, dtype or head
            return None


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Give the query heads that share each key-value head, and its index."""
    size = q.shape[0] // k.shape[0]
    for kv_head in range(k.shape[0]):
        yield slice(kv_head * size, (kv_head + 1) * size), kv_head


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32; a float64 tensor stays as it is.

    Args:
        x: the tensor.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pattern(
    q: Float[Tensor, "group pos d_head"],
    keys: Float[Tensor, "pos d_head"],
    attention: Attention,
    heads: slice,
    block: Block,
    workspace: Workspace,
) -> tuple[Float[Tensor, "group row key"], Float[Tensor, "group row key"] | None]:
    """Return rows of A, and the slope of the soft-cap; valid until the next call with the same workspace."""
    first, stop, first_key = block
    q_rows = attention.scale * wide(q[:, first:stop])  # [group, row, d_head]
    shape = (q.shape[0], stop - first, stop - first_key)
    scores = workspace.take("scores", q_rows, *shape)
    torch.mm(q_rows.flatten(0, 1), keys[first_key:stop].T, out=scores.flatten(0, 1))
    slope = None
    if attention.softcap is not None:
        scores.div_(attention.softcap).tanh_()
        slope = workspace.take("slope", q_rows, *shape)
        torch.mul(scores, scores, out=slope)
        slope.neg_().add_(1)
        scores.mul_(attention.softcap)
    _mask(scores, block, attention.window)
    pattern = workspace.take("pattern", q_rows, *shape)
    torch.softmax(scores, -1, out=pattern)
    if attention.sinks is not None:  # A is largest where s is, at exp(max s - logsumexp s)
        logsumexp = scores.amax(-1) - pattern.amax(-1).log()  # [group, row]
        pattern.mul_(torch.sigmoid(logsumexp - wide(attention.sinks[heads, None])).unsqueeze(-1))
    return pattern, slope


def _mask(scores: Float[Tensor, "group row key"], block: Block, window: int | None) -> None:
    """Set to -inf, in place, what a row does not see: keys after it, and those that its window has left behind."""
    first, stop, first_key = block
    future = torch.ones(stop - first, stop - first, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., first - first_key :].masked_fill_(future, -torch.inf)  # the keys from `first` on
    if window is not None and stop - window > first_key:
        t = torch.arange(first, stop, device=scores.device)[:, None]
        past = torch.arange(first_key, stop - window, device=scores.device) <= t - window
        scores[..., : past.shape[1]].masked_fill_(past, -torch.inf)
