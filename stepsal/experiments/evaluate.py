"""Variants of a model on the same problems: sampled, graded, kept in a folder, and compared in pairs.

    folder/
      manifest.json            model, task, parameters, versions
      answers/<uuid>.parquet   one row per answer: way, problem, draw, verdict, length, FLOPs, text

A *way* is how an answer is written: StepFlow, prompt, budget. A *variant* is a way and a number of votes; variants of
the same way share its answers. Draw d of problem i has the same seed under every way, so that variants are paired. What
is missing is known from the rows that are there: an interrupted run goes on when it is called again, with more
problems, samples or variants too. Files appear whole or not at all; those of a finished run become one.

Ways take each batch of problems in turn, in an order that rotates, so that their times can be compared.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from stepsal.experiments.collect import fingerprint
from stepsal.generation.answers import check_generation, generate, generate_batch
from stepsal.generation.flops import decoding_flops
from stepsal.intervention import StepFlowConfig, active_flow
from stepsal.stats.paired import Groups, PairedDifference, Verdicts, accuracy, paired_difference, pass_at_k
from stepsal.storage import (
    alone_in,
    begin_manifest,
    check_manifest,
    digest,
    package_versions,
    read_manifest,
    write_atomic,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Problem, Task

What = Literal["correct", "answer_correct"]
FORMAT, FORMAT_VERSION = "stepsal.Evaluation", 1
PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "tokenizers", "math-verify", "reasoning-gym")

PLAN_AND_SOLVE = (  # PS+ of Wang et al. 2023 (arXiv 2305.04091), Table 5
    "Let's first understand the problem, extract relevant variables and their corresponding numerals, and devise a "
    "complete plan. Then, let's carry out the plan, calculate intermediate variables (pay attention to correct "
    "numerical calculation and commonsense), solve the problem step by step, and show the answer."
)
HINT = "Before each step, look again at what the question says and at the results of your earlier steps."


@dataclass(frozen=True)
class Variant:
    """A way to answer, and how many answers vote.

    Attributes:
        name: how tables call it.
        stepflow: decode under StepFlow with these settings.
        instruction: put after every question (`PLAN_AND_SOLVE`, `HINT`).
        edit: another intervention. Called with the model and a problem, it gives a context in which that problem is
            answered, alone. A folder knows it by the variant's name: call a changed edit by another.
        budget: limit of new tokens; None for that of the run.
        wait: how many times the end of the thinking is put off by "Wait" (budget forcing, s1).
        votes: self-consistency: of so many draws, the first with the most frequent answer is given. Sample j has draws
            j * votes, ..., (j + 1) * votes - 1.

    Raises:
        ValueError: numbers out of range.
    """

    name: str
    stepflow: StepFlowConfig | None = None
    instruction: str | None = None
    edit: Callable[[TransformerBridge, Problem], AbstractContextManager[object]] | None = None
    budget: int | None = None
    wait: int = 0
    votes: int = 1

    def __post_init__(self) -> None:
        if self.votes < 1 or self.wait < 0 or (self.budget is not None and self.budget < 1):
            raise ValueError(
                f"{self.name!r}: votes={self.votes} and budget={self.budget} must be >= 1, wait={self.wait} >= 0"
            )

    def ask(self, problem: Problem) -> str:
        """The question with the instruction."""
        return problem.question + ("" if self.instruction is None else f"\n\n{self.instruction}")

    @property
    def way(self) -> str:
        """What tells one way to answer from another, as JSON."""
        config = None if self.stepflow is None else self.stepflow.to_dict()
        fields = {"stepflow": config, "instruction": self.instruction, "budget": self.budget, "wait": self.wait}
        if self.edit is not None:
            fields["edit"] = self.name  # functions may share a name of theirs, or have none
        return json.dumps(fields, sort_keys=True)


def evaluate(
    model: TransformerBridge,
    task: Task,
    variants: Sequence[Variant],
    n_problems: int,
    n_samples: int = 1,
    *,
    folder: str | Path,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    system: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Evaluation:
    """Answer `n_problems` problems of a task `n_samples` times under each variant, or go on with what is there.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed; problem i is `task.sample(seed + i)`.
        variants: with names that differ. The first is what the others are compared with, unless told otherwise.
        n_problems, n_samples: under each variant; one with k votes draws k times as many answers.
        folder: made if it is not there.
        temperature, top_p, max_new_tokens, system: see `stepsal.generate`.
        seed: of problems and draws.
        batch_size: answers decoded together.
        progress: show a bar over answers.

    Raises:
        ValueError: numbers out of range, variants of the same name, several greedy draws, an open `stepsal.stepflow`
            context, a prompt that fills the model's context, or a folder that is foreign, damaged, of other parameters
            or problems, or in the hands of another process; before any work. After the first batch: votes of a task
            whose verdicts have no `answer`.
    """
    import pyarrow as pa

    names = [variant.name for variant in variants]
    if not variants or len(set(names)) < len(names):
        raise ValueError(f"variants={names} must be at least one, and have names that differ")
    if min(n_problems, n_samples, batch_size) < 1:
        raise ValueError(f"n_problems={n_problems}, n_samples={n_samples}, batch_size={batch_size} must be at least 1")
    n_draws, way_of = _draws(variants, n_samples), {v.way: v for v in variants}
    if temperature == 0 and max(n_draws.values()) > 1:
        raise ValueError("temperature=0 gives the same answer again: use one sample and no votes, or a temperature")
    if active_flow(model) is not None:
        raise ValueError("a stepflow context is open, of which the folder would not know; use Variant(stepflow=...)")
    folder = Path(folder)
    wanted = {
        "format": FORMAT, "version": FORMAT_VERSION, "model": model.cfg.model_name, "weights": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "task": task.name, "seed": seed,
        "decoding": {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "system": system},
        "chat_template": digest(str(getattr(model.tokenizer, "chat_template", None)).encode()),
    }  # fmt: skip
    problems = [task.sample(seed + i) for i in range(n_problems)]
    for variant in {(v.instruction, v.budget, v.wait): v for v in variants}.values():
        questions = [variant.ask(problem) for problem in problems]
        check_generation(
            model, questions, temperature=temperature, top_p=top_p, max_new_tokens=variant.budget or max_new_tokens,
            system=system, put_off=variant.wait,
        )  # fmt: skip
    with alone_in(folder):
        _begin(folder, wanted)
        there = _check_problems(folder, problems)
        pairs = [(draw, i) for draw in range(max(n_draws.values())) for i in range(n_problems)]
        missing = {
            way: {p for p in pairs if p[0] < n and (way, *p) not in there} for way, n in n_draws.items()
        }  # fmt: skip
        total = sum(n * n_problems for n in n_draws.values())
        run = uuid.uuid4().hex
        left = sum(map(len, missing.values()))
        flops = decoding_flops(model) if left else None
        with tqdm(total=total, initial=total - left, desc=f"answers to {task.name}", disable=not progress) as bar:
            for number, batch in enumerate(_batches(pairs, batch_size)):
                ways = list(n_draws)
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    if not (now := [pair for pair in batch if pair in missing[way]]):
                        continue
                    rows = _answer(
                        model, way_of[way], [problems[i] for _, i in now], seed=[_seed(seed, i, d) for d, i in now],
                        temperature=temperature, top_p=top_p, system=system,
                        max_new_tokens=way_of[way].budget or max_new_tokens,
                    )  # fmt: skip
                    if n_draws[way] > n_samples and not all(row["can_vote"] for row in rows):
                        raise ValueError(f"verdicts of {task.name} have no `answer` to vote with: use votes=1")
                    for row, (draw, i) in zip(rows, now, strict=True):
                        row |= {"way": way, "problem": i, "draw": draw, "batch": number, "run": run}
                        row["flops"] = flops.of(row["n_prompt"], row["n_new_tokens"])  # type: ignore[union-attr]
                    _write(folder, pa.Table.from_pylist(rows, schema=_schema()))
                    bar.update(len(rows))
        _merge(folder)
    return Evaluation(folder, tuple(variants), n_problems, n_samples)


@dataclass(frozen=True)
class Evaluation:
    """Answers of several variants to the same problems, and what they say.

    Attributes:
        folder: where they lie.
        variants: compared ones; the first is the baseline of comparisons.
        n_problems, n_samples: that every variant has answered.
    """

    folder: Path
    variants: tuple[Variant, ...]
    n_problems: int
    n_samples: int

    @property
    def manifest(self) -> dict[str, Any]:
        """Model, task, parameters and versions."""
        return read_manifest(self.folder, FORMAT, FORMAT_VERSION)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """One row per answer that the variants need: way, problem, draw, correct, answer, error, n_new_tokens, ...

        `question` tells different questions apart (a digest); `response` is what the model wrote.

        Raises:
            ValueError: the folder lacks some.
        """
        frame = _rows(self.folder)
        needed = _draws(self.variants, self.n_samples)
        wanted = frame["problem"].lt(self.n_problems) & frame["draw"].lt(frame["way"].map(needed))
        frame = frame[wanted].sort_values(["way", "draw", "problem"], ignore_index=True)
        for way, n in needed.items():
            if (found := int((frame["way"] == way).sum())) != n * self.n_problems:
                raise ValueError(f"{self.folder} has {found} of {n * self.n_problems} answers of {way}: evaluate again")
        return frame

    def given(self, name: str) -> pd.DataFrame:
        """The answers that a variant gives, one row per problem and sample: its draws, or what they voted for."""
        variant = self._variant(name)
        frame = self.answers[self.answers["way"] == variant.way]
        frame = frame[frame["draw"] < self.n_samples * variant.votes]
        frame = frame.assign(sample=frame["draw"] // variant.votes)
        if variant.votes > 1:
            groups = frame.sort_values("draw").groupby(["problem", "sample"], sort=True)
            costs = groups[_COSTS].sum()
            frame = frame.loc[[_voted(group["answer"]) for _, group in groups]].reset_index(drop=True)
            frame[_COSTS] = costs.to_numpy()
            frame["n_new_tokens"] = frame["n_new_tokens"].astype(int)
        return frame.sort_values(["problem", "sample"], ignore_index=True)

    def verdicts(self, name: str, what: What = "correct") -> Verdicts:
        """[problem, sample]: correct, or answer_correct where a task tells these apart."""
        if what not in get_args(What):
            raise ValueError(f"what={what!r} is no verdict; use one of {', '.join(map(repr, get_args(What)))}")
        return self.given(name)[what].to_numpy(dtype=bool).reshape(self.n_problems, self.n_samples)

    @cached_property
    def groups(self) -> Groups:
        """A number for each problem, the same for problems with the same question."""
        import pandas as pd

        questions = self.answers.drop_duplicates("problem").set_index("problem")["question"].sort_index()
        return np.asarray(pd.factorize(questions)[0])

    def accuracy(self, what: What = "correct", k: Sequence[int] = ()) -> pd.DataFrame:
        """Accuracy of each variant with its interval, pass@k, and the share of answers that were cut off."""
        import pandas as pd

        rows = []
        for variant in self.variants:
            correct = self.verdicts(variant.name, what)
            share = accuracy(correct, groups=self.groups)
            rows.append(
                {"variant": variant.name, "n_problems": self.n_problems, "n_different": len(set(self.groups)),
                 "n_samples": self.n_samples, "accuracy": share.value, "low": share.low, "high": share.high}
                | {f"pass@{n}": pass_at_k(correct, n) for n in k}
                | {"truncated": self.given(variant.name)["truncated"].mean()}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def paired(self, baseline: str | None = None, what: What = "correct") -> pd.DataFrame:
        """Each variant against the baseline: difference, what is fixed and broken, p-values (`PairedDifference`).

        Sample j of a variant that votes has other draws than sample j of one that does not, from j = 1 on.
        """
        import pandas as pd

        base = self._variant(baseline).name
        rows = [
            {"variant": v.name, "baseline": base} | asdict(self.difference(base, v.name, what))
            for v in self.variants
            if v.name != base
        ]
        return pd.DataFrame(rows, columns=["variant", "baseline", *(f.name for f in fields(PairedDifference))])

    def difference(self, before: str, after: str, what: What = "correct") -> PairedDifference:
        """How accuracy changes from one variant to another."""
        return paired_difference(self.verdicts(before, what), self.verdicts(after, what), groups=self.groups)

    def errors(self, name: str, baseline: str | None = None) -> pd.DataFrame:
        """Kinds of first errors before (rows) and after (columns), "none" for correct answers; counts of answers."""
        import pandas as pd

        before, after = (self.given(n)["error"].fillna("none") for n in (self._variant(baseline).name, name))
        return pd.crosstab(before.rename("before"), after.rename("after"))

    def repairs(self, name: str, baseline: str | None = None) -> pd.DataFrame:
        """What a variant fixes and breaks, by kind of the first error; counts of answers.

        Columns: error; before (baseline answers with it), fixed (of those, the ones that become correct), changed (that
        get another first error), broken (correct baseline answers that get it), after (answers of the variant with it).
        """
        import pandas as pd

        table = self.errors(name, baseline)
        kinds = sorted((set(table.index) | set(table.columns)) - {"none"})
        table = table.reindex(index=["none", *kinds], columns=["none", *kinds], fill_value=0)
        before, after = table.sum(axis=1)[kinds], table.sum(axis=0)[kinds]
        fixed, same = table.loc[kinds, "none"], [table.loc[kind, kind] for kind in kinds]
        columns = {
            "before": before,
            "fixed": fixed,
            "changed": before - fixed - same,
            "broken": table.loc["none", kinds],
        }
        found = pd.DataFrame({**columns, "after": after}, index=kinds)
        return found.rename_axis("error").sort_values("before", ascending=False, kind="stable").reset_index()

    def costs(self, baseline: str | None = None) -> pd.DataFrame:
        """What an answer of each variant costs: mean new tokens and FLOPs of decoding, and time next to the baseline's.

        FLOPs are those of all draws that vote, prompt included (`stepsal.generation.flops`); what an `edit` computes is not in
        them. The time ratio is the median over batches of the same answers that one run did in turn, with quartiles,
        times the number of votes over the baseline's; NaN where there is no such batch.
        """
        import pandas as pd

        self.answers  # noqa: B018  all are there
        frame = _rows(self.folder).sort_values(["draw", "problem"])
        frame["member"] = list(zip(frame["draw"], frame["problem"], strict=True))
        batches = frame.groupby(["way", "run", "batch"])
        seconds, members = batches["seconds"].sum(), batches["member"].agg(tuple)
        base = self._variant(baseline)
        rows = []
        for variant in self.variants:
            given = self.given(variant.name)
            both = pd.concat([members[variant.way], members[base.way]], axis=1, join="inner", keys=["this", "base"])
            alike = both.index[both["this"] == both["base"]]
            ratio = seconds[variant.way][alike] / seconds[base.way][alike] * variant.votes / base.votes
            low, median, high = ratio.quantile([0.25, 0.5, 0.75])
            rows.append(
                {"variant": variant.name, "new_tokens": given["n_new_tokens"].mean(), "flops": given["flops"].mean(),
                 "flops_ratio": given["flops"].mean() / self.given(base.name)["flops"].mean(),
                 "time_ratio": median, "time_low": low, "time_high": high, "batches": len(ratio)}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _variant(self, name: str | None) -> Variant:
        named = {v.name: v for v in self.variants}
        if name is not None and name not in named:
            raise ValueError(f"there is no variant {name!r}; there is {', '.join(map(repr, named))}")
        return self.variants[0] if name is None else named[name]


def _answer(
    model: TransformerBridge, variant: Variant, problems: list[Problem], *, seed: list[int], **decoding: Any
) -> list[dict[str, Any]]:
    """One row per problem."""
    options = {"stepflow": variant.stepflow, "put_off": variant.wait, **decoding}
    questions = [variant.ask(problem) for problem in problems]
    start = time.perf_counter()
    if variant.edit is None:
        traces = generate_batch(model, questions, seed=seed, **options)
    else:
        traces = []
        for problem, question, s in zip(problems, questions, seed, strict=True):
            with variant.edit(model, problem):
                traces.append(generate(model, question, seed=s, **options))
    seconds = (time.perf_counter() - start) / len(traces)
    rows = []
    for problem, trace in zip(problems, traces, strict=True):
        verdict = problem.grade(trace)
        answer = getattr(verdict, "answer", None)
        rows.append(
            {
                "question": digest(problem.question.encode()),
                "reference": str(problem.reference),
                "correct": bool(verdict.correct),
                "answer_correct": bool(getattr(verdict, "answer_correct", verdict.correct)),
                "answer": None if answer is None else str(answer),
                "error": getattr(verdict, "error", None) or (None if verdict.correct else "wrong"),
                "can_vote": hasattr(verdict, "answer"),
                "reason": verdict.reason,
                "truncated": trace.truncated,
                "n_prompt": trace.n_prompt,
                "n_new_tokens": len(trace) - trace.n_prompt,
                "n_steps": len(trace.steps),
                "seconds": seconds,
                "response": trace.response,
            }
        )
    return rows


def _voted(answers: pd.Series) -> Any:
    """Index of the first answer that says what most say; the first of all where none says anything."""
    counts = Counter(answers.dropna())
    if not counts:
        return answers.index[0]
    most = max(counts.values())
    return next(i for i, answer in answers.items() if counts.get(answer, 0) == most)


def _seed(seed: int, problem: int, draw: int) -> int:
    """Of the sampling; far apart for each draw, so that no two answers share one."""
    return int(digest(f"{seed} {problem} {draw}".encode())[:12], 16)


def _batches(pairs: list[tuple[int, int]], size: int) -> Iterable[list[tuple[int, int]]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _begin(folder: Path, wanted: dict[str, Any]) -> None:
    """Make a folder ready, or check that it is of the wanted parameters."""
    if any(not path.name.startswith(".") for path in folder.iterdir()):  # dots: the lock, leftovers
        check_manifest(folder, read_manifest(folder, FORMAT, FORMAT_VERSION), wanted)
    else:
        begin_manifest(folder, wanted, package_versions(PACKAGES))
    (folder / "answers").mkdir(exist_ok=True)
    for unfinished in (folder / "answers").glob(".*.part"):
        unfinished.unlink()
    _sweep(folder)  # before more is written, so that a merged file always names all that it replaces


def _check_problems(folder: Path, problems: list[Problem]) -> set[tuple[str, int, int]]:
    """(way, draw, problem) of what is there.

    Raises:
        ValueError: answers to other questions than those of today's task.
    """
    frame = _rows(folder)
    asked = dict(enumerate(digest(problem.question.encode()) for problem in problems))
    for problem, question in frame[["problem", "question"]].drop_duplicates().itertuples(index=False):
        if question != asked.get(problem, question):
            raise ValueError(
                f"{folder} has answers to another question as problem {problem}: the task has changed under its name "
                "(another version of a package, or of a file?); use another folder"
            )
    return set(frame[_KEY].itertuples(index=False, name=None))


def _draws(variants: Iterable[Variant], n_samples: int) -> dict[str, int]:
    """How many draws each way needs, for the variant with the most votes."""
    needed: dict[str, int] = {}
    for variant in variants:
        needed[variant.way] = max(needed.get(variant.way, 0), n_samples * variant.votes)
    return needed


def _write(folder: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(folder / "answers" / f"{uuid.uuid4().hex}.parquet", sink.getvalue(), durable=True)


def _read(folder: Path) -> dict[Path, pa.Table]:
    """The files of a folder that count. One that was merged into another counts no more, deleted or not.

    Raises:
        ValueError: a file that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    for path in sorted((folder / "answers").glob("*.parquet")):
        try:
            tables[path] = pq.read_table(path)
        except FileNotFoundError:  # merged into another while we read
            return _read(folder)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and evaluate again to make it anew") from error
    merged = {name for t in tables.values() for name in json.loads((t.schema.metadata or {}).get(_MERGED, b"[]"))}
    return {path: table for path, table in tables.items() if path.name not in merged}


