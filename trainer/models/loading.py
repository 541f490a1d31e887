"""Loading any Hugging Face masked-diffusion checkpoint, and building the demo's toy-size EuroBERT.

`load` returns a model whose forward takes `input_ids` and an optional `[B, S]` attention mask, whatever its
family, its tokenizer with the mask token, and its `Facts`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from ..config import ModelConfig
from ..errors import UserError, first_line
from ..facts import Facts, facts_of
from ..tasks import Task
from . import compat, lora
from .tokenizer import make_tokenizer, train_tokenizer

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: Facts

    def call_kwargs(self, attention_mask_BS: Tensor | None) -> dict[str, Tensor]:
        """Keywords of every model call beside the ids: the attention mask in this model's dtype.

        Empty where nothing is padded (attention then has faster kernels) or the model takes no mask.
        """
        if attention_mask_BS is None or self.facts.attention_mask == "none" or bool(attention_mask_BS.all()):
            return {}
        dtype = torch.int64 if self.facts.attention_mask == "int" else torch.bool
        return {"attention_mask": attention_mask_BS.to(dtype)}

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that are never predicted beside the mask id: the table's, and rows beyond the vocabulary."""
        rows = self.model.get_output_embeddings().weight.shape[0]  # of the whole head, where it is sharded too
        return (*self.facts.suppress, *range(self.facts.valid_vocab or rows, rows))


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    facts: Mapping[str, Any] | None = None,
    four_bit: bool = False,
) -> Loaded:
    """Model (eval mode), tokenizer and facts of a checkpoint folder or hub id.

    Args:
        dtype: of the weights. trust_remote_code: run the modelling code that the checkpoint carries.
            revision: of the hub.
        facts: overrides of the table, the config's `model.facts`. For a run's own checkpoint pass the facts
            of its start, `dataclasses.asdict(loaded.facts)`: the name that identified the family is not
            saved.
        four_bit: QLoRA's quantised weights, by bitsandbytes.

    The model stays in eval mode during training: some published forwards behave differently in training mode
    (SDAR's makes masks of its own), and dropout would make two scores of the same tokens differ.

    Raises UserError: missing or damaged checkpoint, untrusted code, unknown mask id.
    """
    name = str(source)
    config, tokenizer, found, cls = recognise(name, trust_remote_code=trust_remote_code, revision=revision, facts=facts)
    with _sentences(name):
        quantised = lora.four_bit_options(dtype, found.head) if four_bit else {}
        with torch.random.fork_rng(devices=[]):
            model, report = cls.from_pretrained(
                name, config=config, dtype=dtype, revision=revision, output_loading_info=True, **quantised
            )
            if cls._auto_class is not None:  # the checkpoint's own code
                compat.restore_buffers(model)
                compat.declare_ties(model)
        _refuse_missing(name, model, report["missing_keys"])
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # Dream's blocks would append to it again when recomputed in backward
    compat.adapt_forward(model, found)
    compat.adapt_head(model, found)
    _add_mask_token(tokenizer, found.mask_id)
    return Loaded(model.eval() if four_bit else model.to(device).eval(), tokenizer, found)


