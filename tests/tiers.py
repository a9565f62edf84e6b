"""Which tests run in `make test-all` alone: whole flows, kills, servers, and every case where a few are enough.

A test with the marker ``exhaustive``, ``slow`` or ``browser`` is not in the fast tier; the tables here give the marker
``exhaustive`` to tests by name, so that the choice can be read and measured in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXHAUSTIVE: Final[Mapping[str, tuple[str, ...]]] = {
    # whole runs of the flow, its servers and its commands
    "flows/test_chain.py": (
        "test_the_first_link", "test_nothing_new", "test_another_gate", "test_a_link_whose_run",
        "test_stopped_anywhere",
        "test_the_command", "test_the_page", "TestNews::test_a_link_that", "test_a_reward_model_comes",
    ),
    "flows/test_edge.py": (
        "test_a_reader_that_has_gone", "test_words_that_are_no_text", "test_a_name_that_no_disk_takes",
        "test_an_output_that_is_closed", "test_a_working_folder_that_is_gone", "test_a_latin_terminal",
        "test_markup_and_escapes",
    ),
    "flows/test_ending.py": ("test_exit_handlers",),
    "flows/test_engines.py": ("test_its_log_probs", "test_responses_end", "test_the_gap_to_the_policy",
        "test_a_stop_sequence"),
    "flows/test_exact_resume.py": (
        "test_killed_and_resumed_again_and_again_it_is_the_undisturbed_run[rloo, LoRA adapter",
        "test_killed_and_resumed_again_and_again_it_is_the_undisturbed_run[reinforce++ with",
    ),
    "flows/test_guards_flow.py": ("TestStop::test_at_the_end", "TestStop::test_accepted", "TestCommandLine",
        "TestPause",
        "test_a_warning_is_told_once"),
    "flows/test_overlap.py": (
        "test_workers_answer", "test_a_run_that_is_stopped", "test_a_cap_of_one", "test_it_is_replayed",
    ),
    "flows/test_ppo_flow.py": ("test_a_killed_run_resumes", "test_two_runs_are_equal"),
    "flows/test_real_quickstart.py": ("test_a_worker_builds",),
    "flows/test_reward_components_flow.py": ("test_a_run_with_components", "test_a_run_that_stops"),
    "flows/test_replay_cli.py": ("test_bundle_verify_replay",),
    "flows/test_sharding.py": (
        "test_the_run_is_the_same", "test_one_worker_comes", "test_a_worker_killed", "test_parts_of_a_stopped_run",
        "test_a_mistake_in_a_shard", "test_through_prefect",
    ),
    "flows/test_sweep_flow.py": ("TestWhole", "TestProcesses::test_as_a_deployment"),
    "flows/test_ui.py": ("test_both_pages", "test_the_tracker_of_the_runs"),
    "flows/test_verify_cli.py": ("test_resume_refuses_then_repairs",),
    "flows/test_vllm.py": (
        "test_the_same_run_by_another", "test_its_end_and_its_silence", "test_no_environment",
        "test_what_vllm_does_not",
        "test_each_iteration", "test_responses_end", "test_it_ends_with",
    ),
    "flows/test_without_prefect.py": (
        "test_what_prefect_fails_at", "test_an_api_that_dies", "test_ctrl_c", "test_a_resume_marks",
        "test_a_damaged_memory",
        "test_nothing_is_pickled", "test_an_error_of_the_work",
    ),
    # every case of what a few cases show
    "tasks/test_blend.py": (
        "test_the_policy_has_the_kl_that_was_asked_for[an adapter", "test_the_command_says", "test_the_run_is_left",
        "test_the_policy_has_the_kl_that_was_asked_for[a merged adapter]",
    ),
    "tasks/test_bundle.py": ("TestOfOtherKinds",),
    "tasks/test_cleaning.py": ("TestParts",),
    "tasks/test_evaluate.py": (
        "test_a_checkpoint_answers_with_its_own_weights[a", "test_an_adapter", "test_each_of_several",
        "test_what_lies_between",
    ),
    "tasks/test_extension.py": (
        "test_with_a_constant_rate", "test_stopped_in_the_extension", "test_from_the_command_line",
        "test_a_stopped_run",
        "test_damage_on_either_side",
    ),
    "tasks/test_local_workers.py": ("test_a_call_that_kills_every_worker",),
    "tasks/test_old_settings.py": ("test_a_run_whose_horizon",),
    "tasks/test_repair.py": (
        "TestRepair::test_the_run_is_what_it_was", "TestDrift::test_twice", "TestDrift::test_damage_older",
        "TestArchive",
    ),
    "tasks/test_replay.py": ("TestIdentical::test_runs_of_other_kinds", "TestRewardsThatAreNotHere"),
    "tasks/test_session.py": (
        "test_a_killed_lora_run", "test_every_stage_could_run", "test_a_merged_run_goes_on", "test_on_disk_nothing",
        "test_sending_frozen_models_away_changes_no_number[disk",
    ),
    "tasks/test_retention.py": ("TestRun::test_an_archived_update", "TestRun::test_compaction_changes_no_number"),
    "tasks/test_sqlite_store.py": ("test_a_real_maker_is_killed",),
    "tasks/test_strangers_runs.py": (
        "test_nothing_is_started_imported_or_contacted[meeting",
        "test_nothing_is_started_imported_or_contacted[cluster",
        "test_nothing_is_started_imported_or_contacted[tracker", "test_nothing_is_started_imported_or_contacted[place",
        "test_ones_own_runs",
    ),
    "tasks/test_tracked_traces.py": ("test_a_sender_that_dies_anywhere", "test_sending_again_keeps"),
    "tasks/test_what_if_state.py": ("TestOptimizer::test_other_betas",),
    "inputs/test_hub_online.py": ("test_a_run_of_a_hub",),
    "inputs/test_small_files_that_grow.py": (
        "test_a_template_that_loops", "test_prompts[zstd", "test_a_template[multiplied", "test_a_template[long",
        "test_a_template[doubled", "test_a_template[formatted",
    ),
    "inputs/test_texts_and_rewards.py": ("test_a_special_token_stops[transformers",),
    "inputs/test_token_ids.py": ("test_other_engines",),
    "benchmarks/test_benchmarks.py": ("test_the_accelerator_script",),
    "rlhf_core/models/test_architectures.py": ("test_two_iterations",),
    "rlhf_core/models/test_fingerprint.py": (
        "test_it_is_the_same_in_every_process", "test_another_way_to_compute", "test_a_setting_of_openmp",
    ),
    "rlhf_core/models/test_recompute.py": ("test_an_update_has_the_same_bits[['policy.lora",),
    "rlhf_core/test_numerical_guards.py": ("test_nan_in_padding_changes_no_bit_of_experience_or_weights[0.2",),
    "rlhf_core/rewards/test_function.py": ("test_refused[torch:hub.load",),
    "rlhf_core/stages/test_ppo_update.py": ("test_shares_of_ranks_add_up_to_the_step[shared",),
    "rlhf_core/sweeping/test_equal.py": ("test_real_points",),
    "rlhf_core/sweeping/test_folder.py": ("test_a_run_that_was_extended",),
    "rlhf_core/viewer/test_script.py": ("test_numbers_are_written",),
    "rlhf_core/test_disk_use.py": (
        "test_a_run_takes_what_was_predicted[changes1", "test_a_run_takes_what_was_predicted[changes2",
        "test_a_run_takes_what_was_predicted[changes3", "test_a_run_takes_what_was_predicted[changes4",
    ),
    "torture/test_battery.py": ("TestARow::test_is_not_measured_again", "TestARow::test_of_no_such_name"),
}  # fmt: skip
"""Test file below tests/ -> beginnings of the names that leave the fast tier."""

FEW: Final[Mapping[str, tuple[str, ...]]] = {
    "flows/test_artifacts.py": ("test_without_prefect_no_thread", "test_watchers_beside"),
    "flows/test_chats_are_spoken.py": ("test_the_last_message", "test_a_trace_of_a_checkpoint"),
    "flows/test_evaluate_flow.py": (),
    "flows/test_object_store.py": (),
    "flows/test_planted_modules.py": ("test_this_process", "test_a_reward_function"),
    "flows/test_prefect_behind_tls.py": (),
    "flows/test_ranks.py": ("test_only_the_layout", "test_a_layout_that_cannot_be"),
    "flows/test_shards_elsewhere.py": (),
    "tasks/test_other_peoples_mlflow.py": (),
    "tasks/test_tracking.py": ("test_numbers_that_are_not_finite", "test_what_the_user_has_set", "test_the_address_of"),
}
"""Test file -> beginnings of the names that stay: everything else in it leaves the fast tier."""


def is_exhaustive(file: str, name: str) -> bool:
    """Whether the tables give a test the marker.

    Args:
        file: below tests/, as ``flows/test_chain.py``.
        name: after the file, as ``TestNews::test_a_link[case]``.
    """
    if file in FEW:
        return not name.startswith(FEW[file])
    return name.startswith(EXHAUSTIVE.get(file, ()))
