"""Whole evaluations by Inspect with local tasks, for the tests of stepsal models there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, EvalSample
from inspect_ai.model import ContentReasoning, ContentText
from inspect_ai.scorer import includes
from inspect_ai.solver import Solver, generate

from stepsal.tasks import chain

PROBLEMS = [chain.sample(930_000 + i, length=length) for i, length in enumerate((1, 2, 3, 2, 3))]


def chains(*solvers: Solver) -> Task:
    samples = [Sample(p.question, target=f"= {p.reference}.", id=i) for i, p in enumerate(PROBLEMS)]
    return Task(samples, solver=list(solvers) or generate(), scorer=includes(), name="chains")


def run(
    task: Task, folder: Path, model: str = "stepsal/mini", args: dict[str, Any] | None = None, **options: Any
) -> EvalLog:
    options = {"max_tokens": 120, "display": "none", "log_dir": str(folder)} | options
    (log,) = eval(task, model=model, model_args=args or {}, **options)
    return log


def samples_of(log: EvalLog) -> list[EvalSample]:
    assert log.status == "success", log.error
    assert log.samples
    return sorted(log.samples, key=lambda sample: (sample.id, sample.epoch))


def said(sample: EvalSample) -> tuple[str, str]:
    """Reasoning and text."""
    content = sample.output.message.content
    if isinstance(content, str):
        return "", content
    reasoning = "".join(c.reasoning for c in content if isinstance(c, ContentReasoning))
    return reasoning, "".join(c.text for c in content if isinstance(c, ContentText))
