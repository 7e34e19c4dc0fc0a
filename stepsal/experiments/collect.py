"""Sample, grade and map answers to the problems of a task, into a folder that `stepsal.experiments.Population` reads.

Trace i is the answer to the problem with seed `seed + i`, sampled with the same seed. So what is missing is known from
what the folder has: an interrupted run goes on when it is called again, and so does one that asks for more problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import safetensors.torch
from tqdm.auto import tqdm

from stepsal.experiments.checks import check_counts, check_no_open_stepflow, segmentation_for_manifest
from stepsal.experiments.population import (
    ANSWERS_FILE,
    KIND,
    MAPS_FILE,
    METRICS_FILE,
    VERSION,
    Population,
    numbered,
    trace_columns,
)
from stepsal.experiments.store import Store, identity_of
from stepsal.generation.answers import answer_batch, warn_of_what_is_unknown
from stepsal.generation.decoding import Decoding
from stepsal.generation.scoring import log_probabilities
from stepsal.intervention import StepFlowConfig
from stepsal.intervention import stepflow as open_stepflow
from stepsal.layers import Layers, checked_layers, layer_indices
from stepsal.maps import StepSaliency
from stepsal.maps.pooling import Reduce
from stepsal.maps.step_saliency import GradientTarget
from stepsal.metrics import SCALARS, flow_metrics, trace_metrics
from stepsal.saliency import step_saliency
from stepsal.storage import digest
from stepsal.trace.prompt import check_chat
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Problem, Task
    from stepsal.trace import Trace


def collect(
    model: TransformerBridge,
    task: Task,
    n_problems: int,
    folder: str | Path,
    *,
    decoding: Decoding = Decoding(temperature=1.0),
    seed: int = 0,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    batch_size: int = 64,
    target: GradientTarget = "token",
    reduce: Reduce = "density",
    layers: Layers = "all",
    engine: Literal["auto", "pattern", "streamed"] = "auto",
    progress: bool = True,
) -> Population:
    """Collect graded answers and their step maps in a folder, resuming one that was begun.

    Make the same call again to resume a run that was interrupted, even by a kill or a power failure; ask for more
    problems to extend it. Batches that are kept are never repeated. Some batches are answered in a row, and then mapped
    and kept one by one, so that a kill costs a few of them. Memory is bounded by one batch.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed and has a name, e.g. `stepsal.tasks.chain.ChainTask(length=(7, 9))`.
        n_problems: number of problems that the folder is to hold answers to, one each.
        folder: an empty or new folder, or one to go on with; created if missing.
        decoding: settings of decoding; the default samples at temperature 1. A `Decoding()` of your own is greedy: say
            `Decoding(temperature=1.0, max_new_tokens=4096)`.
        seed: problem i is `task.sample(seed + i)`, and its answer is sampled with seed + i.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}.
        stepflow: settings of StepFlow, under which answers are written, scored and mapped; None goes without it.
        segmentation: how sections and steps are found, by StepFlow and in the traces; None is `Segmentation()`.
        batch_size: largest number of answers that are written together, and number that is kept at once.
        target: "token", "logit" or "sequence", as in `stepsal.step_saliency`.
        reduce: "density" or "mass", as in `stepsal.step_saliency`.
        layers: layers to map; see `stepsal.layers`.
        engine: "auto", "pattern" or "streamed", as in `stepsal.step_saliency`; may differ when a folder is resumed.
        progress: show a bar over answers.

    Raises:
        ValueError: raised before any work: numbers out of range, an open `stepsal.stepflow` context, a segmentation by
            a function, or a folder that is foreign, damaged, of other parameters or locked by another process. Later, a
            problem that can't be answered or mapped stops the run with its own error and a note on its batch.

    Example:
        >>> import tempfile
        >>> task = stepsal.tasks.chain.ChainTask(length=1)
        >>> population = stepsal.collect(stepsal.load("mini"), task, 3, tempfile.mkdtemp(), progress=False)
        >>> population.answers["correct"].tolist()
        [True, True, True]
    """
    check_counts(n_problems=n_problems, batch_size=batch_size)
    check_no_open_stepflow(model, "collect(stepflow=...)")
    warn_of_what_is_unknown(model, [task.sample(seed).question], stacklevel=3)
    segmentation = segmentation or Segmentation()
    parameters = {
        **identity_of(model),
        "task": task.name,
        "seed": seed,
        "decoding": decoding.to_dict(),
        "system": system,
        "chat": (switches := check_chat(model.tokenizer, chat)),
        "stepflow": None if stepflow is None else stepflow.to_dict(),
        "saliency": _saliency_settings(target, reduce, layers, model.cfg.n_layers),
        "segmentation": segmentation_for_manifest(segmentation),
    }
    mapper = _Mapper(model, task, decoding, seed, system, switches, segmentation, target, reduce, layers, engine)
    with Store.opened(folder, KIND, VERSION, parameters) as store:
        spans = [(first, int(part.about["n"])) for first, part in numbered(store.parts())]
        n_present = sum(n for _, n in spans)
        bar = tqdm(
            total=n_problems, initial=min(n_present, n_problems), desc=f"answers to {task.name}", disable=not progress
        )
        with bar, _stepflow_if_given(model, stepflow, segmentation):
            batches = missing_batches(spans, n_problems, batch_size)
            for start in range(0, len(batches), BATCHES_IN_A_TURN):
                for batch in mapper.batches(batches[start : start + BATCHES_IN_A_TURN], batch_size):
                    with store.adding(f"{batch.numbers[0]:06d}", {"n": len(batch.numbers)}) as part:
                        _write(part, batch)
                    bar.update(len(batch.numbers))
    return Population.load(folder)


BATCHES_IN_A_TURN = 4
"""Batches that are answered in a row before they are mapped: more fill the rows better, fewer are lost by a kill."""


def missing_batches(spans: Iterable[tuple[int, int]], n_problems: int, batch_size: int) -> list[range]:
    """Return the numbers of the traces that are missing, in batches.

    Args:
        spans: first trace and number of traces of each part, in order.
        n_problems: number of traces that the folder is to hold.
        batch_size: size of a batch, which is smaller where the next part begins.

    Example:
        >>> stepsal.experiments.collect.missing_batches([(0, 4), (6, 2)], n_problems=13, batch_size=4)
        [range(4, 6), range(8, 12), range(12, 13)]
    """
    batches: list[range] = []
    start = 0
    for first, n in [*spans, (n_problems, 0)]:
        stop = min(first, n_problems)
        batches += [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
        start = max(start, first + n)
    return batches


@dataclass(frozen=True)
class _Batch:
    """The answers of a batch, with their problems and maps; `numbers` are those of the traces."""

    numbers: range
    seeds: Sequence[int]
    problems: Sequence[Problem]
    traces: Sequence[Trace]
    maps: Sequence[StepSaliency]
    log_probs: Sequence[float]  # mean over the tokens of each answer


@dataclass(frozen=True)
class _Mapper:
    """The writer of a population's answers and of their maps."""

    model: TransformerBridge
    task: Task
    decoding: Decoding
    seed: int
    system: str | None
    chat: Mapping[str, Any]
    segmentation: Segmentation
    target: GradientTarget
    reduce: Reduce
    layers: Layers
    engine: Literal["auto", "pattern", "streamed"]

    def batches(self, batches: Sequence[range], batch_size: int) -> Iterator[_Batch]:
        """Write the answers to some batches in a row, where one ends the next, and yield each batch with its maps.

        Raises:
            Exception: whatever a problem raises, with a note on the batches or the batch.
        """
        seeds = [self.seed + i for numbers in batches for i in numbers]
        with self._noting(seeds):
            problems = [self.task.sample(seed) for seed in seeds]
            traces = answer_batch(
                self.model, [problem.question for problem in problems], self.decoding, seeds=seeds,
                batch_size=batch_size, segmentation=self.segmentation, system=self.system, chat=self.chat,
            )  # fmt: skip
        start = 0
        for numbers in batches:
            part = slice(start, start := start + len(numbers))
            with self._noting(seeds[part]):
                batch = self._mapped(numbers, seeds[part], problems[part], traces[part])
            yield batch

    def _mapped(
        self, numbers: range, seeds: Sequence[int], problems: Sequence[Problem], traces: Sequence[Trace]
    ) -> _Batch:
        maps = step_saliency(
            self.model, traces, target=self.target, engine=self.engine, layers=self.layers, reduce=self.reduce,
            progress=False,
        )  # fmt: skip
        log_probs = [float(log_probabilities(self.model, t)[t.n_prompt - 1 :].mean()) for t in traces]
        return _Batch(numbers, seeds, problems, traces, maps, log_probs)

    @contextmanager
    def _noting(self, seeds: Sequence[int]) -> Iterator[None]:
        """Put a note on an error, which says where it came up."""
        try:
            yield
        except Exception as error:
            error.add_note(f"in {self.task.name}, seeds {seeds[0]}..{seeds[-1]}; the answers written before are kept")
            raise


