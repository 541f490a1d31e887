"""Run by test_noise.py in a process of its own with TRITON_INTERPRET=1: noise in Triton has the bits of noise in torch."""

import torch
import triton
import triton.language as tl

from dllm_kernels import noise
from dllm_kernels.backends.triton import noise as kernels
from dllm_kernels.noise import Stream
from tests import oracle


@triton.jit
def one(words, out):
    c = tl.arange(0, 1)
    answer = kernels.philox4x32(
        tl.load(words + c).to(tl.uint32),
        tl.load(words + 1 + c).to(tl.uint32),
        tl.load(words + 2 + c).to(tl.uint32),
        tl.load(words + 3 + c).to(tl.uint32),
        tl.load(words + 4 + c).to(tl.uint32),
        tl.load(words + 5 + c).to(tl.uint32),
    )
    for w in tl.static_range(4):
        tl.store(out + w + c, answer[w].to(tl.int64))


def main() -> None:
    for counter, key, answer in oracle.PHILOX_VECTORS:
        out = torch.empty(4, dtype=torch.int64)
        one[(1,)](torch.tensor([*counter, *key]), out)
        assert tuple(out.tolist()) == answer, (counter, key, out)

    ids = torch.tensor([1, -2, 2**62 + 12345, -(2**63), 2**63 - 1])
    for seed, stream in ((0, Stream.MASK), (1, Stream.REMASK), (2**32 - 1, Stream.LEVEL)):
        for sequence, sample, position in (
            (ids, torch.tensor(0), torch.tensor(2**32 - 1)),
            (ids[:, None], torch.arange(3)[:, None, None], torch.arange(100)),  # more than one block
            (ids[0], torch.arange(3), torch.tensor(4)),
            (ids[:0], torch.tensor(0), torch.tensor(0)),
        ):
            want = noise.row_bits(seed, stream, sequence, sample, position)
            assert torch.equal(kernels.row_bits(seed, stream, sequence, sample, position), want)
    for tokens, step, tag in ((1, 0, 0), (3, 1, 1), (5, 2**31, 1), (1000, torch.arange(5), 0), (5001, 7, 1)):
        want = noise.element_bits(ids, tokens, step=step, tag=tag)
        assert torch.equal(kernels.element_bits(ids, tokens, step=step, tag=tag), want)
    print("equal bits")


if __name__ == "__main__":  # pytest looks into every file for doctests
    main()
