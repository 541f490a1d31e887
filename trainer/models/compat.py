"""Patches that let published modelling code run under current transformers, behind one calling convention.

Each patch touches only the loaded class, its module or the model, and only where its symptom would show.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import transformers.utils
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dllm_kernels.model.block_attention import BlockMask

from ..distributed import find_blocks
from ..errors import UserError
from ..facts import Facts

FORM = "_dllm_attention_form"


def eurobert() -> tuple[Any, Any]:
    """Configuration and model of EuroBERT, a Llama without the causal mask. Raises UserError where transformers has none."""
    if not hasattr(transformers, "EuroBertForMaskedLM"):
        raise UserError(
            f"model.checkpoint must be a folder or an id of the hub under transformers {transformers.__version__}: a model from "
            f"scratch or of known sizes is a EuroBERT, which came with 5.3 (pip install 'transformers>=5.3')"
        )
    return transformers.EuroBertConfig, transformers.EuroBertForMaskedLM


# --- loading ------------------------------------------------------------------------------------------------


@contextmanager
def removed_names() -> Iterator[None]:
    """While remote code is imported: "cannot import name 'LossKwargs' from 'transformers.utils'" (SDAR)."""
    if hasattr(transformers.utils, "LossKwargs"):
        yield
        return
    transformers.utils.LossKwargs = transformers.utils.TransformersKwargs
    try:
        yield
    finally:
        del transformers.utils.LossKwargs


def patch_class(cls: type[PreTrainedModel], config: Any) -> None:
    """Make remote code's `cls` load and save under current transformers."""
    package = cls.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            _patch_rope(module)
    # "'LLaDAConfig' object has no attribute 'use_cache'" in LLaDA's forward: no default since transformers 5
    if not hasattr(config, "use_cache"):
        config.use_cache = False
    # "'LLaDAModelLM' object has no attribute 'all_tied_weights_keys'": its __init__ has no post_init()
    if not hasattr(cls, "all_tied_weights_keys") and not _calls_post_init(cls):
        cls.all_tied_weights_keys = {}
    # "tie_weights() got an unexpected keyword argument 'missing_keys'"
    if not _accepts(cls.tie_weights, "missing_keys"):
        cls.tie_weights = _without_keywords(cls.tie_weights)
    # "'list' object has no attribute 'keys'" where a model ties its embeddings: it is a dict by now
    if isinstance(keys := cls._tied_weights_keys, (list, tuple)):
        cls._tied_weights_keys = None
        with _weightless():
            model = cls(config)
        embedding = model.get_input_embeddings()
        path = next(name for name, module in model.named_modules() if module is embedding)
        cls._tied_weights_keys = dict.fromkeys(keys, f"{path}.weight")


def _calls_post_init(cls: type) -> bool:
    return "post_init" in cls.__init__.__code__.co_names  # type: ignore[misc]


def _accepts(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _without_keywords(method: Any) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self)

    return call


def _patch_rope(module: Any) -> None:
    """`KeyError: 'default'` in rotary embeddings written for transformers 4 (Dream, SDAR, LLaDA2)."""
    if hasattr(module, "ROPE_INIT_FUNCTIONS") and "default" not in ROPE_INIT_FUNCTIONS:
        module.ROPE_INIT_FUNCTIONS = {**ROPE_INIT_FUNCTIONS, "default": _default_rope}


