"""Populations of traces in a folder: sampled, graded, mapped; safe to interrupt, resumed where they stopped.

    folder/
      manifest.json            what was asked for: model, task, parameters, versions
      parts/000000/            traces 0 .. 63
        part.json              size and SHA-256 of the other files, and the versions that made them
        traces.parquet         one row per trace: problem, tokens, steps, verdict, length, log-probability, scalars
        metrics.parquet        one row per trace and layer: `stepsal.metrics.flow_metrics`
        maps.safetensors       "0", "1", ...: [layer, query_step, key_step]
      parts/000064/            traces 64 ..

A part is named by its first trace. It is written beside its place and moved there when it is complete and on the
disk, so that there are whole parts and nothing else, whatever happens. Trace i is the answer to the problem with seed
`seed + i`, sampled with the same seed; so what is missing is known from what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from tqdm.auto import tqdm

from stepsal.maps import StepSaliency, labels_of
from stepsal.metrics import SCALARS, flow_metrics, trace_metrics
from stepsal.storage import alone_in, begin_manifest, check_manifest, digest, package_versions, read_manifest, to_disk
from stepsal.trace import Step, Trace
from stepsal.trace.segment import Format

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.intervention import StepFlowConfig
    from stepsal.tasks import Problem, Task

FORMAT = "stepsal.Population"
FORMAT_VERSION = 1
PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "tokenizers", "reasoning-gym")


def collect(
    model: TransformerBridge,
    task: Task,
    n: int,
    folder: str | Path,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    system: str | None = None,
    stepflow: StepFlowConfig | None = None,
    part_size: int = 64,
    saliency: dict[str, Any] | None = None,
    segmentation: dict[str, Any] | None = None,
    progress: bool = True,
) -> Population:
    """Sample, grade and map `n` traces into a folder, or go on with what is there.

    A run that was interrupted, also by a kill or a power cut, goes on where it stopped when it is called again, and so
    does one that is asked for more traces. Nothing is kept twice; the part that was in the works is done again. Memory
    is bounded by one part.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed and has a name, e.g. `stepsal.tasks.chain.ChainTask(length=(7, 9))`.
        n: how many traces the folder shall hold.
        folder: made if it is not there.
        temperature, top_p, max_new_tokens, system: see `stepsal.generate`.
        seed: problem i is `task.sample(seed + i)`, and its answer is sampled with seed + i.
        stepflow: decode, score and map under StepFlow.
        part_size: traces that are decoded together and written at once.
        saliency: options of `stepsal.step_saliency`: target, engine, layers, reduce.
        segmentation: `format`, `split`, `min_chars` of `Trace.from_tokens`.
        progress: show a bar over traces.

    Raises:
        ValueError: numbers out of range, an open `stepsal.stepflow` context, or a folder that is foreign, damaged, of
            other parameters or in the hands of another process; before any work. A problem that can't be answered or
            mapped stops the run with its own error, to which its part is added.
    """
    from stepsal.generation.answers import generate_batch, log_probabilities
    from stepsal.intervention import active_flow
    from stepsal.intervention import stepflow as open_stepflow
    from stepsal.saliency import step_saliency

    if n < 1 or part_size < 1:
        raise ValueError(f"n={n} and part_size={part_size} must be at least 1")
    options: dict[str, Any] = {"target": "token", "reduce": "density", **(saliency or {})}
    if isinstance(options.get("layers"), Iterable) and not isinstance(options["layers"], str):
        options["layers"] = list(options["layers"])
    if unknown := set(options) - {"target", "engine", "layers", "reduce"}:
        raise ValueError(f"saliency={sorted(unknown)} is not kept in a population; use target, engine, layers, reduce")
    if options["target"] not in ("token", "sequence"):
        raise ValueError(f"saliency target={options['target']!r} is unknown; use 'token' or 'sequence'")
    if active_flow(model) is not None:
        raise ValueError("a stepflow context is open, of which the folder would not know; use collect(stepflow=...)")
    folder = Path(folder)
    wanted = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": model.cfg.model_name,
        "weights": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_layers": model.cfg.n_layers,
        "task": task.name,
        "seed": seed,
        "decoding": {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "system": system},
        "stepflow": None if stepflow is None else stepflow.to_dict(),
        "saliency": {name: _plain(name, value) for name, value in options.items() if name != "engine"},
        "segmentation": {name: _plain(name, value) for name, value in (segmentation or {}).items()},
        "chat_template": digest(str(getattr(model.tokenizer, "chat_template", None)).encode()),
    }
    with alone_in(folder), ExitStack() as edits:
        population = _open_or_begin(folder, wanted)
        _clear_unfinished(folder)
        if stepflow is not None:
            edits.enter_context(open_stepflow(model, stepflow))
        done = len(population)
        bar = tqdm(total=n, initial=min(done, n), desc=f"traces of {task.name}", disable=not progress)
        edits.callback(bar.close)
        for first in range(done, n, part_size):
            seeds = list(range(seed + first, seed + min(first + part_size, n)))
            try:
                problems = [task.sample(s) for s in seeds]
                traces = generate_batch(
                    model, [p.question for p in problems], temperature=temperature, top_p=top_p, seed=seeds,
                    max_new_tokens=max_new_tokens, system=system, **(segmentation or {}),
                )  # fmt: skip
                maps = step_saliency(model, traces, progress=False, **options)
                log_probs = [float(log_probabilities(model, t)[t.n_prompt - 1 :].mean()) for t in traces]
            except Exception as error:
                error.add_note(f"in {task.name}, seeds {seeds[0]}..{seeds[-1]}; the {first} traces before are kept")
                raise
            _write_part(folder / "parts", first, seeds, problems, traces, maps, log_probs)
            bar.update(len(seeds))
    return Population.open(folder)


@dataclass(frozen=True)
class Population:
    """Traces of a model on a task, with their maps and metrics; read from a folder that `collect` wrote.

    Attributes:
        folder: where it lies.
        manifest: model, task, parameters and versions.
        parts: (folder, number of traces) of each part, in order.
    """

    folder: Path
    manifest: dict[str, Any]
    parts: tuple[tuple[Path, int], ...]

    @classmethod
    def open(cls, folder: str | Path) -> Population:
        """Open a folder, checking that it is whole.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is foreign, of another format version, or damaged; names the part, and what to do.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, FORMAT, FORMAT_VERSION)
        parts, expected = [], 0
        numbered = [p for p in (folder / "parts").glob("*") if p.name.isdigit()]
        for part in sorted(numbered, key=lambda p: int(p.name)):
            if int(part.name) != expected:
                raise ValueError(
                    f"{folder}: traces {expected}..{int(part.name) - 1} are missing before {part}; put them back, or "
                    "delete this and all later parts and collect again"
                )
            parts.append((part, _check_part(part)))
            expected += parts[-1][1]
        return cls(folder, manifest, tuple(parts))

    def __len__(self) -> int:
        return sum(n for _, n in self.parts)

    def __repr__(self) -> str:
        return f"Population({self.manifest['model']!r} on {self.manifest['task']}, {len(self)} traces, {self.folder})"

    @cached_property
    def traces(self) -> pd.DataFrame:
        """One row per trace: trace, seed, problem, reference, correct, error, reason, n_steps, n_tokens, ...

        Tokens, steps and texts, which `trace` gives, are left out.
        """
        return self._table("traces", without=_TRACE_FIELDS)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """`flow_metrics` of every trace, one row per trace and layer, beside outcome and length of the trace."""
        of_trace = self.traces[["trace", "problem", "correct", "error", "truncated", "n_steps", "n_tokens"]]
        return of_trace.merge(self._table("metrics"), on="trace", validate="one_to_many")

    def trace(self, i: int) -> Trace:
        """Trace i, from 0.

        Raises:
            IndexError: there is no such trace.
        """
        import pyarrow.parquet as pq

        part, row = self._locate(i)
        fields = (
            pq.read_table(part / "traces.parquet", columns=[*_TRACE_FIELDS, "truncated"]).slice(row, 1).to_pylist()[0]
        )
        return _trace_of(fields)

    def saliency(self, i: int) -> StepSaliency:
        """The step maps of trace i, from 0.

        Raises:
            IndexError: there is no such trace.
        """
        part, _ = self._locate(i)
        with safetensors.safe_open(part / "maps.safetensors", framework="pt") as file:
            values, layers = file.get_tensor(str(i)), json.loads(file.metadata()["layers"])
        trace, manifest = self.trace(i), self.manifest
        return StepSaliency(
            values=values, layers=tuple(layers), n_layers=manifest["n_layers"], model=manifest["model"],
            target=manifest["saliency"]["target"], reduce=manifest["saliency"]["reduce"], **labels_of(trace),
            metadata={"trace": i, "task": manifest["task"], "dtype": manifest["dtype"]}
            | ({"stepflow": manifest["stepflow"]} if manifest["stepflow"] else {}),
        )  # fmt: skip

    def _locate(self, i: int) -> tuple[Path, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"trace {i} is not there; {self.folder} has traces 0..{len(self) - 1}")
        first = 0
        for part, n in self.parts:
            if i < first + n:
                return part, i - first
            first += n
        raise AssertionError("the parts hold all traces")

    def _table(self, name: str, without: tuple[str, ...] = ()) -> pd.DataFrame:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.parts:
            raise ValueError(f"{self.folder} holds no traces yet; stepsal.collect fills it")
        tables = []
        for part, _ in self.parts:
            columns = [c for c in pq.read_schema(part / f"{name}.parquet").names if c not in without]
            tables.append(pq.read_table(part / f"{name}.parquet", columns=columns))
        frame: pd.DataFrame = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        return frame


