"""The result of `stepsal.collect`: answers of a model to the problems of a task, with their step maps and metrics.

    folder/
      manifest.json            what was asked for: model, task, parameters, versions
      parts/000000/            traces 0 .. 63, named by the first
        answers.parquet        one row per trace: problem, tokens, steps, verdict, lengths, log-probability, scalars
        metrics.parquet        one row per trace and layer: `stepsal.metrics.flow_metrics`
        maps.safetensors       "0", "1", ...: [layer, query_step, key_step]
      parts/000064/            traces 64 ..

`answers.parquet` keeps of the segmentation of a trace only the format; the rest is the same for all, in the manifest.
So are the switches of the chat template.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from stepsal.experiments.store import Store, StoredPart
from stepsal.maps import StepSaliency, labels_of
from stepsal.metrics import SCALARS
from stepsal.stats.report import Report
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Step, Trace

if TYPE_CHECKING:
    import pandas as pd

KIND, VERSION = "population", 2
ANSWERS_FILE, METRICS_FILE, MAPS_FILE = "answers.parquet", "metrics.parquet", "maps.safetensors"

#: Columns of answers.parquet that make up a `Trace`.
TRACE_COLUMNS = (
    "question", "response", "text", "tokens", "token_starts", "token_ends", "roles", "starts", "ends", "format",
    "n_prompt", "truncated",
)  # fmt: skip


@dataclass(frozen=True)
class Population:
    """Answers of a model to the problems of a task, with their step maps and metrics, in a folder of `stepsal.collect`.

    Attributes:
        folder: folder that holds it.
        manifest: model, task, parameters and versions.
        parts: folder and number of traces of each part, in order.

    Example:
        >>> import tempfile
        >>> folder, task = tempfile.mkdtemp(), stepsal.tasks.chain.ChainTask(length=1)
        >>> _ = stepsal.collect(stepsal.load("mini"), task, 2, folder, progress=False)
        >>> population = stepsal.experiments.Population.load(folder)
        >>> len(population), population.trace(0).roles[0], population.saliency(0).n_layers
        (2, 'question', 8)
    """

    folder: Path
    manifest: Mapping[str, Any]
    parts: tuple[tuple[Path, int], ...]

    @classmethod
    def load(cls, folder: str | Path) -> Population:
        """Read a population from a folder, after checking that it is whole.

        Args:
            folder: the folder of `stepsal.collect`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder is no population, of another format version, or damaged, or traces are missing; the
                message names the part and the remedy.
        """
        store = Store.load(folder, KIND, VERSION)
        parts, n_traces = [], 0
        for first, part in numbered(store.parts()):
            if first > n_traces:
                raise ValueError(
                    f"{store.folder}: traces {n_traces}..{first - 1} are missing before {part.folder}; put them back, "
                    "or collect again to make them anew"
                )
            if first < n_traces:
                raise ValueError(f"{part.folder} begins with traces that the part before it has, too; delete it")
            parts.append((part.folder, int(part.about["n"])))
            n_traces += parts[-1][1]
        return cls(store.folder, store.manifest, tuple(parts))

    def save(self, folder: str | Path) -> Path:
        """Copy the population to another folder, which appears when the copy is complete.

        Args:
            folder: an empty or new folder; created if missing.

        Returns:
            The folder.

        Raises:
            ValueError: the folder is not empty, or a part of this population is damaged.
        """
        return Store(self.folder, self.manifest).save(folder)

    def __len__(self) -> int:
        """Return the number of traces."""
        return sum(n for _, n in self.parts)

    def __repr__(self) -> str:
        model_name, task = self.manifest["model_name"], self.manifest["task"]
        return f"Population({model_name!r} on {task}, {len(self)} traces, {self.folder})"

    @cached_property
    def answers(self) -> pd.DataFrame:
        """Table of the answers, one row each: trace, seed, problem, reference, correct, error, n_steps, n_tokens, ...

        It leaves out tokens, steps and texts, which `trace` returns.
        """
        return self._table(ANSWERS_FILE, without=[name for name in TRACE_COLUMNS if name != "truncated"])

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Table of the `flow_metrics`, one row per trace and layer, with outcome and length of the trace."""
        outcomes = self.answers[["trace", "problem", "correct", "error", "truncated", "n_steps", "n_tokens"]]
        return outcomes.merge(self._table(METRICS_FILE), on="trace", validate="one_to_many")

    def summary(self) -> Report:
        """Say how many traces are correct, how long they are, and how strong Lock-in and Decay are in either group.

        To tell whether the groups differ, use `stepsal.stats.compare_groups`, which matches for length.

        Returns:
            The report; `print` writes it within 100 columns, JupyterLab shows it as a table.

        Raises:
            ValueError: there are no traces.
        """
        import pandas as pd

        answers = self.answers
        columns = ["n_steps", "n_tokens", *SCALARS]
        rows = []
        for word, group in (("correct", answers[answers["correct"]]), ("wrong", answers[~answers["correct"]])):
            means = {name: f"{group[name].mean():.3g}" if group[name].notna().any() else "-" for name in columns}
            cut_off = f"{group['truncated'].mean():.1%}" if len(group) else "-"
            rows.append({"traces": word, "n": len(group), "cut off": cut_off} | means)
        n_correct, n_problems = int(answers["correct"].sum()), answers["problem"].nunique()
        title = f"{self.manifest['model_name']} on {self.manifest['task']}: {len(self)} traces, {n_problems} problems"
        sentences = [f"{n_correct} of {len(self)} are correct ({n_correct / len(self):.1%}). The numbers are means."]
        if kinds := answers["error"].value_counts().head(3).to_dict():
            sentences.append(f"First errors: {', '.join(f'{kind} ({n})' for kind, n in kinds.items())}, ...")
        return Report(title, pd.DataFrame(rows), sentences)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_() if len(self) else f"<p>{html.escape(repr(self))}</p>"

    def trace(self, i: int) -> Trace:
        """Return a trace.

        Args:
            i: number of the trace, from 0.

        Raises:
            IndexError: there is no such trace.
        """
        import pyarrow.parquet as pq

        part, row = self._locate(i)
        columns = pq.read_table(part / ANSWERS_FILE, columns=list(TRACE_COLUMNS)).slice(row, 1).to_pylist()[0]
        segmentation = Segmentation.from_dict(self.manifest["segmentation"])
        return trace_from_columns(columns, segmentation, self.manifest.get("chat"))

    def saliency(self, i: int) -> StepSaliency:
        """Return the step maps of a trace.

        Args:
            i: number of the trace, from 0.

        Raises:
            IndexError: there is no such trace.
        """
        part, _ = self._locate(i)
        with safetensors.safe_open(part / MAPS_FILE, framework="pt") as file:
            values, layers = file.get_tensor(str(i)), json.loads(file.metadata()["layers"])
        manifest = self.manifest
        metadata = {"trace": i, "task": manifest["task"], "dtype": manifest["dtype"]}
        if manifest["stepflow"] is not None:
            metadata |= {name: manifest[name] for name in ("stepflow", "segmentation")}
        return StepSaliency(
            values=values, layers=tuple(layers), n_layers=manifest["n_layers"], model_name=manifest["model_name"],
            target=manifest["saliency"]["target"], reduce=manifest["saliency"]["reduce"], metadata=metadata,
            **labels_of(self.trace(i)),
        )  # fmt: skip

    def _locate(self, i: int) -> tuple[Path, int]:
        """Return the part that holds a trace, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"there is no trace {i}; {self.folder} has traces 0..{len(self) - 1}")
        row = i
        for part, n in self.parts:
            if row < n:
                return part, row
            row -= n
        raise AssertionError("the parts hold all traces")

    def _table(self, file: str, without: Iterable[str] = ()) -> pd.DataFrame:
        """Return the rows of all parts.

        Raises:
            ValueError: there are no parts.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.parts:
            raise ValueError(f"{self.folder} holds no traces yet; stepsal.collect fills it")
        tables = []
        for part, _ in self.parts:
            columns = [name for name in pq.read_schema(part / file).names if name not in without]
            tables.append(pq.read_table(part / file, columns=columns))
        frame: pd.DataFrame = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        return frame


