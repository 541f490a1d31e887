"""Compile every kernel for GPUs that are not here, and refuse what would be slow or would not launch.

    python -m dllm_kernels.backends.triton.gate                     all kernels, configurations and targets
    python -m dllm_kernels.backends.triton.gate --target sm_90 --quick

Needs Triton alone. Prints registers, shared memory and occupancy; exit code 1 where a kernel spills registers or keeps
arrays in local memory, wants more shared memory than the device has, or misses the device's matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dllm_kernels.backends.divergence.problem import KINDS
from dllm_kernels.backends.triton import divergence, expectation, fused, low_rank, noise, rows
from dllm_kernels.backends.triton.configs import ARITHMETIC, CONFIGS, Config


@dataclass(frozen=True)
class Target:
    """What a kernel may use: bytes of shared memory per block; per multiprocessor registers, threads and shared memory."""

    gpu: GPUTarget
    shared: int
    matrix: str  # in PTX, or in AMD's assembly
    registers: int = 65536
    threads: int = 2048
    shared_in_all: int = 0
    reserved: int = 1024  # of shared memory, by the system, per block


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, "mma.sync", shared_in_all=164 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, "wgmma.mma_async", shared_in_all=228 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, "tcgen05.mma", shared_in_all=228 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma", 131072, shared_in_all=64 << 10, reserved=0),
}


@dataclass(frozen=True)
class Variant:
    """One specialisation: types of the arguments that are passed, values of those that are compiled in."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    matrix: bool = False
    quick: bool = False  # representative: compiled by `make test`


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    registers: int
    shared: int
    local: int  # bytes of stack and local memory per thread: spilled registers and arrays
    occupancy: float  # threads of a multiprocessor that can be resident, of those that fit
    matrix: bool
    faults: tuple[str, ...]


_OPTIONS = ("bias", "excluded", "temperature_N", "softcap", "temperature")
_OPTION_TYPES = {"bias": "*fp32", "excluded": "*u8", "temperature_N": "*fp32", "softcap": "fp32", "temperature": "fp32"}


def _options(names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, None]]:
    return {name: _OPTION_TYPES[name] for name in names}, {name: None for name in _OPTIONS if name not in names}


def _fused(
    label: str,
    config: Config,
    dtype: str,
    options: tuple[str, ...],
    *,
    draw: bool,
    all_statistics: bool,
    quick: bool,
    low_planes: int = 0,
) -> Variant:
    types, constants = _options(options)
    types |= dict.fromkeys(("rows", "vocabulary", "width", "segments", "weight_stride", "plane", "step"), "i32")
    types |= {"hidden_stride": "i32", "inverse": "fp32", "parts": "*fp32", "part_ids": "*i32"}
    if config.descriptors:
        types |= {
            "hidden": f"tensordesc<{dtype}[{config.BM}, {config.BK}]>",
            "weight": f"tensordesc<{dtype}[{config.BN}, {config.BK}]>",
        }
        constants["index"] = None
    else:
        types |= {"hidden": f"*{dtype}", "weight": f"*{dtype}", "index": "*i64"}
    low: dict[str, Any] = dict.fromkeys(("low_hidden", "low_weight"))
    if low_planes:
        types |= {"low_hidden": "*bf16", "low_weight": "*bf16"}
        low = {}
    types |= dict.fromkeys(("rank", "low_hidden_plane", "low_weight_plane"), "i32")
    types |= {"key": "*i64"} if draw else {"target": "*i64", "target_z": "*fp32"}
    absent: tuple[str, ...] = ("target", "target_z") if draw else ("key",)
    fixed = {"hidden_step": 1, "weight_step": 1, "ENTROPY": all_statistics or draw, "TOP": all_statistics and not draw}
    fixed |= {"DESCRIPTORS": config.descriptors, "EVEN": True, "UPCAST": False}
    fixed |= {"LOW_PLANES": low_planes, "BR": low_rank.DEPTH}
    tiles = {name: value for name, value in config.kernel.items() if name.isupper()}
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    known = {**constants, **low, **dict.fromkeys(absent), **fixed, **tiles}
    return Variant(f"fused {label} {dtype}", fused.fused_kernel, types, known, launch, matrix=True, quick=quick)


