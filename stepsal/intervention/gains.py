"""Tell which heads an edit of StepFlow helps, by one backward pass for all of them.

The first-order effect of an edit on an objective J, such as the log-probability of a right continuation, is the
gradient of J times what the edit changes. With A the pattern of head h of layer l, q the same pattern bridged at
tau_max (Eq. 5-8), z the attention output, and m the mean value vector of the step before (Eq. 9),

    bridge[l, h]   = sum_{t, k} dJ/dA[t, k] (q[t, k] - A[t, k])
    momentum[l, h] = sum_{t begins a step} dJ/dz[t] . m[t]              (of one unit of alpha)

In the bridged pattern the entries of B and of S are those of A times a factor each, so that the first sum needs the
mass of dJ/dA * A on B and on S alone, and any number of tau_max costs one backward pass. The model is not edited: gains
are those of the first step away from it, and say less of an edit the stronger it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.gradients import differentiable
from stepsal.bridge.native import native
from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.gain_table import EditGains
from stepsal.intervention.hooks import StepFlow, active_flow
from stepsal.intervention.oeb import bridge_scales, of_bridge_and_segment
from stepsal.intervention.smi import momentum, previous_step_means
from stepsal.trace.continuation import Continuation
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace

Objective = Literal["right", "contrast", "answer", "errors"]
"""Objective J: log-probability of the right continuation; of the right minus that of the wrong one; of all tokens of a
trace's answer; of those of its tokens that the model would not have chosen."""


class Row(NamedTuple):
    """A text to be read, and the tokens whose log-probability counts.

    Attributes:
        trace: the text.
        first: position of the first token that counts; all from there on do.
        sign: 1 for a text that is to be likelier, -1 for one that is to be less so.
        text: number of the text that the row belongs to.
    """

    trace: Trace
    first: int
    sign: int
    text: int