def _refuse_missing(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Weights missing in the files would be random, with a mere table in the log. Tied ones may be absent."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameter) for key, parameter in parameters.items() if key not in missing}
    lost = sorted(key for key in missing if key in parameters and id(parameters[key]) not in held)
    if lost:
        more = f" and {len(lost) - 1} more weights" if lost[1:] else ""
        raise UserError(f"model: {name} cannot be loaded (its files lack {lost[0]}{more})")


def recognise(
    name: str, *, trust_remote_code: bool, revision: str | None, facts: Mapping[str, Any] | None
) -> tuple[Any, PreTrainedTokenizerBase, Facts, type[PreTrainedModel]]:
    """A checkpoint's configuration, tokenizer, facts and class, without weights. Raises as `load` does."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    check_place(name)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    with _sentences(name):
        with compat.removed_names():
            config = AutoConfig.from_pretrained(name, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        return (
            config,
            tokenizer,
            facts_of(config, tokenizer, label, facts),
            _model_class(config, name, revision, trusted=trust_remote_code),
        )


def check_place(name: str) -> None:
    """Raises UserError for what can be no id of the hub and is no folder; asked before a task's data are made."""
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise UserError(f"model: there is no folder {name}; a checkpoint is a folder, or an id of the hub such as org/name")


def _is_path(name: str) -> bool:
    """Whether it can be no id of the hub, which is `name` or `org/name`."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files raise all kinds of errors
        if "trust_remote_code" in str(error):
            raise _untrusted(name) from error
        nowhere = "" if Path(name).expanduser().is_dir() else "is no folder here, and as an id of the hub "
        raise UserError(f"model: {name} {nowhere}cannot be loaded ({first_line(error)})") from error


def _untrusted(name: str) -> UserError:
    return UserError(f"model: {name} brings modelling code of its own; read it, then set model.trust_remote_code=true to run it")


def _model_class(config: Any, name: str, revision: str | None, *, trusted: bool) -> type[PreTrainedModel]:
    """The class named by `architectures`, from the checkpoint's own code if trusted, else transformers."""
    architectures = list(getattr(config, "architectures", None) or [])
    mapped = {auto: reference for auto, reference in (getattr(config, "auto_map", None) or {}).items() if auto in AUTO_CLASSES}
    by_class = {reference.rpartition(".")[2]: auto for auto, reference in mapped.items()}
    chosen = next((by_class[a] for a in architectures if a in by_class), next((a for a in AUTO_CLASSES if a in mapped), None))
    if chosen is not None and trusted:
        with compat.removed_names():
            cls = get_class_from_dynamic_module(mapped[chosen], name, revision=revision)
        cls.register_for_auto_class(chosen)  # so that its code is saved with the weights
        compat.patch_class(cls, config)
        return cls
    for auto in AUTO_CLASSES:  # classes registered by an imported package
        if (
            type(config) in (mapping := getattr(transformers, auto)._model_mapping)
            and mapping[type(config)].__name__ in architectures
        ):
            return mapping[type(config)]
    for architecture in architectures:
        cls = getattr(transformers, architecture, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    if chosen is not None:
        raise _untrusted(name)
    raise UserError(
        f"model: {name} names no class that transformers knows (architectures: {', '.join(architectures) or 'none'}) "
        "and brings no code of its own (auto_map)"
    )


def _add_mask_token(tokenizer: PreTrainedTokenizerBase, mask_id: int) -> None:
    """Give the tokenizer a mask token that only the configuration names (LLaDA), without resizing embeddings.

    An id far beyond the tokenizer's last cannot be assigned to a token; it decodes to nothing. A token of
    ordinary text is left as it is, for `check_mask_id` to refuse.
    """
    if tokenizer.mask_token_id == mask_id:
        return
    token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id < len(tokenizer) else None
    if token is None and mask_id == len(tokenizer):
        token = "<|mask|>"
    if token is not None and (mask_id >= len(tokenizer) or mask_id in tokenizer.added_tokens_decoder):
        tokenizer.add_special_tokens({"mask_token": token})


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Random weights, a function of (config, seed); leaves the global random state alone."""
    EuroBertConfig, EuroBertForMaskedLM = compat.eurobert()
    settings = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EuroBertForMaskedLM(settings).eval()


def tokenizer_of(task: Task) -> PreTrainedTokenizerBase:
    """For a model from scratch: of the task's characters, or trained on its texts."""
    if task.corpus is not None:
        return train_tokenizer(task.corpus, task.vocabulary)
    if task.alphabet is None:
        raise UserError(
            "model.checkpoint must be given for this task: it has no tokenizer for a model from scratch, which task.style "
            "characters or bpe makes"
        )
    return make_tokenizer(task.alphabet)


def from_scratch(config: ModelConfig, task: Task, *, seed: int) -> Loaded:
    """A random EuroBERT of the config's sizes and dtype, and a tokenizer of the task's texts."""
    tokenizer = tokenizer_of(task)
    size = config.hidden_size
    weights = 2 * len(tokenizer) * size + config.layers * size * (4 * size + 3 * config.intermediate_size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        raise UserError(
            f"model: about {weights:.2g} weights by hidden_size, intermediate_size and layers do not fit this machine's memory"
        )
    facts = Facts(
        family="eurobert",
        mask_id=int(tokenizer.mask_token_id),
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
    )
    model = build_model(config, tokenizer, seed=seed)
    for parameter in model.parameters():  # of them alone: a checkpoint that is loaded keeps its buffers in float32 too
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return Loaded(model, tokenizer, facts)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
