"""Refuse the name of no model at once, before libraries try for half a minute to reach the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

OWN = ("mini", "smollm2")
"""Names of the models that need no hub."""
_SECONDS = 10  # that the hub may take to answer


def check_name(name: str, revision: str | None = None) -> None:
    """Refuse a name that is neither that of an own model, nor a folder, nor a model of the hub or in its cache.

    Args:
        name: "mini", "smollm2", a hub id, or a local folder.
        revision: branch, tag or commit of a hub model; None is the default branch.

    Raises:
        OSError: there is no such model, or the hub can't be asked; with the names of those that need no hub.

    Example:
        >>> from stepsal.bridge.names import check_name
        >>> check_name("mini")
    """
    if name in OWN or Path(name).is_dir():
        return
    remedy = 'Use "mini" (the embedded reasoner), "smollm2" (SmolLM2-135M-Instruct), a hub id, or the path of a folder'
    if close := difflib.get_close_matches(name.lower(), OWN, n=1):
        remedy = f'Did you mean "{close[0]}"? {remedy}'
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(f"{name!r} is no folder and no hub id. {remedy}") from None
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f"{name!r} is no folder and not in the cache of the hub, which is switched off (HF_HUB_OFFLINE). {remedy}"
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=_SECONDS)  # says at once why not, without new tries
    except Exception as error:  # of the hub, of the network, or of the library in between
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{name!r} is no folder, and can't be had from the Hugging Face hub ({reason}). {remedy}"
        ) from error