def _row(
    label: str,
    options: tuple[str, ...],
    given: dict[str, str],
    *,
    rows_at_once: int,
    draw: bool = False,
    quick: bool = False,
    **flags: bool,
) -> Variant:
    types, constants = _options(options)
    types |= {"logits": "*fp32", "logp": "*fp32", "lse": "*fp32", "rows": "i32", "vocabulary": "i32", "stride": "i32"}
    types |= {"operand_stride": "i32", "entropy_stride": "i32", "step": "i32", "inverse": "fp32", **given}
    arguments = ("operand", "entropy_operand", "target", "joined", "spread", "key", "temperature_of", "coef", "entropy_coef")
    optional = (*arguments, "entropy", "top_logp", "top_id", "token")
    constants |= {name: None for name in optional if name not in given}
    tile = rows.row_tile(rows_at_once, draw=draw, interpreter=False)
    known = {**constants, "ENTROPY": False, "SHARED": False, "ROUND": False, **flags, "R": tile["R"], "C": tile["C"]}
    launch = {name: tile[name] for name in ("num_warps", "num_stages")}
    return Variant(f"rows {label}", rows.row_kernel, types, known, launch, quick=quick)


def variants(architecture: str) -> Iterator[Variant]:
    """Every kernel in the forms that the engine launches: with what masked diffusion models use, and with every option."""
    statistics, drawing, many = CONFIGS[architecture]
    usual, every = ("excluded",), ("bias", "excluded", "temperature_N", "softcap")
    for dtype in ("bf16", "fp16"):
        own = dtype == "bf16"
        yield _fused("logp", statistics, dtype, usual, draw=False, all_statistics=False, quick=False)
        yield _fused("all", statistics, dtype, usual, draw=False, all_statistics=True, quick=own)
        yield _fused("all, every option", statistics, dtype, every, draw=False, all_statistics=True, quick=False)
        for label, config in (("few", drawing), ("many", many)):
            first = own and label == "many"
            yield _fused(f"draw, {label}", config, dtype, usual, draw=True, all_statistics=False, quick=first)
            yield _fused(f"draw, {label}, every option", config, dtype, every, draw=True, all_statistics=False, quick=False)
        for label, config in (("all", statistics), ("draw, few", drawing), ("draw, many", many)):
            for count in (1, 3):  # an adapter of bfloat16, of float32
                draw = config is not statistics
                shared: Any = {"draw": draw, "all_statistics": not draw, "low_planes": count}
                first = own and count == 1 and not draw
                yield _fused(f"{label}, adapter of {count}", config, dtype, every, **shared, quick=first)
    target, plain = {"target": "*i64"}, {"operand": "*bf16", "target": "*i64"}
    top = {"entropy": "*fp32", "top_logp": "*fp32", "top_id": "*i64"}
    both = {"coef": "*fp32", "entropy_coef": "*fp32"}
    for count in (4096, 256):
        yield _row(f"statistics, {count}", usual, {**target, **top}, rows_at_once=count, ENTROPY=True)
        yield _row(
            f"bf16 operand, {count}", usual, {**plain, "coef": "*fp32"}, rows_at_once=count, quick=count == 4096, SHARED=True
        )
        everything = {**plain, **top, **both, "entropy_operand": "*bf16"}
        yield _row(f"all, every option, {count}", every, everything, rows_at_once=count, ENTROPY=True, SHARED=True)
    yield _row("fp32 operand", every, {**target, **both, "operand": "*fp32"}, rows_at_once=4096, ENTROPY=True)
    several = {"operand": "*bf16", "joined": "*fp32", "spread": "*fp32", "entropy": "*fp32", **both}
    yield _row("several targets", every, several, rows_at_once=4096, quick=True, ENTROPY=True, SHARED=True)
    token = {"token": "*i64", "entropy": "*fp32"}
    yield _row("draw", usual, {**token, "key": "*i64"}, rows_at_once=4096, draw=True, quick=True, ENTROPY=True)
    yield _row("draw, every option", every, {**token, "key": "*i64"}, rows_at_once=4096, draw=True, ENTROPY=True)
    by_row = {**token, "key": "*i64", "temperature_of": "*fp32"}
    yield _row("draw at each row's temperature", usual, by_row, rows_at_once=4096, draw=True, ENTROPY=True)
    yield _row("largest", usual, token, rows_at_once=4096, ENTROPY=True)

    counts = {
        "rows": "i32",
        "segments": "i32",
        "plane": "i32",
        "parts": "*fp32",
        "part_ids": "*i32",
        "logp": "*fp32",
        "lse": "*fp32",
    }
    scored = {**counts, "target": "*i64", "target_at": "*fp32", **top}
    launch = {"num_warps": 4, "num_stages": 1}
    yield Variant("merge statistics", fused.merge_kernel, scored, {"token": None, "DRAW": False, "R": 4, "P": 256}, launch)
    absent = dict.fromkeys(("target", "target_at", "top_logp", "top_id"))
    sizes = {"DRAW": True, "R": 4, "P": 256}
    yield Variant("merge draw", fused.merge_kernel, {**counts, **token}, {**absent, **sizes}, launch, quick=True)
    numbers = dict.fromkeys(("vocabulary", "columns", "stride", "second_stride", "out_stride"), "i32")
    one = {"first": "*bf16", "first_coef": "*fp32", "out": "*bf16", **numbers}
    tile = {"ROUND": False, "R": 8, "C": 256}
    yield Variant("combine one", rows.combine_kernel, one, {"second": None, "second_coef": None, **tile}, launch)
    yield Variant("combine two", rows.combine_kernel, {**one, "second": "*bf16", "second_coef": "*fp32"}, tile, launch)
    key = {"key": "*i64", "step": "*i64", "out": "*i64", "step_stride": "i32", "tokens": "i32", "tag": "i32"}
    yield Variant("noise", noise._element_bits_kernel, key, {"BLOCK": 1024}, launch)
    yield from _divergences()
    yield from _expectations()


