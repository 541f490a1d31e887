"""Tile sizes of the fused kernel: few, and functions of device and dtype alone, so that a row's bits do not depend on N."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SEGMENT = 512  # vocabulary columns per part: enough programs for the chip even at 32 rows


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


# By architecture, for 16-bit operands: statistics, and the draw of a few rows, whose epilogue holds bounds beside the logits.
CONFIGS: dict[str, tuple[Config, Config]] = {
    "interpreter": (Config(64, 64, 32, 4, 1, piece=32, segment=128), Config(64, 64, 32, 4, 1, piece=64, segment=128)),
    "sm_80": (Config(128, 128, 32, 8, 4), Config(64, 64, 64, 8, 4)),
    "sm_90": (Config(128, 256, 64, 8, 4, True), Config(64, 64, 64, 8, 4, True)),
    "sm_100": (Config(128, 128, 64, 8, 4, True, piece=32), Config(64, 64, 64, 8, 4, True)),
    "gfx942": (Config(128, 128, 32, 8, 2), Config(64, 64, 64, 8, 2)),
}


@functools.cache
def architecture(device: torch.device, interpreted: bool) -> str:
    """Key of CONFIGS for a device."""
    if interpreted:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def config_for(device: torch.device, *, draw: bool, interpreted: bool) -> Config:
    return CONFIGS[architecture(device, interpreted)][int(draw)]
