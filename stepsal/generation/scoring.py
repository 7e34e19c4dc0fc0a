"""Score the tokens of a trace, and right and wrong continuations, by their log-probabilities under a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.native import native
from stepsal.bridge.unembedding import LateLogits
from stepsal.intervention import StepFlowConfig, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.intervention.gains import Objective, Row, padded, rows_of, target_log_probs
from stepsal.trace.continuation import Continuation
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def log_probabilities(model: TransformerBridge, trace: Trace) -> Float[Tensor, " target"]:
    """Return log p(token t + 1 | tokens up to t) for t = 0 .. T - 2, in nats, at temperature 1.

    They come from one forward pass, with the hooks that are on the model. Values of the answer begin at index
    `trace.n_prompt - 1`.

    Args:
        model: any model with the tokens of the trace, not only the one that wrote it.
        trace: a trace of T tokens.

    Returns:
        One value for each token but the first, float32 on the CPU.

    Raises:
        ValueError: a StepFlow is open with another segmentation than that of the trace.

    Example:
        >>> from stepsal.generation.scoring import log_probabilities
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Anna is 3 plus 4. What is Anna?", max_new_tokens=20)
        >>> log_probabilities(model, trace).shape == (len(trace) - 1,)
        True
    """
    agreed_segmentation(model, trace.segmentation)
    late, losses, first = LateLogits(model, trace.tokens, 0, len(trace) - 1), [], 1
    for logits in late.portions():
        targets = trace.tokens[first : first + len(logits)].to(logits.device)
        losses.append(cross_entropy(logits, targets, reduction="none").cpu())
        first += len(logits)
    return -torch.cat(losses)


def continuation_scores(
    model: TransformerBridge,
    texts: Sequence[Continuation],
    stepflow: StepFlowConfig | None = None,
    *,
    segmentation: Segmentation | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how likely a model thinks the right and the wrong continuation of texts, without any decoding.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        texts: the continuations.
        stepflow: read under StepFlow with these settings; None without.
        segmentation: the way to find sections and steps; None is `Segmentation()`.
        batch_size: number of rows that are read together.
        progress: show a bar over rows.

    Returns:
        A row for each text: text; right and wrong, the log-probability of either continuation in nats (NaN where there
        is no wrong one); greedy, True where greedy decoding would write the right one; and the labels of the text.

    Raises:
        ValueError: no texts, or an open StepFlow context beside `stepflow`.

    Example:
        >>> from stepsal.generation.scoring import continuation_scores
        >>> question = "Hugo is 4 plus 3. What is Hugo?"
        >>> text = stepsal.Continuation(question, " Hugo is", right=" 4 plus 3", wrong=" 3 plus 9")
        >>> scores = continuation_scores(stepsal.load("mini"), [text])
        >>> bool(scores["greedy"][0]), bool(scores["right"][0] > scores["wrong"][0])
        (True, True)
    """
    import pandas as pd

    rows = [row for text in range(len(texts)) for row in _rows_of_text(model, texts, text, segmentation)]
    table = pd.DataFrame({"text": range(len(texts)), "right": float("nan"), "wrong": float("nan"), "greedy": False})
    for row, (log_probs, likeliest) in zip(
        rows, read_rows(model, rows, stepflow, segmentation, batch_size, progress), strict=True
    ):
        table.loc[row.text, "right" if row.sign > 0 else "wrong"] = float(log_probs.sum())
        if row.sign > 0:
            table.loc[row.text, "greedy"] = bool(likeliest.all())
    about = pd.DataFrame([dict(text.about) for text in texts])
    return pd.concat([table, about], axis=1)


def read_rows(
    model: TransformerBridge,
    rows: Sequence[Row],
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[tuple[Float[Tensor, " target"], Bool[Tensor, " target"]]]:
    """Return for each row the log-probabilities of the tokens that count, and whether each is the likeliest.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        rows: from `stepsal.intervention.gains.rows_of`.
        stepflow: read under StepFlow with these settings; None without.
        segmentation: the way to find sections and steps; None is `Segmentation()`.
        batch_size: number of rows that are read together.
        progress: show a bar over rows.

    Raises:
        ValueError: no rows, or an open StepFlow context beside `stepflow`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not rows:
        raise ValueError("there are no texts: give continuations or traces")
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].trace))  # rows of one length share a batch
    context = nullcontext() if stepflow is None else open_stepflow(model, stepflow, segmentation=segmentation)
    device = next(model.parameters()).device
    with context, native(model), torch.no_grad(), tqdm(total=len(rows), disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [rows[i] for i in numbers]
            tokens, mask = padded(batch, device)
            logits = model(tokens, attention_mask=mask, return_type="logits")
            log_probs, likeliest = target_log_probs(logits, tokens, batch)
            scores |= {i: (p.cpu(), x.cpu()) for i, p, x in zip(numbers, log_probs, likeliest, strict=True)}
            bar.update(len(batch))
    return [scores[i] for i in range(len(rows))]


def _rows_of_text(
    model: TransformerBridge, texts: Sequence[Continuation], number: int, segmentation: Segmentation | None
) -> list[Row]:
    """Return the rows of a text: its right continuation, and its wrong one where there is one."""
    objective: Objective = "right" if texts[number].wrong is None else "contrast"
    rows = rows_of(model, [texts[number]], objective, segmentation)
    return [row._replace(text=number) for row in rows]
