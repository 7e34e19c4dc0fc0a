"""The Inspect provider `stepsal/<model>`: chats in, reasoning and text out, StepFlow by `-M` arguments.

Each answer's seed is derived from the configured seed, the sample, its epoch and the prompt, so that epochs differ, a
retried or resumed sample gets the answer it would have got, and none of it depends on what else is in the batch.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.loading import load
from stepsal.generation.answers import warn_of_what_is_unknown
from stepsal.generation.decoding import Decoding
from stepsal.generation.endings import before_stop
from stepsal.generation.loop import check_prompt
from stepsal.harness.arguments import ModelArguments, read_dtype
from stepsal.harness.chat import render, tool_calls
from stepsal.harness.engine import Reply, Request, release, result_of, shared_engine
from stepsal.harness.inspect_private import active_sample, sample_metadata
from stepsal.intervention.segmentation import common_segmentation
from stepsal.storage import digest
from stepsal.trace import Trace
from stepsal.trace.prompt import check_chat
from stepsal.trace.sections import sections

MAX_TOKENS = 32768  # where the evaluation says nothing, as in the paper's settings; the context is a limit too
UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "logprobs", "top_logprobs",
    "prompt_logprobs", "response_schema", "reasoning_mode", "reasoning_tokens", "effort", "verbosity", "extra_body",
)  # fmt: skip
STOP_REASONS: dict[str, StopReason] = {
    "end": "stop", "stop": "stop", "limit": "max_tokens", "context": "model_length"
}  # fmt: skip
KEPT_TOKENS = 20_000_000  # of answers that are kept for `capture_step_saliency`
COUNTED_PROMPTS = 100_000  # prompts whose repetitions are counted

Place = tuple[str, ...]
"""The place of an answer: attempt, configured seed, sample, epoch and prompt; empty without a seed."""


class KeptAnswer(NamedTuple):
    """The tokens of an answer and what else a trace of exactly these needs.

    Attributes:
        tokens: prompt and answer.
        n_prompt: number of tokens of the prompt.
        question: the last message of the user.
        truncated: True if a limit ended the answer.
        chat: switches of the chat template.
    """

    tokens: Int[Tensor, " pos"]
    n_prompt: int
    question: str
    truncated: bool
    chat: dict[str, Any]


class StepsalAPI(ModelAPI):
    """A model of `stepsal.load` as a provider of Inspect.

    Args:
        model_name: what `stepsal.load` takes: "mini", "smollm2", a hub id, a local folder.
        base_url: not used; every provider has it.
        api_key: not used; every provider has it.
        config: generation options of Inspect. max_tokens, temperature (0 if not set), top_p, stop_seqs and seed are
            honoured; reasoning_effort is, where the chat template has a switch of that name; reasoning_history "all"
            and "last" put the thinking of earlier answers back where the template drops it, "none" leaves it out, and
            "auto" (as if not set) lets the template decide. Options in `UNSUPPORTED` are refused.
        **model_args: `device`, `device_map`, `dtype`, `revision` and `trust_remote_code` of `stepsal.load`;
            `batch_size`, the largest number of answers written together (default 16); `preset`, published settings of
            StepFlow by name or a JSON file of `StepFlowConfig.save` or `Calibration.save_preset`; `stepflow=true` for
            the paper's settings; the fields of `StepFlowConfig` (`tau_max`, `alpha`, `oeb_layers`, ...), which change
            these settings, and any of which switches StepFlow on; `stepflow=false`, which overrules them all; `format`
            (a name, or the text of a marker before the summary), `split` and `min_chars` of `Segmentation`, for
            StepFlow, messages and traces; `chat`, switches of the chat template, or one of them by `chat.<name>`;
            `stop_in_thinking=true`, which lets stop sequences end the thinking, too.

    Attributes:
        stepflow: settings of StepFlow; None leaves the model as it is.
        segmentation: how sections and steps are found.
        chat: switches of the chat template.
        stop_in_thinking: whether stop sequences count in the thinking, too.
        batch_size: largest number of answers that are written together.
        engine: the model and its thread, shared by models of the same name and loading options.

    Raises:
        ValueError: an unknown argument, a value out of range, or a switch that the chat template does not have.
        FileNotFoundError: a preset that is no file.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # as Inspect's own providers have it
        **model_args: Any,
    ) -> None:
        arguments = ModelArguments.read(model_args)
        # Inspect's cache tells answers apart by this, and knows nothing of StepFlow
        settings = digest(json.dumps(arguments.to_dict(), default=str).encode())[:12]
        super().__init__(model_name=model_name, base_url=f"stepsal:{settings}", api_key=api_key, config=config)
        self.stepflow, self.segmentation = arguments.stepflow, arguments.segmentation
        self.batch_size, self.stop_in_thinking = arguments.batch_size, arguments.stop_in_thinking
        if config.max_connections is None and config.adaptive_connections is None:
            # as many samples as fit into a batch; Inspect begins with 20 otherwise
            config.max_connections = self.batch_size
        self._kept: OrderedDict[str, KeptAnswer] = OrderedDict()
        self._n_kept_tokens = 0
        self._counts: OrderedDict[Place, int] = OrderedDict()
        options = dict(arguments.loading)
        self._key = (model_name, *sorted((name, str(value)) for name, value in options.items()))
        if "dtype" in options:
            options["dtype"] = read_dtype(options["dtype"])
        self.engine = shared_engine(self._key, lambda: load(model_name, **options))
        self._closed = self._was_asked = False
        try:  # what the model does not have is refused
            self.segmentation = common_segmentation(self.segmentation, self.model)
            self.chat = check_chat(self.model.tokenizer, arguments.chat)
            if self.stepflow is not None:
                self.stepflow.resolve(self.model.cfg.n_layers)
        except ValueError:
            self.close()
            raise

    @property
    def model(self) -> TransformerBridge:
        """The model, which only `engine` may run."""
        return self.engine.model

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a chat; Inspect calls this for many samples concurrently.

        Args:
            input: the chat.
            tools: functions that the model may call.
            tool_choice: "auto" or "none".
            config: generation options.

        Raises:
            ValueError: options that can't be honoured, or a chat that can't be rendered.
        """
        _check_options(config, tools, tool_choice)
        if not self._was_asked:  # the questions of a task are of one kind
            self._was_asked = True
            warn_of_what_is_unknown(self.model, [message.text for message in input if message.role == "user"][-1:])
        decoding = _decoding(config, self.stop_in_thinking)
        tools = [] if tool_choice == "none" else tools
        chat = self._switches(config)
        prompt = self.render(input, tools, chat=chat, keep_thinking=config.reasoning_history in ("all", "last"))
        ids: list[int] = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        try:
            check_prompt(self.model, ids)
        except ValueError as error:  # so that a chain of tool calls ends, and is scored
            return ModelOutput.from_content(self.model_name, str(error), stop_reason="model_length", error=str(error))
        place, seed = self._seed(config.seed, prompt)
        request = Request(ids, decoding, seed, self.stepflow, self.segmentation, self.batch_size)
        begin = time.monotonic()
        try:
            reply = await result_of(self.engine.ask(request))
        except BaseException:
            if place in self._counts:  # Inspect may ask again: it is to get the same answer then
                self._counts[place] -= 1
            raise
        finally:
            request.cancel()  # without effect on what is done; what is cancelled or out of time costs no token more
        message, reason = self._message(prompt, reply, decoding.stop, with_calls=bool(tools))
        self._keep(message, input, ids, reply, chat)
        return self._output(message, reason, ids, reply, seed, time.monotonic() - begin)

    def render(
        self,
        messages: list[ChatMessage],
        tools: list[ToolInfo],
        *,
        chat: Mapping[str, Any] | None = None,
        keep_thinking: bool = False,
    ) -> str:
        """Render a chat by the model's template; see `stepsal.harness.chat.render`.

        Args:
            messages: the chat.
            tools: functions that the model may call.
            chat: switches of the chat template; None is `self.chat`.
            keep_thinking: put the thinking of earlier answers back where the template drops it.

        Raises:
            ValueError: content that is no text, or a template that refuses the chat.
        """
        return render(
            self.model.tokenizer, self.model_name, messages, tools, switches=self.chat if chat is None else chat,
            format=self.segmentation.named_format, keep_thinking=keep_thinking,
        )  # fmt: skip

    def _switches(self, config: GenerateConfig) -> dict[str, Any]:
        """Return the switches of the chat template for an answer, the effort of its reasoning among them."""
        effort = config.reasoning_effort
        if effort is None:
            return self.chat
        try:
            return check_chat(self.model.tokenizer, {**self.chat, "reasoning_effort": effort})
        except ValueError as error:
            raise ValueError(
                f"reasoning_effort={effort!r} would have no effect on {self.model_name}: {error}"
            ) from error

    def _seed(self, seed: int | None, prompt: str) -> tuple[Place, int]:
        """Count an answer at its place, and return the place and the answer's own seed."""
        if seed is None:
            return (), secrets.randbits(48)
        sample = active_sample()
        sample_id, epoch, attempt = ("", "", "") if sample is None else sample
        settled = (str(seed), sample_id, epoch, digest(prompt.encode()))
        place = (attempt, *settled)  # a sample that is run again begins to count anew
        self._counts[place] = count = self._counts.get(place, 0) + 1
        while len(self._counts) > COUNTED_PROMPTS:
            self._counts.popitem(last=False)
        return place, int(digest("\n".join((*settled, str(count))).encode())[:12], 16)

    def _message(
        self, prompt: str, reply: Reply, stop: Sequence[str], with_calls: bool
    ) -> tuple[ChatMessageAssistant, StopReason]:
        """Return an answer as a message, which ends before the stop text, and why it ended."""
        ids = reply.tokens[:-1] if reply.ended == "end" else reply.tokens  # without the token that ends it
        text = self._decoded(ids)
        if reply.ended == "stop":
            text = before_stop(text, self._decoded(ids[:-1]), stop)
        thinking, words = sections(self.model.tokenizer, prompt, text, self.segmentation)
        reason = STOP_REASONS[reply.ended]
        words, calls = tool_calls(words) if with_calls else (words, [])
        if calls and reason == "stop":
            reason = "tool_calls"
        content: Any = [ContentReasoning(reasoning=thinking), ContentText(text=words)] if thinking else words
        message = ChatMessageAssistant(
            content=content, tool_calls=calls or None, model=self.model_name, source="generate"
        )
        return message, reason

    def _output(
        self,
        message: ChatMessageAssistant,
        reason: StopReason,
        prompt_ids: list[int],
        reply: Reply,
        seed: int,
        seconds: float,
    ) -> ModelOutput:
        """Return an answer as Inspect takes it; StepFlow's log is added to it and to the sample."""
        metadata: dict[str, Any] = {"seed": seed, "batch": reply.n_together, "ended": reply.ended}
        if reply.log is not None:
            metadata["stepflow"] = reply.log
            self._add_to_sample(reply.log)
        thinking = "".join(part.reasoning for part in message.content_list if isinstance(part, ContentReasoning))
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=len(prompt_ids),
                output_tokens=len(reply.tokens),
                total_tokens=len(prompt_ids) + len(reply.tokens),
                reasoning_tokens=self._n_tokens(thinking) if thinking else None,
            ),
            time=seconds,
            metadata=metadata,
        )

    def _add_to_sample(self, log: dict[str, Any]) -> None:
        """Add an answer's log to the metadata of the sample."""
        metadata = sample_metadata()
        if metadata is not None and self.stepflow is not None:
            settings = {"config": self.stepflow.to_dict(), "segmentation": self.segmentation.to_dict()}
            entry = {"model_name": self.model_name, **settings, **log}
            metadata["stepflow"] = [*metadata.get("stepflow", []), entry]

    def _keep(
        self,
        message: ChatMessageAssistant,
        messages: Sequence[ChatMessage],
        prompt_ids: list[int],
        reply: Reply,
        chat: dict[str, Any],
    ) -> None:
        """Keep an answer's tokens for `trace`; the oldest are forgotten when they are too many."""
        question = next((message.text for message in reversed(messages) if message.role == "user"), "")
        tokens = torch.tensor(prompt_ids + reply.tokens, dtype=torch.int32)
        truncated = reply.ended in ("limit", "context")
        self._kept[str(message.id)] = KeptAnswer(tokens, len(prompt_ids), question, truncated, chat)
        self._n_kept_tokens += len(tokens)
        while self._n_kept_tokens > KEPT_TOKENS:
            self._n_kept_tokens -= len(self._kept.popitem(last=False)[1].tokens)

    def trace(self, output: ModelOutput) -> Trace:
        """Return the trace of an answer of this model.

        Args:
            output: what `generate` returned.

        Raises:
            ValueError: the tokens of the answer are not kept any more, or never were.
        """
        kept = self._kept.get(str(output.message.id)) if output.choices else None
        if kept is None:
            raise ValueError(
                output.error or "the tokens of this answer are not there: it is from Inspect's cache, or from long ago"
            )
        return Trace.from_tokens(
            kept.tokens.long(), kept.n_prompt, self.model, question=kept.question, truncated=kept.truncated,
            segmentation=self.segmentation, chat=kept.chat,
        )  # fmt: skip

    def _decoded(self, ids: list[int]) -> str:
        """Return the text of tokens as they are."""
        tokenizer = self.model.tokenizer
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _n_tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def count_text_tokens(self, text: str) -> int:
        """Return how many tokens a text has.

        Args:
            text: any text; no special tokens are added to it.
        """
        return self._n_tokens(text)

    def max_connections(self) -> int:
        """Return how many samples Inspect keeps in work at a time, unless it is told otherwise."""
        return self.batch_size

    def connection_key(self) -> str:
        """Return the identity of the engine: the model's name, and how it is loaded."""
        return str(self._key)

    def max_tokens(self) -> int | None:
        """Return the limit of an answer, in tokens, for evaluations that set none."""
        return min(MAX_TOKENS, self.model.cfg.n_ctx)

    def collapse_user_messages(self) -> bool:
        """Tell Inspect to join messages of the user in a row, since many templates refuse them."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Tell Inspect to join messages of the assistant in a row, since many templates refuse them."""
        return True

    def close(self) -> None:
        """Give the engine back, and forget the answers."""
        if not self._closed:
            self._closed = True
            self._kept.clear()
            release(self._key)


def _check_options(config: GenerateConfig, tools: Sequence[ToolInfo], tool_choice: ToolChoice) -> None:
    """Refuse generation options that would have no effect."""
    options = [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, False)]
    options += ["num_choices"] if config.num_choices not in (None, 1) else []
    options += ["tool_choice"] if tools and tool_choice not in ("auto", "none") else []
    if options:
        raise ValueError(f"stepsal models don't support {', '.join(options)}; leave it out of the generation options")


def _decoding(config: GenerateConfig, stop_in_thinking: bool) -> Decoding:
    """Return generation options of Inspect as a `Decoding`; its checks are those of the numbers."""
    return Decoding(
        max_new_tokens=MAX_TOKENS if config.max_tokens is None else config.max_tokens,
        temperature=config.temperature or 0.0,
        top_p=1.0 if config.top_p is None else config.top_p,
        stop=tuple(config.stop_seqs or ()),
        stop_in_thinking=stop_in_thinking,
    )
