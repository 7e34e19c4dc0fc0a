"""Traces: a question, what a model wrote, and the steps into which that falls.

Make a `Trace` from text or tokens; a `Segmentation` says how its sections and `Step`s are found, and a `Format` how a
model marks the sections (`FORMATS` has the usual ones, `Format.with_marker` makes one of your own). `render_prompt` and
`tokenize_prompt` put a chat template around a question and keep where the question stands.

Files: `formats` (marks of sections), `recognition` (which format a text has), `markers` (the section that a text is
in), `boundaries` (ends of steps), `enclosures` (code and mathematics, in which none ends), `segmenter` (the state
machine that finds sections and steps), `segment` (its settings), `assignment` (tokens to steps), `template` (chat
templates and their switches), `prompt` (a question in a template), `frame` (what stands around every question),
`encoding` (text to tokens and back), `trace` (the result), `sections` (the texts alone), `tracking` (a sequence
followed by its token ids while it is written).
"""

from stepsal.trace.formats import FORMATS, Format, Header, Role
from stepsal.trace.frame import PromptFrame
from stepsal.trace.prompt import Prompt, TokenizedPrompt, check_chat, render_prompt, render_prompts, tokenize_prompt
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Step, Trace

__all__ = [
    "FORMATS",
    "Format",
    "Header",
    "Prompt",
    "PromptFrame",
    "Role",
    "Segmentation",
    "Step",
    "TokenizedPrompt",
    "Trace",
    "check_chat",
    "render_prompt",
    "render_prompts",
    "tokenize_prompt",
]
