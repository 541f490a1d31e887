"""A sixteenth algorithm: one file of another package, found by its entry point; nothing else is told of it."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dllm_trainer.cli import app
from dllm_trainer.config import load_config
from dllm_trainer.errors import UserError
from typer.testing import CliRunner

from dllm_kernels.objectives import RECIPES, AlgorithmError, discovery

ROOT = Path(__file__).resolve().parents[3]
# the file that CONTRIBUTING.md shows under "Add an algorithm", to the letter
ALGORITHM = re.findall(
    r"^```python\n(# my_algorithm\.py\n.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
)[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Distributions on sys.path, each of one module and one entry point."""

    def install(code: str, *, point: str = "imitation", package: str = "fake_algorithm") -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dllm_kernels.algorithms]\n{point} = {package}:RECIPE\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, package, raising=False)
        discovery.installed.cache_clear()

    yield install
    discovery.installed.cache_clear()


def test_it_trains_by_its_name_with_its_own_option_and_figure(
    install: Callable[..., None], finished: Path, tmp_path: Path
) -> None:
    install(ALGORITHM)
    arguments = ["rl", "--checkpoint", finished / "checkpoint_sft", "--algorithm", "imitation", "--out", tmp_path / "run"]
    result = CliRunner().invoke(app, [*map(str, arguments), "rl.updates=2", "rl.options.margin=0.001"])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
        assert record["margin"] == 0.001
        assert record["imitated"] == pytest.approx(record["sequences_scored"] / 16)
    assert 0 < records[0]["imitated"] < 1
    config = load_config(tmp_path / "run" / "config.yaml").rl
    assert (config.law, config.samples, config.advantage, config.options) == ("exact", 2, "mean", {"margin": 0.001})


def test_it_is_listed_and_its_options_are_checked(install: Callable[..., None]) -> None:
    install(ALGORITHM)
    assert [*RECIPES][-1] == "imitation"
    assert len(RECIPES) == 23
    result = CliRunner().invoke(app, ["algorithms"])
    assert result.exit_code == 0
    assert any("imitation" in line and "0000.00000" in line for line in result.output.splitlines())
    with pytest.raises(
        UserError, match=r"rl\.options of imitation: marging is unknown: the nearest is margin; allowed: push, margin"
    ):
        load_config(overrides=["rl.algorithm=imitation", "rl.options.marging=1"])
    with pytest.raises(UserError, match=r"rl\.options of imitation: margin must be at least 0, got -1"):
        load_config(overrides=["rl.algorithm=imitation", "rl.options.margin=-1"])


BROKEN = [
    ("raise RuntimeError('broken\\nmore')\n", "imitation", r"imitation of .* cannot be loaded \(RuntimeError: broken\)"),
    ("RECIPE = 3\n", "imitation", r"imitation of .* must be a Recipe, got int"),
    (ALGORITHM, "imitate", r"imitate of .* must have its recipe's name, imitation"),
    ("", "imitation", r"imitation of .* cannot be loaded \(AttributeError: "),
]


@pytest.mark.parametrize(("code", "point", "sentence"), BROKEN)
def test_a_package_that_is_broken_is_told_by_name_and_only_where_it_is_asked_for(
    code: str, point: str, sentence: str, install: Callable[..., None]
) -> None:
    install(code, point=point)
    assert load_config(overrides=["rl.algorithm=gdpo"]).rl.algorithm == "gdpo"
    with pytest.raises(UserError, match=rf"entry point {sentence}") as caught:
        load_config(overrides=[f"rl.algorithm={point}"])
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(app, ["algorithms"])
    assert result.exit_code == 2
    assert f"entry point {point} of dllm_kernels.algorithms" in result.stderr


def test_a_name_that_is_taken_is_an_error(install: Callable[..., None]) -> None:
    install(ALGORITHM.replace('name="imitation"', 'name="gdpo"'), point="gdpo")
    with pytest.raises(UserError, match=r"entry point gdpo of dllm_kernels\.algorithms has the name of an algorithm"):
        load_config()


def test_two_packages_with_one_name_are_an_error(install: Callable[..., None]) -> None:
    install(ALGORITHM)
    install(ALGORITHM, package="other_algorithm")
    with pytest.raises(AlgorithmError, match=r"two entry points of .* are called imitation: .*:RECIPE and .*:RECIPE"):
        list(RECIPES)


def test_two_recipes_of_one_name_in_a_package_are_an_error() -> None:
    recipe = RECIPES["bgpo"]
    assert recipe is discovery.Recipes([recipe, recipe])["bgpo"]
    with pytest.raises(ValueError, match="two algorithms are called bgpo"):
        discovery.Recipes([recipe, replace(recipe, title="another")])


def test_a_file_in_the_package_is_found_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_algorithms"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("X = 1\n")
    (package / "imitation.py").write_text(ALGORITHM)
    monkeypatch.syspath_prepend(str(tmp_path))
    (module,) = discovery.algorithm_modules("some_algorithms", [str(package)])
    assert [recipe.name for recipe in discovery.recipes_of(module)] == ["imitation"]
