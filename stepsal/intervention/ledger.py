"""Keep account of the sections of a batch of sequences while their tokens come in, as the input of StepFlow.

A `Ledger` is told the new token ids of every row before each forward pass. One `SequenceTracker` per row decides which
section each token is in and where a step begins; the ledger puts that into arrays over *key positions*, the columns of
the batch, in which padding counts. From it come, for the tokens of one pass (a `Portion`):

    which section is the bridge B and which the segment S of each query row, and from which key position on (`Groups`);
    how many keys of B and of S each row sees, in full attention or through a sliding window (`Ledger.count_visible`);
    at which queries momentum is injected, and the keys of the step before (`Portion.places`, `Portion.members`);
    which keys no later injection can need (`Portion.oldest_needed`).

So the groups of a row are described by three numbers and one section per key, and never as a table of queries by keys.
Key k is in B of query t where `sections[k] == groups.bridge[t]` and `k >= groups.since[t]`; for S it is
`groups.segment[t]`. All arrays are NumPy, on the host. In which portions the tokens come makes no difference, as the
tracker decides about each of them when it comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepsal.trace.tracking import Section, SequenceTracker, StepStart

NOWHERE = -1
"""A section that no key is in: the groups of a query row that is not edited."""

# by section of the query row: other, question, thinking, summary
_BRIDGE_OF = np.array([NOWHERE, NOWHERE, Section.QUESTION, Section.THINKING], dtype=np.int8)
_SEGMENT_OF = np.array([NOWHERE, NOWHERE, Section.THINKING, Section.SUMMARY], dtype=np.int8)
_CAPACITY = 256  # key positions for which there is room at first


class Groups(NamedTuple):
    """The bridge and the segment of each query row of one pass, by section and turn.

    Attributes:
        bridge: section of the keys in B; `NOWHERE` in rows that are not edited.
        segment: section of the keys in S; `NOWHERE` in rows that are not edited.
        since: key position at which the turn of the row begins; keys before it are in neither group.
    """

    bridge: NDArray[np.int8]  # [batch, query_pos]
    segment: NDArray[np.int8]  # [batch, query_pos]
    since: NDArray[np.int32]  # [batch, query_pos]


@dataclass(frozen=True, eq=False)
class Portion:
    """The tokens of one forward pass.

    Attributes:
        first: key position of the first query.
        stop: key position after the last query.
        changed: first key position whose section is new or was revised. (Sections of a prompt are known when it ends.)
        groups: bridge and segment of each query row.
        places: (row, query position) of each injection of momentum.
        members: key positions of the previous step of each injection.
        oldest_needed: the first key position that may be among the members of a later injection.
    """

    first: int
    stop: int
    changed: int
    groups: Groups
    places: list[tuple[int, int]]
    members: list[list[int]]
    oldest_needed: int


class Ledger:
    """Sections, turns and steps of a batch of sequences, one tracker per row.

    Args:
        trackers: a new tracker for each row.
        window: number of last tokens of the previous step that are members of an injection; None takes all of them.
        into_summary: inject also where the summary begins.

    Attributes:
        n_columns: number of key positions so far, those of padding included.

    Example:
        >>> import numpy as np
        >>> from stepsal.intervention.ledger import Ledger
        >>> from stepsal.trace.tracking import SequenceTracker
        >>> from stepsal.trace import FORMATS, PromptFrame
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("What is Anna?", "Anna is 1 plus 2. So Anna = 3.", model)
        >>> ledger = Ledger([SequenceTracker(model.tokenizer, PromptFrame.of(model.tokenizer), FORMATS["think"])])
        >>> portion = ledger.advance(trace.tokens[None].numpy(), np.ones((1, len(trace)), dtype=bool))
        >>> portion.places, portion.members
        ([(0, 16)], [[9, 10, 11, 12, 13, 14, 15]])
    """

    def __init__(
        self, trackers: Sequence[SequenceTracker], *, window: int | None = None, into_summary: bool = False
    ) -> None:
        batch = len(trackers)
        self.n_columns = 0
        self._trackers = list(trackers)
        self._columns: list[list[int]] = [[] for _ in trackers]  # key position of each token of a row
        self._window, self._into_summary = window, into_summary
        self._sections = np.zeros((batch, _CAPACITY), dtype=np.int8)
        self._turn_starts = np.zeros((batch, _CAPACITY), dtype=np.int32)
        self._counts = np.zeros(
            (batch, _CAPACITY + 1, len(Section)), dtype=np.int32
        )  # keys of a section before a position

    @property
    def n_rows(self) -> int:
        """The number of sequences."""
        return len(self._trackers)

    @property
    def sections(self) -> NDArray[np.int8]:
        """The `Section` of each key position, [batch, key_pos]; padding is `Section.OTHER`."""
        return self._sections[:, : self.n_columns]

    @property
    def turn_starts(self) -> NDArray[np.int32]:
        """The key position at which the turn of each key position begins, [batch, key_pos]; padding has no turn."""
        return self._turn_starts[:, : self.n_columns]

    @property
    def several_turns(self) -> bool:
        """True where a row has begun a second turn, so that some keys belong to earlier questions."""
        return any(tracker.origin > 0 for tracker in self._trackers)

    @property
    def rows_without_question(self) -> list[int]:
        """The rows in which no complete prompt has been found so far."""
        return [row for row, tracker in enumerate(self._trackers) if not tracker.found_question]

    def advance(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> Portion:
        """Read the new tokens of all rows.

        Args:
            ids: token ids, [batch, query_pos].
            real: True for tokens of the sequence, False for padding, [batch, query_pos].

        Returns:
            The tokens, with the input of StepFlow for the pass over them.
        """
        first, stop = self.n_columns, self.n_columns + ids.shape[1]
        self._grow(stop)
        self.n_columns = stop
        changed = first
        places: list[tuple[int, int]] = []
        members: list[list[int]] = []
        for row, columns in enumerate(self._columns):
            new_columns = (first + np.flatnonzero(real[row])).tolist()
            starts, revised = self._read_row(row, ids[row, real[row]].tolist(), new_columns)
            changed = min(changed, revised)
            for start in filter(self._injects, starts):
                places.append((row, columns[start.position] - first))
                members.append([columns[position] for position in start.previous[-(self._window or 0) :]])
        self._count(changed)
        oldest_needed = min(map(self._oldest_needed, self._trackers, self._columns), default=stop)
        return Portion(first, stop, changed, self._groups(first), places, members, oldest_needed)

    def count_visible(self, sections: NDArray[np.int8], window: int | None = None) -> NDArray[np.int32]:
        """Count the keys of one section that each of the last query rows sees, itself included.

        Args:
            sections: section to count for each of these rows, such as `Groups.bridge`, [batch, query_pos].
            window: number of keys that a query sees, itself included; None for all of its turn.

        Returns:
            Counts [batch, query_pos]; 0 where the section is `NOWHERE`.
        """
        first = self.n_columns - sections.shape[1]
        until = np.arange(first, self.n_columns) + 1  # [query_pos]
        since = self._turn_starts[:, first : self.n_columns]  # [batch, query_pos]
        if window is not None:
            since = np.maximum(since, until - window)
        rows, columns = np.arange(len(sections))[:, None], np.maximum(sections, 0)
        counts = self._counts[rows, until, columns] - self._counts[rows, since, columns]
        return np.where(sections == NOWHERE, 0, counts)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order.

        Args:
            rows: indices of rows.
        """
        index = list(rows)
        self._trackers = [self._trackers[row] for row in index]
        self._columns = [self._columns[row] for row in index]
        self._sections, self._turn_starts = self._sections[index], self._turn_starts[index]
        self._counts = self._counts[index]

    def shift(self, n: int) -> None:
        """Add columns of padding on the left, or drop some that are padding in all rows.

        Args:
            n: number of columns that are added; below 0, of those that are dropped.
        """
        added, dropped = max(n, 0), max(-n, 0)
        self.n_columns += n
        self._columns = [[column + n for column in columns] for columns in self._columns]
        sides = ((0, 0), (added, 0))
        self._sections = np.pad(self._sections[:, dropped:], sides)
        self._turn_starts = np.pad(np.maximum(self._turn_starts[:, dropped:] + n, 0), sides)
        # only differences between columns count, so that the counts of what is dropped may stay in them
        self._counts = np.pad(self._counts[:, dropped:], (*sides, (0, 0)))

    def join(self, other: Ledger) -> None:
        """Put the rows of another ledger below these, with the last column of both in one.

        Args:
            other: a ledger of other sequences, which is used up.
        """
        n = max(self.n_columns, other.n_columns)
        both = (self, other)
        for ledger in both:
            ledger.shift(n - ledger.n_columns)
        self._trackers += other._trackers
        self._columns += other._columns
        self._sections = np.concatenate([ledger._sections[:, :n] for ledger in both])
        self._turn_starts = np.concatenate([ledger._turn_starts[:, :n] for ledger in both])
        self._counts = np.concatenate([ledger._counts[:, : n + 1] for ledger in both])

    def _read_row(self, row: int, tokens: list[int], new_columns: list[int]) -> tuple[list[StepStart], int]:
        """Read the tokens of one row; return the steps that begin and the first key position whose section changed."""
        tracker, columns = self._trackers[row], self._columns[row]
        n_known = revised = len(columns)
        columns += new_columns
        starts: list[StepStart] = []
        for token, column in zip(tokens, new_columns, strict=True):
            in_prompt = tracker.in_prompt
            starts += tracker.push([token])
            if in_prompt and not tracker.in_prompt:  # the prompt is complete, and only now its sections are known
                revised = min(revised, tracker.origin)
            self._turn_starts[row, column] = columns[tracker.origin]
        self._sections[row, columns[revised:]] = tracker.sections[revised:]
        return starts, columns[revised] if revised < n_known else self.n_columns

    def _injects(self, start: StepStart) -> bool:
        """Tell whether momentum is injected where this step begins."""
        sections = (Section.THINKING, Section.SUMMARY) if self._into_summary else (Section.THINKING,)
        return start.section in sections and start.previous_section is Section.THINKING

    def _oldest_needed(self, tracker: SequenceTracker, columns: list[int]) -> int:
        position = tracker.oldest_needed
        return columns[position] if position < len(columns) else self.n_columns

    def _groups(self, first: int) -> Groups:
        sections = self._sections[:, first : self.n_columns]
        return Groups(_BRIDGE_OF[sections], _SEGMENT_OF[sections], self._turn_starts[:, first : self.n_columns])

    def _count(self, changed: int) -> None:
        """Bring the counts of keys up to date from a key position on."""
        is_section = self._sections[:, changed : self.n_columns, None] == np.arange(len(Section))
        self._counts[:, changed + 1 : self.n_columns + 1] = self._counts[:, changed, None] + is_section.cumsum(1)

    def _grow(self, n_columns: int) -> None:
        capacity = self._sections.shape[1]
        if n_columns > capacity:
            more = max(n_columns - capacity, capacity)
            self._sections = np.pad(self._sections, ((0, 0), (0, more)))
            self._turn_starts = np.pad(self._turn_starts, ((0, 0), (0, more)))
            self._counts = np.pad(self._counts, ((0, 0), (0, more), (0, 0)))
