"""Models under FSDP2: every gradient, loss, rollout and advantage is that of one process, however many ranks
there are.
"""

import subprocess
import sys

import pytest
import torch

from tests.tiny import worst_gradient_error

pytestmark = [
    pytest.mark.xdist_group("sharded"),  # one worker: what its fixtures make is made once
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8), reason="FSDP2 of torch up to 2.7 does not sum in float64"
    ),
    pytest.mark.timeout(600),
]


def run(folder, work, *sizes):
    command = [sys.executable, "-m", "tests.model.sharded_ranks", str(folder / "out"), work, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out", weights_only=False)


def check_gradients(found, want):
    for key, (loss, gradients) in found.items():
        whole_loss, whole = want[key[:3]]
        assert loss == pytest.approx(whole_loss, rel=1e-10), key
        assert worst_gradient_error(gradients, whole) < 1e-10, key


def check_curves(found, want):
    assert len(want) == 6
    for coupling, (losses, norm) in found.items():
        whole, whole_norm = want[coupling]
        assert losses == pytest.approx(whole, rel=1e-4, abs=1e-6), coupling
        assert norm == pytest.approx(whole_norm, rel=1e-4), coupling
        assert len({round(loss, 5) for loss in whole}) > 1, "the weights move"


@pytest.fixture(scope="module", params=[1, 2])
def few(request, tmp_path_factory):
    """(what a process without ranks found, what the ranks found, how many there were)"""
    found = _few(tmp_path_factory)
    return found[0], found[request.param], request.param


_cache = {}


def _few(tmp_path_factory):
    if not _cache:
        _cache.update(run(tmp_path_factory.mktemp("sharded"), "few", 0, 1, 2))
    return _cache


def test_sharded_gradients_are_those_of_one_process(few):
    alone, found, size = few
    assert len(found["gradients"]) >= (20 if size == 2 else 10)
    check_gradients(found["gradients"], alone["gradients"])


def test_loss_curves_do_not_depend_on_the_number_of_ranks(few):
    alone, found, _ = few
    check_curves(found["curves"], alone["curves"])


def test_rollouts_do_not_depend_on_the_number_of_ranks(few):
    alone, found, _ = few
    assert torch.equal(found["rollouts"], alone["rollouts"])
    assert len(alone["rollouts"].unique()) > 10


def test_a_loss_of_the_gathered_head_reaches_the_sharded_one(few):
    alone, found, _ = few
    for kind, gradients in found["supervised"].items():
        assert worst_gradient_error(gradients, alone["supervised"][kind]) < 1e-10


def test_every_rank_has_the_rewards_of_all_bit_for_bit_and_in_order(few):
    alone, found, _ = few
    assert torch.equal(found["gathered"], alone["gathered"])


def test_bf16_forwards_leave_fp32_gradients_close_to_the_exact_ones(few):
    alone, found, _ = few
    for kind, gradients in found["half_precision"].items():
        for name, gradient in gradients.items():
            want = alone["half_precision"][kind][name]
            assert 0 < float((gradient - want).norm()) < 0.1 * float(want.norm()), name


def test_recomputed_activations_give_the_same_gradients(few):
    alone, found, _ = few
    for (loss, gradients), (whole_loss, whole) in zip(found["recomputed"], alone["recomputed"], strict=True):
        assert loss == pytest.approx(whole_loss, rel=1e-10)
        assert worst_gradient_error(gradients, whole) < 1e-10


def test_a_checkpoint_of_shards_is_that_of_the_whole_model(few):
    (alone, config), (found, sharded_config) = few[0]["saved"], few[1]["saved"]
    assert alone.keys() == found.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert sharded_config == config


def test_clipping_sees_all_shards(few):
    alone, found, _ = few
    assert found["clipped"][0] == pytest.approx(alone["clipped"][0], rel=1e-10)
    assert worst_gradient_error(found["clipped"][1], alone["clipped"][1]) < 1e-6  # torch 2.8 rounds the factor to float32
    assert alone["clipped"][0] > 0.5


def test_replicas_of_shards_give_the_same_gradients(few):
    alone, found, _ = few
    for key, (loss, gradients) in zip([("untied", "sequence", 0), ("tied", "batch", 1)], found["replicas"], strict=True):
        assert loss == pytest.approx(alone["gradients"][key][0], rel=1e-10)
        assert worst_gradient_error(gradients, alone["gradients"][key][1]) < 1e-10


def test_a_step_without_any_weight_calls_no_model_on_any_rank(few):
    assert few[1]["nothing_to_learn"] == (0, 0.0, {})


def test_the_head_is_gathered_and_reduced_once_per_optimizer_step(few):
    alone, found, size = few
    gathers, reductions, gradients = found["gathers"]
    none = [(0, 0)] if size == 1 else []  # torch up to 2.8 lets a single rank send, too
    assert (gathers, reductions) in [(1, 1), *none]
    assert worst_gradient_error(gradients, alone["gradients"]["untied", "sequence", 0][1]) < 1e-10


def test_a_step_reduces_once_even_where_its_last_block_has_no_gradient(few):
    alone, found, size = few
    gradients, reductions, modules = found["reduced_once"]
    assert worst_gradient_error(gradients, alone["reduced_once"][0]) < 1e-10
    assert size == 1 or reductions == modules


def test_a_head_that_changed_is_gathered_anew(few):
    before, after, fresh = few[1]["an_updated_head"]
    assert torch.equal(after, fresh)
    assert not torch.allclose(before[0], after[0])


def test_what_fails_on_one_rank_fails_on_all_with_its_sentence(few):
    size = few[2]
    others = [("OtherRankError", f"rank {size - 1}: a reward is nan")] * (size - 1)
    assert few[1]["failures"] == [*others, ("GuardError", "a reward is nan")]


def test_a_rank_that_fails_leaves_none_waiting(few):
    (waiting, _), (failed, said) = few[0]["stopped"]
    assert (failed, said) == (2, "dllm-kernels: the loss became nan\n")
    assert waiting == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sharded_gradients_of_every_cut_and_split_are_those_of_one_process(tmp_path, size):
    found = run(tmp_path, "gradients", 0, size)
    assert len(found[size]) > (100 if size > 1 else 50)
    check_gradients(found[size], found[0])


@pytest.mark.slow
def test_adapters_over_shards_are_those_over_the_whole_model(tmp_path):
    pytest.importorskip("peft")
    found = run(tmp_path, "adapters", 0, 2)
    alone, sharded = found[0], found[2]
    for kind, factors in (("untied", 8 + 2), ("tied", 8)):  # of two layers, and of the head
        assert len(alone[kind, "gradients"][1]) == factors
        check_gradients({(kind,): sharded[kind, "gradients"]}, {(kind,): alone[kind, "gradients"]})
        torch.testing.assert_close(sharded[kind, "reference"], alone[kind, "reference"])
        assert alone[kind, "weights"].keys() == sharded[kind, "weights"].keys()
        for name, weight in alone[kind, "weights"].items():
            torch.testing.assert_close(sharded[kind, "weights"][name], weight, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_twenty_steps_have_one_loss_curve_on_1_2_and_4_ranks(tmp_path):
    found = run(tmp_path, "curves", 0, 1, 2, 4)
    for size in (1, 2, 4):
        check_curves(found[size], found[0])


@pytest.mark.slow
def test_four_ranks_agree_with_one_process_in_everything(tmp_path):
    found = run(tmp_path, "few", 0, 4)
    four = (found[0], found[4], 4)
    for check in (
        test_sharded_gradients_are_those_of_one_process,
        test_rollouts_do_not_depend_on_the_number_of_ranks,
        test_a_loss_of_the_gathered_head_reaches_the_sharded_one,
        test_every_rank_has_the_rewards_of_all_bit_for_bit_and_in_order,
        test_bf16_forwards_leave_fp32_gradients_close_to_the_exact_ones,
        test_recomputed_activations_give_the_same_gradients,
        test_a_checkpoint_of_shards_is_that_of_the_whole_model,
        test_clipping_sees_all_shards,
        test_replicas_of_shards_give_the_same_gradients,
        test_a_step_without_any_weight_calls_no_model_on_any_rank,
        test_the_head_is_gathered_and_reduced_once_per_optimizer_step,
        test_a_head_that_changed_is_gathered_anew,
        test_what_fails_on_one_rank_fails_on_all_with_its_sentence,
    ):
        check(four)
