"""What the tiny models of this folder share. Written from the published models' facts (MODELS.md), not from their code."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class RotaryEmbedding(nn.Module):
    """As code of transformers 4 has it: frequencies from the "default" entry of its table, in a buffer that is not saved."""

    def __init__(self, config, device=None):
        super().__init__()
        self.config = config
        self.rope_type = "default"
        self.rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = self.rope_init_fn(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, length, device, position_ids=None):
        """`[S, D]`, or `[B, 1, S, D]` for positions `[B, S]`."""
        positions = torch.arange(length, device=device) if position_ids is None else position_ids[:, None]
        angle = positions[..., None].float() * self.inv_freq
        return torch.cat([angle, angle], dim=-1)


def rotate(x, angle):
    """`[B, heads, S, D]`; angles for the first columns, the rest stay as they are."""
    size = angle.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([(turned * angle.cos() + half * angle.sin()).to(x.dtype), rest], dim=-1)


def split(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def attend(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A router, experts of which each token takes some, and one for all."""

    def __init__(self, config, router, shared):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = router
        self.experts = nn.ModuleList(MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts))
        if shared:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).topk(self.chosen, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        mixed = every.gather(-2, index[..., None].expand(*index.shape, x.shape[-1])).mul(weight[..., None]).sum(-2)
        return mixed + self.shared_experts(x) if hasattr(self, "shared_experts") else mixed
