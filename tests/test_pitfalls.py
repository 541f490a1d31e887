"""What went wrong in other projects' heads and losses, and the tests here that would have caught it.

The table is the project's list of such bugs (`PITFALLS.md`, "In heads and losses"); a test that is renamed or dropped fails
this file. Tests of the head suite run over every backend.
"""

import importlib

import pytest

PITFALLS = {
    "phantom columns where V is not a multiple of the split": [
        "head_suite.test_pitfall_phantom_columns_of_a_vocabulary_that_is_no_multiple_of_anything"
    ],
    "softcap maps -inf padding to -cap": ["head_suite.test_pitfall_softcap_must_not_revive_suppressed_columns"],
    "running maximum initialised to 0": ["head_suite.test_pitfall_running_max_starts_at_minus_infinity"],
    "0 * -inf = NaN in the entropy": [
        "head_suite.test_pitfall_minus_infinity_logits_add_exactly_0_to_entropy_and_gradients",
        "head.head_relations.test_any_bias_of_minus_infinity_is_as_good_as_a_suppressed_id",
    ],
    "p - 1 in bf16 loses the true class's gradient": ["head_suite.test_pitfall_the_true_class_gradient_survives_p_near_1"],
    "a common offset of 2^24 destroys the loss": ["head_suite.test_pitfall_a_common_offset_of_2_to_24_costs_no_digits"],
    "entropy gradient silently dropped": ["head_suite.test_pitfall_the_entropy_gradient_is_not_dropped"],
    "logp > 0 by rounding": ["head_suite.test_pitfall_logp_is_never_above_0"],
    "logp cast to bf16 before the ratio": ["head_suite.test_pitfall_16_bit_never_enters_the_statistics"],
    "non-uniform upstream gradients ignored": ["head_suite.test_pitfall_upstream_gradients_that_differ_by_row_are_used"],
    "saved gradient changed in place, second backward wrong": [
        "head_suite.test_pitfall_a_second_backward_gives_the_same_gradient",
        "head.test_autograd.test_an_upstream_gradient_of_one_does_not_expose_what_is_saved",
    ],
    "gradients differ from PyTorch's (filtering)": [
        "head_suite.test_every_plan_equals_plain_autograd_in_float64",
        "head_suite.test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch",
        "head.head_relations.test_pitfall_small_probabilities_are_not_filtered_out_of_the_gradient",
    ],
    "softcap not applied by a patcher": [
        "model.test_headless.test_scores_over_headless_hidden_states_equal_the_model_s_own_logits"
    ],
    "gradient norm 100 x by normalisation": [
        "head.head_relations.test_the_gradients_of_a_batch_are_the_sums_of_those_of_its_parts",
        "accumulation.test_accumulation.test_two_calls_with_the_step_s_denominator_equal_one",
    ],
    "crash with a frozen head": ["head_suite.test_pitfall_a_frozen_head_works_and_gets_no_gradient"],
    "loss terms not weighted by 1 / p_mask": ["test_losses.test_it_equals_llada_s_pre_training_loss"],
    "a frozen head pays for dW": [
        "head.head_relations.test_pitfall_a_frozen_head_pays_for_no_weight_gradient",
        "head.test_ops.test_a_counter_sees_the_products_that_a_plan_executes",
    ],
    "entropy from an averaged log-likelihood": ["head_suite.test_all_statistics_equal_the_oracle_in_float64"],
    "32-bit offsets": ["head_suite.test_pitfall_row_offsets_beyond_2_to_31"],
    "sign of the entropy": ["head_suite.test_pitfall_the_sign_of_entropy"],
}


@pytest.mark.parametrize("bug", PITFALLS)
def test_each_known_bug_has_its_test(bug):
    for name in PITFALLS[bug]:
        module, _, test = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), test, None)), name
