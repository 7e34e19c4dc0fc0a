"""Record and read what the last completed call asked for: a part named request-<uuid> with the file request.json."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from stepsal.experiments.store import Store, StoredPart

PREFIX, REQUEST_FILE = "request-", "request.json"


def note_request(store: Store, request: Mapping[str, Any]) -> None:
    """Record what a call has asked for, in place of the record of the call before it.

    Args:
        store: store that is open to be added to.
        request: what the call has asked for, JSON-ready.
    """
    before = [part for part in store.parts() if is_request(part)]
    text = f"{json.dumps(request, indent=2, allow_nan=False)}\n"
    if [(part.folder / REQUEST_FILE).read_text(encoding="utf-8") for part in before] != [text]:
        with store.adding(f"{PREFIX}{uuid.uuid4().hex}", replaces=[part.name for part in before]) as folder:
            (folder / REQUEST_FILE).write_text(text, encoding="utf-8")


def read_request(store: Store, names: Sequence[str], remedy: str) -> dict[str, Any]:
    """Return what the last completed call has asked a store for.

    Args:
        store: store to read from.
        names: entries that the request must have.
        remedy: what to do without a request, for the error.

    Raises:
        ValueError: the store has no request, or the request lacks one of the entries.
    """
    parts = [part for part in store.parts() if is_request(part)]
    if not parts:
        raise ValueError(f"{store.folder} does not say what it was asked for: {remedy}")
    request = json.loads((parts[-1].folder / REQUEST_FILE).read_text(encoding="utf-8"))
    if lacking := [name for name in names if name not in request]:
        raise ValueError(f"{parts[-1].folder} does not name {', '.join(lacking)}: {remedy}")
    return {name: request[name] for name in names}


def is_request(part: StoredPart) -> bool:
    """Tell whether a part holds a request.

    Args:
        part: a part of any store.
    """
    return part.name.startswith(PREFIX)
