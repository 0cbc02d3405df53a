"""The kernel tests once more under every other CPU target that this machine has: `make test-targets`."""

import os
import subprocess
import sys
from pathlib import Path

import onestep

# The C++ tests hold every kernel of every target against plain loops. Here ops call them: what depends on a target is
# the table that is used, sizes of panels and of work memory, and rounding.
TESTS = {
    "test_solve_normal.py": (
        "as_accurate_as_torch",
        "strided_is_bitwise_contiguous",
        "empty_batch",
        "dual_solves_the_augmented_least_squares",
        "rcond",
        "rcond_of_ill_conditioned_problems",
        "bitwise_for_any_number_of_threads",
    ),
    "test_gram.py": (
        "gram_is_as_accurate_as_torch",
        "gram_is_exactly_symmetric",
        "float32_gram_of_many_rows_does_not_drift",
        "moments",
        "a_large_offset_does_not_cancel",
        "moments_read_any_layout",
    ),
    "test_cholesky.py": (
        "residual_as_lapack_tests_it",
        "factor_is_as_accurate_as_torch",
        "solve_is_as_accurate_as_torch",
        "many_right_hand_sides",
        "info_equals_torchs_on_indefinite_matrices",
        "nan_and_inf_fail_alone",
    ),
    "test_failures.py": (
        "info_says_which_failed_and_neighbours_are_bitwise_untouched",
        "gradients_are_zero_where_it_failed_and_bitwise_untouched_elsewhere",
        "any_position_of_a_nan_is_found",
        "rank_deficiency_is_found_although_rounding_hides_it",
        "jitter_repairs_the_singular_alone",
        "jitter_escalates_tenfold",
    ),
    "test_refine.py": ("nist_problems_to_eight_digits", "two_steps_are_as_good_as_qr_in_float32"),
    "test_derivatives.py": ("agrees_with_composite", "float32_gradients_are_as_good_as_the_composite"),
    "test_glm.py": (
        "agrees_with_torch_in_double",
        "gram_is_the_dense_hessian",
        "bitwise_the_same_for_any_number_of_threads",
        "logistic_extremes",
        "softmax_extremes",
        "poisson_extremes",
        "nan_in_x_shows_in_every_result",
    ),
    "test_mlp.py": ("against_autograd", "threads_do_not_change_a_bit"),
    "test_sparse_products.py": (
        "product_against_scipy",
        "threads_do_not_change_a_bit",
        "a_row_with_nan_leaves_the_others",
    ),
    "test_linear_cross_entropy.py": (
        "value_gradient_and_hvp",
        "error_is_at_most_twice_torchs",
        "bfloat16_is_accumulated_in_float32",
        "strided_operands_are_read_in_place",
        "masked_classes_and_large_logits",
        "bitwise_for_any_number_of_threads",
    ),
    "test_attention.py": (
        "agrees_with_the_math_backend",
        "fp32_error_is_at_most_twice_the_math_backends",
        "bf16_error_is_about_the_math_backends",
        "rows_that_see_no_key",
        "threads_change_no_bit",
        "large_scores",
        "no_scores_give_zero_gradients",
    ),
}

# Half of all cases, in the type that every other family is tested in. ONESTEP_ALL_CASES=1 takes them, as .ci/run does.
LEFT_OUT = [] if "ONESTEP_ALL_CASES" in os.environ else ["-k", "not (agrees_with_torch_in_double and float64)"]


def main() -> int:
    """Runs the tests target by target; 0 if all passed."""
    facts = onestep.info()
    active = facts["cpu_target"]
    others = [target for target in facts["cpu_targets_supported"] if target != active]
    if not others:
        print(f"No CPU target but {active} on this machine: nothing more to test.")
        return 0
    folder = Path(__file__).parent
    chosen = [f"{folder / file}::test_{name}" for file, names in TESTS.items() for name in names]
    failed = []
    for target in others:
        print(f"== CPU target {target}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", *LEFT_OUT, *chosen]
        run = subprocess.run(command, cwd=folder.parent, env=os.environ | {"ONESTEP_TARGET": target}, check=False)
        if run.returncode != 0:
            failed.append(target)
    if failed:
        print(f"Failed under: {', '.join(failed)}")
        return 1
    print(f"Passed under: {', '.join(others)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
