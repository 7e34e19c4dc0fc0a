"""The Inspect provider `stepsal/<model>`: chats in, reasoning and text out, StepFlow by `-M` arguments.

Each answer's seed is derived from the configured seed, the sample, its epoch and the prompt, so that epochs differ, a
retried or resumed sample gets the answer it would have got, and none of it depends on what else is in the batch.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import jinja2
import torch
from inspect_ai.log._samples import sample_active
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.model._providers.util import HFHandler
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge import load
from stepsal.generation import check_prompt
from stepsal.harness.engine import Reply, Request, Sharing, release, shared_engine
from stepsal.intervention import StepFlowConfig
from stepsal.storage import digest
from stepsal.trace import Trace, sections

MAX_TOKENS = 32768  # where the evaluation says nothing, as in the paper's settings; the context is a limit too
UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "num_choices", "logprobs",
    "top_logprobs", "prompt_logprobs", "response_schema",
)  # fmt: skip
STOP_REASONS: dict[str, StopReason] = {
    "end": "stop", "stop": "stop", "limit": "max_tokens", "context": "model_length"
}  # fmt: skip
KEPT = 4096  # answers whose tokens are kept for `capture_step_saliency`
POLL = 0.005  # seconds between looks at a future; the event loop may be asyncio's or trio's


class Kept(NamedTuple):
    """What an answer is made of, for a trace of exactly its tokens."""

    tokens: list[int]
    n_prompt: int
    question: str
    truncated: bool


class StepsalAPI(ModelAPI):
    """A model of `stepsal.load` in Inspect.

    Args:
        model_name: what `stepsal.load` takes: "mini", "smollm2", a hub id, a local folder.
        config: of Inspect. max_tokens, temperature (0 if not set), top_p, stop_seqs and seed are honoured; what can't
            be (`UNSUPPORTED`) is refused.
        **model_args: `device`, `dtype`, `revision`, `trust_remote_code` of `stepsal.load`; `batch_size`: most answers
            at once (default 16); the fields of `StepFlowConfig` (`tau_max`, `alpha`, `oeb_layers`, ...), any of which
            switches StepFlow on, as does `stepflow=true` with the paper's settings, while `stepflow=false` overrules
            them; `preset`: a JSON file of `StepFlowConfig.save`, which the other fields change.

    Raises:
        ValueError: an unknown argument, or a bad value.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # as Inspect's own providers have it
        **model_args: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        self.stepflow = stepflow_of(model_args)
        batch_size = int(model_args.pop("batch_size", 16))
        options = {name: model_args.pop(name) for name in LOADING if name in model_args}
        if model_args:
            known = ", ".join(("batch_size", "preset", "stepflow", *LOADING, *FLOW_FIELDS))
            raise ValueError(f"unknown model arguments {sorted(model_args)}; there are {known}")
        if isinstance(options.get("dtype"), str):
            options["dtype"] = getattr(torch, options["dtype"])
        self._key = (model_name, *sorted(options.items(), key=str))
        self.engine = shared_engine(self._key, lambda: load(model_name, **options), batch_size)
        self._closed = False
        self.kept: OrderedDict[str, Kept] = OrderedDict()
        self._asked: Counter[tuple[str, ...]] = Counter()

    @property
    def model(self) -> TransformerBridge:
        """The model; to be run through `engine`."""
        return self.engine.model

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a chat; called by Inspect for each sample, concurrently."""
        if asked := [name for name in UNSUPPORTED if getattr(config, name) not in (None, False)]:
            raise ValueError(f"stepsal models don't support {', '.join(asked)}; leave it out of the generation options")
        prompt = self.render(input, tools if tool_choice != "none" else [])
        ids: list[int] = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        try:
            check_prompt(self.model, ids)
        except ValueError as error:  # so that a chain of tool calls ends, and is scored
            return ModelOutput.from_content(self.model_name, str(error), stop_reason="model_length", error=str(error))
        seed = self._seed(config.seed, prompt)
        request = Request(
            ids, config.max_tokens or MAX_TOKENS, seed,
            Sharing(config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p,
                    tuple(config.stop_seqs or ()), self.stepflow),
        )  # fmt: skip
        begun = time.monotonic()
        try:
            reply: Reply = await heard(self.engine.ask(request))
        finally:
            request.unwanted.set()  # cancelled, or out of time: no token more
        return self._output(prompt, ids, reply, seed, time.monotonic() - begun, input, tools, request.sharing.stop)

    def render(self, messages: list[ChatMessage], tools: list[ToolInfo]) -> str:
        """The chat as the model's template has it, up to where the answer begins.

        Raises:
            ValueError: content that is no text, or a template that refuses the chat.
        """
        tokenizer = self.model.tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        rendered = [as_template_input(message, template) for message in messages]
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if described and "tools" in template:
            options["tools"] = [{"type": "function", "function": tool} for tool in described]
        elif described:
            rendered.insert(0, {"role": "system", "content": TOOL_PROMPT.format(json.dumps(described))})
        rendered = one_system_message(rendered)
        if not template:
            return (tokenizer.bos_token or "") + "".join(f"{m['content']}\n" for m in rendered)
        try:
            text = str(tokenizer.apply_chat_template(rendered, **options))
        except jinja2.TemplateError as error:
            if rendered[0]["role"] != "system":
                raise ValueError(f"the chat template of {self.model_name} refuses this chat: {error}") from error
            system, first, *rest = rendered  # many templates know no system prompt
            joined = first | {"content": f"{system['content']}\n\n{first['content']}"}
            text = str(tokenizer.apply_chat_template([joined, *rest], **options))
        # a template that opens the thinking of earlier answers itself, before content that opens it too
        return re.sub(r"<think>\s*<think>", "<think>", text)

    def _seed(self, seed: int | None, prompt: str) -> int:
        if seed is None:
            return secrets.randbits(48)
        active = sample_active()
        where = ("", "") if active is None else (str(active.sample.id), str(active.epoch))
        place = (str(seed), *where, digest(prompt.encode()))
        within = (active.id if active else "", *place)  # the attempt: a retried sample begins anew
        self._asked[within] += 1
        return int(digest("\n".join((*place, str(self._asked[within]))).encode())[:12], 16)

    def _output(
        self,
        prompt: str,
        ids: list[int],
        reply: Reply,
        seed: int,
        seconds: float,
        messages: list[ChatMessage],
        tools: list[ToolInfo],
        stop: Sequence[str],
    ) -> ModelOutput:
        tokenizer = self.model.tokenizer
        written = tokenizer.decode(reply.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for text in stop if reply.ended == "stop" else ():
            written = written.partition(text)[0]
        thinking, said = sections(tokenizer, prompt, written)
        reason = STOP_REASONS[reply.ended]
        message = ChatMessageAssistant(content=said, model=self.model_name, source="generate")
        if tools:
            message = HFHandler(self.model_name).parse_assistant_response(said, tools)
            reason = "tool_calls" if message.tool_calls else reason
        if thinking:
            parts = [ContentReasoning(reasoning=thinking), ContentText(text=message.text)]
            message = message.model_copy(update={"content": parts})
        question = next((m.text for m in reversed(messages) if m.role == "user"), "")
        self._keep(str(message.id), Kept(ids + reply.tokens, len(ids), question, reason != "stop"))
        about: dict[str, Any] = {"seed": seed, "batch": reply.batch, "ended": reply.ended}
        if reply.log is not None:
            about["stepflow"] = reply.log
            self._tell_sample(reply.log)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=len(ids),
                output_tokens=len(reply.tokens),
                total_tokens=len(ids) + len(reply.tokens),
                reasoning_tokens=len(tokenizer(thinking, add_special_tokens=False)["input_ids"]) if thinking else None,
            ),
            time=seconds,
            metadata=about,
        )

    def _tell_sample(self, log: dict[str, Any]) -> None:
        """Add an answer's log to the metadata of the sample."""
        if (state := sample_state()) is not None and self.stepflow is not None:
            told = state.metadata.setdefault("stepflow", {"config": self.stepflow.to_dict(), "answers": []})
            told["answers"].append(log)

    def _keep(self, message: str, answer: Kept) -> None:
        self.kept[message] = answer
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)

    def trace(self, output: ModelOutput) -> Trace:
        """The trace of an answer of this model.

        Raises:
            ValueError: it was given in another process, or long ago.
        """
        if (kept := self.kept.get(str(output.message.id))) is None:
            raise ValueError(
                "the tokens of this answer are not there: capture_step_saliency() follows generate() in the same run "
                "(an answer from Inspect's cache has no tokens)"
            )
        return Trace.from_tokens(
            torch.tensor(kept.tokens), kept.n_prompt, self.model, question=kept.question, truncated=kept.truncated
        )

    async def count_text_tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def max_connections(self) -> int:
        """So many samples are answered together."""
        return self.engine.batch_size

    def connection_key(self) -> str:
        """Of one model all go through one engine."""
        return str(self._key)

    def max_tokens(self) -> int | None:
        return min(MAX_TOKENS, self.model.cfg.n_ctx)

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            release(self._key)


