"""Let a model answer questions, and keep the answers as traces.

A question is rendered, tokenised and located in its prompt once: the decoding loop continues the `TokenizedPrompt` of
`check_questions`, and the trace is made with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from transformer_lens.model_bridge import TransformerBridge

from stepsal.generation.decoding import Decoding
from stepsal.generation.endings import thinking_ends
from stepsal.generation.loop import Prompt, check_prompt, write
from stepsal.intervention import StepFlowConfig, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.tasks.chain_questions import warn_of_other_questions
from stepsal.trace.prompt import TokenizedPrompt, render_prompts, tokenize_prompt
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace


def generate(
    model: TransformerBridge,
    question: str,
    *,
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    budget_forcing: int = 0,
    stop_in_thinking: bool = False,
    seed: int = 0,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Trace:
    """Let a model answer one question, and return the answer as a trace.

    A `Decoding` is passed as `**decoding.to_dict()`. The embedded reasoner "mini" knows the questions of
    `stepsal.tasks.chain` alone; where another one is asked, a warning says so.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge`; with a tokenizer.
        question: the question that the user asks; the chat template of the tokenizer is put around it.
        stepflow: decode under StepFlow with these settings. A `stepsal.stepflow` context around the call does the same.
        segmentation: the way to find sections and steps, for StepFlow and in the trace; None is that of an open
            StepFlow context, or `Segmentation()`.
        max_new_tokens: most tokens that an answer may have, thinking and summary together; the prompt does not count.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens whose probability reaches top_p, in (0, 1]; 1 keeps all.
        stop: end the answer as soon as one of these texts appears outside the thinking; it is kept in the response.
        budget_forcing: number of times that "Wait" replaces the end of the thinking, so that the model thinks on (s1,
            arXiv 2501.19393). The end is the marker of the format, such as `</think>`; for models without any it is the
            end of the answer.
        stop_in_thinking: True lets a stop text end the answer in the middle of the thinking, too.
        seed: seed of the sampling.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}; kept in the trace.
        progress: show a bar over tokens.

    Returns:
        The trace, with exactly the tokens that the model wrote, those that ended the answer included. Its `truncated`
        is True where `max_new_tokens` or the end of the context ended the answer.

    Raises:
        ValueError: the question is empty, a number is out of range, the template does not have a switch of `chat`, the
            prompt fills the context, the segmentation differs from that of an open StepFlow context, or the model's
            logits are NaN or infinite.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Anna is 3 plus 4. What is Anna?")
        >>> trace.summary
        'The answer is Anna = 7.'
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, stop, budget_forcing, stop_in_thinking)
    warn_of_what_is_unknown(model, [question], stacklevel=3)
    return answer_batch(
        model, [question], decoding, seeds=[seed], stepflow=stepflow, segmentation=segmentation, system=system,
        chat=chat, progress=progress,
    )[0]  # fmt: skip


def generate_batch(
    model: TransformerBridge,
    questions: Sequence[str],
    *,
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    budget_forcing: int = 0,
    stop_in_thinking: bool = False,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Trace]:
    """Let a model answer several questions together, and return the answers as traces.

    An answer ends at the end-of-sequence token, with a stop text, after `max_new_tokens`, or at the end of the model's
    context; the next question takes its place. A `Decoding` is passed as `**decoding.to_dict()`.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge`; with a tokenizer.
        questions: the questions that the user asks; the chat template of the tokenizer is put around each.
        stepflow: decode under StepFlow with these settings. A `stepsal.stepflow` context around the call does the same.
        segmentation: the way to find sections and steps, for StepFlow and in the traces; None is that of an open
            StepFlow context, or `Segmentation()`.
        max_new_tokens: most tokens that an answer may have, thinking and summary together; the prompt does not count.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens whose probability reaches top_p, in (0, 1]; 1 keeps all.
        stop: end an answer as soon as one of these texts appears outside the thinking; it is kept in the response.
        budget_forcing: number of times that "Wait" replaces the end of the thinking, so that the model thinks on (s1,
            arXiv 2501.19393). The end is the marker of the format, such as `</think>`; for models without any it is the
            end of the answer.
        stop_in_thinking: True lets a stop text end the answer in the middle of the thinking, too.
        seed: seeds of the sampling, one for each question; a single number means seed, seed + 1, ... An answer depends
            on its own seed only, so that it is the same in any batch (up to rounding in the logits).
        batch_size: largest number of answers that are written together; None writes all.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}; kept in the trace.
        progress: show a bar over answers; over tokens if there is one question.

    Returns:
        One trace per question, with exactly the tokens that the model wrote, those that ended the answer included. Its
        `truncated` is True where `max_new_tokens` or the end of the context ended the answer.

    Raises:
        ValueError: there is no question or an empty one, a number is out of range, the template does not have a switch
            of `chat`, a prompt fills the context, or the segmentation differs from that of an open StepFlow context.

    Example:
        >>> model = stepsal.load("mini")
        >>> questions = [f"Anna is {n} plus 4. What is Anna?" for n in (1, 2)]
        >>> [trace.summary for trace in stepsal.generate_batch(model, questions)]
        ['The answer is Anna = 5.', 'The answer is Anna = 6.']
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, stop, budget_forcing, stop_in_thinking)
    warn_of_what_is_unknown(model, questions, stacklevel=3)
    seeds = [seed + row for row in range(len(questions or ()))] if isinstance(seed, int) else seed
    return answer_batch(
        model, questions, decoding, seeds=seeds, batch_size=batch_size, stepflow=stepflow, segmentation=segmentation,
        system=system, chat=chat, progress=progress,
    )  # fmt: skip


