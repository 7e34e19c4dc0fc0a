"""Read and write the answers of `stepsal.evaluate`, as rows in the parts of a store."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepsal.experiments.request import is_request
from stepsal.experiments.store import Store, StoredPart

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ANSWERS_FILE = "answers.parquet"

#: Columns of the answers, with the names of their Arrow types.
ANSWER_COLUMNS = {
    "variant": "string",  # Variant.key
    "draw": "int64",
    "problem": "int64",
    "question": "string",  # digest that tells different questions apart
    "reference": "string",
    "correct": "bool",
    "final_answer_correct": "bool",
    "final_answer": "string",  # the value that the text states
    "error": "string",  # kind of the first error
    "reason": "string",
    "truncated": "bool",
    "n_prompt": "int64",
    "n_new_tokens": "int64",
    "n_steps": "int64",
    "seconds": "float64",
    "batch": "int64",
    "run": "string",  # one call of evaluate
    "flops": "float64",
    "response": "string",
}
ANSWER_KEY = ["variant", "draw", "problem"]


def answer_schema() -> pa.Schema:
    """Return the Arrow schema of answers.parquet."""
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in ANSWER_COLUMNS.items()])


def answer_parts(store: Store) -> list[StoredPart]:
    """Return the parts of a store that hold answers.

    Args:
        store: store of an evaluation.

    Raises:
        ValueError: a part that is damaged.
    """
    return [part for part in store.parts() if not is_request(part)]


def read_table(store: Store) -> pa.Table:
    """Return all answers of a store as an Arrow table, from all calls of `evaluate`.

    Args:
        store: store of an evaluation.

    Raises:
        ValueError: a part that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, parts = answer_schema(), answer_parts(store)
    try:
        tables = [pq.read_table(part.folder / ANSWERS_FILE, schema=schema) for part in parts]
    except FileNotFoundError:
        if answer_parts(store) == parts:
            raise
        return read_table(store)  # parts became one while they were read
    return pa.concat_tables([schema.empty_table(), *tables])


def read_answers(store: Store) -> pd.DataFrame:
    """Return all answers of a store, one row each, from all calls of `evaluate`.

    Args:
        store: store of an evaluation.

    Raises:
        ValueError: a part that is damaged, or an answer that the store has twice.
    """
    frame = read_table(store).to_pandas()
    if (twice := frame.duplicated(ANSWER_KEY)).any():
        raise ValueError(f"{store.folder} has an answer twice: {frame.loc[twice, ANSWER_KEY].iloc[0].to_dict()}")
    return frame


def keep_answers(store: Store, answers: pa.Table, replaces: Sequence[str] = ()) -> None:
    """Add answers to a store as a part of its own.

    Args:
        store: store of an evaluation, open to be added to.
        answers: table with the columns of `answer_schema`.
        replaces: names of the parts that the new part takes the place of.
    """
    import pyarrow.parquet as pq

    with store.adding(uuid.uuid4().hex, {"n_answers": len(answers)}, replaces) as folder:
        pq.write_table(answers, folder / ANSWERS_FILE, compression="zstd")


def merge_parts(store: Store) -> None:
    """Make one part of all parts with answers.

    Args:
        store: store of an evaluation, open to be added to.
    """
    parts = answer_parts(store)
    if len(parts) > 1:
        answers = read_table(store).sort_by([(name, "ascending") for name in ANSWER_KEY])
        keep_answers(store, answers, replaces=[part.name for part in parts])
