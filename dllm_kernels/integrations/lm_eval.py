"""lm-evaluation-harness with masked diffusion models: its own command, with `--model dllm-kernels` among its models.

    python -m dllm_kernels.integrations.lm_eval run --model dllm-kernels --tasks gsm8k
        --model_args pretrained=FOLDER,mask_id=126336,samples=128,length=256,block_length=32

(on one line). Log-likelihoods are ELBOs by `estimate_elbo`, completions are `generate`'s; the results' `config` holds
every setting of both, and the standard errors of the estimates.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks, estimate_elbo, generate, noise
from dllm_kernels.integrations import needs
from dllm_kernels.masks.laws import LAWS
from dllm_kernels.model.headless import context_length
from dllm_kernels.rollouts.samplers import SAMPLERS

with needs("lm_eval"):
    import lm_eval.models  # noqa: F401 - the others' names, which the harness looks up only before the first of ours
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

with needs("transformers", "pip install 'dllm-kernels[train]'"):
    import transformers

NAME = "dllm-kernels"
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of context and continuation
_AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
# of gen_kwargs, which tasks and the command give: what a decoder from left to right would make of them
_ENDINGS = ("until", "do_sample", "temperature", "max_gen_toks")


@register_model(NAME)
class DiffusionLM(TemplateLM):
    """A masked diffusion model for the harness.

    Args:
        pretrained: a checkpoint's folder or name, loaded by transformers, or by `loader`; or a model, with its
            `tokenizer`.
        tokenizer: None takes the checkpoint's.
        mask_id: None takes the tokenizer's mask token, or that of the model's config. shift: 1 where position i
            is predicted by row i - 1.
        causal_block: tokens per block of a block-causal model; None takes the loader's.
        loader: "module:function", called with `pretrained`, and with `dtype` and `trust_remote_code` where they are given;
            returns an object with `model`, `tokenizer`, `facts`
            (`mask_id`, `shift`, `block_length`), `suppressed` and `call_kwargs(attention_mask)`. The trainer's is
            "dllm_trainer.models.loading:load", whose table knows the published models.
        law, samples, seed, law_options: of `estimate_elbo`. samples_per_pass: masks in one call of the model.
        greedy: whether to find out, by greedy decoding of one token a step, if a continuation is the likeliest.
            False answers "no" to every request, in one call of the model less per token: for tasks that compare
            log-likelihoods alone.
        length, sampler, steps, block_length, temperature, and others of `generate`: the decoding. sampler None is
            "llada", of a block-causal model "sdar" in its blocks with cache=True.
            Values of a task's or the command's gen_kwargs come over them; `max_gen_toks` is the length where none is given
            here, and `do_sample` alone means temperature 1.
        errors: a file to which every estimate is appended with its standard error, a JSON object a line.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        *,
        tokenizer: Any = None,
        mask_id: int | None = None,
        shift: int | None = None,
        causal_block: int | None = None,
        loader: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        law: str = "exact",
        samples: int = 128,
        seed: int = 0,
        law_options: Mapping[str, Any] | None = None,
        samples_per_pass: int = 1,
        greedy: bool = True,
        length: int | None = None,
        sampler: str | None = None,
        errors: str | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        checks.choice("law", law, tuple(LAWS))
        if sampler is not None:
            checks.choice("sampler", sampler, tuple(SAMPLERS))
        self.batch_size = checks.count("batch_size", int(batch_size) if str(batch_size).isdigit() else batch_size)
        loaded = _load(pretrained, tokenizer, loader, dtype, trust_remote_code)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"there is no {device}, the harness's own default; the model stays on the CPU", stacklevel=2)
        elif device is not None:
            self.model.to(device)
        self._device = next(self.model.parameters()).device
        self.mask_id = checks.count("mask_id", loaded.facts.mask_id if mask_id is None else mask_id, 0)
        self.shift = loaded.facts.shift if shift is None else checks.count("shift", shift, 0)
        self._call_kwargs = loaded.call_kwargs
        self._suppress = (self.mask_id, *(token for token in loaded.suppressed if token != self.mask_id))
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        block = loaded.facts.block_length if causal_block is None else checks.count("causal_block", causal_block)
        self.scoring = {"law": law, "samples": samples, "seed": seed, **(law_options or {}), "samples_per_pass": samples_per_pass}
        if block is not None:
            self.scoring["causal_block"] = block
        own: dict[str, Any] = {"sampler": "llada"} if block is None else {"sampler": "sdar", "block_length": block, "cache": True}
        given = {name: value for name, value in (("sampler", sampler), ("length", length)) if value is not None}
        self.decoding = {**own, "seed": seed, **decoding, **given}
        self._greedy, self._errors = greedy, None if errors is None else Path(errors)
        self._decoded: list[dict[str, Any]] = []
        self._found: list[float] = []  # standard errors

    # --- what the harness asks ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise ValueError("the tokenizer must have a BOS or an EOS token to stand for an empty context, it has neither")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results' `config`: every setting that the numbers depend on, and how sure the estimates are."""
        known = [value for value in self._found if math.isfinite(value)]
        errors = {"mean": sum(known) / len(known), "largest": max(known)} if known else {}
        return {
            "checkpoint": self._name,
            "mask_id": self.mask_id,
            "shift": self.shift,
            "suppressed": list(self._suppress),
            "elbo": {**self.scoring, "estimates": len(self._found), "standard_error": errors},
            "decoding": self._decoded,
        }

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([(tuple(context), tuple(continuation)) for _, context, continuation in requests], self._greedy)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        longest = context_length(self.model)
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            windows = get_rolling_token_windows(ids, self.eot_token_id, (longest or len(ids) + 1) - 1, 1)
            pairs = [(tuple(context), tuple(rest)) for context, rest in map(make_disjoint_window, windows)]
            totals.append(sum(elbo for elbo, _ in self._score(pairs, False)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        seen: dict[str, int] = {}
        for key, numbers in groups.items():
            options, until = self._options(json.loads(key))
            for batch in _batches(sorted(numbers, key=lambda n: len(requests[n].args[0])), self.batch_size):
                contexts = [requests[n].args[0] for n in batch]
                members = []
                for context in contexts:
                    members.append(seen.get(context, 0))
                    seen[context] = members[-1] + 1
                rollout = generate(
                    self.model,
                    [self._tensor(self.tok_encode(context)) for context in contexts],
                    mask_id=self.mask_id,
                    shift=self.shift,
                    suppress=self._suppress[1:],
                    sequence_ids=noise.sequence_ids(contexts, members=members, device=self._device),
                    **options,
                )
                if rollout.settings not in self._decoded:
                    self._decoded.append(rollout.settings)
                for n, completion_L in zip(batch, rollout.completion_BL):
                    texts[n] = self._text(completion_L, until)
        return texts

    # --- how it is answered -------------------------------------------------------------------------------------------

    def _score(self, pairs: Sequence[Pair], greedy: bool) -> list[tuple[float, bool]]:
        found = dict.fromkeys(pairs, (0.0, False))  # equal requests share their estimate
        for batch in _batches(sorted(found, key=lambda pair: (len(pair[1]), len(pair[0]))), self.batch_size):
            elbo_B, error_B = self._elbo(batch)
            found.update(zip(batch, zip(elbo_B, self._likeliest(batch) if greedy else [False] * len(batch))))
            self._tell(batch, elbo_B, error_B)
        return [found[pair] for pair in pairs]

    def _elbo(self, batch: Sequence[Pair]) -> tuple[list[float], list[float]]:
        """ELBOs of continuations, and their standard errors, in nats."""
        rows = [self._tensor([*context, *continuation]) for context, continuation in batch]
        ids_BS = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place_S = torch.arange(ids_BS.shape[1], device=self._device)
        width_B1 = torch.tensor([[len(row)] for row in rows], device=self._device)
        first_B1 = torch.tensor([[len(context)] for context, _ in batch], device=self._device)
        real_BS = place_S < width_B1
        if (longest := context_length(self.model)) is not None and ids_BS.shape[1] > longest:
            raise ValueError(
                f"a request of {ids_BS.shape[1]} tokens must fit the model's context of {longest}; nothing is ever cut"
            )
        estimate = estimate_elbo(
            self.model,
            ids_BS,
            real_BS & (place_S >= first_B1),
            mask_id=self.mask_id,
            shift=self.shift,
            suppress=self._suppress,
            attention_mask_BS=real_BS,
            model_kwargs=self._call_kwargs(None if bool(real_BS.all()) else real_BS),
            **self.scoring,
        )
        return estimate.elbo_B.tolist(), estimate.standard_error_B.tolist()

    def _likeliest(self, batch: Sequence[Pair]) -> list[bool]:
        """Whether greedy decoding, the surest token first, one a step, writes each continuation."""
        found = []
        for context, continuation in batch:
            if not continuation:
                found.append(True)
                continue
            options: dict[str, Any] = {"steps": len(continuation), "block_length": len(continuation)}
            if (block := self.scoring.get("causal_block")) is not None:  # such a model never saw masks before a block
                options = {"steps": block, "block_length": block, "sampler": "sdar", "cache": True}
                options["remasking"] = "low_confidence_static"
            rollout = generate(
                self.model,
                [self._tensor(context)],
                length=len(continuation),
                mask_id=self.mask_id,
                shift=self.shift,
                suppress=self._suppress[1:],
                **options,
            )
            found.append(rollout.completion_BL[0].tolist() == list(continuation))
        return found

    def _options(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Options of `generate`, and the texts at which a completion ends."""
        options = {**self.decoding, **{name: value for name, value in given.items() if name not in _ENDINGS}}
        until = given.get("until") or []
        if given.get("max_gen_toks") is not None and "length" not in self.decoding:
            options["length"] = given["max_gen_toks"]
        if given.get("do_sample") is False:
            options["temperature"] = 0.0
        elif given.get("temperature") is not None:
            options["temperature"] = float(given["temperature"])
        elif given.get("do_sample"):
            options.setdefault("temperature", 1.0)  # as transformers reads it
        if "length" not in options:
            raise ValueError("length must be given, in model_args or gen_kwargs (there as max_gen_toks too)")
        return options, [until] if isinstance(until, str) else list(until)

    def _text(self, completion_L: Tensor, until: Sequence[str]) -> str:
        ids, end = completion_L.tolist(), self.tokenizer.eos_token_id
        text = str(self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True))
        for ending in until:
            text = text.split(ending)[0] if ending else text
        return text

    def _tell(self, batch: Sequence[Pair], elbo_B: Sequence[float], error_B: Sequence[float]) -> None:
        self._found += error_B
        if self._errors is not None:
            with self._errors.open("a") as file:
                for (context, continuation), elbo, error in zip(batch, elbo_B, error_B):
                    told = {"context": self.tokenizer.decode(context), "continuation": self.tokenizer.decode(continuation)}
                    file.write(json.dumps({**told, "elbo": elbo, "standard_error": error, "tokens": len(continuation)}) + "\n")

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    yield from (items[first : first + size] for first in range(0, len(items), size))


def _load(source: str | nn.Module, tokenizer: Any, loader: str | None, dtype: str | None, trusted: bool) -> Any:
    """What a loader returns, for a model at hand or one that transformers loads."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype, None)}
    if not isinstance(options.get("dtype", torch.float32), torch.dtype):
        raise ValueError(f"dtype must name one of torch's, such as bfloat16, got {dtype!r}")
    options |= {"trust_remote_code": True} if trusted else {}
    if loader is not None:
        module, _, function = loader.partition(":")
        if not module or not function:
            raise ValueError(f"loader must be written module:function, got {loader!r}")
        return getattr(importlib.import_module(module), function)(source, **options)
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer must be given where pretrained is a model")
        model = source
    else:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted)
        names = list(getattr(config, "auto_map", None) or {}) if trusted else []
        known = [name for name in _AUTO_CLASSES if name in names or type(config) in getattr(transformers, name)._model_mapping]
        if not known:
            raise ValueError(f"pretrained must name a masked language model that transformers knows, {source} is none of them")
        model = getattr(transformers, known[0]).from_pretrained(source, **{"dtype": torch.float32, **options}).eval()
        tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    of_config = getattr(model.config, "mask_token_id", None)
    facts = SimpleNamespace(
        mask_id=of_config if tokenizer.mask_token_id is None else tokenizer.mask_token_id, shift=0, block_length=None
    )
    return SimpleNamespace(model=model, tokenizer=tokenizer, facts=facts, suppressed=(), call_kwargs=_attention)


def _attention(real_BS: Tensor | None) -> dict[str, Tensor]:
    return {} if real_BS is None else {"attention_mask": real_BS.long()}


def main() -> None:
    """The harness's command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
