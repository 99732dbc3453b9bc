"""Which tests need the compiled runtime, and which are slow.

By directory where possible, then by file, then by test.  Every test is ``runtime`` or ``unit``; ``slow`` comes on top: processes that
are killed, peaks of memory, clusters, downloads, compilers.  ``make test-unit`` runs ``unit and not slow``.
``test_house.py`` checks that every name here exists.
"""

from __future__ import annotations

RUNTIME = (
    "bench/",
    "compress/",
    "export/",
    "native/",
    "parity/",
    "plan/",
    "runtime/",
    "stock/",
    "studies/",
    "browser/test_side_by_side.py",
    "calibrate/test_moments.py::test_export_leaves_what_was_fitted_to_moments",
    "evaluate/test_cli.py",
    "evaluate/test_experts.py",
    "evaluate/test_page_of_files.py",
    "evaluate/test_inspect.py::test_checkpoint_and_its_gguf_agree",
    "evaluate/test_inspect.py::test_down",
    "evaluate/test_inspect.py::test_tables_fit_a_hundred_columns",
    "evaluate/test_verify.py",
    "factorize/test_cli.py::test_factors_larger_than_the_experts_are_refused",
    "factorize/test_cli.py::test_forms",
    "factorize/test_cli.py::test_numbers_that_are_too_large",
    "factorize/test_down.py::test_dry_run_prints_it",
    "factorize/test_down.py::test_export_writes_the_very_values",
    "factorize/test_down.py::test_rounding_goes_along_the_files_rows",
    "factorize/test_linear.py::test_about_as_good_as_adam_with_three_times_the_steps",
    "factorize/test_memory.py::test_the_plan_says_what_a_unit_takes",
    "factorize/test_placement.py::test_the_command",
    "factorize/test_rounding.py",
    "factorize/test_target.py::test_a_file_of_a_size",
    "models/test_families.py::test_other_families_are_those_that_the_converter_knows",
    "models/test_gguf_source.py",
    "models/test_hub.py::test_export_by_id",
    "models/test_hub.py::test_gguf_files_by_name",
    "models/test_inputs.py::test_a_token_beyond_the_vocabulary",
    "models/test_inputs.py::test_compressed_tensors_by_way_of_gguf",
    "models/test_inputs.py::test_converter_is_asked_before_work",
    "models/test_inputs.py::test_fused_experts_everywhere",
    "models/test_inputs.py::test_one_file_counts_before_an_index",
    "models/test_inputs.py::test_no_command_replaces_what_it_reads",
    "models/test_inputs.py::test_weights_that_change_while_they_are_read",
    "models/test_inputs.py::test_widths_that_grouped_products_refuse",
    "models/test_inputs.py::test_tokenizer_may_come_later",
    "quant/test_allocate.py::test_a_file_of_a_size",
    "quant/test_allocate.py::test_bits_per_weight_and_options_before_it",
    "quant/test_allocate.py::test_errors_are_the_encoders_own",
    "quant/test_codebook.py",
    "quant/test_codebook_blocks.py",
    "quant/test_codebook_search.py",
    "quant/test_recipe.py::test_bytes_are_those_of_llama_quantize",
    "quant/test_recipe.py::test_table_agrees_with_libggml",
    "quant/test_recipe.py::test_types_are_those_of_llama_quantize",
    "quant/test_recipe.py::test_types_of_factors_of_down_are_those_of_llama_quantize",
    "quant/test_rounding_engine.py",
    "quant/test_rounding_forms.py",
    "quant/test_small.py::test_least",
    "test_wrong_types.py::test_a_key_that_the_file_has_no_room_for",
    "test_wrong_types.py::test_messages_about_keys",
)

SLOW = (
    "evaluate/test_inspect.py::test_original",
    "evaluate/test_report.py::test_labels_are_apart_and_in_the_picture",
    "evaluate/test_report.py::test_plot",
    "core/test_executors.py",
    "factorize/test_job.py::test_every_family",
    "factorize/test_job.py::test_fp8_source",
    "factorize/test_job.py::test_the_model_still_loads_in_transformers_when_multiplied_out",
    "factorize/test_linear.py::test_groups_and_down",
    "factorize/test_solver.py::test_few_terms_are_exact_zeros_and_chosen_well",
    "factorize/test_solver.py::test_the_weighted_fit_is_better_where_it_counts",
    "factorize/test_target.py::test_a_unit_of_another_size_is_fitted_again",
    "factorize/test_target.py::test_bases_go_where_they_help",
    "quant/test_allocate.py::test_large_sizes_are_counted_in_grains",
    "test_tiny_moe.py",
    "test_wrong_types.py::test_keys_of_a_gguf_file",
    "browser/",
    "calibrate/",
    "evaluate/test_verify.py::test_any_bytes_changed",
    "export/test_failures.py",
    "export/test_reconstruct.py::test_killed",
    "export/test_reconstruct.py::test_two_at_once",
    "export/test_refit_memory.py",
    "export/test_shards.py::test_killed",
    "factorize/test_cli.py::test_sigterm_is_as_an_interrupt",
    "factorize/test_cli.py::test_stdout_is_closed",
    "factorize/test_distributed.py",
    "factorize/test_job.py::test_killed_twice_gives_the_same_files",
    "factorize/test_memory.py",
    "factorize/test_target.py::test_a_stopped_job_goes_on_with_its_probes_and_sizes",
    "factorize/test_workers.py",
    "models/test_hub.py",
    "native/",
    "parity/",
    "runtime/test_build.py",
    "runtime/test_compile.py",
    "runtime/test_packaging.py",
    "stock/",
)


def marks(test: str) -> tuple[str, ...]:
    """Markers of ``folder/file.py::name``."""

    def among(places: tuple[str, ...]) -> bool:
        return any(
            test == p or (p.endswith("/") and test.startswith(p)) or test.split("::")[0] == p for p in places
        )

    return ("runtime" if among(RUNTIME) else "unit", *(("slow",) if among(SLOW) else ()))
