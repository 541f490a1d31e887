"""The head as a folder that Hugging Face `kernels` loads: Python and Triton alone, nothing to build.

    python -m dllm_kernels.integrations.kernels FOLDER

then, in another program, `kernels.get_local_kernel(Path("FOLDER"))` has `score_tokens`, `sample_tokens`, `head_backward`,
the ELBO losses and `Rows`; uploaded to the hub, `kernels.get_kernel("name/of-it")` has. The C++ engine stays behind: on the
CPU it is plain PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from dllm_kernels.version import __version__

PACKAGE = Path(__file__).parent.parent
EXPORTS = {
    "head.scoring": ("Scores", "head_backward", "score_tokens"),
    "head.sampling": ("sample_tokens",),
    "losses": ("bgpo_loss", "elbo_loss"),
    "rows": ("Rows",),
}
LATE = ("backends.triton.head",)  # imported by name when it is first wanted
BACKENDS = ("cpu", "cuda", "rocm")


def write(folder: Path, *, name: str = "dllm-head") -> list[Path]:
    """Write `build/torch-BACKEND` for every backend under `folder`, and return these folders.

    Each holds the modules that the exports need, under a package name of its own, so that the kernel and an installed
    `dllm_kernels` live side by side. Raises FileExistsError where one is there already.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     sorted(path.name for path in write(Path(place)))
        ['torch-cpu', 'torch-cuda', 'torch-rocm']
    """
    modules = _needed([*EXPORTS, *LATE])
    written = []
    for backend in BACKENDS:
        own = re.sub(r"\W", "_", f"_{name}_{backend}_{__version__}")
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=False)
        for module in modules:
            source = _source(module)
            place = variant / source.relative_to(PACKAGE)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(re.sub(r"\bdllm_kernels(?=\.|::| import )", own, source.read_text()))
        lines = [f"from {own}.{module} import {', '.join(names)}" for module, names in EXPORTS.items()]
        names = sorted(name for names in EXPORTS.values() for name in names)
        text = f'"""The LM head of dllm-kernels {__version__}."""\n\n' + "\n".join(lines) + f"\n\n__all__ = {names!r}\n"
        (variant / "__init__.py").write_text(text)
        facts = {"id": own, "name": name, "version": 1, "license": "Apache-2.0", "python-depends": []}
        (variant / "metadata.json").write_text(json.dumps(facts | {"backend": {"type": backend}}, indent=2) + "\n")
        written.append(variant)
    return written


def _source(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _needed(roots: list[str]) -> list[str]:
    """These modules of the package and all that they import, folders of them included."""
    found: set[str] = set()
    left = list(roots)
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        folder = module.rpartition(".")[0]
        left += [folder] if folder else []
        left += _imports(_source(module))
    return sorted(found)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] != PACKAGE.name:
            continue
        inside = node.module.partition(".")[2]
        for alias in node.names:
            longer = f"{inside}.{alias.name}" if inside else alias.name
            yield longer if _source(longer).is_file() else inside


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for place in write(parser.parse_args().folder):
        print(place)
