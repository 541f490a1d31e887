"""Checks of a model before a run: alignment and mask id, with a wrong one of which nothing is learned, and its rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_kernels import headless, noise, score_tokens
from dllm_kernels.model.kept import check_kept
from dllm_kernels.model.layouts import takes, takes_cache
from dllm_kernels.noise import Stream
from dllm_kernels.rollouts.samplers import check_steps

from ..config import RolloutConfig
from ..errors import UserError
from ..facts import FAMILIES
from .loading import Loaded

LEAST_GAP = 0.1  # nats per token; the wrong alignment of a trained model is off by several
LEAST_ERRORS = 4.0  # standard errors
FAMILIAR = 1.0  # nats per token that text of its own may be less likely to a model than it expects


@dataclass(frozen=True)
class ShiftVerdict:
    """Log-probabilities per masked token of clean text, in nats, under both alignments."""

    likelier: int | None  # shift 0 or 1; None: undecided, as for an untrained model, or text unlike what it was trained on
    same_logp: float  # position i from row i
    shifted_logp: float  # position i from row i - 1
    standard_error: float  # of their difference
    tokens: int
    expected_logp: float = math.nan  # what the model gives text that it writes itself, under the likelier alignment
    strange: bool = False  # the text is far less likely than that

    def __str__(self) -> str:
        name = {None: "undecided", 0: "position i is predicted by row i", 1: "position i is predicted by row i - 1"}
        return (
            f"{name[self.likelier]}: {self.same_logp:.2f} nats a token from its own row, {self.shifted_logp:.2f} from the row "
            f"before (standard error of the difference {self.standard_error:.2f}, {self.tokens} tokens)"
            + (f"; of its own text the model expects {self.expected_logp:.2f}, so this is none" if self.strange else "")
        )


@torch.no_grad()
def shift_self_test(
    loaded: Loaded, ids_BS: Tensor, *, seed: int, attention_mask_BS: Tensor | None = None, share: float = 0.15
) -> ShiftVerdict:
    """Mask a few tokens of clean text and compare their scores under both alignments.

    Args:
        ids_BS: token ids of real text, 100 tokens or more. attention_mask_BS: False at padding, where nothing
            is masked.
        share: fraction to mask; small, so that a trained model knows the answers.

    Text that the model was not trained on says nothing: of text of its own, a model expects minus the entropy of its
    predictions. Raises UserError with the figures if they contradict `facts.shift`, unless that is the table's for this family.
    """
    facts, model = loaded.facts, loaded.model
    B, S = ids_BS.shape
    real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if attention_mask_BS is None else attention_mask_BS.bool()
    sequence = noise.sequence_ids([f"shift/{b}" for b in range(B)]).to(ids_BS.device)
    zero = torch.zeros((), dtype=torch.int64, device=ids_BS.device)
    bits_BS = noise.row_bits(seed, Stream.MASK, sequence[:, None], zero, torch.arange(S, device=ids_BS.device))
    masked_BS = noise.bernoulli(bits_BS, share) & real_BS & real_BS.roll(1, dims=1)
    masked_BS[:, 0] = False
    masked_BS &= ~masked_BS.roll(1, dims=1)  # the token before each masked one must be visible
    index_N = masked_BS.flatten().nonzero()[:, 0]
    if len(index_N) < 2:
        return ShiftVerdict(None, math.nan, math.nan, math.nan, len(index_N))
    target_N = ids_BS.flatten()[index_N]
    with headless(model) as body:
        hidden = body(ids_BS.masked_fill(masked_BS, facts.mask_id), **loaded.call_kwargs(attention_mask_BS))
        options = replace(body.options, suppress=(facts.mask_id,), valid_vocab=facts.valid_vocab)
        want = ("logp", "entropy")
        scored = [score_tokens(hidden, body.weight, target_N, rows=index_N - s, want=want, **options) for s in (0, 1)]
    same_N, shifted_N = (score.logp.double() for score in scored if score.logp is not None)
    expected = [-float(score.entropy.double().mean()) for score in scored if score.entropy is not None]
    gap_N = same_N - shifted_N
    gap, error = float(gap_N.mean()), float(gap_N.std()) / math.sqrt(len(gap_N))
    decided = abs(gap) > max(LEAST_GAP, LEAST_ERRORS * error)
    likelier = 0 if gap > 0 else 1
    best = float((same_N, shifted_N)[likelier].mean())
    strange = decided and best < expected[likelier] - FAMILIAR
    found = likelier if decided and not strange else None
    verdict = ShiftVerdict(found, float(same_N.mean()), float(shifted_N.mean()), error, len(index_N), expected[likelier], strange)
    of_family = next((row.facts.get("shift", 0) for row in FAMILIES if row.name == facts.family), None)
    if found is not None and found != facts.shift and facts.shift != of_family:
        raise UserError(f"model.facts.shift is {facts.shift}, but in this model {verdict}; set model.facts.shift={found}")
    return verdict


def check_rollout(rollout: RolloutConfig, loaded: Loaded, length: int, *, infills: bool = False) -> None:
    """Raises UserError for what `generate` would refuse of this config and model, before anything is trained.

    `infills`: completions fill the middle of a text.
    """
    if rollout.engine == "sglang":
        if infills:
            raise UserError("rollout.engine must be ours for a task with suffixes, which a server of SGLang does not take")
        if loaded.facts.block_length is None:
            raise UserError(
                "rollout.engine=sglang is for block-causal models (SDAR, LLaDA2), whose finished blocks the server keeps; this "
                "one is bidirectional (model.facts.topology)"
            )
        return
    sampler = rollout.resolved()
    if infills and (loaded.facts.block_length is not None or sampler.blocks == "sequence"):
        raise UserError(
            "a task with suffixes needs a model and a sampler that see what follows a block, and sdar and llada2 do not"
        )
    if infills and (rollout.stop_at_eos or rollout.cache):
        raise UserError(
            "rollout.stop_at_eos and rollout.cache must be false for a task with suffixes, which follow the completion"
        )
    try:
        check_steps(sampler, length, rollout.steps, rollout.block_length)
    except (TypeError, ValueError) as error:
        raise UserError(f"rollout.{error}") from error
    if rollout.stop_at_eos and sampler.take_back is not None:
        raise UserError(f"rollout.stop_at_eos must be false for sampler {sampler.name}, which may take an EOS back")
    if sampler.take_back == "verified":
        if loaded.facts.shift:
            raise UserError(
                f"rollout.sampler must not be {sampler.name} for a model with a shift, got shift={loaded.facts.shift}"
            )
        with headless(loaded.model) as body:
            if not takes(body, "position_ids"):
                name = type(loaded.model).__name__
                raise UserError(f"rollout.sampler must not be {sampler.name} for {name}, which takes no position_ids")
    if rollout.refresh is not None and isinstance(rollout.cache, bool):
        raise UserError(f"rollout.refresh must be null with rollout.cache={str(rollout.cache).lower()}, got {rollout.refresh}")
    if isinstance(rollout.cache, str):
        if sampler.blocks != "completion" or sampler.take_back is not None:
            raise UserError(f"rollout.cache={rollout.cache} is for samplers with blocks of the completion, got {sampler.name}")
        if loaded.facts.block_length is not None:
            raise UserError(f"rollout.cache must be true or false for a block-causal model, got {rollout.cache}")
        with headless(loaded.model) as body:
            try:
                check_kept(body, "rollout.cache")
            except ValueError as error:
                raise UserError(str(error)) from error
        return
    if rollout.cache and sampler.blocks != "sequence":
        raise UserError(f"rollout.cache is for the blocks of samplers sdar and llada2, got {sampler.name}")
    if rollout.cache:
        with headless(loaded.model) as body:
            if not takes_cache(body):
                name = type(loaded.model).__name__
                raise UserError(f"rollout.cache must be false for {name}, which takes no past_key_values")


def check_layouts(loaded: Loaded) -> None:
    """Raises UserError for a block-causal model that cannot be told what a noisy copy sees, before anything is trained."""
    if loaded.facts.block_length is not None and loaded.facts.attention_mask == "none":
        raise UserError(
            f"model {type(loaded.model).__name__} takes no attention mask (model.facts.attention_mask is none), but a "
            "block-causal model is trained under one of four dimensions, which says what each noisy copy sees"
        )


@torch.no_grad()
def check_positions(loaded: Loaded) -> None:
    """Raises UserError for a block-causal model that does not heed `position_ids`, which noisy copies of a text repeat."""
    if loaded.facts.block_length is None:
        return
    device = next(loaded.model.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    with headless(loaded.model) as body:
        near, far = (body(ids, position_ids=torch.tensor([[0, place]], device=device)) for place in (1, 7))
    if torch.equal(near, far):
        raise UserError(
            f"model {type(loaded.model).__name__} ignores position_ids, but a block-causal model is scored on a clean and noisy "
            "copies of a text, whose positions repeat; without them set model.facts.topology=bidirectional"
        )


def check_mask_id(loaded: Loaded) -> None:
    """Raises UserError for a mask id outside the model or one that occurs in ordinary text."""
    mask_id, tokenizer = loaded.facts.mask_id, loaded.tokenizer
    with headless(loaded.model) as body:
        sizes = {"embedding": body.vocabulary, "head": len(body.parameter)}
    for name, size in sizes.items():
        if mask_id >= size:
            raise UserError(f"model.facts.mask_id must be in the {name}'s 0..{size - 1}, got {mask_id}")
    if loaded.facts.valid_vocab is not None and mask_id >= loaded.facts.valid_vocab:
        raise UserError(f"model.facts.mask_id must be below valid_vocab={loaded.facts.valid_vocab}, got {mask_id}")
    if beyond := [token for token in loaded.facts.suppress if token >= sizes["head"]]:
        raise UserError(f"model.facts.suppress must be in the head's 0..{sizes['head'] - 1}, got {beyond[0]}")
    token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id < len(tokenizer) else None
    added = tokenizer.added_tokens_decoder.get(mask_id)
    special = mask_id in tokenizer.all_special_ids or (added is not None and added.special)
    if token is not None and not special:
        raise UserError(
            f"model.facts.mask_id must be a special token, but {mask_id} is {token!r}, which ordinary text may hold; "
            "masked and written tokens could not be told apart"
        )
    if mask_id in (loaded.facts.eos_id, loaded.facts.pad_id):
        raise UserError(f"model.facts.mask_id must differ from the ids of end and padding, got {mask_id} for both")