def answer_batch(
    model: TransformerBridge,
    questions: Sequence[str],
    decoding: Decoding,
    *,
    seeds: Sequence[int],
    batch_size: int | None = None,
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Trace]:
    """Let a model answer several questions together, with the settings as one value.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        questions: the questions that the user asks.
        decoding: settings with which the answers are written.
        seeds: seeds of the sampling, one for each question.
        batch_size: largest number of answers that are written together; None writes all.
        stepflow: decode under StepFlow with these settings.
        segmentation: the way to find sections and steps, for StepFlow and in the traces; None is that of an open
            StepFlow context, or `Segmentation()`.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}; kept in the trace.
        progress: show a bar over answers; over tokens if there is one question.

    Returns:
        One trace per question.

    Raises:
        ValueError: as for `generate_batch`, or there is not one seed for each question.

    Example:
        >>> from stepsal.generation.answers import answer_batch
        >>> model, decoding = stepsal.load("mini"), stepsal.Decoding(max_new_tokens=5)
        >>> traces = answer_batch(model, ["Anna is 3. What is Anna?"] * 2, decoding, seeds=[0, 1])
        >>> [trace.truncated for trace in traces]
        [True, True]
    """
    answers = answer_each(
        model, questions, decoding, seeds=seeds, batch_size=batch_size, stepflow=stepflow, segmentation=segmentation,
        system=system, chat=chat, progress=progress,
    )  # fmt: skip
    return [answer.trace for answer in sorted(answers, key=lambda answer: answer.number)]


class Answered(NamedTuple):
    """A question that has been answered.

    Attributes:
        number: number of the question, from 0.
        trace: the answer.
        seconds: its share of the time, as in `stepsal.generation.loop.Written`.
    """

    number: int
    trace: Trace
    seconds: float


