"""From text to traces: sections and steps, whole or token by token.

`formats` says how models mark their sections; `segment` is the state machine that finds sections and steps; `prompt` renders
chat templates and finds the question in them; `trace` holds tokens, text and steps; `tracking` follows a sequence by its
token ids while it is written.
"""

from stepsal.trace.formats import FORMATS, Format, Role
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Step, Trace

__all__ = ["FORMATS", "Format", "Role", "Segmentation", "Step", "Trace"]
