"""Toy models that the tests share."""

from __future__ import annotations

from pathlib import Path

import torch


def eurobert(vocab=11, hidden=32, layers=2, dtype=torch.float64, seed=0, **options):
    """`EuroBertForMaskedLM` at toy size: Llama without the causal mask, random weights, eval mode."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = EuroBertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **options,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = EuroBertForMaskedLM(config).to(dtype).eval()
    torch.set_rng_state(state)
    return model


def checkpoint(folder: Path, alphabet: str = "0123456789+=") -> Path:
    """A random model of 14 thousand parameters; ids are places in the alphabet, then unknown, mask, padding, end."""
    from dllm_trainer.models.tokenizer import make_tokenizer
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    tokenizer = make_tokenizer(alphabet)
    config = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EuroBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def worst_gradient_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest relative error of a parameter's gradient; one that is 0 but for rounding counts relative to the others."""
    assert got.keys() == want.keys()
    floor = 1e-6 * max(float(g.double().norm()) for g in want.values())
    return max(
        float((got[name].double() - want[name].double()).norm()) / max(float(want[name].double().norm()), floor, 1e-300)
        for name in want
    )
