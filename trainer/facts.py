"""What a masked diffusion model's files do not say, or say in as many ways as there are families: one table.

A value is taken from the run's config (`model.facts`), else from where the row says that the checkpoint states it, else from
the row. Installed packages add rows by the entry point group `dllm_kernels.adapters`, whose objects are `Family`s; theirs come
first. Figures: MODELS.md section 1.3, read from the published configurations unless marked there as second-hand.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from .errors import UserError, first_line

GROUP = "dllm_kernels.adapters"
TOPOLOGIES = ("bidirectional", "block_causal")
ATTENTION_MASKS = ("none", "int", "bool", "float", "bias")


@dataclass(frozen=True)
class Facts:
    """One model, as the trainer sees it.

    `attention_mask` is what its forward takes: "none" (never pass one), "int" `[B, S]`, or four dimensions as "bool" (True: may
    be seen), as "float" (added to the scores) or as "bias" (the same, by the name attention_bias). The loaded model makes four
    dimensions out of `[B, S]` itself, see `models.compat`.
    """

    family: str
    mask_id: int
    eos_id: int | None = None
    pad_id: int | None = None
    shift: int = 0  # 1: position i is predicted by row i - 1
    topology: str = "bidirectional"
    block_length: int | None = None  # of block_causal
    valid_vocab: int | None = None  # ids from here on are no text
    attention_mask: str = "int"
    suppress: tuple[int, ...] = ()  # ids never predicted, beside the mask id
    head: str | None = None  # the head's module, where get_output_embeddings() does not give it

    def __post_init__(self) -> None:
        for name in ("mask_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if value is not None or name == "mask_id":
                _check_integer(name, value, 0)
        _check_integer("shift", self.shift, 0)
        if self.shift > 1:
            raise ValueError(f"shift must be 0 or 1, got {self.shift}")
        for name in ("block_length", "valid_vocab"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        for name, allowed in (("topology", TOPOLOGIES), ("attention_mask", ATTENTION_MASKS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if (self.topology == "block_causal") != (self.block_length is not None):
            raise ValueError(f"block_length must be given for block_causal, and only for it, got {self.block_length!r}")
        for token in self.suppress:
            _check_integer("suppress", token, 0)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


# Where checkpoints state a value, best first.
Places = dict[str, tuple[str, ...]]
STATED: Places = {
    "mask_id": ("config.mask_token_id", "tokenizer.mask_token_id"),
    "eos_id": ("config.eos_token_id", "tokenizer.eos_token_id"),
    "pad_id": ("config.pad_token_id", "tokenizer.pad_token_id"),
}


@dataclass(frozen=True)
class Family:
    """A row: which checkpoints it is for, what is true of them, and which of it the checkpoint itself knows better.

    `matches` gets the checkpoint's configuration and its name in lower case. `facts` are those of the published models, `None`
    as mask id where there is no common one.
    """

    name: str
    matches: Callable[[Any, str], bool]
    facts: Mapping[str, Any]
    stated: Places = field(default_factory=lambda: STATED)
    hint: str = ""  # said where no mask id is found


def _type(*types: str) -> Callable[[Any, str], bool]:
    return lambda config, name: str(getattr(config, "model_type", "")).lower() in types


def _is_moe(config: Any) -> bool:
    return bool(getattr(config, "num_experts", None)) or any(
        "moe" in a.lower() for a in getattr(config, "architectures", None) or ()
    )


def _is_llada(config: Any, name: str) -> bool:
    return _type("llada")(config, name) and not _is_moe(config)


def _is_llada_moe(config: Any, name: str) -> bool:  # published under the same model_type as LLaDA
    return _type("llada", "lladamoe", "llada_moe")(config, name) and _is_moe(config)


def _is_illada(config: Any, name: str) -> bool:
    return "illada" in name or (_is_llada(config, name) and getattr(config, "vocab_size", None) == 155136)


def _named(part: str, *types: str) -> Callable[[Any, str], bool]:
    return lambda config, name: part in name and _type(*types)(config, name)


# some copies of LLaDA's code become causal once they are given an attention_mask, MMaDA's among them; none does by a bias
LLADA = {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081, "attention_mask": "bias"}
LLADA2 = {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892}
DREAM = {"mask_id": 151666, "eos_id": 151643, "pad_id": 151643, "shift": 1, "attention_mask": "bool"}
SDAR = {"mask_id": 151669, "eos_id": 151643, "pad_id": 151643, "topology": "block_causal", "block_length": 4}


def _stated(places: Places) -> Places:
    return STATED | places


A2D_TYPES = ("a2d-qwen3", "a2d-qwen2", "a2d-llama")
BLOCK_SIZE: Places = {"block_length": ("config.block_size",)}

# The first row that matches wins.
FAMILIES: tuple[Family, ...] = (
    Family("illada", _is_illada, {"mask_id": 5, "eos_id": 2, "pad_id": 1, "attention_mask": "bias"}),
    Family("llada-moe", _is_llada_moe, LLADA2),
    Family("llada", _is_llada, LLADA),  # 8B Base, Instruct and 1.5
    Family("llada2", _type("llada2_moe"), LLADA2 | {"topology": "block_causal", "block_length": 32, "attention_mask": "float"}),
    # DiffuCoder's and Dream-Coder's tokenizers pad with a token of their own, their configurations still name Dream's
    Family("diffucoder", _named("diffucoder", "dream"), DREAM, _stated({"pad_id": ("tokenizer.pad_token_id",)})),
    Family("dream-coder", _named("dream-coder", "dream"), DREAM, _stated({"pad_id": ("tokenizer.pad_token_id",)})),
    Family("dream", _type("dream"), DREAM),
    Family("sdar", _type("sdar", "sdar_moe"), SDAR | {"attention_mask": "bool"}, _stated(BLOCK_SIZE)),
    # the head also knows image tokens, after the text
    Family("mmada", _type("mmada"), LLADA | {"valid_vocab": 126464}, _stated({"valid_vocab": ("config.llm_vocab_size",)})),
    # its forward makes the block-causal mask itself
    Family(
        "fast-dllm-v2",
        _type("fast_dllm_qwen"),
        {"mask_id": 151665, "eos_id": 151645, "pad_id": 151643, "shift": 1, "attention_mask": "none"}
        | {"topology": "block_causal", "block_length": 32},
        _stated({"block_length": ("config.bd_size",)}),
    ),
    Family(
        "a2d-bd3lm",
        _named("bd3lm", *A2D_TYPES),
        {"mask_id": None, "topology": "block_causal", "block_length": 32, "attention_mask": "float"},
        _stated(BLOCK_SIZE),
    ),
    Family("a2d", _type(*A2D_TYPES), {"mask_id": None}),
    Family(
        "modernbert",
        _type("modernbert"),
        {"mask_id": 50284, "eos_id": 50282, "pad_id": 50283},
        _stated({"mask_id": ("tokenizer.mask_token_id", "config.mask_token_id")}),
    ),
    Family("eurobert", _type("eurobert"), {"mask_id": 128002, "eos_id": 128001, "pad_id": 128001}),
    # the forward takes no attention mask; the head lies inside the output layer
    Family(
        "mdlm",
        _type("mdlm", "bd3lm"),
        {"mask_id": 50257, "eos_id": 50256, "attention_mask": "none", "head": "backbone.output_layer.linear"},
        _stated({"mask_id": ("config.mask_index", "config.mask_token_id", "tokenizer.mask_token_id")}),
    ),
    Family(
        "diffusion-gemma",
        _type("diffusion_gemma"),
        {"mask_id": None},
        hint="it was trained on uniform noise and has none",
    ),
)
UNKNOWN = Family("unknown", lambda config, name: True, {"mask_id": None})


def family_of(config: Any, name: str) -> Family:
    """The row of a checkpoint, by its configuration and its name or path; `UNKNOWN` where none is for it."""
    rows = (*_installed(), *FAMILIES)
    return next((row for row in rows if row.matches(config, name.lower())), UNKNOWN)


def _installed() -> Iterator[Family]:
    for point in entry_points(group=GROUP):
        try:
            row = point.load()
        except Exception as error:  # whatever a foreign package raises on import
            raise UserError(f"entry point {point.name} of {GROUP} cannot be loaded ({first_line(error)})") from error
        if not isinstance(row, Family):
            raise UserError(f"entry point {point.name} of {GROUP} must be a dllm_trainer.facts.Family, got {type(row).__name__}")
        yield row


def facts_of(config: Any, tokenizer: Any, name: str, overrides: Mapping[str, Any] | None = None) -> Facts:
    """What holds for a checkpoint. `overrides` are the config's `model.facts`; unknown or wrong ones raise UserError."""
    overrides = dict(overrides or {})
    known = [f.name for f in dataclasses.fields(Facts)]
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown config key model.facts.{key}: the nearest is {near}; allowed: {', '.join(known)}")
    if isinstance(overrides.get("suppress"), list):
        overrides["suppress"] = tuple(overrides["suppress"])
    row = family_of(config, name)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    sources = {"config": text_config, "tokenizer": tokenizer}
    stated = {key: value for key, places in row.stated.items() if (value := _first(places, sources)) is not None}
    if (known_length := stated.get("block_length")) is not None and overrides.get("block_length") not in (None, known_length):
        raise UserError(
            f"model.facts.block_length must be the {known_length} that the configuration of {name} states, "
            f"got {overrides['block_length']!r}"
        )
    values = {"family": row.name, **row.facts, **stated, **overrides}
    if values.get("topology") != "block_causal" and "block_length" not in overrides:
        values["block_length"] = None
    if values["mask_id"] is None:
        raise UserError(
            f"model {name} states no mask token{f' ({row.hint})' if row.hint else ''}: "
            "set model.facts.mask_id to the id that stands for a masked position"
        )
    try:
        return Facts(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.facts.{error}") from error


def _first(places: tuple[str, ...], sources: Mapping[str, Any]) -> int | None:
    for place in places:
        source, _, key = place.partition(".")
        value = getattr(sources[source], key, None)
        if isinstance(value, (list, tuple)) and value:  # several ends of text: the first
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None