def _divergences() -> Iterator[Variant]:
    """The passes over two slabs: each kind, an operand in fp32 and in 16 bits, and raw logits with every option."""
    tile = divergence.tile(interpreter=False)
    launch, sizes = {"num_warps": tile["num_warps"], "num_stages": 3}, {"R": tile["R"], "C": tile["C"]}
    both = {"student": "*fp32", "teacher": "*fp32", "rows": "i32", "ids": "i32"}
    levels = {"student_lse": "*fp32", "teacher_lse": "*fp32"}
    part = {"sums": "*fp32", "part": "i32"}
    for number, kind in enumerate(KINDS):
        known = {**sizes, "KIND": number}
        yield Variant(f"look {kind}", divergence.look_kernel, {**both, **part}, known, launch, quick=number == 0)
        given = {**both, **levels, "mean": "*fp32", "factor": "*fp32", "beta": "fp32", "rest": "fp32"}
        for label, more, absent in (("bf16", {"out": "*bf16"}, {"squeeze": None}), ("fp32, softcap", {"squeeze": "*fp32"}, {})):
            types = {**given, "out": "*fp32", **more}
            fixed: dict[str, Any] = {**sizes, **absent, "KIND": number, "ROUND": False}
            quick = number == 2 and bool(absent)
            yield Variant(f"operand {kind} {label}", divergence.operand_kernel, types, fixed, launch, quick=quick)
    yield Variant(
        "mix", divergence.mix_kernel, {**both, **levels, **part, "beta": "fp32", "rest": "fp32"}, sizes, launch, quick=True
    )
    raw = dict.fromkeys(("rows", "ids", "first", "stride"), "i32") | {"logits": "*fp32"}
    for label, names in (
        ("every option", ("bias", "excluded", "temperature_N", "softcap")),
        ("usual", ("excluded", "temperature")),
    ):
        types, constants = _options(names)
        yield Variant(f"finish {label}", divergence.finish_kernel, {**raw, **types}, {**constants, **sizes}, launch)


