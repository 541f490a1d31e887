"""`headless(model)`: final hidden states and the LM head of any Hugging Face model, without its logits."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions, WeightGradient
from dllm_kernels.model import adapters
from dllm_kernels.model.sharding import Shards, WholeHead, accumulation_hooks, find_shards, is_sharded
from dllm_kernels.model.wrappers import HandedOut, Wrapper, check_alone, check_head, find_outer, unwrapped


class _Tap:
    """Replaces the head's forward: keeps its input and returns a single column of it.

    Whatever the model does to its logits afterwards (softcap, scaling, an upcast) costs one column. A head has one
    for all its contexts: `torch.compile` would see a new graph in each new one.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.open: list[Body] = []
        self.check: Callable[[Callable[[Tensor], Tensor], Tensor], None] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        if not torch.compiler.is_compiling() and self.check is not None:
            self.check(functools.partial(self.open[-1].whole.copy_of, dtype=hidden.dtype), hidden)
        return hidden[..., :1].clone()  # not a view: OLMo-style code (LLaDA) may scale its logits in place

    def hand_out(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook of the module whose output reducers look at."""
        if self.hidden is None:
            return None
        body = self.open[-1]
        used_names = {"weight", "bias", *adapters.active_names(body.head)}
        parameters = [
            p for name, p in body.whole.parameters.items() if name in used_names and p is not None and not is_sharded(p)
        ]
        used = tuple(p[:0] for p in parameters if p.requires_grad) if torch.is_grad_enabled() else ()
        return HandedOut(self.hidden, getattr(output, "logits", None), used)


_TAPS: weakref.WeakKeyDictionary[nn.Module, _Tap] = weakref.WeakKeyDictionary()


class _LinearTap(TorchFunctionMode):
    """The same where `F.linear` with the input embedding is the head (LLaDA's `weight_tying`)."""

    def __init__(self, weight: Tensor, tap: _Tap) -> None:
        super().__init__()
        self.weight, self.tap = weight, tap

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self.weight:
            return self.tap(args[0])
        return func(*args, **(kwargs or {}))


class Body:
    """A model without its head, made by `headless`. Calling it returns hidden states.

    `weight` is the head's; with `options` (bias, softcap, temperature, and `low_rank` while an adapter on the head is
    switched on), `score_tokens` and `sample_tokens` reproduce the model's own logits.
    """

    def __init__(self, model: nn.Module, head: nn.Module, wrapper: Wrapper, whole: WholeHead) -> None:
        self.model = model
        self.head = head
        self.wrapper, self.whole = wrapper, whole
        self.parameter: Tensor = whole.parameters["weight"]  # type: ignore[assignment]  # a DTensor where it is sharded
        self._tap = _TAPS[head]
        self._active = True
        self._seen = type(find_outer(model)) is not Wrapper or self.shards is not None  # no wrapper was left out
        model = unwrapped(model)
        embed = getattr(model, "get_input_embeddings", None)
        try:
            embedding = embed() if callable(embed) else None
        except NotImplementedError:  # transformers finds none (MDLM's own code calls it vocab_embed)
            embedding = None
        self._embedding: Tensor | None = getattr(embedding, "weight", None)
        if self.shards is not None and self._embedding is self.parameter and accumulation_hooks(self.parameter):
            raise ValueError(
                "model must not have a tied head with an optimizer in backward (register_post_accumulate_grad_hook) under "
                "fully_shard: it would step before the head's part of the gradient is there; step after backward"
            )
        # the input embedding may have more rows than the head
        self.vocabulary = int(getattr(embedding, "num_embeddings", self.parameter.shape[0]))
        config = text_config(model)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them
        self.temperature = float(getattr(config, "logits_scaling", None) or 1.0 / (getattr(config, "logit_scale", None) or 1.0))

    @property
    def shards(self) -> Shards | None:
        """None for a model of plain tensors."""
        return self.wrapper if isinstance(self.wrapper, Shards) else None

    @property
    def weight(self) -> Tensor:
        """`[V, H]`: the parameter, or a full copy of a sharded one in the dtype of the last hidden states.

        The gradient of a copy is reduced over ranks, as FSDP reduces the body's, into the sharded parameter when
        the outermost `headless` ends.
        """
        weight = self.whole.get("weight")
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        """`[V]` or None; as the weight."""
        return self.whole.get("bias")

    @property
    def options(self) -> HeadOptions:
        low_rank = adapters.low_rank(self.head, self.whole.get)
        return HeadOptions(self.bias, self.softcap, self.temperature, low_rank=low_rank)

    @property
    def take_dweight(self) -> WeightGradient | None:
        """Where the gradient of a sharded head's weight is added up, in fp32; None where autograd's `.grad` takes it."""
        return self.whole.taker("weight")

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states `[..., S, H]` of ids `[..., S]`, in the dtype in which the model feeds its head.

        Leading dimensions, such as `[K, B]`, are flattened into one batch; so are those of an
        `attention_mask`.
        """
        if not self._active:
            raise ValueError("body must be called inside its headless context, which has ended")
        checks.dtype("input_ids", input_ids, (torch.int64, torch.int32))
        if input_ids.dim() == 0 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must have shape [..., S] and hold at least one id, got {list(input_ids.shape)}")
        if self._embedding is not None:
            checks.same_device("input_ids", input_ids, "the input embedding", self._embedding)
        checks.in_range("input_ids", input_ids, 0, self.vocabulary)
        flat = input_ids.reshape(-1, input_ids.shape[-1])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() <= input_ids.dim():  # a mask of pairs is passed through
            kwargs["attention_mask"] = kwargs["attention_mask"].expand(input_ids.shape).reshape(flat.shape)
        self._tap.hidden = None
        if self.shards is not None and self.shards.refresh():
            self.whole.check_step()
        own_embedding = isinstance(self.head, nn.Embedding)
        with warnings.catch_warnings(), _LinearTap(self.parameter, self._tap) if own_embedding else nullcontext():
            if self.shards is not None:  # warns of views changed in place later; these are not
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            output = self.wrapper.callee(self.model)(input_ids=flat, **kwargs)
        hidden, self._tap.hidden = self._tap.hidden, None
        if hidden is None:
            raise ValueError(
                f"model must pass its hidden states through its output embedding, but {type(self.model).__name__} did not call it"
            )
        wanted = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in self.whole.parameters.values())
        if not self._seen and (wanted or hidden.requires_grad):
            check_alone(self.head)
            self._seen = True
        if isinstance(output, HandedOut):  # reducers may have marked or cast what they hand out
            hidden, column = output.hidden.to(hidden.dtype), output.column
        else:
            column = getattr(output, "logits", None)
        self._check_logits(hidden, column)
        if torch.is_autocast_enabled(hidden.device.type):  # autocast would bring both operands to one dtype
            hidden = hidden.to(self.parameter.dtype)
        self.whole.get("weight", hidden.dtype)  # a collective, which all ranks call here
        adapters.low_rank(self.head, self.whole.get)  # likewise, and refuses what cannot be right
        self.wrapper.watch(hidden)
        return hidden.view(*input_ids.shape, hidden.shape[-1])

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        """Within the context, gradients are summed over ranks, whatever the wrapper does otherwise; then it does so again."""
        with self.wrapper.accumulating(reduce_last=reduce_last):
            yield

    def idle(self, length: int, model_kwargs: Mapping[str, Tensor], *, backward: bool = False) -> None:
        """A call that adds exactly 0 to every gradient, to keep step with ranks that have more to do."""
        device = self.parameter.device
        ones = {name: tensor.new_ones(1, *tensor.shape[1:]) for name, tensor in model_kwargs.items()}
        with torch.set_grad_enabled(backward):
            hidden = self(torch.zeros(1, length, dtype=torch.int64, device=device), **ones)
            if hidden.requires_grad:
                hidden.backward(torch.zeros_like(hidden))

    def _check_logits(self, hidden: Tensor, column: Tensor | None) -> None:
        """Check that the model did to the tap's column only what `options` say."""
        if not isinstance(column, Tensor) or column.shape != (*hidden.shape[:-1], 1) or not checks.may_read(column):
            return
        want = hidden.detach()[..., :1].float()
        if self.softcap is not None:
            want = self.softcap * torch.tanh(want / self.softcap)
        if not torch.allclose(column.detach().float(), want / self.temperature, rtol=2e-2, atol=1e-3, equal_nan=True):
            raise ValueError(f"model must not change its logits beyond softcap and scale: {type(self.model).__name__} does")


@contextmanager
def headless(model: nn.Module) -> Iterator[Body]:
    """Within the context, the model's output embedding is bypassed and logits are never built.

    Args:
        model: any module with Hugging Face's `get_output_embeddings()`, also with a tied head or softcapped logits, as the
            training loop holds it: in DistributedDataParallel, under fully_shard (FSDP2), in a DeepSpeed engine (ZeRO 0 to 2),
            compiled. Pass the wrapper, not what is inside it.

    Yields a `Body`. Calls go through the wrapper, which reduces gradients as it does with plain logits; the gradient of a head
    that FSDP2 shards is reduced in the same way when the context ends, so backward has to run inside. The model is restored
    on exit, also after an exception. Only the head's forward is replaced: modules, parameters, state dict and hooks stay in
    place, so training and saving work as usual.

    peft's LoRA on the head is a part of it (`body.options`), merged or not, and a head in `modules_to_save` is the active
    copy; a head whose own output on one row is not what the options say is refused, once per model.

    Raises TypeError if `model` is not a module, ValueError if it has no output embedding, or one with a norm or scale in its
    forward, with DoRA, a LoRA bias, LoRA dropout in training, or an adapter of another kind; or if it is in a wrapper under
    which gradients could not be right: FSDP1, ZeRO 3, DataParallel; or if tensor parallelism splits its head.

    Example:
        >>> import torch
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> config = EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = EuroBertForMaskedLM(config)
        >>> with headless(model) as body:
        ...     hidden = body(torch.tensor([[1, 2, 3]]))
        >>> hidden.shape, body.weight.shape
        (torch.Size([1, 3, 8]), torch.Size([11, 8]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrapper = find_outer(model)
    getter = getattr(unwrapped(model), "get_output_embeddings", None)
    head: Any = getter() if callable(getter) else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            f"model must have an output embedding (get_output_embeddings() with a weight), {type(model).__name__} has none"
        )
    head = adapters.in_use(head)
    check_head(head)
    own_embedding = isinstance(head, nn.Embedding)  # its forward is the input lookup and must stay
    previous = head.__dict__.get("forward")  # accelerate and others patch instances, too
    tap = _TAPS.setdefault(head, _Tap())
    hook = None
    if tap.open:
        wrapper, whole = tap.open[0].wrapper, tap.open[0].whole
    else:
        if (shards := find_shards(model)) is not None:
            if type(wrapper) is not Wrapper:
                raise ValueError(f"model must be sharded or in a {type(model).__name__}, not both")
            if own_embedding:
                raise ValueError(
                    f"model must have an output embedding apart from its input embedding to be sharded: {type(model).__name__}"
                )
            wrapper = shards
        whole = WholeHead(head.weight, getattr(head, "bias", None), wrapper)
        whole.parameters |= adapters.parameters(head)
        if shards is not None:
            shards.check_head(whole.parameters.values())
        whole.get("bias")
        for parameter in whole.parameters.values():
            if parameter is not None:
                wrapper.stand_in(parameter)  # before any forward
        carrier = wrapper.carrier
        if carrier is not None and carrier is not head and any(module is head for module in carrier.modules()):
            hook = carrier.register_forward_hook(tap.hand_out, prepend=True)
    checks.shape("model's output embedding weight", head.weight, [None, None])
    if getattr(head, "lora_embedding_A", None):
        raise ValueError("model's output embedding must not be an input embedding with LoRA: its logits would be without it")
    if not tap.open and not own_embedding:
        tap.check = functools.partial(adapters.check_own_output, head, head.forward)
    body = Body(model, head, wrapper, whole)
    tap.open.append(body)
    if not own_embedding:
        head.forward = tap
    try:
        yield body
    finally:
        tap.open.remove(body)
        body._active = False
        if previous is not None:
            head.forward = previous
        elif not own_embedding:
            del head.forward
        if hook is not None:
            hook.remove()
        wrapper.reshard()
        if not tap.open:
            tap.check = None  # holds the head
            whole.close()
    if not tap.open:  # not after an error: other ranks may be elsewhere
        whole.reduce()


def text_config(model: nn.Module) -> Any:
    """The language model's config, nested in that of a multimodal model; None where there is none."""
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module) -> int | None:
    """The largest number of positions according to the config; None where it states none."""
    config = text_config(model)
    stated = (getattr(config, name, None) for name in ("max_position_embeddings", "max_sequence_length"))
    return min((length for length in stated if isinstance(length, int) and length > 0), default=None)


def dropout_names(model: nn.Module) -> list[str]:
    """Active dropout modules and dropout rates of the config: with any, two forward passes differ."""
    if not model.training:
        return []
    active = [
        name for name, m in model.named_modules() if m.training and "Dropout" in type(m).__name__ and getattr(m, "p", 0) > 0
    ]
    config: Any = getattr(unwrapped(model), "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return active + [
        f"config.{key}" for key, value in settings.items() if "dropout" in key and isinstance(value, float) and value > 0
    ]
