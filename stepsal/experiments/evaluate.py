"""Answer the same problems under several variants, graded, and kept in a folder.

Draw d of problem i has the same seed under every variant, so that variants are paired. What is missing is known from
the rows in the folder (`stepsal.experiments.results`): an interrupted run goes on when it is called again, and so does
one that asks for more problems, samples or variants. Answers are kept as they are done, some at a time in a part of
their own; at the end of a run all parts become one.

Variants take turns, in an order that rotates, so that their times can be compared. In a turn a variant answers some
batches of problems: where an answer ends, the next begins in its row, so that the batch is full up to the end of the
turn. The seconds of an answer are its share of each pass that it was in (`stepsal.generation.loop.Written`).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from stepsal.experiments.answer_rows import ANSWER_KEY, answer_schema, keep_answers, merge_parts, read_answers
from stepsal.experiments.checks import check_counts, check_no_open_stepflow, segmentation_for_manifest
from stepsal.experiments.request import note_request
from stepsal.experiments.results import KIND, VERSION, Evaluation
from stepsal.experiments.store import Store, identity_of
from stepsal.experiments.variants import Variant, check_names, draws_needed
from stepsal.generation.answers import Answered, answer_each, check_questions, warn_of_what_is_unknown
from stepsal.generation.decoding import Decoding
from stepsal.generation.flops import decoding_flops
from stepsal.intervention.segmentation import common_segmentation
from stepsal.storage import digest
from stepsal.trace.prompt import check_chat
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Problem, Task, Verdict
    from stepsal.trace import Trace


def evaluate(
    model: TransformerBridge,
    task: Task,
    variants: Sequence[Variant],
    n_problems: int,
    n_samples: int = 1,
    *,
    folder: str | Path,
    decoding: Decoding = Decoding(temperature=1.0),
    seed: int = 0,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    segmentation: Segmentation | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Evaluation:
    """Answer problems of a task under each variant, graded, in a folder, resuming one that was begun.

    Make the same call again to resume a run that was interrupted; ask for more problems, samples or variants to extend
    it. Answers that the folder has are never written again.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed, such as `stepsal.tasks.chain.ChainTask(length=(7, 9))`.
        variants: variants with names that differ. The first is the baseline of comparisons.
        n_problems: number of problems.
        n_samples: samples of each problem under each variant; a variant with k votes draws k times as many answers.
        folder: an empty or new folder, or one to go on with; created if missing.
        decoding: settings of decoding; the default samples at temperature 1. A `Decoding()` of your own is greedy: say
            `Decoding(temperature=1.0, max_new_tokens=4096)`.
            A variant may set `max_new_tokens` and `budget_forcing` of its own.
        seed: problem i is `task.sample(seed + i)`; draws have seeds of their own, the same under every variant.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}.
        segmentation: how sections and steps are found, by StepFlow and in the traces; None is `Segmentation()`.
        batch_size: largest number of answers that are written together; where one ends, the next begins.
        progress: show a bar over answers.

    Raises:
        ValueError: raised before any work: numbers out of range, variants of the same name, several greedy draws, an
            open `stepsal.stepflow` context, a prompt that fills the model's context, or a folder that is foreign,
            damaged, of other parameters or problems, or locked by another process. Raised after the first batch: votes
            on a task whose verdicts have no `final_answer`.

    Example:
        >>> import tempfile
        >>> task, model = stepsal.tasks.chain.ChainTask(length=1), stepsal.load("mini")
        >>> variants = [stepsal.Variant("plain"), stepsal.Variant("StepFlow", stepflow=stepsal.StepFlowConfig())]
        >>> decoding = stepsal.Decoding(max_new_tokens=40)  # greedy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evaluation = stepsal.evaluate(model, task, variants, 3, folder=folder, decoding=decoding)
        ...     evaluation.accuracy()["accuracy"].tolist()
        [1.0, 1.0]
    """
    check_names(variants)
    check_counts(n_problems=n_problems, n_samples=n_samples, batch_size=batch_size)
    _check_greedy(variants, n_samples, decoding)
    check_no_open_stepflow(model, "Variant(stepflow=...)")
    problems = [task.sample(seed + i) for i in range(n_problems)]
    warn_of_what_is_unknown(model, [problem.question for problem in problems], stacklevel=3)
    switches = check_chat(model.tokenizer, chat)
    _check_prompts(model, variants, problems, decoding, segmentation, system, switches)
    segmentation = segmentation or Segmentation()
    parameters = {
        **identity_of(model), "task": task.name, "seed": seed, "decoding": decoding.to_dict(), "system": system,
        "chat": switches, "segmentation": segmentation_for_manifest(segmentation),
    }  # fmt: skip
    evaluation = Evaluation(Path(folder), tuple(variants), n_problems, n_samples)
    with Store.opened(folder, KIND, VERSION, parameters) as store:
        answers = read_answers(store)
        _check_questions_unchanged(store.folder, answers, problems)
        needed = draws_needed(variants, n_samples)
        missing = missing_answers(needed, n_problems, answers)
        common = common_segmentation(segmentation, model)
        writer = _Writer(model, task.name, problems, decoding, system, switches, common, seed, batch_size)
        n_missing, n_needed = sum(map(len, missing.values())), sum(needed.values()) * n_problems
        bar = tqdm(total=n_needed, initial=n_needed - n_missing, desc=f"answers to {task.name}", disable=not progress)
        with bar:
            if n_missing:
                _answer_missing(store, writer, variants, missing, needed, bar)
        merge_parts(store)
        note_request(store, evaluation.to_request())
    return evaluation


class Draw(NamedTuple):
    """The place of an answer: number of the sample, and number of the problem."""

    draw: int
    problem: int


BATCHES_IN_A_TURN = 4
"""Batches of problems that a variant answers in a row: more fill its rows better, fewer compare times more closely."""


class Turn(NamedTuple):
    """The answers that one variant writes in a row."""

    variant: str
    batch: int
    draws: list[Draw]


def missing_answers(needed: Mapping[str, int], n_problems: int, answers: pd.DataFrame) -> dict[str, set[Draw]]:
    """Return the answers that each variant still has to write.

    Args:
        needed: number of draws of each problem, by `Variant.key`.
        n_problems: number of problems.
        answers: table of the answers that are kept, with the columns variant, draw and problem.

    Example:
        >>> import pandas as pd
        >>> from stepsal.experiments.evaluate import missing_answers
        >>> missing_answers({"a": 1}, 2, pd.DataFrame({"variant": ["a"], "draw": [0], "problem": [1]}))
        {'a': {Draw(draw=0, problem=0)}}
    """
    kept = set(answers[ANSWER_KEY].itertuples(index=False, name=None))
    return {
        key: {Draw(d, i) for d in range(n_draws) for i in range(n_problems) if (key, d, i) not in kept}
        for key, n_draws in needed.items()
    }


def turns(missing: Mapping[str, set[Draw]], needed: Mapping[str, int], n_problems: int, size: int) -> Iterator[Turn]:
    """Yield the turns of a run, batch by batch; of each batch, variants take turns in an order that rotates.

    Batches are the same whatever is missing, so that times of an interrupted run can be compared, too. All draws of a
    batch are needed by the same variants, so that each of them answers all of it.

    Args:
        missing: answers to write, by `Variant.key`.
        needed: number of draws of each problem, by `Variant.key`.
        n_problems: number of problems.
        size: largest number of answers in a turn.

    Example:
        >>> from stepsal.experiments.evaluate import Draw, turns
        >>> missing = {"a": {Draw(0, 0), Draw(0, 1)}, "b": {Draw(0, 1)}}
        >>> [(turn.variant, turn.batch, len(turn.draws)) for turn in turns(missing, {"a": 1, "b": 1}, 2, 1)]
        [('a', 0, 1), ('b', 1, 1), ('a', 1, 1)]
    """
    keys, batches = list(missing), list[list[Draw]]()
    for first, stop in itertools.pairwise([0, *sorted(set(needed.values()))]):
        draws = [Draw(d, i) for d in range(first, stop) for i in range(n_problems)]
        batches += [draws[start : start + size] for start in range(0, len(draws), size)]
    for number, batch in enumerate(batches):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            if to_write := [draw for draw in batch if draw in missing[key]]:
                yield Turn(key, number, to_write)


def draw_seed(seed: int, problem: int, draw: int) -> int:
    """Return the seed that an answer is sampled by; seeds lie so far apart that no two answers share random numbers.

    Args:
        seed: seed of the run.
        problem: number of the problem.
        draw: number of the sample.

    Example:
        >>> from stepsal.experiments.evaluate import draw_seed
        >>> draw_seed(seed=0, problem=4, draw=1) == draw_seed(seed=0, problem=1, draw=4)
        False
    """
    return int(digest(f"{seed} {problem} {draw}".encode())[:12], 16)


@dataclass(frozen=True)
class _Writer:
    """The writer of graded answers to the problems of a run."""

    model: TransformerBridge
    task_name: str
    problems: Sequence[Problem]
    decoding: Decoding
    system: str | None
    chat: Mapping[str, Any]
    segmentation: Segmentation
    seed: int
    batch_size: int

    def rows(self, variant: Variant, draws: Sequence[Draw]) -> Generator[dict[str, Any]]:
        """Yield a row per draw when it is answered: what was written, the verdict on it, lengths and seconds.

        Raises:
            ValueError: the variant votes on verdicts that have no `final_answer`.
        """
        for answered in self._answered(variant, draws):
            draw = draws[answered.number]
            problem = self.problems[draw.problem]
            verdict = problem.grade(answered.trace)
            if variant.votes > 1 and not hasattr(verdict, "final_answer"):
                raise ValueError(f"verdicts of {self.task_name} have no `final_answer` to vote with: use votes=1")
            columns = _columns(problem, answered.trace, verdict)
            yield {"variant": variant.key, **draw._asdict(), "seconds": answered.seconds, **columns}

    def _answered(self, variant: Variant, draws: Sequence[Draw]) -> Iterator[Answered]:
        """Yield the answers of a variant as they are done; under an edit, one problem at a time."""
        if variant.edit is None:
            yield from self._together(variant, draws)
            return
        for number, draw in enumerate(draws):
            with variant.edit(self.model, self.problems[draw.problem]):
                for answered in self._together(variant, [draw]):
                    yield answered._replace(number=number)

    def _together(self, variant: Variant, draws: Sequence[Draw]) -> Iterator[Answered]:
        return answer_each(
            self.model, [variant.question_of(self.problems[draw.problem]) for draw in draws],
            variant.decoding_of(self.decoding), seeds=[draw_seed(self.seed, d.problem, d.draw) for d in draws],
            batch_size=self.batch_size, stepflow=variant.stepflow, segmentation=self.segmentation, system=self.system,
            chat=self.chat,
        )  # fmt: skip


def _columns(problem: Problem, trace: Trace, verdict: Verdict) -> dict[str, Any]:
    """Return what the row of an answer says of its problem, its text and the verdict on it."""
    final_answer = getattr(verdict, "final_answer", None)
    return {
        "question": digest(problem.question.encode()),
        "reference": str(problem.reference),
        "correct": bool(verdict.correct),
        "final_answer_correct": bool(getattr(verdict, "final_answer_correct", verdict.correct)),
        "final_answer": None if final_answer is None else str(final_answer),
        "error": getattr(verdict, "error", None) or (None if verdict.correct else "wrong"),
        "reason": verdict.reason,
        "truncated": trace.truncated,
        "n_prompt": trace.n_prompt,
        "n_new_tokens": len(trace) - trace.n_prompt,
        "n_steps": len(trace.steps),
        "response": trace.response,
    }


def _answer_missing(
    store: Store,
    writer: _Writer,
    variants: Sequence[Variant],
    missing: Mapping[str, set[Draw]],
    needed: Mapping[str, int],
    bar: tqdm[Any],
) -> None:
    """Write what is missing, and keep it in parts of as many answers as are written together."""
    by_key = {v.key: v for v in sorted(variants, key=lambda v: v.votes)}  # of one key, the one that votes
    run, flops = uuid.uuid4().hex, decoding_flops(writer.model)
    for turn in turns(missing, needed, len(writer.problems), BATCHES_IN_A_TURN * writer.batch_size):
        with (
            _Keeper(store, writer.batch_size) as keeper,
            closing(writer.rows(by_key[turn.variant], turn.draws)) as rows,
        ):
            for row in rows:
                row |= {"batch": turn.batch, "run": run, "flops": flops.of(row["n_prompt"], row["n_new_tokens"])}
                keeper.add(row)
                bar.update()


class _Keeper:
    """A writer of parts, which holds answers until there are enough for one, or the block ends, however it does."""

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._size, self._rows = store, size, list[dict[str, Any]]()

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self._keep()

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of an answer.

        Args:
            row: columns of `stepsal.experiments.answer_rows`.
        """
        self._rows.append(row)
        if len(self._rows) >= self._size:
            self._keep()

    def _keep(self) -> None:
        import pyarrow as pa

        if self._rows:
            keep_answers(self._store, pa.Table.from_pylist(self._rows, schema=answer_schema()))
            self._rows = []