def numbered(parts: Iterable[StoredPart]) -> list[tuple[int, StoredPart]]:
    """Return the parts of a population by the number of their first trace, which is their name.

    Args:
        parts: of the store of a population.

    Raises:
        ValueError: a part that no number names.
    """
    for part in parts:
        if not part.name.isdigit():
            raise ValueError(f"{part.folder} is no part of a population: its name is not a number; remove it")
    return sorted(((int(part.name), part) for part in parts), key=lambda pair: pair[0])


def trace_columns(trace: Trace) -> dict[str, Any]:
    """Return a trace as columns of answers.parquet; of its segmentation, they hold the format only.

    Args:
        trace: the trace.
    """
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
        "truncated": trace.truncated,
    }


def trace_from_columns(
    columns: Mapping[str, Any], segmentation: Segmentation, chat: Mapping[str, Any] | None = None
) -> Trace:
    """Return the trace that `trace_columns` has written.

    Args:
        columns: one value per column.
        segmentation: that of the population; its format is replaced by the one in the columns.
        chat: switches of the chat template that the population was made with; None, as in old folders, is without any.
    """
    if columns["format"] != segmentation.format_name:
        segmentation = replace(segmentation, format=columns["format"])
    return Trace(
        question=columns["question"],
        response=columns["response"],
        text=columns["text"],
        tokens=torch.tensor(columns["tokens"]),
        offsets=torch.tensor([columns["token_starts"], columns["token_ends"]]).T.contiguous(),
        steps=tuple(map(Step, columns["roles"], columns["starts"], columns["ends"])),
        segmentation=segmentation,
        n_prompt=columns["n_prompt"],
        truncated=columns["truncated"],
        chat=dict(chat or {}),
    )
