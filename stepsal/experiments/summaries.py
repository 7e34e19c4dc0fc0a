"""Say what an evaluation has shown: the accuracy of each variant, and how it differs from the first one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stepsal.stats.report import Report, sentence_of_difference

if TYPE_CHECKING:
    from stepsal.experiments.results import Evaluation

What = Literal["correct", "final_answer_correct"]
"""Which verdict: on the answer as a whole, or on its final answer, however that was reached."""


def evaluation_report(evaluation: Evaluation, what: What) -> Report:
    """Return what `Evaluation.summary` says.

    Args:
        evaluation: the answers.
        what: which verdict.
    """
    import pandas as pd

    rows = evaluation.accuracy(what)
    table = pd.DataFrame(
        {
            "variant": rows["variant"],
            "accuracy": rows["accuracy"].map("{:.1%}".format),
            "95 %": [f"{low:.1%} to {high:.1%}" for low, high in zip(rows["low"], rows["high"], strict=True)],
            "cut off": rows["truncated"].map("{:.1%}".format),
        }
    )
    n_different = len(set(evaluation.groups))
    different = f" ({n_different} different)" if n_different < evaluation.n_problems else ""
    samples = f", {evaluation.n_samples} answers to each" if evaluation.n_samples > 1 else ""
    manifest, base = evaluation.manifest, evaluation.variants[0].name
    title = f"{manifest['model_name']} on {manifest['task']}: {evaluation.n_problems} problems{different}{samples}"
    sentences = [
        sentence_of_difference(v.name, base, evaluation.difference(base, v.name, what)) for v in evaluation.variants[1:]
    ]
    if len(sentences) > 1:
        sentences.append("The p-values are not corrected for the number of variants.")
    return Report(title, table, sentences)
