"""The paper's benchmarks (arXiv 2604.06695, Section 5) from the Hugging Face hub, at pinned revisions.

    stepsal.tasks.hub.HubTask("aime25")
    stepsal.tasks.hub.HubTask("aime25", file="aime25.jsonl")      # the same records, from a file

LiveCodeBench, whose answers are programs, is not among them: Inspect can run it in a sandbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepsal.tasks.answers import Grader, Problem
from stepsal.tasks.jsonl import Fields, problems_of, read_jsonl


@dataclass(frozen=True)
class Benchmark:
    """The place of a benchmark on the hub, and the shape of its records.

    Attributes:
        path: name of the data set on the hub.
        split: split of the data set.
        revision: pinned commit; None takes the newest, whose commit becomes part of the task's name.
        question: name of the field with the question.
        answer: name of the field with the right final answer.
        n_problems: number of problems.
        n_samples: samples of each problem in the paper.
        wrong: names of the fields with wrong options; where there are any, problems are graded by the letter.
        config: configuration of the data set; None where it has only one.
        grader: grader of problems without options.
    """

    path: str
    split: str
    revision: str | None
    question: str
    answer: str
    n_problems: int
    n_samples: int
    wrong: tuple[str, ...] = ()
    config: str | None = None
    grader: Grader = "math"

    def fields(self, record: Mapping[str, Any]) -> Fields:
        """Return the fields of a problem.

        Args:
            record: a record of the data set.
        """
        answer = record[self.answer]
        options = [answer, *(record[name] for name in self.wrong)] if self.wrong else None
        return Fields(record[self.question], answer, options)


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        "Maxwell-Jia/AIME_2024", "train", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792", "Problem", "Answer", 30, 16
    ),
    "aime25": Benchmark(
        "math-ai/aime25", "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "problem", "answer", 30, 16
    ),
    "amc23": Benchmark("math-ai/amc23", "test", None, "question", "answer", 40, 16),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500", "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "problem", "answer", 500, 1
    ),
    "gpqa-diamond": Benchmark(
        "Idavidrein/gpqa", "train", "5233cd1db58884ed0bf678c7c6be731722a23f84", "Question", "Correct Answer", 198, 8,
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"), config="gpqa_diamond",
        grader="choice",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class HubTask:
    """A benchmark as a task (`stepsal.tasks.Task`): problem i is record i, counted from 0.

    Attributes:
        benchmark: a name in `BENCHMARKS`.
        file: JSONL file to take the records from instead of the hub, with the same fields; it may hold fewer of them.
        revision: commit to use in place of the pinned one.
        shuffle_seed: seed of the order of options.

    Raises:
        ValueError: an unknown benchmark, a record that can't be read, or a wrong number of records from the hub.
        ImportError: `datasets` is not installed.
        OSError: the hub can't be reached, or refuses; the message names the fields that a `file` needs instead.
    """

    benchmark: str
    file: str | Path | None = None
    revision: str | None = None
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise ValueError(f"benchmark={self.benchmark!r} is unknown; use one of {', '.join(BENCHMARKS)}")
        n, expected = len(self.problems), self.about.n_problems
        if n == 0 or (self.file is None and n != expected):
            source = self.file or self.name
            raise ValueError(f"{self.benchmark} has {expected} problems, but {n} were found in {source}")

    @property
    def about(self) -> Benchmark:
        """The place of the benchmark on the hub, and the shape of its records."""
        return BENCHMARKS[self.benchmark]

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def name(self) -> str:
        """A text that names the benchmark, its source, and the order of options."""
        if self.file is not None:
            digest = hashlib.sha256(Path(self.file).read_bytes()).hexdigest()[:12]
            return f"{self.benchmark} {Path(self.file).name} {digest} options {self.shuffle_seed}"
        return f"{self.benchmark} {self.about.path} {self._commit} options {self.shuffle_seed}"

    def sample(self, seed: int) -> Problem:
        """Return the problem of a record.

        Args:
            seed: number of the record, counted from 0.

        Raises:
            IndexError: there is no such record.
        """
        if not 0 <= seed < len(self):
            raise IndexError(f"{self.benchmark} has problems 0..{len(self) - 1}, not {seed}: ask for fewer, from 0")
        return self.problems[seed]

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """All problems, in the order of the records."""
        records = read_jsonl(self.file, self.about.fields) if self.file is not None else self._records()
        return problems_of(records, self.about.grader, self.shuffle_seed)

    @cached_property
    def _commit(self) -> str:
        """The revision that was asked for, else the pinned one, else the newest commit."""
        pinned = self.revision or self.about.revision
        if pinned is not None:
            return pinned
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self.about.path, timeout=10).sha)

    def _records(self) -> Iterator[tuple[str, Fields]]:
        """Yield the records of the hub, each with its place in words."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("benchmarks of the hub need pip install 'stepsal[hub]'") from error
        about = self.about
        try:
            from huggingface_hub import HfApi, constants

            if not constants.HF_HUB_OFFLINE:  # offline a copy in the cache is enough
                HfApi().dataset_info(about.path, revision=self._commit, timeout=10)  # fails at once, and says why
            records = load_dataset(about.path, about.config, split=about.split, revision=self._commit)
        except Exception as error:
            names = ", ".join((about.question, about.answer, *about.wrong))
            raise OSError(
                f"{about.path} can't be loaded from the Hugging Face hub ({type(error).__name__}: {error}). Without "
                f"it, pass HubTask({self.benchmark!r}, file=...): a JSONL file, one object per problem, with the "
                f"fields {names}"
            ) from error
        for number, record in enumerate(records):
            try:
                yield f"{about.path}, record {number}", about.fields(record)
            except KeyError as error:
                raise ValueError(f"{about.path}, record {number}: there is no field {error}") from error
