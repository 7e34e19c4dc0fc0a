"""Render chats of Inspect by a model's template, and read tool calls in what a model writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageTool, ContentReasoning
from inspect_ai.tool import ToolCall, ToolInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
"""Messages as chat templates take them."""

TOOL_PROMPT = (
    "You may call functions, given as JSON schemas: {}\nTo call one, write its name and its arguments in one line of "
    "JSON between <tool_call> and </tool_call>."
)
_STAND_IN = "\ue000reasoning\ue001"  # private-use characters: in no real text
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def render(
    tokenizer: PreTrainedTokenizerBase, model_name: str, messages: Sequence[ChatMessage], tools: Sequence[ToolInfo]
) -> str:
    """Render a chat by the model's template, up to where the answer begins.

    Args:
        tokenizer: the model's tokenizer; if it has no chat template, the prompt is one line per message.
        model_name: name of the model, for the errors.
        messages: the chat; its last message is not the assistant's.
        tools: functions that the model may call; a system message describes them where the template does not.

    Raises:
        ValueError: there is nothing to answer, a message has content that is no text, tools for a Harmony model, or a
            template that refuses the chat.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not messages or messages[-1].role == "assistant":
        raise ValueError("the last message is the assistant's, and there is nothing to answer; add a user message")
    if tools and "<|channel|>" in template:
        raise ValueError(f"tools are not supported for Harmony models such as {model_name}; leave them out")
    schemas = [tool.model_dump(exclude_none=True) for tool in tools]
    native = "<tool_call>" in template  # the model's own way to call tools is the one that `tool_calls` reads
    chat = [as_template_input(message, template, native) for message in messages]
    if schemas and not native:
        chat.insert(0, {"role": "system", "content": TOOL_PROMPT.format(json.dumps(schemas))})
    chat = joined(chat)
    if template:
        text = _by_template(tokenizer, model_name, chat, schemas if native else [])
    else:
        text = str(tokenizer.bos_token or "") + "".join(f"{message['content']}\n" for message in chat)
    for message in messages:  # in place of the stand-ins, which no template takes out
        if isinstance(message, ChatMessageAssistant) and (reasoning := reasoning_of(message)):
            text = text.replace(_STAND_IN, f"<think>{reasoning}</think>", 1)
    # a template may open the thinking of earlier answers itself, before content that opens it too
    return re.sub(r"<think>\s*<think>", "<think>", text)


def _by_template(tokenizer: PreTrainedTokenizerBase, model_name: str, chat: Chat, schemas: list[dict[str, Any]]) -> str:
    """Apply the template; many know no system prompt, which then goes into the first user message."""
    tools: Any = [{"type": "function", "function": schema} for schema in schemas] or None
    try:
        return str(tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError:
        chat = without_system(chat)
    try:
        return str(tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of {model_name} refuses this chat: {error}") from error


def reasoning_of(message: ChatMessageAssistant) -> str:
    """Return the thinking of an answer; "" where it has none.

    Args:
        message: the answer.
    """
    return "\n".join(part.reasoning for part in message.content_list if isinstance(part, ContentReasoning))


def as_template_input(message: ChatMessage, template: str, native: bool) -> dict[str, Any]:
    """Return a message as chat templates take it.

    Args:
        message: a message of Inspect.
        template: the chat template, which decides under which name reasoning is passed.
        native: True if the template knows tool calls and their results; otherwise they are written as text.

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
        if reasoning := reasoning_of(message):
            if "reasoning_content" in template:
                fields["reasoning_content"] = reasoning
            elif ".thinking" in template:  # Harmony
                fields["thinking"] = reasoning
            else:
                fields["content"] = _STAND_IN + message.text
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