def _saliency_settings(target: GradientTarget, reduce: Reduce, layers: Layers, n_layers: int) -> dict[str, Any]:
    """Return how traces are mapped, JSON-ready.

    Raises:
        ValueError: a setting that is unknown, or no layers.
    """
    for name, value, choices in (("target", target, get_args(GradientTarget)), ("reduce", reduce, get_args(Reduce))):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")
    if not layer_indices(layers, n_layers):
        raise ValueError(f"layers={layers!r} names no layer of {n_layers}, so that there is nothing to map; use 'all'")
    choice = checked_layers(layers)
    return {"target": target, "reduce": reduce, "layers": choice if isinstance(choice, str) else list(choice)}


@contextmanager
def _stepflow_if_given(
    model: TransformerBridge, stepflow: StepFlowConfig | None, segmentation: Segmentation
) -> Iterator[None]:
    if stepflow is None:
        yield
    else:
        with open_stepflow(model, stepflow, segmentation=segmentation):
            yield


def _write(part: Path, batch: _Batch) -> None:
    """Write the files of a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = pa.Table.from_pylist(_answer_rows(batch))
    error = answers.schema.get_field_index("error")  # a column of nulls alone would have another type
    answers = answers.set_column(error, "error", answers.column(error).cast(pa.string()))
    metrics = pa.Table.from_pandas(_metrics_table(batch), preserve_index=False)
    pq.write_table(answers, part / ANSWERS_FILE, compression="zstd")
    pq.write_table(metrics, part / METRICS_FILE, compression="zstd")
    safetensors.torch.save_file(
        {str(i): saliency.values.contiguous() for i, saliency in zip(batch.numbers, batch.maps, strict=True)},
        part / MAPS_FILE,
        metadata={"layers": json.dumps(batch.maps[0].layers)},
    )


def _answer_rows(batch: _Batch) -> list[dict[str, Any]]:
    """Return one row per answer: its problem, the verdict on it, lengths, log-probability, scalars, and the trace."""
    rows = []
    for i, seed, problem, trace, saliency, log_prob in zip(
        batch.numbers, batch.seeds, batch.problems, batch.traces, batch.maps, batch.log_probs, strict=True
    ):
        verdict, scalars = problem.grade(trace), trace_metrics(saliency)
        rows.append(
            {
                "trace": i,
                "seed": seed,
                "problem": digest(problem.question.encode()),
                "reference": problem.reference,
                "correct": bool(verdict.correct),
                "error": getattr(verdict, "error", None),
                "reason": verdict.reason,
                "n_steps": len(trace.steps),
                "n_tokens": len(trace),
                "n_new_tokens": len(trace) - trace.n_prompt,
                "truncated": trace.truncated,
                "mean_log_prob": log_prob,
                **{name: float(scalars[name]) for name in SCALARS},
                "metrics_reason": scalars["reason"],
            }
            | trace_columns(trace)
        )
    return rows


def _metrics_table(batch: _Batch) -> pd.DataFrame:
    """Return the metrics of each trace and layer."""
    import pandas as pd

    tables = [flow_metrics(saliency).assign(number=i) for i, saliency in zip(batch.numbers, batch.maps, strict=True)]
    table = pd.concat(tables).drop(columns=["trace", "n_steps", "n_tokens"])  # the last two are among the answers
    return table.rename(columns={"number": "trace"})