LOADING = ("device", "dtype", "revision", "trust_remote_code")
FLOW_FIELDS = tuple(f.name for f in fields(StepFlowConfig))
TOOL_PROMPT = (
    "You may call functions, given as JSON schemas: {}\nTo call one, write its name and its arguments in one line of "
    "JSON between <tool_call> and </tool_call>."
)


def stepflow_of(arguments: dict[str, Any]) -> StepFlowConfig | None:
    """Take the settings of StepFlow out of model arguments; None where there are none, or `stepflow` is false.

    Raises:
        ValueError: a bad value, or a preset that can't be read.
    """
    changes = {name: arguments.pop(name) for name in FLOW_FIELDS if name in arguments}
    path, wanted = arguments.pop("preset", None), arguments.pop("stepflow", None)
    if wanted not in (None, True, False):
        raise ValueError(f"stepflow={wanted!r} must be true or false; a file of settings goes by preset=")
    for name in ("oeb_layers", "smi_layers"):
        if changes.get(name) == "none":  # the command line has no other way to say so
            changes[name] = None
    if wanted is False or (wanted is None and path is None and not changes):
        return None
    base = StepFlowConfig() if path is None else StepFlowConfig.load(Path(path))
    return base.but(**changes)


def as_template_input(message: ChatMessage, template: str) -> dict[str, Any]:
    """A message as chat templates take it.

    Raises:
        ValueError: content that is no text.
    """
    parts = message.content_list
    if strange := [part.type for part in parts if part.type not in ("text", "reasoning")]:
        raise ValueError(f"stepsal models read text only, but a message of the {message.role} has {strange[0]}")
    found: dict[str, Any] = {"role": message.role, "content": message.text}
    if isinstance(message, ChatMessageTool):
        error = f"Error: {message.error.message}" if message.error else message.text
        found |= {"content": error, "name": message.function or ""}
    if isinstance(message, ChatMessageAssistant):
        reasoning = "\n".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
        if reasoning and "reasoning_content" in template:
            found["reasoning_content"] = reasoning
        elif reasoning and ".thinking" in template:  # Harmony
            found["thinking"] = reasoning
        elif reasoning:
            found["content"] = f"<think>{reasoning}</think>{message.text}"
        if message.tool_calls:
            calls = [{"name": call.function, "arguments": call.arguments} for call in message.tool_calls]
            if "tool_calls" in template:
                found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            else:
                found["content"] += "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    return found


def one_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several system messages as one, at the beginning, where templates look for it."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others] if system else others


async def heard(future: Future[Any]) -> Any:
    """The result of a future of another thread."""
    while not future.done():
        await anyio.sleep(POLL)
    return future.result()
