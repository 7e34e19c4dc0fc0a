"""The only place that uses parts of Inspect that are not public.

A provider is not told for which sample it answers, and a sample's metadata can't be reached from a provider otherwise.
Both stand in modules whose names begin with an underscore, and may move with any version.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

TESTED = "0.3.285"  # the version of inspect-ai that the tests run with

try:
    from inspect_ai.log._samples import sample_active
    from inspect_ai.solver._task_state import sample_state
except ImportError as error:
    raise ImportError(
        f"stepsal uses internals of inspect-ai that are not where they were ({error}): version {version('inspect-ai')} "
        f"is installed, and stepsal was tested with {TESTED}; pip install inspect-ai=={TESTED}"
    ) from error


class ActiveSample(NamedTuple):
    """The sample that is being answered.

    Attributes:
        sample_id: its id in the task.
        epoch: number of the repetition.
        attempt: id of this try; a sample that is run again gets a new one.
    """

    sample_id: str
    epoch: str
    attempt: str


def active_sample() -> ActiveSample | None:
    """Return the sample for which Inspect is calling, or None outside an evaluation."""
    active = sample_active()
    return None if active is None else ActiveSample(str(active.sample.id), str(active.epoch), str(active.id))


def sample_metadata() -> dict[str, Any] | None:
    """Return the metadata of the sample for which Inspect is calling, to be added to, or None outside an evaluation."""
    state = sample_state()
    return None if state is None else state.metadata
