"""Sizes, without Triton: tiles of the fused kernel, by device alone so that a row's bits do not depend on N, and chunks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dllm_kernels.backends import contract

ROW_BLOCK = contract.ROW_BLOCK
MOST_ROWS = 1024  # of a chunk: enough to fill a chip in the products that follow
SEGMENT = 512  # vocabulary columns per part: enough programs for the chip even at 32 rows
# No product and sum becomes one rounding, as in csrc/ and PyTorch: corrections that are added later (`finish`, `log_positive`)
# are those of the sums as written, and bits do not change with Triton's own default, which did in 3.10. Products of matrices
# are fused whatever this says.
ARITHMETIC = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Config:
    """BM rows x BN columns per tile, BK deep; `segment` columns per program."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    descriptors: bool = False  # of the tensor memory accelerator, Hopper and later
    piece: int = 16  # columns of the epilogue at a time
    segment: int = SEGMENT

    @property
    def kernel(self) -> dict[str, int]:
        tiles = self.segment // self.BN
        return {
            "BM": self.BM,
            "BN": self.BN,
            "BK": self.BK,
            "TILES": tiles,
            "PIECE": self.piece,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


USES = ("statistics", "few draws", "many draws")
# By architecture, for 16-bit operands, one for each use.
CONFIGS: dict[str, tuple[Config, Config, Config]] = {
    "interpreter": (
        Config(64, 64, 32, 4, 1, piece=32, segment=128),
        Config(64, 64, 32, 4, 1, piece=64, segment=128),
        Config(64, 64, 32, 4, 1, piece=32, segment=128),
    ),
    "sm_80": (Config(128, 128, 32, 8, 4), Config(32, 64, 32, 4, 4, piece=32), Config(64, 128, 32, 8, 4)),
    "sm_90": (Config(128, 256, 64, 8, 4, True), Config(64, 64, 64, 8, 4, True, piece=32), Config(128, 128, 64, 8, 4, True)),
    "sm_100": (
        Config(128, 128, 64, 8, 4, True, piece=32),
        Config(64, 64, 64, 8, 4, True, piece=32),
        Config(128, 128, 64, 8, 4, True, piece=32),
    ),
    "gfx942": (Config(128, 128, 32, 8, 2, piece=128), Config(64, 64, 64, 8, 2, piece=32), Config(128, 128, 32, 8, 2, piece=32)),
}


@functools.cache
def architecture(device: torch.device, interpreted: bool) -> str:
    """Key of CONFIGS for a device."""
    if interpreted:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")  # plain loads and little memory: also for sm_120


def config_for(device: torch.device, use: str, *, interpreted: bool) -> Config:
    """For one of USES."""
    return CONFIGS[architecture(device, interpreted)][USES.index(use)]


def row_stride(vocabulary: int) -> int:
    """Columns of a chunk's row in memory: whole 256 bytes, for every operand's alignment."""
    return -(-vocabulary // 64) * 64


def chunk_rows(vocabulary: int, bytes_per_logit: int, device_type: str) -> int:
    """Rows of a whole chunk, from the workspace budget and V alone: a multiple of ROW_BLOCK."""
    budget = contract.WORKSPACE_BYTES.get(device_type, contract.GPU_WORKSPACE_BYTES)
    fit = budget // (row_stride(vocabulary) * bytes_per_logit) // ROW_BLOCK * ROW_BLOCK
    if torch.are_deterministic_algorithms_enabled():
        fit = ROW_BLOCK
    return min(max(fit, ROW_BLOCK), MOST_ROWS)


def spans(total: int, chunk: int) -> list[tuple[int, int, int]]:
    """(start, rows, padded rows): whole chunks, and the rest in blocks of ROW_BLOCK, so that products have two shapes only."""
    whole = total // chunk * chunk
    found = [(start, chunk, chunk) for start in range(0, whole, chunk)]
    return found + [(start, min(ROW_BLOCK, total - start), ROW_BLOCK) for start in range(whole, total, ROW_BLOCK)]
