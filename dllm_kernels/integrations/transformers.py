"""transformers' `Trainer` with the ELBO loss of masked diffusion models: `DiffusionSFTTrainer`.

    trainer = DiffusionSFTTrainer(model, DiffusionSFTConfig("out", mask_id=126336), train_dataset=data,
                                  data_collator=DiffusionCollator(pad_id))

Everything else is the Trainer's own: its arguments, datasets, callbacks, checkpoints and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import MaskPlan, checks, make_mask_plan, score_tokens
from dllm_kernels.accumulation.estimation import content_ids
from dllm_kernels.integrations import needs, with_body
from dllm_kernels.model.headless import Body, headless
from dllm_kernels.model.layouts import block_diffusion, check_block_length, check_blocks

with needs("transformers", "pip install 'dllm-kernels[train]'"):
    from transformers import Trainer, TrainingArguments

IGNORED = -100  # as a label: not scored
# t in (t_min, 1) -> (probability of hiding a token, weight of its log-prob), each of t's shape: one t for a sample of a
# sequence, `[K, B]`, or with blocks for each of them, `[K, B * blocks]`
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
REDUCTIONS = ("token", "sequence", "batch", "position")


@dataclass
class DiffusionSFTConfig(TrainingArguments):
    """`TrainingArguments`, and what masked diffusion adds. Masks depend on `seed`, step and content alone.

    reduction, of the weighted sums of `-logp` over the whole optimizer step, all micro-batches and processes:

        token     divided by the number of scored tokens (MDLMTrainer's default)
        sequence  each by its own number of scored tokens, then averaged over sequences: LLaDA's SFT loss
                  (arXiv 2502.09992, eq. 5)
        batch     averaged over sequences: minus the mean ELBO
        position  divided by all positions, padding included: LLaDA's pre-training loss (eq. 3)
    """

    mask_id: int | None = None  # None: the tokenizer's mask token, or that of the model's config
    shift: int = 0  # 1 where position i is predicted by row i - 1 (Dream)
    law: str = "bernoulli"  # of `make_mask_plan`
    law_options: dict[str, Any] | None = None  # None: t_min=1e-3 for `bernoulli`, which is LLaDA's; else the law's own
    samples: int = 1  # masks per sequence and step; memory grows with them
    reduction: str = "token"
    eval_samples: int = 4  # masks per sequence, the same in every evaluation
    eval_seed: int = 0
    causal_block: int | None = None  # of a block-causal model: tokens per block, in which everything is drawn
    block_origin: str = "sequence"  # or "completion": where blocks begin
    packed: bool = False  # calls the model without padding: all sequences in one row, each sees itself alone
    suppress_mask: bool = False  # the mask id gets probability 0, as in rollouts


class DiffusionSFTTrainer(Trainer):
    """`Trainer` whose loss is `-sum over hidden tokens of weight * logp`, from hidden states, without logits.

    Args:
        schedule: masks by a schedule of your own in place of a linear one: t ~ U(t_min, 1] ->
            (p_mask, weight), for instance `lambda t: (1 - alpha(t), -alpha'(t) / (1 - alpha(t)))`, element by
            element; needs law="bernoulli". With causal_block each block has a t, and so a weight, of its own
            (BD3-LM, arXiv 2503.09573, eq. 8).
        Others are the Trainer's; `args` is a `DiffusionSFTConfig`.

    Batches hold `input_ids` int64 `[B, S]`, `labels` `[B, S]` (the same ids, or -100 where a token is shown and
    not scored) and optionally `attention_mask`; other tensors are handed to the model.

    The loss is divided once over all micro-batches and processes of an optimizer step, so it does not depend on
    how the step is cut. The evaluation loss has the same reduction, over the whole set, with fixed masks: it
    depends on the weights alone, but for rows that occur twice.

    Raises ValueError or TypeError naming the argument or the entry of the batch.
    """

    loss_is_scaled_for_ga = True  # divided over the whole optimizer step here

    def __init__(
        self, model: nn.Module | None = None, args: Any = None, *arguments: Any, schedule: Schedule | None = None, **named: Any
    ) -> None:
        if not isinstance(args, DiffusionSFTConfig):
            raise TypeError(f"args must be a DiffusionSFTConfig, got {type(args).__name__}")
        checks.choice("reduction", args.reduction, REDUCTIONS)
        if schedule is not None and args.law != "bernoulli":
            raise ValueError(f"law must be 'bernoulli' where a schedule is given, got {args.law!r}")
        if schedule is not None and "weight" in (args.law_options or {}):
            raise ValueError("law_options must have no weight where a schedule is given, which says it")
        if args.packed and args.causal_block is not None:
            raise ValueError(f"causal_block must be None where packed is given, got {args.causal_block}")
        if named.get("compute_metrics") is not None:
            raise ValueError("compute_metrics must be None: there are no logits; the evaluation gives the loss")
        if args.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the loss is an ELBO")
        if not args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must be True: the loss is divided once, over all processes of a step")
        super().__init__(model, args, *arguments, **named)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None: the loss is that of args.reduction, without logits")
        check_block_length(self.model, args.causal_block)
        if args.n_gpu > 1:
            raise ValueError("torch.nn.DataParallel splits a model call; launch one process per GPU with torchrun")
        # divides the loss by the number of micro-batches otherwise, where transformers is older than the attribute above
        self.model_accepts_loss_kwargs = True
        self.label_names = ["labels"]
        self.schedule = schedule
        of_llada = {"t_min": 1e-3} if args.law == "bernoulli" else {}
        self.law_options: dict[str, Any] = of_llada if args.law_options is None else args.law_options
        self.mask_id = find_mask_id(args.mask_id, self.processing_class, self.model)
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        check_parallelism(self.accelerator)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and what divides their loss, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        units = sum(int(self._units(*_scored(batch)).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(units, device=device), "sum")

    def training_step(self, model: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        with headless(model):
            return super().training_step(model, *arguments, **named)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of that of the optimizer step, or of itself without `num_items_in_batch`."""
        plan = self.plan(inputs, samples=self.args.samples, seed=self.args.seed, iteration=self.state.global_step)
        scale_B, units_B = self._parts(plan)
        divisor: Any = units_B.sum().clamp(min=1)
        if num_items_in_batch is not None:  # gradients are averaged over the processes
            divisor = num_items_in_batch / self.accelerator.num_processes
        rows, share_K = plan.rows, plan.share_K
        coef_N = -(rows.weight * share_K[rows.sample] * scale_B[rows.sequence]) / divisor  # of the scored tokens
        loss = self._score(model, plan, inputs, coef_N)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        plan = self.plan(inputs, samples=self.args.eval_samples, seed=self.args.eval_seed)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll_B = -plan.score(self._score(model, plan, inputs))
        scale_B, units_B = self._parts(plan)
        # dataloaders repeat sequences to fill up the processes' last batch; this leaves them out
        told = self.accelerator.gather_for_metrics(torch.stack([nll_B * scale_B, units_B], dim=-1).double())
        self._evaluated += told.sum(0).cpu()
        return (nll_B * scale_B).sum() / units_B.sum().clamp(min=1), None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, *arguments: Any, metric_key_prefix: str = "eval", **named: Any
    ) -> Any:
        self._evaluated.zero_()
        output = super().evaluation_loop(dataloader, description, *arguments, metric_key_prefix=metric_key_prefix, **named)
        total, units = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(1.0, units)
        return output

    def plan(self, inputs: Mapping[str, Any], *, samples: int, seed: int, iteration: int = 0) -> MaskPlan:
        """The masks of a batch: a function of (seed, iteration, content), the same in any batch."""
        ids_BS, scored_BS = _scored(inputs)
        attention_mask_BS = inputs.get("attention_mask")
        arguments: dict[str, Any] = {
            "seed": seed,
            "iteration": iteration,
            "sequence_ids": content_ids(ids_BS, scored_BS, attention_mask_BS),
            "mask_id": self.mask_id,
            "shift": self.args.shift,
            "attention_mask_BS": attention_mask_BS,
        }
        if self.args.causal_block is not None:
            arguments |= {"causal_block": self.args.causal_block, "block_origin": self.args.block_origin}
        drawn = make_mask_plan(ids_BS, scored_BS, law=self.args.law, samples=samples, **arguments, **self.law_options)
        if self.schedule is None:
            return drawn
        # the linear schedule's noise and levels t, as another one reads them
        p_mask_KU, weight_KU = self.schedule(drawn.level.t_KB)
        for name, value in (("p_mask", p_mask_KU), ("weight", weight_KU)):
            checks.shape(f"schedule's {name}", value, list(drawn.level.t_KB.shape))
        masked_KBS = drawn.hidden_at(replace(drawn.level, t_KB=p_mask_KU.double()))
        if drawn.block_BS is None:
            arguments["weight_KB"] = weight_KU
        else:
            arguments["weight_KBS"] = drawn.units.at_tokens(weight_KU)
        return make_mask_plan(ids_BS, scored_BS, law="given", samples=None, masked_KBS=masked_KBS, **arguments)

    def _score(self, model: nn.Module, plan: MaskPlan, inputs: Mapping[str, Any], coef_N: Tensor | None = None) -> Tensor:
        """The log-probs of the plan's rows, or their sum weighted by coefficients."""
        check_blocks(self.model, plan, {})
        rows, packed = plan.rows, self.args.packed
        kwargs = {name: value for name, value in inputs.items() if name not in ("input_ids", "labels")}

        def score(body: Body) -> Tensor:
            layout, target_N, coef = None, rows.target, coef_N
            if plan.block_BS is not None:
                layout = plan.layout()
                hidden, index_N, target_N = block_diffusion(body, layout, kwargs), layout.index_M, layout.target_M
                if coef_N is not None:  # a row may predict tokens of several samples
                    coef = coef_N.new_zeros(len(index_N)).index_put((layout.row_N,), coef_N, accumulate=True)
            elif packed:
                hidden, index_N = _packed(body, self.model, plan, kwargs)
            else:
                hidden, index_N = body(plan.noisy_ids, **_repeated(kwargs, len(plan.sample_K))), rows.index
            scores = score_tokens(
                hidden,
                body.weight,
                target_N,
                rows=index_N,
                coef=coef,
                suppress=(self.mask_id,) if self.args.suppress_mask else (),
                take_dweight=body.take_dweight,
                **body.options,
            )
            found = scores.logp if coef_N is None else scores.weighted_sum
            assert found is not None
            return found if layout is None or coef_N is not None else found[layout.row_N]

        return with_body(model, score)

    def _parts(self, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        """What multiplies each sequence's sum, and what it adds to the divisor."""
        lengths_B = plan.lengths_B
        units_B = self._units(plan.input_ids_BS, plan.completion_mask_BS)
        scale_B = torch.ones_like(lengths_B, dtype=torch.float32)
        return (scale_B / lengths_B.clamp(min=1) if self.args.reduction == "sequence" else scale_B), units_B

    def _units(self, ids_BS: Tensor, scored_BS: Tensor) -> Tensor:
        if self.args.reduction == "token":
            return scored_BS.sum(-1)
        units = ids_BS.shape[1] if self.args.reduction == "position" else 1
        return torch.full((len(ids_BS),), units, device=ids_BS.device)


@dataclass(frozen=True)
class DiffusionCollator:
    """Pads examples on the right: `input_ids`, and `labels` (absent: every token is scored), lists or tensors.

    Returns `input_ids`, `labels` and `attention_mask`, int64 `[B, S]`; padding is not scored.

    Example:
        >>> batch = DiffusionCollator(pad_id=0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7]}])
        >>> batch["labels"].tolist()
        [[-100, 6], [7, -100]]
    """

    pad_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
        labels = [torch.as_tensor(example.get("labels", example["input_ids"]), dtype=torch.int64) for example in examples]
        for one, other in zip(ids, labels, strict=True):
            checks.shape("labels", other, list(one.shape))
        width = -(-max(map(len, ids)) // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])

        real = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": padded(ids, self.pad_id),
            "labels": padded(labels, IGNORED),
            "attention_mask": padded(real, 0),
        }


def find_mask_id(given: int | None, tokenizer: Any, model: nn.Module) -> int:
    """The id given, the tokenizer's or the config's. Raises ValueError or TypeError where none is in the vocabulary."""
    names = {"the arguments": given, "the tokenizer": getattr(tokenizer, "mask_token_id", None)}
    names["the model's config"] = getattr(getattr(model, "config", None), "mask_token_id", None)
    place, found = next(((place, found) for place, found in names.items() if found is not None), ("", None))
    if found is None:
        raise ValueError("mask_id must be given: neither the tokenizer nor the model's config names a mask token")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if checks.count("mask_id", found, 0) >= len(embedding.weight):
        raise ValueError(f"mask_id must be in 0..{len(embedding.weight) - 1}, got {found}, of {place}")
    return found


def check_parallelism(accelerator: Any) -> None:
    """Raises ValueError where ranks hold parts of a sequence: masks, weights and counts are made of whole ones."""
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if getattr(config, name, 1) > 1:
            raise ValueError(f"parallelism_config must have {name}=1, got {getattr(config, name)}: a rank needs whole sequences")


def _scored(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and which of them are scored, `[B, S]`."""
    for name in ("input_ids", "labels"):
        if name not in inputs:
            raise ValueError(f"{name} must be in every batch, got {', '.join(sorted(inputs)) or 'nothing'}")
    ids_BS, labels_BS = inputs["input_ids"], inputs["labels"]
    checks.shape("labels", labels_BS, list(ids_BS.shape))
    scored_BS = labels_BS != IGNORED
    if checks.may_read(ids_BS) and bool((scored_BS & (labels_BS != ids_BS)).any()):
        raise ValueError("labels must be the input_ids, unshifted, or -100 where a token is not scored")
    return ids_BS, scored_BS


def _repeated(kwargs: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The model's other inputs, once for every sample of a batch; the body repeats the attention mask itself."""
    if samples == 1:
        return dict(kwargs)
    return {
        n: v if n == "attention_mask" or not isinstance(v, Tensor) else v.repeat(samples, *[1] * (v.dim() - 1))
        for n, v in kwargs.items()
    }


def _packed(body: Body, model: nn.Module, plan: MaskPlan, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states `[M, H]` of the M real tokens of all samples in one row, and the plan's rows among them.

    Positions restart with every sequence. flash-attn's variable-length kernel finds the sequences by them; other
    kernels get a mask of pairs, which is as exact and takes M x M numbers.
    """
    if others := sorted(set(kwargs) - {"attention_mask"}):
        raise ValueError(f"packed takes input_ids, labels and attention_mask only, got {', '.join(others)}")
    keep_BS = kwargs.get("attention_mask")
    ids_KBS = plan.noisy_ids
    keep_KBS = torch.ones_like(ids_KBS, dtype=torch.bool) if keep_BS is None else (keep_BS != 0).expand(ids_KBS.shape)
    keep_X = keep_KBS.reshape(-1)
    position_M = (keep_KBS.cumsum(-1) - 1).reshape(-1)[keep_X]
    options: dict[str, Any] = {"position_ids": position_M[None]}
    if not str(getattr(getattr(model, "config", None), "_attn_implementation", "")).startswith("flash"):
        sequence_M = (position_M == 0).cumsum(-1)
        apart_MM = sequence_M[:, None] != sequence_M
        dtype = next(model.parameters()).dtype
        mask_MM = torch.zeros(apart_MM.shape, dtype=dtype, device=apart_MM.device)
        options["attention_mask"] = mask_MM.masked_fill_(apart_MM, torch.finfo(dtype).min)[None, None]
    hidden = body(ids_KBS.reshape(-1)[keep_X][None], **options)[0]
    return hidden, (keep_X.cumsum(0) - 1)[plan.rows.index]
