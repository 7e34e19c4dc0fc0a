"""From text to traces: sections and steps, whole or token by token.

`formats` says how models mark their sections, `boundaries` where steps end; `segment` is the state machine that finds
both, and `assignment` says which token belongs to which step. `prompt` renders chat templates and finds the question in
them; `encoding` goes from text to tokens and back; `trace` holds tokens, text and steps; `sections` gives the texts
alone; `tracking` follows a sequence by its token ids while it is written.
"""

from stepsal.trace.formats import FORMATS, Format, Role
from stepsal.trace.prompt import Prompt, PromptFrame, TokenizedPrompt, render_prompt, render_prompts, tokenize_prompt
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Step, Trace

__all__ = [
    "FORMATS",
    "Format",
    "Prompt",
    "PromptFrame",
    "Role",
    "Segmentation",
    "Step",
    "TokenizedPrompt",
    "Trace",
    "render_prompt",
    "render_prompts",
    "tokenize_prompt",
]