def _default_rope(config: Any, device: Any = None, **kwargs: Any) -> tuple[Tensor, float]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head_dim * getattr(config, "partial_rotary_factor", 1.0))
    exponent = torch.arange(0, size, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / size
    return 1.0 / config.rope_theta**exponent, 1.0


def restore_buffers(model: PreTrainedModel) -> None:
    """Recompute the buffers of remote code that its checkpoint does not hold.

    Without it logits are silently wrong: transformers 5 builds models on the meta device and leaves such
    buffers uninitialised, such as the rotary frequencies of Dream, SDAR and LLaDA2. They are copied from a
    second instance without weights.
    """
    with _weightless():
        fresh = type(model)(model.config)
    for path, source in fresh.named_modules():
        target = model.get_submodule(path)
        for name in source._non_persistent_buffers_set:
            value = source._buffers[name]
            target._buffers[name] = None if value is None else value.to(model.device)
        for name, value in vars(source).items():  # such as original_inv_freq
            if isinstance(value, Tensor) and getattr(vars(target).get(name), "is_meta", False):
                setattr(target, name, value.to(model.device))


@contextmanager
def _weightless() -> Iterator[None]:
    """Within the context, new modules have meta parameters but real buffers."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def declare_ties(model: PreTrainedModel) -> None:
    """LLaDA ties without declaring it: "The weights trying to be saved contained shared tensors"."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(parameter, name)) != name:
            model._tied_weights_keys = {**(model._tied_weights_keys or {}), name: first}


# --- calling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionForm:
    """The form of attention mask that a model's forward takes instead of `[B, S]`."""

    kind: str  # Facts.attention_mask
    block_length: int | None  # None: bidirectional

    @property
    def keyword(self) -> str:
        return "attention_bias" if self.kind == "bias" else "attention_mask"

    def __call__(self, mask_BS: Tensor | None, ids_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`[B, 1, S, S]`, or `[B, 1, 1, S]` if bidirectional; None where no mask is needed.

        A mask with four dimensions, as rollouts pass for packed and cached layouts, only changes its dtype.
        Blocks count from a sequence's first real token, as in training without padding.
        """
        if mask_BS is not None and not isinstance(mask_BS, Tensor):  # flex_attention's, which its models take as it is
            return mask_BS
        if mask_BS is not None and mask_BS.dim() == 4:
            if self.kind == "none":
                raise ValueError("attention_mask must be None for a model that takes none, got a mask of pairs")
            form = self._as_kind(mask_BS if mask_BS.dtype == torch.bool else mask_BS == 0, dtype)
            return BlockMask.of(form, mask_BS.of_layout) if isinstance(mask_BS, BlockMask) else form
        if self.kind == "none":
            return None
        if self.block_length is None and mask_BS is None:
            return None
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        seen = real_BS[:, None, None, :]
        if self.block_length is not None:
            block_BS = (real_BS.cumsum(1) - 1).clamp(min=0) // self.block_length
            seen = seen & (block_BS[:, None, None, :] <= block_BS[:, None, :, None])
        return self._as_kind(seen, dtype)

    def _as_kind(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind == "bool":
            return seen
        return torch.zeros((), dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def adapt_forward(model: PreTrainedModel, facts: Facts) -> None:
    """Let `model(input_ids=, attention_mask=[B, S])` pass each family the mask that its forward takes.

    The forward of the class is wrapped, not hooked, since peft calls the forward of the model that it wraps.
    """
    block_length = facts.block_length if facts.topology == "block_causal" else None
    model.causal_block = block_length  # type: ignore[assignment]  # for the library, which scores such models by blocks
    if facts.attention_mask == "int" and facts.topology == "bidirectional":
        return
    if facts.attention_mask == "int":  # two dimensions cannot express what a block sees
        raise ValueError("attention_mask must be bool, float, bias or none for a block-causal model, got 'int'")
    setattr(model, FORM, AttentionForm(facts.attention_mask, block_length))
    cls = type(model)
    if not hasattr(cls.forward, FORM):
        cls.forward = _with_form(cls.forward)  # type: ignore[method-assign]


def _with_form(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        form = self.__dict__.get(FORM)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if form is not None and ids is not None:
            mask = form(kwargs.pop("attention_mask", None), ids, self.dtype)
            if mask is not None:
                kwargs[form.keyword] = mask
        return forward(self, *args, **kwargs)

    setattr(call, FORM, True)
    return call


def adapt_head(model: PreTrainedModel, facts: Facts) -> None:
    """Let `get_output_embeddings()` find the head by the table of facts, unless the class finds it itself."""
    if model.get_output_embeddings() is None and facts.head is not None:
        path = facts.head
        model.get_submodule(path)  # AttributeError where there is none
        type(model).get_output_embeddings = lambda self: self.get_submodule(path)  # type: ignore[method-assign]


# --- activation checkpointing -------------------------------------------------------------------------------


def checkpoint_blocks(model: nn.Module) -> int:
    """Recompute each transformer block in backward instead of storing activations; returns their number.

    Works for every model: LLaDA's class has no checkpointing, and that of transformers needs training mode.
    """
    _, blocks = find_blocks(model)
    for block in blocks:
        if not isinstance(block.forward, functools.partial):
            # unlike a closure, a partial of a bound method follows a deep copy of the model
            block.forward = functools.partial(_checkpointed, block.forward)  # type: ignore[method-assign]
    return len(blocks)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
