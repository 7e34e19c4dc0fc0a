"""The Inspect provider `stepsal/<model>`: chats in, reasoning and text out, StepFlow by `-M` arguments.

Each answer's seed is derived from the configured seed, the sample, its epoch and the prompt, so that epochs differ, a
retried or resumed sample gets the answer it would have got, and none of it depends on what else is in the batch.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import OrderedDict
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
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.loading import load
from stepsal.generation.answers import check_decoding, check_prompt
from stepsal.harness.engine import Reply, Request, Sharing, release, shared_engine
from stepsal.intervention import StepFlowConfig
from stepsal.storage import digest
from stepsal.trace.trace import Trace, sections

MAX_TOKENS = 32768  # where the evaluation says nothing, as in the paper's settings; the context is a limit too
UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "logprobs", "top_logprobs",
    "prompt_logprobs", "response_schema", "reasoning_effort", "reasoning_tokens", "effort", "extra_body",
)  # fmt: skip
STOP_REASONS: dict[str, StopReason] = {
    "end": "stop", "stop": "stop", "limit": "max_tokens", "context": "model_length"
}  # fmt: skip
KEPT = 20_000_000  # tokens of answers that are kept for `capture_step_saliency`
COUNTED = 100_000  # prompts whose repetitions are counted
POLL = 0.005  # seconds between looks at a future; the event loop may be asyncio's or trio's


class Kept(NamedTuple):
    """What an answer is made of, for a trace of exactly its tokens."""

    tokens: Int[Tensor, " pos"]
    n_prompt: int
    question: str
    truncated: bool


class StepsalAPI(ModelAPI):
    """A model of `stepsal.load` in Inspect.

    Args:
        model_name: what `stepsal.load` takes: "mini", "smollm2", a hub id, a local folder.
        config: of Inspect. max_tokens, temperature (0 if not set), top_p, stop_seqs and seed are honoured; what can't
            be (`UNSUPPORTED`) is refused.
        **model_args: `device`, `device_map`, `dtype`, `revision`, `trust_remote_code` of `stepsal.load`; `batch_size`:
            most answers at once (default 16); the fields of `StepFlowConfig` (`tau_max`, `alpha`, `oeb_layers`, ...),
            any of which switches StepFlow on, as does `stepflow=true` with the paper's settings, while `stepflow=false`
            overrules them; `preset`: a JSON file of `StepFlowConfig.save` or `Calibration.save`, which the other fields
            change.

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
        self.stepflow = stepflow_of(model_args)
        batch_size = model_args.pop("batch_size", 16)
        options = {name: model_args.pop(name) for name in LOADING if name in model_args}
        if model_args:
            known = ", ".join(("batch_size", "preset", "stepflow", *LOADING, *FLOW_FIELDS))
            raise ValueError(f"unknown model arguments {sorted(model_args)}; there are {known}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number >= 1")
        # Inspect's cache tells answers apart by this, and knows nothing of StepFlow
        settings = {**options, "stepflow": None if self.stepflow is None else self.stepflow.to_dict()}
        super().__init__(
            model_name=model_name, base_url=f"stepsal:{digest(json.dumps(settings, default=str).encode())[:12]}",
            api_key=api_key, config=config,
        )  # fmt: skip
        if isinstance(options.get("dtype"), str):
            options["dtype"] = getattr(torch, options["dtype"], None)
            if not isinstance(options["dtype"], torch.dtype):
                raise ValueError(f"dtype={settings['dtype']!r} is unknown; use float32, bfloat16 or float16")
        self.batch_size = batch_size
        if config.max_connections is None and config.adaptive_connections is None:
            config.max_connections = batch_size  # as many samples as fit into a batch; Inspect begins with 20 otherwise
        self.kept: OrderedDict[str, Kept] = OrderedDict()
        self._n_kept = 0  # tokens
        self._asked: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._key = (model_name, *sorted((name, str(value)) for name, value in options.items()))
        self.engine = shared_engine(self._key, lambda: load(model_name, **options))
        self._closed = False
        if self.stepflow is not None:
            try:
                self.stepflow.resolve(self.model.cfg.n_layers)  # complains about layers that are not there
            except ValueError:
                self.close()
                raise

    @property
    def model(self) -> TransformerBridge:
        """The model; to be run through `engine`."""
        return self.engine.model

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a chat; called by Inspect for each sample, concurrently."""
        asked = [name for name in UNSUPPORTED if getattr(config, name) not in (None, False)]
        asked += ["num_choices"] if config.num_choices not in (None, 1) else []
        asked += ["tool_choice"] if tools and tool_choice not in ("auto", "none") else []
        if asked:
            raise ValueError(f"stepsal models don't support {', '.join(asked)}; leave it out of the generation options")
        limit = MAX_TOKENS if config.max_tokens is None else config.max_tokens
        sharing = Sharing(
            config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p, tuple(config.stop_seqs or ()),
            self.stepflow,
        )  # fmt: skip
        check_decoding(limit, sharing.temperature, sharing.top_p)
        tools = [] if tool_choice == "none" else tools
        prompt = self.render(input, tools)
        ids: list[int] = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        try:
            check_prompt(self.model, ids)
        except ValueError as error:  # so that a chain of tool calls ends, and is scored
            return ModelOutput.from_content(self.model_name, str(error), stop_reason="model_length", error=str(error))
        place, seed = self._seed(config.seed, prompt)
        request = Request(ids, limit, seed, sharing, self.batch_size)
        begun = time.monotonic()
        try:
            reply: Reply = await heard(self.engine.ask(request))
        except BaseException:
            if place in self._asked:  # Inspect may ask again: it is to get the same answer then
                self._asked[place] -= 1
            raise
        finally:
            request.unwanted.set()  # cancelled, or out of time: no token more
        return self._output(prompt, ids, reply, seed, time.monotonic() - begun, input, tools, sharing.stop)

    def render(self, messages: list[ChatMessage], tools: list[ToolInfo]) -> str:
        """The chat as the model's template has it, up to where the answer begins.

        Raises:
            ValueError: content that is no text, or a template that refuses the chat.
        """
        tokenizer = self.model.tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        if not messages or messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's, and there is nothing to answer; add a user message")
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        native = "<tool_call>" in template  # the model's own way to call tools is the one that we read
        if described and "<|channel|>" in template:
            raise ValueError(f"tools are not supported for Harmony models such as {self.model_name}")
        chat = [as_template_input(message, template, native) for message in messages]
        if described and native:
            options["tools"] = [{"type": "function", "function": tool} for tool in described]
        elif described:
            chat.insert(0, {"role": "system", "content": TOOL_PROMPT.format(json.dumps(described))})
        chat = joined(chat)
        if not template:
            text = (tokenizer.bos_token or "") + "".join(f"{m['content']}\n" for m in chat)
        else:
            try:
                text = str(tokenizer.apply_chat_template(chat, **options))
            except jinja2.TemplateError:
                chat = without_system(chat)  # many templates know no system prompt
                try:
                    text = str(tokenizer.apply_chat_template(chat, **options))
                except (jinja2.TemplateError, TypeError) as error:
                    raise ValueError(f"the chat template of {self.model_name} refuses this chat: {error}") from error
        for message in messages:  # in place of the stand-ins, which no template takes out
            if isinstance(message, ChatMessageAssistant) and (reasoning := reasoning_of(message)):
                text = text.replace(_STAND_IN, f"<think>{reasoning}</think>", 1)
        # a template that opens the thinking of earlier answers itself, before content that opens it too
        return re.sub(r"<think>\s*<think>", "<think>", text)

    def _seed(self, seed: int | None, prompt: str) -> tuple[tuple[str, ...], int]:
        """What is counted, and the seed of the answer."""
        if seed is None:
            return (), secrets.randbits(48)
        active = sample_active()
        where = ("", "") if active is None else (str(active.sample.id), str(active.epoch))
        place = (str(seed), *where, digest(prompt.encode()))
        within = (active.id if active else "", *place)  # the attempt: a sample that is run again begins anew
        self._asked[within] = count = self._asked.get(within, 0) + 1
        while len(self._asked) > COUNTED:
            self._asked.popitem(last=False)
        return within, int(digest("\n".join((*place, str(count))).encode())[:12], 16)

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
        new = reply.tokens[:-1] if reply.ended == "end" else reply.tokens  # without the token that ends it
        written = tokenizer.decode(new, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for text in stop if reply.ended == "stop" else ():
            written = written.partition(text)[0]
        thinking, said = sections(tokenizer, prompt, written)
        reason = STOP_REASONS[reply.ended]
        calls: list[ToolCall] = []
        if tools:
            said, calls = tool_calls(said)
            reason = "tool_calls" if calls and reason == "stop" else reason
        content: Any = [ContentReasoning(reasoning=thinking), ContentText(text=said)] if thinking else said
        message = ChatMessageAssistant(
            content=content,
            tool_calls=calls or None,
            model=self.model_name,
            source="generate",
        )
        question = next((m.text for m in reversed(messages) if m.role == "user"), "")
        cut_off = reply.ended in ("limit", "context")
        tokens = torch.tensor(ids + reply.tokens, dtype=torch.int32)
        self._keep(str(message.id), Kept(tokens, len(ids), question, cut_off))
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
            told = {"model": self.model_name, "config": self.stepflow.to_dict(), **log}
            state.metadata["stepflow"] = [*state.metadata.get("stepflow", []), told]

    def _keep(self, message: str, answer: Kept) -> None:
        self.kept[message] = answer
        self._n_kept += len(answer.tokens)
        while self._n_kept > KEPT:
            self._n_kept -= len(self.kept.popitem(last=False)[1].tokens)

    def trace(self, output: ModelOutput) -> Trace:
        """The trace of an answer of this model.

        Raises:
            ValueError: its tokens are not there any more, or never were.
        """
        kept = self.kept.get(str(output.message.id)) if output.choices else None
        if kept is None:
            raise ValueError(
                output.error or "the tokens of this answer are not there: it is from Inspect's cache, or from long ago"
            )
        return Trace.from_tokens(
            kept.tokens.long(), kept.n_prompt, self.model, question=kept.question, truncated=kept.truncated
        )

    async def count_text_tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def max_connections(self) -> int:
        """So many samples are answered together, unless Inspect is told otherwise."""
        return self.batch_size

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
            self.kept.clear()
            release(self._key)


LOADING = ("device", "device_map", "dtype", "revision", "trust_remote_code")
FLOW_FIELDS = tuple(f.name for f in fields(StepFlowConfig))
TOOL_PROMPT = (
    "You may call functions, given as JSON schemas: {}\nTo call one, write its name and its arguments in one line of "
    "JSON between <tool_call> and </tool_call>."
)


_STAND_IN = "\ue000reasoning\ue001"  # private-use characters: in no real text
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def stepflow_of(arguments: dict[str, Any]) -> StepFlowConfig | None:
    """Take the settings of StepFlow out of model arguments; None where there are none, or `stepflow` is false.

    Texts of the command line are read as numbers, as None ("none"), or as layers ("0,1").

    Raises:
        ValueError: a bad value, or a preset that can't be read.
    """
    changes = {name: _read(arguments.pop(name)) for name in FLOW_FIELDS if name in arguments}
    path, wanted = arguments.pop("preset", None), arguments.pop("stepflow", None)
    if wanted not in (None, True, False):
        raise ValueError(f"stepflow={wanted!r} must be true or false; a file of settings goes by preset=")
    if wanted is False or (wanted is None and path is None and not changes):
        return None
    base = StepFlowConfig() if path is None else StepFlowConfig.load(Path(path))
    return base.but(**changes)


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(x) for x in value]
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def reasoning_of(message: ChatMessageAssistant) -> str:
    """Its thinking; empty without."""
    return "\n".join(part.reasoning for part in message.content_list if isinstance(part, ContentReasoning))


def as_template_input(message: ChatMessage, template: str, native: bool) -> dict[str, Any]:
    """A message as chat templates take it; tool calls and their results as text, where they are not `native`.

    Raises:
        ValueError: content that is no text.
    """
    if strange := [part.type for part in message.content_list if part.type not in ("text", "reasoning")]:
        raise ValueError(f"stepsal models read text only, but a message of the {message.role} has {strange[0]}")
    found: dict[str, Any] = {"role": message.role, "content": message.text}
    if isinstance(message, ChatMessageTool):
        result = f"Error: {message.error.message}" if message.error else message.text
        if native:
            return {"role": "tool", "content": result, "name": message.function or ""}
        return {"role": "user", "content": f"<tool_response>{result}</tool_response>"}
    if isinstance(message, ChatMessageAssistant):
        if reasoning := reasoning_of(message):
            if "reasoning_content" in template:
                found["reasoning_content"] = reasoning
            elif ".thinking" in template:  # Harmony
                found["thinking"] = reasoning
            else:
                found["content"] = _STAND_IN + message.text
        calls = [{"name": call.function, "arguments": call.arguments} for call in message.tool_calls or []]
        if calls and native:
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        else:
            found["content"] += "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    return found


def joined(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All system messages as one at the beginning, where templates look for it; users' in a row as one."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in chat:
        if message["role"] == "user" and found and found[-1]["role"] == "user":
            found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n\n{message['content']}"}
        elif message["role"] != "system":
            found.append(message)
    return found


def without_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system prompt put before what the user says first."""
    if chat[0]["role"] != "system":
        return chat
    text, rest = chat[0]["content"], chat[1:]
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": text}, *rest]


def tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """What is said besides, and the calls between <tool_call> and </tool_call>; all else is text, braces or not."""
    calls = []
    for found in _CALL.findall(text):
        name = f"call_{secrets.token_hex(6)}"
        try:
            call = json.loads(found)
            arguments = call.get("arguments", call.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append(ToolCall(id=name, function=str(call["name"]), arguments=dict(arguments)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # the model is told, and may try again
            reason = f"{found!r} is no call, which would be JSON with `name` and `arguments`: {error}"
            calls.append(ToolCall(id=name, function="unknown", arguments={}, parse_error=reason))
    return _CALL.sub("", text).strip(), calls


async def heard(future: Future[Any]) -> Any:
    """The result of a future of another thread."""
    while not future.done():
        await anyio.sleep(POLL)
    return future.result()