def _merge(folder: Path) -> None:
    """One file of many; a kill at any moment leaves each answer there once."""
    import pyarrow as pa

    if len(parts := _read(folder)) > 1:
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in parts.values()])
        whole = whole.sort_by([(name, "ascending") for name in _KEY])
        _write(folder, whole.replace_schema_metadata({_MERGED: json.dumps([path.name for path in parts])}))
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Delete the files that were merged into another."""
    counting = _read(folder)
    for path in set((folder / "answers").glob("*.parquet")) - set(counting):
        path.unlink()


def _rows(folder: Path) -> pd.DataFrame:
    """All rows of a folder.

    Raises:
        ValueError: a file that is damaged, or an answer that is there twice.
    """
    import pyarrow as pa

    tables = [table.replace_schema_metadata(None) for table in _read(folder).values()]
    frame = pa.concat_tables([_schema().empty_table(), *tables]).to_pandas()
    if frame.duplicated(_KEY).any():
        raise ValueError(f"{folder} has an answer twice: {frame.loc[frame.duplicated(_KEY), _KEY].iloc[0].to_dict()}")
    return frame


_KEY = ["way", "draw", "problem"]
_COSTS = ["n_new_tokens", "flops"]
_MERGED = b"stepsal.merged"  # names of the files whose rows a merged one holds


def _schema() -> Any:
    import pyarrow as pa

    text, number, flag = pa.string(), pa.int64(), pa.bool_()
    return pa.schema(
        {"way": text, "draw": number, "problem": number, "question": text, "reference": text, "correct": flag,
         "answer_correct": flag, "answer": text, "error": text, "reason": text, "truncated": flag, "n_prompt": number,
         "n_new_tokens": number, "n_steps": number, "seconds": pa.float64(), "batch": number, "run": text,
         "flops": pa.float64(),
         "response": text}
    )  # fmt: skip