def edit_gains(
    model: TransformerBridge,
    texts: Sequence[Continuation] | Sequence[Trace],
    objective: Objective = "right",
    *,
    taus: Sequence[float] = (0.15,),
    config: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> EditGains:
    """Compute the gain of bridging each head, and of adding momentum to it, for each of several texts.

    One forward and one backward pass of a batch give the gains of all heads, at all `taus`.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        texts: continuations, or traces whose answers are right.
        objective: what is to gain. For continuations: "right", log p(right), or "contrast", log p(right) minus
            log p(wrong). For traces: "answer", the log-probability of all tokens of the answer, or "errors", of those
            that the model would not have chosen.
        taus: values of tau_max to bridge with, in (0, 1).
        config: bridge, window and `into_summary` of the edits; None is those of the paper. Its layers and strengths are
            not used: gains are computed for all heads.
        segmentation: the way to find sections and steps; None is that of each trace, or `Segmentation()`.
        batch_size: number of rows that are read together.
        progress: show a bar over texts.

    Returns:
        The gains in nats, by text, step, layer and head.

    Raises:
        ValueError: no texts, an objective that they don't have, a tau_max out of range, or an open StepFlow context.

    Example:
        >>> from stepsal.trace.continuation import Continuation
        >>> text = Continuation("Hugo is 4 plus 3. What is Hugo?", " Hugo is 4 plus 3,", " 4 plus 3, so Hugo = 7.")
        >>> gains = stepsal.edit_gains(stepsal.load("mini"), [text], taus=(0.15, 0.3), progress=False)
        >>> gains.bridge.dims, gains.bridge.sum("step").shape
        (('text', 'step', 'tau_max', 'layer', 'head'), (1, 2, 8, 4))
    """
    if active_flow(model) is not None:
        raise ValueError("a stepflow context is open, whose edits gains would be added to: leave it first")
    for tau in taus:
        StepFlowConfig(tau_max=tau)  # refuses what is out of range
    if not taus:
        raise ValueError("taus is empty: give at least one tau_max, such as 0.15")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    rows = rows_of(model, texts, objective, segmentation)
    edits = (config or StepFlowConfig()).but(oeb_layers="all", smi_layers="all", alpha=1.0)
    gains = _Sums(len(texts), max(len(row.trace.steps) for row in rows), tuple(taus), model)
    # rows of one length share a batch, so that little is padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].trace))
    with tqdm(total=len(rows), desc="gains", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = [rows[i] for i in order[start : start + batch_size]]
            _add_gains(model, batch, objective, edits, gains)
            bar.update(len(batch))
    steps = [next(row.trace for row in rows if row.text == i) for i in range(len(texts))]
    return gains.table(model, texts, objective, edits, [trace.roles for trace in steps])


def rows_of(
    model: TransformerBridge,
    texts: Sequence[Continuation] | Sequence[Trace],
    objective: Objective,
    segmentation: Segmentation | None,
) -> list[Row]:
    """Return the rows to read for an objective.

    Args:
        model: the model, which tokenises continuations.
        texts: continuations or traces.
        objective: what is to gain.
        segmentation: the way to find sections and steps; None is that of each trace, or `Segmentation()`.

    Raises:
        ValueError: no texts, or an objective that they don't have.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is unknown; use {', '.join(map(repr, get_args(Objective)))}")
    if not texts:
        raise ValueError("there are no texts: give continuations or traces, from which gains are read")
    kind = Continuation if objective in ("right", "contrast") else Trace
    rows: list[Row] = []
    for i, text in enumerate(texts):
        if isinstance(text, Continuation) and kind is Continuation:
            for wrong in (False, True)[: 1 + (objective == "contrast")]:
                trace, n_new = text.trace(model, wrong=wrong, segmentation=segmentation)
                rows.append(Row(trace, len(trace) - n_new, -1 if wrong else 1, i))
        elif isinstance(text, Trace) and kind is Trace:
            rows.append(Row(text, text.n_prompt, 1, i))
        else:
            raise ValueError(
                f"objective={objective!r} is one of {kind.__name__}s, but text {i} is a {type(text).__name__}: use "
                + ("'answer' or 'errors'" if kind is Continuation else "'right' or 'contrast'")
            )
    return rows


def padded(rows: Sequence[Row], device: torch.device) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Return the tokens of rows, padded on the left, and a mask that is 0 for padding.

    Args:
        rows: the rows.
        device: device of the model.
    """
    width = max(len(row.trace) for row in rows)
    tokens = torch.stack([F.pad(row.trace.tokens, (width - len(row.trace), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row.trace.tokens), (width - len(row.trace), 0)) for row in rows])
    return tokens.to(device), mask.to(device)


def target_log_probs(
    logits: Float[Tensor, "row pos d_vocab"], tokens: Int[Tensor, "row pos"], rows: Sequence[Row]
) -> tuple[list[Float[Tensor, " target"]], list[Bool[Tensor, " target"]]]:
    """Return the log-probabilities of the tokens of each row that count, and whether they are the likeliest.

    Args:
        logits: logits of rows that are padded on the left; those of the last positions are enough.
        tokens: the tokens of the rows.
        rows: the rows.
    """
    log_probs, likeliest = [], []
    for row, row_logits, row_tokens in zip(rows, logits, tokens, strict=True):
        n = len(row.trace) - row.first
        targets = row_tokens[-n:].to(logits.device)
        of_targets = exact(row_logits[-n - 1 : -1])
        log_probs.append(-F.cross_entropy(of_targets, targets, reduction="none"))
        likeliest.append(of_targets.argmax(-1) == targets)
    return log_probs, likeliest


def exact(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is.

    Args:
        x: the tensor.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Sums:
    """Gains by text, step, layer and head, summed up batch by batch."""

    def __init__(self, n_texts: int, n_steps: int, taus: tuple[float, ...], model: TransformerBridge) -> None:
        self.taus, n_layers, n_heads = taus, model.cfg.n_layers, model.cfg.n_heads
        self.bridge = torch.zeros(n_texts, n_steps, len(taus), n_layers, n_heads, dtype=torch.float64)
        self.momentum = torch.zeros(n_texts, n_steps, n_layers, n_heads, dtype=torch.float64)
        self.objective = torch.zeros(n_texts, dtype=torch.float64)

    def table(
        self,
        model: TransformerBridge,
        texts: Sequence[Continuation] | Sequence[Trace],
        objective: str,
        edits: StepFlowConfig,
        roles: list[tuple[str, ...]],
    ) -> EditGains:
        """Return the gains with their labels."""
        about = [dict(text.about) if isinstance(text, Continuation) else {} for text in texts]
        return EditGains.of(
            self.bridge.numpy(), self.momentum.numpy(), self.objective.numpy(), self.taus, roles=roles, about=about,
            metadata={
                "model_name": model.cfg.model_name, "objective": objective, "bridge": edits.bridge,
                "window": edits.window, "into_summary": edits.into_summary,
            },
        )  # fmt: skip


def _add_gains(
    model: TransformerBridge, rows: Sequence[Row], objective: Objective, edits: StepFlowConfig, sums: _Sums
) -> None:
    """Read rows forwards and backwards, and add their gains."""
    tokens, mask = padded(rows, next(model.parameters()).device)
    segmentation = rows[0].trace.segmentation
    flow = _Gradients(model, edits, segmentation, rows, mask.shape[1], sums)
    with differentiable(model), flow.applied(), native(model):
        logits = model(tokens, attention_mask=mask, return_type="logits")
        log_probs, likeliest = target_log_probs(logits, tokens, rows)
        if objective == "errors":
            log_probs = [log_p[~right] for log_p, right in zip(log_probs, likeliest, strict=True)]
        of_rows = torch.stack([row.sign * log_p.sum() for row, log_p in zip(rows, log_probs, strict=True)])
        if of_rows.requires_grad:
            of_rows.sum().backward()
    for row, value in zip(rows, of_rows.detach().cpu().double(), strict=True):
        sums.objective[row.text] += value


class _Gradients(StepFlow):
    """A StepFlow that edits nothing, and takes the gains of its edits when the backward pass comes by.

    Args:
        model: the model.
        edits: settings, with all layers.
        segmentation: the way to find sections and steps.
        rows: the rows that are read.
        width: number of columns.
        sums: what gains are added to.
    """

    def __init__(
        self,
        model: TransformerBridge,
        edits: StepFlowConfig,
        segmentation: Segmentation,
        rows: Sequence[Row],
        width: int,
        sums: _Sums,
    ) -> None:
        super().__init__(model, edits, segmentation)
        self._rows, self._sums = rows, sums
        self._step_ids = torch.full((len(rows), width), -1)
        for i, row in enumerate(rows):
            self._step_ids[i, width - len(row.trace) :] = row.trace.step_ids

    def _add(self, target: Tensor, gains: Float[Tensor, "row query_pos head"]) -> None:
        """Add gains of query positions to those of the steps of a layer, [text, step, head]."""
        for row, step_ids, of_row in zip(self._rows, self._step_ids, gains.detach().cpu().double(), strict=True):
            is_in_step = step_ids >= 0
            target[row.text].index_add_(0, step_ids[is_in_step], of_row[is_in_step])

    def _bridge_hook(self, layer: int) -> Callable[..., Tensor | None]:
        window = self._windows[layer]

        def hook(pattern: Float[Tensor, "row head query_pos key_pos"], hook: HookPoint) -> Tensor:
            if not pattern.requires_grad:  # the graph starts at the lowest pattern
                pattern = pattern.detach().requires_grad_()
            if self._bridging is not None:
                bridging, n_keys = self._bridging.on(pattern.device), pattern.shape[-1]
                members, of_rows = bridging.row_groups(n_keys)
                share, a = bridging.shares[window], exact(pattern.detach())

                def of_groups(x: Float[Tensor, "row head query_pos key_pos"]) -> Float[Tensor, "2 row head query_pos"]:
                    return of_bridge_and_segment(x @ members[:, None].to(x), of_rows)

                def take(gradient: Float[Tensor, "row head query_pos key_pos"]) -> None:
                    masses = of_groups(a)
                    slopes = of_groups(exact(gradient) * a)  # of J
                    for i, tau in enumerate(self._sums.taus):
                        scales, _ = bridge_scales(masses, share.clamp(max=tau))
                        gains = ((scales - 1) * slopes).sum(0)  # [row, head, query_pos]
                        self._add(self._sums.bridge[:, :, i, layer], gains.transpose(1, 2))

                pattern.register_hook(take)
            return pattern

        return hook

    def _inject_hook(self, layer: int) -> Callable[..., Tensor | None]:
        def hook(z: Float[Tensor, "row query_pos head d_head"], hook: HookPoint) -> Tensor:
            values = self._new_values.pop(layer)  # of the whole text, which is read in one pass
            if self._injections is None:
                return z
            injections = self._injections.on(values.device)
            one = torch.ones(z.shape[2], 1, device=values.device)
            added = momentum(previous_step_means(values.detach(), injections), one)  # [injection, head, d_head]

            def take(gradient: Float[Tensor, "row query_pos head d_head"]) -> None:
                places = (injections.row, injections.query_pos)
                of_places = (exact(gradient[places]) * added).sum(-1)  # [injection, head]
                gains = of_places.new_zeros(gradient.shape[:3]).index_put(places, of_places)
                self._add(self._sums.momentum[:, :, layer], gains)

            z.register_hook(take)
            return z  # what is hooked may be a view that nothing else comes from

        return hook