def _check_greedy(variants: Sequence[Variant], n_samples: int, decoding: Decoding) -> None:
    """Refuse several greedy draws of a problem, which would be the same.

    Raises:
        ValueError: there would be some.
    """
    if decoding.temperature == 0 and max(draws_needed(variants, n_samples).values()) > 1:
        raise ValueError("temperature=0 gives the same answer again: use one sample and no votes, or a temperature")


def _check_prompts(
    model: TransformerBridge,
    variants: Sequence[Variant],
    problems: Sequence[Problem],
    decoding: Decoding,
    segmentation: Segmentation | None,
    system: str | None,
    chat: Mapping[str, Any],
) -> None:
    """Refuse questions that the model can't be asked under one of the variants.

    Raises:
        ValueError: naming the first.
    """
    for variant in {(v.instruction, v.decoding_of(decoding)): v for v in variants}.values():
        questions = [variant.question_of(problem) for problem in problems]
        check_questions(
            model,
            questions,
            decoding=variant.decoding_of(decoding),
            segmentation=segmentation,
            system=system,
            chat=chat,
        )


def _check_questions_unchanged(folder: Path, answers: pd.DataFrame, problems: Sequence[Problem]) -> None:
    """Refuse a folder with answers to other questions than those that the task asks today.

    Raises:
        ValueError: naming the first such problem.
    """
    today = dict(enumerate(digest(problem.question.encode()) for problem in problems))
    for problem, question in answers[["problem", "question"]].drop_duplicates().itertuples(index=False):
        if question != today.get(problem, question):
            raise ValueError(
                f"{folder} has answers to another question as problem {problem}: the task has changed under its name "
                "(another version of a package, or of a file?); use another folder"
            )
