"""Head options are listed by name only in public signatures and in the schema that torch.library needs."""

from pathlib import Path

import pytest

from tests.house.head_options import listings

ROOT = Path(__file__).resolve().parents[2]

# where users give them: a signature, and one call that makes the carrier
PUBLIC = {
    ("dllm_kernels/head/scoring.py", "score_tokens"),
    ("dllm_kernels/head/scoring.py", "head_backward"),
    ("dllm_kernels/head/sampling.py", "sample_tokens"),
    ("dllm_kernels/head/explain.py", "explain"),
    ("dllm_kernels/head/distillation.py", "distillation_loss"),
    ("dllm_kernels/head/expected_embedding.py", "expected_embedding"),
    ("dllm_kernels/losses.py", "elbo_loss"),
    ("dllm_kernels/losses.py", "bgpo_loss"),
}
# what knows the parts of the carrier: itself, a model's own options, the flat schema of the ops and of Triton's kernels
INSIDE = {
    ("dllm_kernels/backends/contract.py", "HeadOptions"),
    ("dllm_kernels/model/headless.py", "Body"),
    ("dllm_kernels/head/ops.py", "_problem"),
    *(("dllm_kernels/backends/triton/rows.py", name) for name in ("_logit", "row_kernel")),
    *(("dllm_kernels/backends/triton/fused.py", name) for name in ("_final", "_take", "fused_kernel")),
    ("dllm_kernels/backends/triton/divergence.py", "finish_kernel"),
    *(("dllm_kernels/backends/triton/gate.py", name) for name in ("", "variants", "_divergences")),
}

LISTED = {
    "call": "f(x, bias=b, softcap=s, temperature=t)",
    "positions": "f(problem.bias, problem.softcap, self._temperature)",
    "dict": "options = {'bias': b, 'softcap': s, 'suppress': ()}",
    "dict()": "options = dict(bias=b, softcap=s, valid_vocab=v)",
    "tuple": "return bias, softcap, temperature",
    "names in a tuple": "KEYS = ('bias', 'softcap', 'temperature')",
    "unpacked": "bias, softcap, excluded = problem",
    "dataclass": "class Options:\n    bias: int\n    softcap: float = 1.0\n    temperature: float = 1.0",
    "class attributes": "class Options:\n    bias = softcap = None\n    temperature = 1.0",
    "signature": "def f(x, bias, softcap=None, *, logit_temperature=1.0): ...",
    "async signature": "async def f(bias, softcap, temperature): ...",
    "lambda": "f = lambda bias, softcap, temperature: 0",
    "** of a literal": "f(x, **{'bias': b, 'softcap': s}, temperature=t)",
    "** of dict()": "f(x, **dict(bias=b, softcap=s), temperature=t)",
    "** of a variable": "def g():\n    options = {'bias': b, 'softcap': s}\n    return f(x, temperature=t, **options)",
    "** of what grew": "def g():\n    o = {'bias': b}\n    o['softcap'] = s\n    o |= {'suppress': ()}\n    return f(**o)",
    "** in a dict": "options = {**{'bias': b, 'softcap': s}, 'temperature': t}",
    "| of dicts": "options = {'bias': b} | {'softcap': s, 'temperature': t}",
    "* of a tuple": "f(x, *(bias, softcap), temperature)",
    "in a function in a class": "class A:\n    def f(self):\n        g(bias=1, softcap=2, suppress=())",
}

UNLISTED = {
    "two": "f(x, bias=b, softcap=s)",
    "a carrier": "def f(x, options):\n    return g(x, options, options.temperature, **options.extra)",
    "two dicts": "a = {'bias': b, 'softcap': s}\nb = {'temperature': t}",
    "another function's dict": "def f():\n    o = {'bias': b, 'softcap': s}\ndef g(o):\n    return h(temperature=t, **o)",
    "a dict made anew": "o = {'bias': b, 'softcap': s}\no = {}\nf(temperature=t, **o)",
    "texts": "print('bias softcap temperature')  # bias, softcap, temperature",
    "other names": "f(bias=1, hidden=2, weight=3, softcap=4)",
}


@pytest.mark.parametrize("name", LISTED)
def test_a_listing_is_found_once(name):
    found = listings(LISTED[name])
    assert len(found) == 1, found
    assert len(found[0].names) == 3


@pytest.mark.parametrize("name", UNLISTED)
def test_what_is_no_listing_is_not_found(name):
    assert listings(UNLISTED[name]) == []


def test_a_listing_says_its_line_its_names_and_whose_signature_it_is():
    source = "\n\ndef f(x, bias, softcap, temperature):\n    return g(x, bias=bias, softcap=softcap, temperature=temperature)"
    names = ("bias", "softcap", "temperature")
    assert listings(source) == [(3, names, "f", "f"), (4, names, "g", "f")]


def allowed(name, listing):
    makes = listing.of in (listing.inside, "HeadOptions")
    return (name, listing.inside) in INSIDE or ((name, listing.inside) in PUBLIC and makes)


def test_head_options_are_listed_in_two_places_only():
    found = {
        (path.relative_to(ROOT).as_posix(), listing)
        for package in ("dllm_kernels", "trainer", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
        for listing in listings(path.read_text())
    }
    refused = [f"{name}:{x.line} lists {', '.join(x.names)}" for name, x in sorted(found) if not allowed(name, x)]
    assert not refused, "\n".join(refused)
    assert {(name, x.inside) for name, x in found} == PUBLIC | INSIDE, "the lists above name no place without a listing"