def fingerprint(model: TransformerBridge) -> str:
    """A digest of a model's weights: of the shape and up to 64 evenly spaced entries of each parameter."""
    state = hashlib.sha256()
    for name, parameter in sorted(model.original_model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, -(-len(flat) // 64))].float().cpu().numpy()
        state.update(f"{name}{tuple(parameter.shape)}".encode() + some.tobytes())
    return state.hexdigest()[:16]


_TRACE_FIELDS = (
    "question", "response", "text", "tokens", "token_starts", "token_ends", "roles", "starts", "ends", "format",
    "n_prompt",
)  # fmt: skip


def _fields_of(trace: Trace) -> dict[str, Any]:
    return {
        "question": trace.question,
        "response": trace.response,
        "text": trace.text,
        "tokens": trace.tokens.tolist(),
        "token_starts": trace.offsets[:, 0].tolist(),
        "token_ends": trace.offsets[:, 1].tolist(),
        "roles": list(trace.roles),
        "starts": [step.start for step in trace.steps],
        "ends": [step.end for step in trace.steps],
        "format": trace.format,
        "n_prompt": trace.n_prompt,
    }


def _trace_of(fields: dict[str, Any]) -> Trace:
    return Trace(
        question=fields["question"],
        response=fields["response"],
        text=fields["text"],
        tokens=torch.tensor(fields["tokens"]),
        offsets=torch.tensor([fields["token_starts"], fields["token_ends"]]).T.contiguous(),
        steps=tuple(map(Step, fields["roles"], fields["starts"], fields["ends"])),
        format=fields["format"],
        n_prompt=fields["n_prompt"],
        truncated=fields["truncated"],
    )


def _write_part(
    parts: Path,
    first: int,
    seeds: list[int],
    problems: list[Problem],
    traces: list[Trace],
    maps: list[StepSaliency],
    log_probs: list[float],
) -> None:
    """Write a part beside its place, and move it there when it is on the disk."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, metrics = [], []
    for i, (seed, problem, trace, saliency) in enumerate(zip(seeds, problems, traces, maps, strict=True), first):
        verdict = problem.grade(trace)
        scalars = trace_metrics(saliency)
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
                "mean_log_prob": log_probs[i - first],
                **{name: float(scalars[name]) for name in SCALARS},
                "metrics_reason": scalars["reason"],
                **_fields_of(trace),
            }
        )
        metrics.append(flow_metrics(saliency).assign(trace=i))
    unfinished = parts / f".{first:06d}.{uuid.uuid4().hex}.part"
    unfinished.mkdir(parents=True)
    try:
        table = pa.Table.from_pylist(rows)
        error = table.schema.get_field_index("error")  # a column of nulls alone would have another type
        table = table.set_column(error, "error", table.column(error).cast(pa.string()))
        pq.write_table(table, unfinished / "traces.parquet", compression="zstd")
        metric_table = pa.Table.from_pandas(pd.concat(metrics), preserve_index=False)
        pq.write_table(metric_table, unfinished / "metrics.parquet", compression="zstd")
        safetensors.torch.save_file(
            {str(i): saliency.values.contiguous() for i, saliency in enumerate(maps, first)},
            unfinished / "maps.safetensors",
            metadata={"layers": json.dumps(maps[0].layers)},
        )
        files = {path.name: _size_and_hash(path) for path in sorted(unfinished.iterdir())}
        document = {"n": len(traces), "files": files, "versions": package_versions(PACKAGES)}
        (unfinished / "part.json").write_text(f"{json.dumps(document, indent=2)}\n")
        for path in (*unfinished.iterdir(), unfinished):
            to_disk(path)
        os.rename(unfinished, parts / f"{first:06d}")
        to_disk(parts)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _size_and_hash(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _check_part(part: Path) -> int:
    """Number of traces of a part whose files are as they were written."""
    try:
        document = json.loads((part / "part.json").read_text())
        n, files = int(document["n"]), dict(document["files"])
        damaged = [name for name, expected in files.items() if _size_and_hash(part / name) != expected]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{part} is damaged ({' '.join(str(error).split())}); {_REMEDY}") from error
    if damaged or set(files) != {"traces.parquet", "metrics.parquet", "maps.safetensors"}:
        raise ValueError(f"{part} is damaged ({', '.join(damaged) or 'files are missing'}); {_REMEDY}")
    return n


_REMEDY = "delete it and all later parts, and collect again to make them anew"


def _clear_unfinished(folder: Path) -> None:
    """Remove what an interrupted run began to write; only for who is alone in the folder."""
    for unfinished in (folder / "parts").glob(".*.part"):
        shutil.rmtree(unfinished)
    for unfinished in folder.glob(".*.part"):
        unfinished.unlink()


def _open_or_begin(folder: Path, wanted: dict[str, Any]) -> Population:
    """The population in a folder when it is of the wanted parameters; a new one when the folder has no traces."""
    begun = any(not path.name.startswith(".") for path in folder.iterdir())  # dots: the lock, leftovers
    population = Population.open(folder) if begun else None
    if population is None or len(population) == 0:
        begin_manifest(folder, wanted, package_versions(PACKAGES))
        (folder / "parts").mkdir(exist_ok=True)
        to_disk(folder)
        return Population.open(folder)
    check_manifest(folder, population.manifest, wanted)
    return population


def _plain(name: str, value: Any) -> Any:
    """A JSON value that tells one setting from another, also in another process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, re.Pattern):
        return f"re {value.pattern} {value.flags}"
    if isinstance(value, Format):
        return repr(value)
    if isinstance(value, (list, tuple, range)):
        return [_plain(name, v) for v in value]
    raise ValueError(f"{name}={value!r} can't be written to a manifest; use a name, numbers or a regular expression")
