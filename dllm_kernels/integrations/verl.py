"""verl and DARE: log-probs and ELBOs in the shapes that their actors take, rewards in either form.

Nothing of verl is imported: what is here takes and returns tensors, and DARE's actors call it in place of their own
lines (docs/integrations.md shows which).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dllm_kernels import MaskPlan, checks, headless, make_mask_plan, score_tokens
from dllm_kernels.accumulation.estimation import content_ids
from dllm_kernels.integrations import with_body
from dllm_kernels.model.headless import Body

IGNORED = -100  # as a label: not scored


class FusedOutput(NamedTuple):
    """What a patched forward returns: float32 `[B, S]`, 0 where the label is -100. A tuple, in which reducers find tensors."""

    log_probs: Tensor
    entropy: Tensor


class FusedLinearForPPO(nn.Module):
    """verl's `FusedLinearForPPO` by our head, for `verl.utils.experimental.torch_functional`: same arguments and results.

    Labels of -100 are not scored: 0 there.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> log_probs, entropy = FusedLinearForPPO()(hidden, weight, torch.randint(11, (2, 5)))
        >>> log_probs.shape, entropy.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()  # verl's own settings of its chunks: the head here sizes its own

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        checks.shape("input_ids", input_ids, list(hidden_states.shape[:-1]))
        return _statistics(hidden_states, vocab_weights, input_ids.long(), temperature=temperature)


def patch_forward(model: nn.Module, *, shift: int = 0, suppress: Sequence[int] = ()) -> None:
    """Replace `model.forward`: given `labels`, it returns a `FusedOutput` in place of logits, as verl's patch does.

    Call it as `model(input_ids=noisy, labels=targets, temperature=1.0, ...)`, labels -100 where nothing is scored; the
    token at position i is scored by row i - `shift`. Without labels the forward is the model's own. The head runs inside
    the forward, so DistributedDataParallel and `fully_shard` (FSDP2), which gathers a head that is no unit of its own, see it.
    Patch before wrapping.

    Raises TypeError or ValueError where the model has no head that `headless` finds.
    """
    checks.count("shift", shift, 0)
    with headless(model):  # that it can be found
        original = model.forward

    def forward(input_ids: Tensor | None = None, *, labels: Tensor | None = None, temperature: float = 1.0, **kwargs: Any) -> Any:
        if labels is None:
            return original(input_ids=input_ids, **kwargs)
        checks.require_tensor("input_ids", input_ids)
        assert input_ids is not None
        checks.shape("labels", labels, list(input_ids.shape))
        with headless(model) as body:
            hidden = body(input_ids, **kwargs)
            return FusedOutput(*_of_body(body, hidden, labels, shift, temperature, suppress))

    model.forward = forward