def answer_each(
    model: TransformerBridge,
    questions: Sequence[str],
    decoding: Decoding,
    *,
    seeds: Sequence[int],
    batch_size: int | None = None,
    stepflow: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Iterator[Answered]:
    """Let a model answer several questions together, and yield each answer when it is done.

    The arguments are those of `answer_batch`. Close the iterator (`contextlib.closing`) if you leave it early.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        questions: the questions that the user asks.
        decoding: settings with which the answers are written.
        seeds: seeds of the sampling, one for each question.
        batch_size: largest number of answers that are written together; None writes all.
        stepflow: decode under StepFlow with these settings.
        segmentation: the way to find sections and steps, for StepFlow and in the traces.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template.
        progress: show a bar over answers; over tokens if there is one question.

    Raises:
        ValueError: as for `answer_batch`.

    Example:
        >>> from stepsal.generation.answers import answer_each
        >>> model, decoding = stepsal.load("mini"), stepsal.Decoding(max_new_tokens=40)
        >>> questions = ["Anna is 3 plus 1. Hugo is Anna plus 2. What is Hugo?", "Anna is 3 plus 1. What is Anna?"]
        >>> [answer.number for answer in answer_each(model, questions, decoding, seeds=[0, 1])]
        [1, 0]
    """
    prompts = check_questions(model, questions, decoding=decoding, segmentation=segmentation, system=system, chat=chat)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} questions: give one for each, or a single one")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or None for all questions together")
    context = nullcontext() if stepflow is None else open_stepflow(model, stepflow, segmentation=segmentation)
    to_write = [Prompt(prompt.ids, n, decoding.max_new_tokens) for prompt, n in zip(prompts, seeds, strict=True)]
    with context:
        segmentation = agreed_segmentation(model, segmentation)
        for answer in write(
            model, to_write, batch_size, decoding=decoding, segmentation=segmentation, progress=progress
        ):  # fmt: skip
            trace = Trace.from_answer(
                prompts[answer.number], answer.tokens, model, truncated=answer.ended in ("limit", "context"),
                segmentation=segmentation,
            )  # fmt: skip
            yield Answered(answer.number, trace, answer.seconds)


def warn_of_what_is_unknown(model: TransformerBridge, questions: Sequence[str], *, stacklevel: int = 2) -> None:
    """Warn of questions that the embedded reasoner, which its name tells, was not made for.

    Args:
        model: the model that is asked.
        questions: the questions; those of other models are not looked at.
        stacklevel: whose call the warning names, as for `warnings.warn`.

    Example:
        >>> from stepsal.generation.answers import warn_of_what_is_unknown
        >>> warn_of_what_is_unknown(stepsal.load("mini"), [stepsal.tasks.chain.EXAMPLE])
    """
    if model.cfg.model_name == "mini" and not isinstance(questions, str):
        asked = [question for question in questions or () if question]
        warn_of_other_questions(asked, stacklevel=stacklevel + 1)


def check_questions(
    model: TransformerBridge,
    questions: Sequence[str],
    *,
    decoding: Decoding,
    segmentation: Segmentation | None = None,
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
) -> list[TokenizedPrompt]:
    """Check that a model can answer questions with these settings, and return their prompts.

    Args:
        model: from `stepsal.load`.
        questions: the questions that the user asks.
        decoding: settings with which the answers are to be written.
        segmentation: the way to find the thinking, whose end budget forcing puts off; None lets the model tell it.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}; kept in the trace.

    Returns:
        The prompt of each question with its tokens.

    Raises:
        ValueError: there is no question or an empty one, the model has no tokenizer, its template does not have a
            switch of `chat`, a prompt fills the context, or budget forcing is requested of a model that ends its
            thinking by several tokens.

    Example:
        >>> from stepsal.generation.answers import check_questions
        >>> prompts = check_questions(stepsal.load("mini"), ["What is Anna?"], decoding=stepsal.Decoding())
        >>> prompts[0].text
        '<|endoftext|><|user|>What is Anna?<|assistant|><think>'
    """
    if not questions or isinstance(questions, str):
        raise ValueError(f"questions={questions!r} must be a list of at least one; for a single one there is generate")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name!r} has no tokenizer: pass one to stepsal.load(..., tokenizer=...)")
    rendered = render_prompts(tokenizer, questions, system, chat=chat)
    prompts = [tokenize_prompt(tokenizer, prompt) for prompt in rendered]
    check_prompt(model, max((prompt.ids for prompt in prompts), key=len))
    if decoding.budget_forcing:
        thinking_ends(model, segmentation)  # refuses a model that ends its thinking by several tokens
    return prompts
