"""LoRA by peft: adapters on every linear layer of the transformer blocks, the head frozen, the bare model as
the reference.
"""

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

ROUTERS = ("gate", "router")  # a MoE's: what they choose is not differentiable, and a reference with other experts is none


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers within the transformer blocks, such as q_proj, as the model has them;
    routers left out.
    """
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
    """A `peft.PeftModel` around `model` whose adapters alone are trained; `disable_adapter()` gives the
    reference policy.

    Args:
        rank, alpha: of LoRA (arXiv 2106.09685); an adapter is scaled by alpha / rank.
        dropout: 0, or what is scored twice differs: two passes and rollouts then need the model in eval mode.
        targets: names of linear layers; default: all in the blocks. One that does not exist is an error: the
            list that d1 and its descendants pass names four of LLaDA's seven layers, and peft says nothing of
            the rest.
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
        # by path: a list of names would take LLaDA's head too, an ff_out like the one of every block
        target_modules=rf"{re.escape(path)}\.\d+\.(.*\.)?({'|'.join(map(re.escape, wanted))})",
        bias="none",
    )
    return peft.get_peft_model(model, config).eval()


def load_lora(model: PreTrainedModel, directory: str | Path, *, trainable: bool = False) -> Any:
    """`model` with the adapters of a PEFT folder."""
    try:
        return _peft().PeftModel.from_pretrained(model, str(directory), is_trainable=trainable).eval()
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise over a damaged file
        raise UserError(f"adapters: {directory} cannot be loaded ({first_line(error)})") from error


def four_bit_options(dtype: torch.dtype, head: str | None) -> dict[str, Any]:
    """QLoRA's weights (arXiv 2305.14314) for `from_pretrained`; the head stays as it is, since we multiply
    with it ourselves.
    """
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
