"""Chat templates: what a tokenizer's template makes of messages, and the switches that it has.

A switch is a variable of the template that the caller may set, such as `enable_thinking` or `reasoning_effort`. The
switches are read off the template itself, so that a misspelt one is refused in place of being ignored.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.defaults
import jinja2.meta
from jinja2 import nodes

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError)
"""What templates raise on messages or values of switches that they do not take."""

# by jinja, and by transformers beside its parameters
_PROVIDED = frozenset({*jinja2.defaults.DEFAULT_NAMESPACE, "messages", "raise_exception", "strftime_now"}) | {
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "audio", "video")
}
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # of an extension of transformers


def chat_template_of(tokenizer: Any) -> str | None:
    """Return the chat template of a tokenizer, of several the one named "default"; None without any.

    Args:
        tokenizer: of Hugging Face.

    Raises:
        ValueError: the tokenizer has several templates, and none of them is named "default".

    Example:
        >>> from stepsal.trace.template import chat_template_of
        >>> "<|assistant|>" in chat_template_of(stepsal.load("mini").tokenizer)
        True
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping) and template:
        if "default" not in template:
            raise ValueError(
                f"the tokenizer has the chat templates {', '.join(map(repr, sorted(template)))} and none is named "
                "'default': set tokenizer.chat_template to one of them"
            )
        template = template["default"]
    return template or None


def switches_of(tokenizer: Any) -> dict[str, tuple[Any, ...]]:
    """Return the switches of a tokenizer's chat template by name, each with values that may matter to it.

    The values are True, False, and the constants that the template compares the switch with.

    Args:
        tokenizer: of Hugging Face.

    Example:
        >>> from stepsal.trace.template import switches_of
        >>> tokenizer = stepsal.load("mini").tokenizer
        >>> tokenizer.chat_template += "{% if effort == 'high' %}Think hard.{% endif %}"
        >>> switches_of(tokenizer)
        {'effort': (True, False, 'high')}
    """
    template = chat_template_of(tokenizer)
    if template is None:
        return {}
    own = reserved_names(tokenizer)
    return {name: values for name, values in _variables(template).items() if name not in own}


def reserved_names(tokenizer: Any) -> set[str]:
    """Return the names that are no switches, because `apply_chat_template` takes or sets them itself.

    Args:
        tokenizer: of Hugging Face.

    Example:
        >>> from stepsal.trace.template import reserved_names
        >>> {"messages", "tokenize", "eos_token"} <= reserved_names(stepsal.load("mini").tokenizer)
        True
    """
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    return {*_PROVIDED, *parameters, *getattr(tokenizer, "special_tokens_map", {})}


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], chat: Mapping[str, Any]) -> str:
    """Return the text that a tokenizer's chat template makes of messages, up to where the answer begins.

    Args:
        tokenizer: of Hugging Face, with a chat template.
        messages: role and content of each message.
        chat: switches of the template.

    Example:
        >>> from stepsal.trace.template import apply_template
        >>> apply_template(stepsal.load("mini").tokenizer, [{"role": "user", "content": "What is Anna?"}], {})
        '<|endoftext|><|user|>What is Anna?<|assistant|><think>'
    """
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **chat))


@lru_cache(maxsize=32)
def _variables(template: str) -> dict[str, tuple[Any, ...]]:
    """Return the variables that a template takes from outside, each with the values that may matter to it."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
    try:
        tree = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template can't be read ({error}): set tokenizer.chat_template anew") from error
    names = sorted(jinja2.meta.find_undeclared_variables(tree))
    return {name: (True, False, *_compared_with(tree, name)) for name in names}


def _compared_with(tree: nodes.Template, name: str) -> tuple[Any, ...]:
    """Return the constants that a template compares a variable with."""
    constants: list[Any] = []
    for comparison in tree.find_all(nodes.Compare):
        if any(variable.name == name for variable in comparison.find_all(nodes.Name)):
            for constant in comparison.find_all(nodes.Const):  # jinja makes one constant of a list of them
                constants += constant.value if isinstance(constant.value, list | tuple) else [constant.value]
    return tuple(dict.fromkeys(constant for constant in constants if isinstance(constant, str)))
