"""Render chats of Inspect by a model's template, and read tool calls in what a model writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageTool
from inspect_ai.tool import ToolCall, ToolInfo

from stepsal.harness.history import EarlierThinking, earlier_thinking
from stepsal.trace.formats import Format
from stepsal.trace.template import chat_template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
"""Messages as chat templates take them."""

TOOL_PROMPT = (
    "You may call functions, given as JSON schemas: {}\nTo call one, write its name and its arguments in one line of "
    "JSON between <tool_call> and </tool_call>."
)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def render(
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    messages: Sequence[ChatMessage],
    tools: Sequence[ToolInfo],
    *,
    switches: Mapping[str, Any] | None = None,
    format: Format | None = None,
    keep_thinking: bool = False,
) -> str:
    """Render a chat by the model's template, up to where the answer begins.

    Args:
        tokenizer: the model's tokenizer; if it has no chat template, the prompt is one line per message.
        model_name: name of the model, for the errors.
        messages: the chat; its last message is not the assistant's.
        tools: functions that the model may call; a system message describes them where the template does not.
        switches: switches of the chat template.
        format: the marks of thinking in the content of earlier answers; None is "think".
        keep_thinking: put the thinking of earlier answers back where the template drops it; False lets the template
            decide what it keeps.

    Raises:
        ValueError: there is nothing to answer, a message has content that is no text, tools for a Harmony model, a
            template that refuses the chat, or one in which thinking that is to be kept has no place.
    """
    if not messages or messages[-1].role == "assistant":
        raise ValueError("the last message is the assistant's, and there is nothing to answer; add a user message")
    template = _template_of(tokenizer, tools)
    if tools and "<|channel|>" in template:
        raise ValueError(f"tools are not supported for Harmony models such as {model_name}; leave them out")
    schemas = [tool.model_dump(exclude_none=True) for tool in tools]
    native = "<tool_call>" in template  # the model's own way to call tools is the one that `tool_calls` reads

    def rendered(thoughts: Sequence[EarlierThinking | None]) -> str:
        pairs = zip(messages, thoughts, strict=True)
        chat = [as_template_input(message, native, thinking) for message, thinking in pairs]
        if schemas and not native:
            chat.insert(0, {"role": "system", "content": TOOL_PROMPT.format(json.dumps(schemas))})
        chat = joined(chat)
        if template:
            return _by_template(tokenizer, model_name, chat, schemas if native else [], switches or {})
        return str(tokenizer.bos_token or "") + "".join(f"{message['content']}\n" for message in chat)

    thoughts = earlier_thinking(messages, template, format)
    text = rendered(thoughts)
    if keep_thinking:
        thoughts = [thinking and thinking.unless_in(text) for thinking in thoughts]
        text = rendered(thoughts)
    for thinking in thoughts:
        text = text if thinking is None else thinking.settled(text, model_name)
    return text


def _template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[ToolInfo]) -> str:
    """Return the text of the template that transformers takes; with tools it may be another one."""
    template = chat_template_of(tokenizer) or ""
    of_all = getattr(tokenizer, "chat_template", None)
    return str(of_all.get("tool_use", template)) if tools and isinstance(of_all, dict) else template


def _by_template(
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    chat: Chat,
    schemas: list[dict[str, Any]],
    switches: Mapping[str, Any],
) -> str:
    """Apply the template; many know no system prompt, which then goes into the first user message."""
    tools: Any = [{"type": "function", "function": schema} for schema in schemas] or None
    options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": True, **switches}
    try:
        return str(tokenizer.apply_chat_template(chat, **options))
    except jinja2.TemplateError:
        chat = without_system(chat)
    try:
        return str(tokenizer.apply_chat_template(chat, **options))
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of {model_name} refuses this chat: {error}") from error


def as_template_input(message: ChatMessage, native: bool, thinking: EarlierThinking | None) -> dict[str, Any]:
    """Return a message as chat templates take it.

    Args:
        message: a message of Inspect.
        native: True if the template knows tool calls and their results; otherwise they are written as text.
        thinking: the thinking of the message, if it is an answer that has some.

    Raises:
        ValueError: content that is no text.
    """
    if other := [part.type for part in message.content_list if part.type not in ("text", "reasoning")]:
        raise ValueError(f"stepsal models read text only, but a message of the {message.role} has {other[0]}")
    if isinstance(message, ChatMessageTool):
        result = f"Error: {message.error.message}" if message.error else message.text
        if native:
            return {"role": "tool", "content": result, "name": message.function or ""}
        return {"role": "user", "content": f"<tool_response>{result}</tool_response>"}
    fields: dict[str, Any] = {"role": message.role, "content": message.text}
    if isinstance(message, ChatMessageAssistant):
        if thinking is not None:
            fields |= thinking.fields(message.text)
        calls = [{"name": call.function, "arguments": call.arguments} for call in message.tool_calls or []]
        if calls and native:
            fields["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        else:
            fields["content"] += "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    return fields


def joined(chat: Chat) -> Chat:
    """Return a chat with one system message, at the beginning, and with the user's messages in a row as one.

    Args:
        chat: messages as templates take them.
    """
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    result: Chat = [{"role": "system", "content": system}] if system else []
    for message in chat:
        if message["role"] == "user" and result and result[-1]["role"] == "user":
            result[-1] = result[-1] | {"content": f"{result[-1]['content']}\n\n{message['content']}"}
        elif message["role"] != "system":
            result.append(message)
    return result


def without_system(chat: Chat) -> Chat:
    """Return a chat whose system prompt is put at the beginning of the first user message.

    Args:
        chat: as `joined` returns it.
    """
    if chat[0]["role"] != "system":
        return chat
    text, rest = chat[0]["content"], chat[1:]
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": text}, *rest]


def tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Split what a model has written into its words, and its calls between <tool_call> and </tool_call>.

    Args:
        text: an answer without its thinking. Braces elsewhere in it are text.

    Returns:
        The words besides the calls, and the calls. A call that can't be read has a `parse_error`, which Inspect passes
        on to the model, so that it may try again.

    Example:
        >>> from stepsal.harness.chat import tool_calls
        >>> words, (call,) = tool_calls('Look: <tool_call>{"name": "add", "arguments": {"x": 2}}</tool_call>')
        >>> words, call.function, call.arguments
        ('Look:', 'add', {'x': 2})
    """
    calls = []
    for written in _CALL.findall(text):
        name = f"call_{secrets.token_hex(6)}"
        try:
            call = json.loads(written)
            arguments = call.get("arguments", call.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append(ToolCall(id=name, function=str(call["name"]), arguments=dict(arguments)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{written!r} is no call, which would be JSON with `name` and `arguments`: {error}"
            calls.append(ToolCall(id=name, function="unknown", arguments={}, parse_error=reason))
    return _CALL.sub("", text).strip(), calls