def _expectations() -> Iterator[Variant]:
    """The passes over a slab: exponentials and operands in fp32 and in 16 bits, with every argument and with the least."""
    tile = divergence.tile(interpreter=False)
    launch, sizes = {"num_warps": tile["num_warps"], "num_stages": 3}, {"R": tile["R"], "C": tile["C"]}
    slab = {"logits": "*fp32", "rows": "i32", "ids": "i32"}
    yield Variant("top", expectation.top_kernel, {**slab, "tops": "*fp32", "part": "i32"}, sizes, launch)
    sums = {**slab, "top": "*fp32", "sums": "*fp32", "part": "i32"}
    of_rows = dict.fromkeys(("top", "inverse", "mean", "factor"), "*fp32")
    for dtype in ("fp32", "bf16"):
        out, known = f"*{dtype}", {**sizes, "ROUND": False}
        quick = dtype == "bf16"
        yield Variant(f"soften {dtype}", expectation.soften_kernel, {**sums, "out": out}, known, launch, quick=quick)
        every = {**slab, **of_rows, "pulls": "*fp32", "squeeze": "*fp32", "p": out, "out": out}
        yield Variant(f"pull {dtype}, every argument", expectation.pull_kernel, every, known, launch, quick=quick)
        least = {**slab, "top": "*fp32", "inverse": "*fp32", "p": out}
        absent = dict.fromkeys(every.keys() - least.keys())
        yield Variant(f"pull {dtype}, probabilities", expectation.pull_kernel, least, {**known, **absent}, launch)


def compile_variant(variant: Variant, target: Target) -> Compiled:
    """Machine code for a device that need not be here, and what is wrong with it."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(variant.kernel.arg_names):
        if name in variant.types:
            kind = variant.types[name]
            signature[name] = kind
            if kind.startswith("*") or name in (
                "width",
                "hidden_stride",
                "weight_stride",
                "rank",
                "low_hidden_plane",
                "low_weight_plane",
                "stride",
                "operand_stride",
                "entropy_stride",
            ):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", variant.constants[name]
    source = ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=target.gpu, options={**ARITHMETIC, **variant.options})
    shared = int(made.metadata.shared)
    if target.gpu.backend == "cuda":
        registers, local = _cubin_usage(made.asm["cubin"])
        text = made.asm["ptx"]
    else:
        text = made.asm["amdgcn"]
        registers, local = _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    matrix = target.matrix in text
    threads = variant.options["num_warps"] * target.gpu.warp_size
    blocks = min(
        target.threads // threads,
        target.registers // (max(registers, 1) * threads),
        target.shared_in_all // (shared + target.reserved) if shared else 32,
    )
    faults = []
    if local:
        faults.append(f"{local} bytes of registers or arrays in local memory")
    if shared > target.shared:
        faults.append(f"{shared} bytes of shared memory, the device has {target.shared}")
    if variant.matrix and not matrix:
        faults.append(f"no {target.matrix}")
    if blocks < 1:
        faults.append("no block fits a multiprocessor")
    return Compiled(registers, shared, local, blocks * threads / target.threads, matrix, tuple(faults))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern}")
    return int(found.group(1))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, per thread, by the cuobjdump of Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _line(target: str, variant: Variant, made: Compiled) -> str:
    launch = f"{variant.options['num_warps']:6}{variant.options['num_stages']:7}"
    usage = f"{made.registers:6}{made.shared:8}{made.local:6}{made.occupancy:10.0%}"
    return f"{target:8}{variant.name:32}{launch}{usage}  {'; '.join(made.faults) or 'ok'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be given several times; default all")
    parser.add_argument("--quick", action="store_true", help="representative kernels only")
    arguments = parser.parse_args(argv)
    print(f"triton {triton.__version__}")
    print(f"{'target':8}{'kernel':32}{'warps':>6}{'stages':>7}{'regs':>6}{'shared':>8}{'local':>6}{'occupancy':>11}")
    bad = 0
    for name in arguments.target or TARGETS:
        for variant in variants(name):
            if arguments.quick and not variant.quick:
                continue
            made = compile_variant(variant, TARGETS[name])
            print(_line(name, variant, made), flush=True)
            bad += bool(made.faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
