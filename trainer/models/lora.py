"""LoRA by peft: adapters on all linear layers of the blocks, a frozen head, the bare model as reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..distributed import find_blocks
from ..errors import UserError, first_line

# of a MoE: their choice is not differentiable, and the reference must use the same experts
ROUTERS = ("gate", "router")


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers of the transformer blocks, such as q_proj, without routers."""
    _, blocks = find_blocks(model)
    names = (name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear))
    return sorted({name for name in names if name not in ROUTERS})


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> Any:
    """A `peft.PeftModel` around `model` that trains adapters only; `disable_adapter()` is the reference.

    Args:
        rank, alpha: of LoRA (arXiv 2106.09685); adapters are scaled by alpha / rank.
        dropout: with any, two passes and rollouts need the model in eval mode.
        targets: names of linear layers; default: all in the blocks. An unknown name is an error: the list of
            d1 and its descendants covers only four of LLaDA's seven layers, and peft ignores the other names
            silently.
    """
    peft = _peft()
    path, _ = find_blocks(model)
    existing = linear_names(model)
    wanted = sorted(targets) if targets is not None else existing
    for name in wanted:
        if name not in existing:
            raise UserError(f"lora.targets: there is no {name} in the model's blocks; there are {', '.join(existing)}")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # by path: a list of names would match LLaDA's head too, an ff_out like that of every block
        target_modules=rf"{re.escape(path)}\.\d+\.(.*\.)?({'|'.join(map(re.escape, wanted))})",
        bias="none",
    )
    return peft.get_peft_model(model, config).eval()


def load_lora(model: PreTrainedModel, directory: str | Path, *, trainable: bool = False) -> Any:
    """Load the adapters of a PEFT folder onto `model`."""
    try:
        return _peft().PeftModel.from_pretrained(model, str(directory), is_trainable=trainable).eval()
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise over a damaged file
        raise UserError(f"adapters: {directory} cannot be loaded ({first_line(error)})") from error


def four_bit_options(dtype: torch.dtype, head: str | None) -> dict[str, Any]:
    """Options of `from_pretrained` for QLoRA (arXiv 2305.14314); the head is left as it is."""
    if find_spec("bitsandbytes") is None:
        raise UserError("model.four_bit needs the package bitsandbytes and a GPU: pip install bitsandbytes, or set it to false")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[head] if head else None,
    )
    return {"quantization_config": settings, "device_map": {"": 0}}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install peft") from error
    return peft