def forward_micro_batch(
    model: nn.Module,
    micro_batch: Mapping[str, Tensor],
    *,
    calculate_entropy: bool = False,
    shift: int = 0,
    packed: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """DARE's `_forward_micro_batch` of LLaDA's and Dream's actors without logits: `(entropy, log_prob, loss_per_sample)`.

    Args:
        model: the actor's module, in the wrapper that it has.
        micro_batch: `input_ids` `[B, S]`, `attention_mask` `[B, S]`, `responses` `[B, R]`; `perturbed_seq`,
            `mask_indices` and `p_mask` `[B, K, S]`.
        shift: 1 where position i is predicted by row i - 1 (Dream).
        packed: call the model on the real tokens in one row, with `cu_seqlens` and `max_seqlen`, as DARE's patched
            models take them; False: on padded rows with the attention mask.

    Returns `log_prob` `[B, R]`, the ELBO of a sequence in every column, `loss_per_sample` `[B, K, R]`, each sample's over R,
    and DARE's entropy of `log_prob` on request. float32, differentiable. Raises ValueError or TypeError naming the entry.
    """
    ids_BS, real_BS = micro_batch["input_ids"], micro_batch["attention_mask"] == 1
    B, S = ids_BS.shape
    noisy_BKS, masked_BKS, p_mask_BKS = (micro_batch[name] for name in ("perturbed_seq", "mask_indices", "p_mask"))
    for name in ("perturbed_seq", "mask_indices", "p_mask"):
        checks.shape(name, micro_batch[name], [B, None, S])
    checks.dtype("mask_indices", masked_BKS, [torch.bool])
    R, K = micro_batch["responses"].shape[1], noisy_BKS.shape[1]
    seen_BS = real_BS & nn.functional.pad(real_BS, (shift, 0))[:, :S]  # real, and predicted by a real row
    if checks.may_read(real_BS) and bool((masked_BKS & ~seen_BS[:, None]).any()):
        raise ValueError(f"mask_indices must be False at padding and at the first {shift} real position(s) (shift={shift})")

    def elbos(body: Body) -> Tensor:
        sums = []
        for k in range(K):
            masked_BS = masked_BKS[:, k]
            flat_N = masked_BS.reshape(-1).nonzero()[:, 0]
            hidden, row_N = _call(body, noisy_BKS[:, k], real_BS, flat_N - shift, packed)
            scores = score_tokens(
                hidden, body.weight, ids_BS.reshape(-1)[flat_N], rows=row_N, take_dweight=body.take_dweight, **body.options
            )
            assert scores.logp is not None
            weighted_N = scores.logp.double() / p_mask_BKS[:, k].reshape(-1)[flat_N]  # summed as `MaskPlan.elbo` does
            sums.append(weighted_N.new_zeros(B * S).index_copy(0, flat_N, weighted_N).view(B, S).sum(-1).to(scores.logp.dtype))
        return torch.stack(sums, dim=1)

    elbo_BK = with_body(model, elbos)
    log_prob_BR = elbo_BK.mean(1, keepdim=True).expand(-1, R)
    loss_BKR = (elbo_BK / R)[:, :, None].expand(-1, -1, R).contiguous()
    return -log_prob_BR.exp() * log_prob_BR if calculate_entropy else None, log_prob_BR, loss_BKR


def plan_of(micro_batch: Mapping[str, Tensor], *, mask_id: int, shift: int = 0) -> MaskPlan:
    """The masks of a DARE micro-batch as a plan: for `accumulate` in place of the loop over samples, and all else.

    The weight of a sample is `1 / p_mask`, which must be one number over the hidden tokens of each; a sample that hides
    nothing has weight 0. Raises ValueError naming the entry.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> masked = torch.tensor([[[False, False, True, True]]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask_indices": masked}
        >>> plan_of(batch | {"responses": ids[:, 1:], "p_mask": masked * 0.5}, mask_id=9).weight_KB
        tensor([[2.]])
    """
    ids_BS, real_BS, masked_BKS = micro_batch["input_ids"], micro_batch["attention_mask"] == 1, micro_batch["mask_indices"]
    p_mask_BKS = micro_batch["p_mask"]
    low_BK = p_mask_BKS.masked_fill(~masked_BKS, torch.inf).amin(-1)
    high_BK = p_mask_BKS.masked_fill(~masked_BKS, 0.0).amax(-1)
    hidden_BK = masked_BKS.any(-1)
    if checks.may_read(p_mask_BKS) and bool((hidden_BK & ((low_BK != high_BK) | (low_BK <= 0))).any()):
        raise ValueError("p_mask must be one number above 0 over the hidden tokens of each sample")
    completion_BS = real_BS & (
        torch.arange(ids_BS.shape[1], device=ids_BS.device) >= ids_BS.shape[1] - micro_batch["responses"].shape[1]
    )
    return make_mask_plan(
        ids_BS,
        completion_BS,
        law="given",
        samples=None,
        seed=0,
        sequence_ids=content_ids(ids_BS, completion_BS, real_BS),
        mask_id=mask_id,
        shift=shift,
        attention_mask_BS=real_BS,
        masked_KBS=masked_BKS.transpose(0, 1),
        weight_KB=torch.where(hidden_BK, 1.0 / high_BK, 0.0).t(),
    )


def reward_of(compute_score: Callable[..., Any]) -> Callable[..., list[float]]:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` as a reward of TRL's form.

    The columns `data_source`, `ground_truth` (or verl's `reward_model` with it) and `extra_info` are read; a dictionary
    that comes back gives its "score". Raises ValueError where there is no ground truth.

    Example:
        >>> reward = reward_of(lambda data_source, solution_str, ground_truth, extra_info=None: solution_str == ground_truth)
        >>> reward(["1+1="], ["2"], ground_truth=["2"])
        [1.0]
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        truths = columns.get("ground_truth")
        if truths is None and "reward_model" in columns:
            truths = [model["ground_truth"] for model in columns["reward_model"]]
        if truths is None:
            raise ValueError("ground_truth must be a column of the data, or reward_model with one in it")
        sources = columns.get("data_source") or [""] * len(completions)
        extras = columns.get("extra_info") or [None] * len(completions)
        found = []
        for source, text, truth, extra in zip(sources, map(_text, completions), truths, extras, strict=True):
            value = compute_score(data_source=source, solution_str=text, ground_truth=truth, extra_info=extra)
            found.append(float(value["score"] if isinstance(value, Mapping) else value))
        return found

    return reward


def compute_score_of(reward: Callable[..., Sequence[float | None]]) -> Callable[..., float]:
    """A reward of TRL's form as verl's `compute_score`: called with one completion and the columns of `extra_info`.

    Raises ValueError where the reward is None, which verl has no word for.
    """

    def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
        columns = {"data_source": data_source, "ground_truth": ground_truth, **(extra_info or {})}
        prompt = columns.pop("prompt", "")
        (value,) = reward(prompts=[prompt], completions=[solution_str], **{name: [value] for name, value in columns.items()})
        if value is None:
            raise ValueError("reward must give every completion a number, got None")
        return float(value)

    return compute_score


def _text(completion: Any) -> str:
    """A completion, or the content of the last turn of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _call(body: Body, noisy_BS: Tensor, real_BS: Tensor, row_N: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Hidden states of one call of the model, and these rows among them."""
    if not packed:
        return body(noisy_BS, attention_mask=real_BS.long()), row_N
    length_B = real_BS.sum(-1)
    ends = nn.functional.pad(length_B.cumsum(0), (1, 0)).to(torch.int32)
    hidden = body(noisy_BS[real_BS][None], cu_seqlens=ends, max_seqlen=int(length_B.max()))
    return hidden, (real_BS.reshape(-1).cumsum(0) - 1)[row_N]


def _of_body(
    body: Body, hidden: Tensor, labels_BS: Tensor, shift: int, temperature: float, suppress: Sequence[int]
) -> tuple[Tensor, Tensor]:
    options = {**body.options, "temperature": body.options.temperature * temperature, "suppress": suppress}
    return _statistics(hidden, body.weight, labels_BS, shift=shift, take_dweight=body.take_dweight, **options)


def _statistics(hidden: Tensor, weight: Tensor, labels: Tensor, *, shift: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in the shape of the labels, 0 where they are -100."""
    flat_N = (labels.reshape(-1) != IGNORED).nonzero()[:, 0]
    if shift and checks.may_read(labels) and bool((labels[..., :shift] != IGNORED).any()):
        raise ValueError(f"labels must be {IGNORED} at the first {shift} position(s) (shift={shift}): no row predicts them")
    scores = score_tokens(hidden, weight, labels.reshape(-1)[flat_N], rows=flat_N - shift, want=("logp", "entropy"), **options)
    assert scores.logp is not None
    assert scores.entropy is not None
    zeros = scores.logp.new_zeros(labels.numel())
    return zeros.index_copy(0, flat_N, scores.logp).view(labels.shape), zeros.index_copy(0, flat_N, scores.entropy).view(
        labels.shape
    )
