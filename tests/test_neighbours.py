"""Mistakes that others reported, or that users of transformers met here first: of each, tests of its neighbours.

A neighbour is another situation of the same kind (another tokenizer, option, architecture, way to fail) and not the
reported one again. Which tests these are is said here, and that they are there is checked without running any.
"""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
Kind = tuple[str, str]
"""The kind in a sentence; then tests, `file::name`, and behind a name in brackets the beginnings of the parameters' ids
that are meant, ` | ` between them: each is a neighbour."""

REPORTED: dict[str, Kind] = {
    "indentation of streamed code": (
        "Text that is shown token by token is what all tokens decode to.",
        """
        cli/test_streaming.py::test_lines_keep_their_indentation[metaspace]
        cli/test_streaming.py::test_an_answer_that_ends_inside_a_letter
        serving/test_text.py::test_pieces_make_the_whole_with_marked_spaces[metaspace first | word pieces]
        serving/test_text.py::test_pieces_make_the_whole_byte_level
        serving/test_text.py::test_letters_come_whole_with_bytes_by_name
        serving/test_text.py::test_bytes_that_never_become_a_letter_come_in_the_end
        """,
    ),
    "tied in the config, untied in the files": (
        "What the files hold is planned, whatever config.json says of it.",
        """
        engine/test_files_against_config.py::test_another_head_than_the_tied_one[gemma | gpt2]
        engine/test_files_against_config.py::test_the_same_head_again_stays_tied[wider]
        engine/test_files_against_config.py::test_one_row_makes_another_head
        engine/test_files_against_config.py::test_a_head_of_another_shape_is_said[(319, 32) | (0, 32)]
        checkpoint/test_quantised.py::test_a_packed_head_is_no_tied_one
        """,
    ),
    "convert loses the head": (
        "Every way to write a copy writes all that the original answers with.",
        """
        engine/test_files_against_config.py::test_every_way_to_write_a_copy_keeps_another_head[
            int4 | int2 | saved | exported | packed | gguf | copy of a copy]
        checkpoint/test_adapter.py::test_converted_copies_have_it
        """,
    ),
    "generation settings that generate refuses": (
        "What generation_config.json asks for is done, set aside with a word, or refused in a line.",
        """
        cli/test_generation_settings.py::test_settings_that_are_set_aside[
            cache_implementation=paged | prefill_chunk_size | is_assistant]
        cli/test_generation_settings.py::test_settings_that_are_refused[
            penalty_alpha | guidance_scale | watermarking_config | sequence_bias]
        cli/test_generation_settings.py::test_stop_strings_end_an_answer[several | one]
        cli/test_hostile.py::test_generation_settings[temperature-hot | num_beams-0]
        serving/test_generation_settings.py::test_stop_strings_and_ends_of_a_checkpoint
        """,
    ),
    "use_cache false": (
        "A cache that training switched off is used anyway, whatever flags are given.",
        """
        cli/test_generation_settings.py::test_a_cache_that_training_has_switched_off[pruned | exact]
        cli/test_generation_settings.py::test_settings_that_change_nothing[use_cache=False]
        engine/test_transformers_habits.py::test_a_cache_that_training_has_switched_off[
            beams | the stock model | a past | a context | one of many | a pipeline]
        """,
    ),
    "weights of another user": (
        "A file that may not be read is no damaged one.",
        """
        checkpoint/test_unreadable_files.py::test_files_of_another_user[
            config.json | model.safetensors.index.json | tokenizer.json | generation_config.json]
        checkpoint/test_unreadable_files.py::test_directories_of_another_user[closed | not listed | not entered]
        checkpoint/test_unreadable_files.py::test_a_shard_that_could_not_be_opened_is_not_called_damaged
        checkpoint/test_unreadable_files.py::test_gguf_files_of_another_user
        checkpoint/test_unreadable_files.py::test_links_into_a_directory_of_another_user
        checkpoint/test_unreadable_files.py::test_links_to_what_is_not_there[config.json | chat_template.jinja]
        cli/test_places.py::test_places_that_nothing_can_be_read_from[
            prompt | schema | saved | adapter | model | models | config | key | requests | text | rows | prompts]
        cli/test_places.py::test_places_that_nothing_can_be_written_to[answers | copy | export | pictures]
        """,
    ),
    "a terminal without Unicode": (
        "A letter that the output lacks ends no answer.",
        """
        cli/test_streaming.py::test_letters_that_the_output_lacks[utf-16-le | cp932 | latin-1 | cp437 | koi8-r]
        cli/test_streaming.py::test_what_somebody_asked_for_letters_that_lack_is_kept[replace | ignore | surrogate]
        cli/test_streaming.py::test_json_needs_no_letters
        """,
    ),
    "mixed precision in the budget": (
        "What is converted while it loads is in the plan, for as long as it is there.",
        """
        engine/test_files_against_config.py::test_what_is_resident_is_twice_there_until_it_has_arrived
        engine/test_files_against_config.py::test_memory_of_the_host_is_not_the_devices
        engine/test_text_model.py::test_towers_of_another_precision_cost_nothing[gemma3 | got_ocr2]
        checkpoint/test_gguf.py::test_a_plan_counts_the_numbers_that_are_made
        checkpoint/test_kinds.py::test_a_plan_tells_what_is_translated
        offload/test_stream.py::test_another_precision_streams_through_slots
        """,
    ),
    "a vision tower in the budget": (
        "Of a model that sees as well, the language model alone is planned, loaded and written.",
        """
        engine/test_text_model.py::test_the_language_model_alone_is_resident_and_answers[got_ocr2 | fuyu]
        engine/test_text_model.py::test_converted_copies_hold_the_language_model[gemma3]
        engine/test_text_model.py::test_files_without_the_tower_are_enough[gemma3]
        engine/test_text_model.py::test_images_are_refused_by_name[gemma3]
        blocks/test_kept_state.py::test_the_text_decoder_is_found_beside_a_tower_of_as_many_layers
        """,
    ),
    "LFM2 as it is published": (
        "Layers that keep a state run as in transformers, or are refused by the true reason.",
        """
        engine/test_hybrids.py::test_density_one_is_dense_and_half_is_masked[
            qwen3_5 | olmo_hybrid | falcon_h1 | granite_h | nemotron_h]
        engine/test_hybrids.py::test_the_plan_counts_what_layers_keep[falcon_h1]
        engine/test_recurrences.py::test_contexts_go_on_and_back[mamba | falcon_mamba | mamba2 | jamba]
        engine/test_recurrences.py::test_projections_rest_in_their_format[jamba-int4]
        checkpoint/test_gguf.py::test_the_model_is_the_one_that_was_written[lfm2]
        """,
    ),
    "architectures that nobody named": (
        "A dense model that is in no list runs, or is refused in a line.",
        """
        engine/test_hybrids.py::test_density_one_is_dense_and_half_is_masked[
            smollm3 | exaone4 | modernbert_decoder | ctrl | bert]
        blocks/test_kept_state.py::test_the_true_reason_is_named[a past that is no KV cache | no KV cache at all]
        checkpoint/test_foreign.py::test_other_kinds_of_models_are_named[bart | vit]
        """,
    ),
    "files in memory in a container": (
        "Free memory is what the kernel would give and not what is not anonymous.",
        """
        devices/test_cgroup.py::test_what_is_charged_and_can_be_dropped[v1-locked | v1-shared | v1-kernel | v1-no word]
        devices/test_cgroup.py::test_the_tightest_group_above_counts[v2]
        devices/test_cgroup.py::test_a_group_whose_own_path_is_not_there[v1]
        devices/test_cgroup.py::test_where_a_process_is_slowed_down_is_a_limit[v2]
        """,
    ),
    "tokenizer.model alone": (
        "A tokenizer that cannot be loaded is told by what it needs or what is wrong with it.",
        """
        checkpoint/test_unreadable_files.py::test_packages_that_old_tokenizers_need[
            spiece.model | qwen.tiktoken | tekken.json | tokenizer.model-installed4]
        checkpoint/test_unreadable_files.py::test_damaged_tokenizers_are_named[tokenizer.json-page | added_tokens.json]
        cli/test_bad_model.py::test_no_tokenizer
        """,
    ),
    "log probabilities behind a penalty": (
        "A client gets the model's log probabilities, and penalties only if it asks.",
        """
        serving/test_generation_settings.py::test_a_penalty_that_a_request_asks_for[none | the checkpoint's]
        serving/test_generation_settings.py::test_tokens_of_the_answer_are_counted_for_openais_penalties[False | True]
        serving/test_openai_clients.py::test_logprobs_of_what_is_sampled_are_those_before_temperature
        serving/test_openai_clients.py::test_logprobs_of_exact_answers_are_the_full_models
        serving/test_parallel.py::test_log_probabilities_beside_others
        """,
    ),
    "the developer's role": (
        "Instructions are the system's, however a client's library says them.",
        """
        serving/test_requests.py::test_instructions_are_the_systems_whoever_gives_them[
            in parts | behind a question | beside the system | with a name that is null]
        serving/test_other_apis.py::test_instructions_are_the_systems[instructions | developer | system]
        """,
    ),
    "pointers of git-lfs": (
        "A pointer in the place of a file is named as one, and only where the file is needed.",
        """
        checkpoint/test_unreadable_files.py::test_pointers_of_git_lfs[
            config.json | model.safetensors.index.json | tokenizer_config.json | generation_config.json]
        checkpoint/test_unreadable_files.py::test_a_template_that_is_a_pointer_is_no_template
        checkpoint/test_unreadable_files.py::test_pointers_that_nobody_reads_do_not_matter
        checkpoint/test_unreadable_files.py::test_a_pointer_in_the_place_of_a_gguf_file
        """,
    ),
    "tokens of log probabilities without their spaces": (
        "Tokens, bytes and labels join to the answer, and no two tokens have one name.",
        """
        serving/test_text.py::test_logprob_tokens_join_to_the_text[
            chat-metaspace | chat-word pieces | completion-metaspace first | completion-word pieces]
        serving/test_text.py::test_bytes_of_tokens_are_those_of_the_text
        serving/test_text.py::test_of_two_tokens_with_one_name_the_likelier_is_told
        """,
    ),
}

HABITS: dict[str, Kind] = {
    "a second model kills the process": (
        "Models are loaded and used beside each other.",
        """
        robustness/test_process_state.py::test_models_loaded_in_a_row_while_the_others_arrive[none-int8-int4]
        robustness/test_process_state.py::test_beside_a_thread_that_builds_models[int4]
        robustness/test_process_state.py::test_loading_while_another_one_generates[int8]
        robustness/test_process_state.py::test_modules_of_other_threads_stay_real_while_a_converted_one_loads
        """,
    ),
    "torch's default type": (
        "What a program sets for all of torch changes nothing.",
        """
        robustness/test_process_state.py::test_a_default_type_that_was_set_before[int4-torch.float16]
        robustness/test_process_state.py::test_a_converted_checkpoint_under_a_default_type[torch.float64]
        robustness/test_process_state.py::test_a_default_device_and_filled_memory[int8]
        robustness/test_process_state.py::test_inference_mode[True-False-int8]
        """,
    ),
    "int4 ruins trained models": (
        "Single large weights come back from few bits.",
        """
        engine/test_outliers.py::test_logits_stay_near_those_of_16_bit[True-0.5-converted-int3]
        engine/test_outliers.py::test_weights_of_30_rms_come_back[dtype1-on the way-int2]
        engine/test_outliers.py::test_large_weights_that_are_missed_are_said_once
        formats/test_int4.py::test_outliers_come_back[torch-True--1-200]
        """,
    ),
    "more memory, worse plan": (
        "A larger budget never answers worse than a smaller one.",
        """
        planner/test_plan.py::test_more_memory_is_never_worse
        planner/test_tiers.py::test_more_memory_never_expects_a_worse_answer
        engine/test_expert_precisions.py::test_a_budget_is_kept_and_more_of_it_is_no_worse[mixtral | gpt_oss]
        engine/test_experts.py::test_more_memory_is_more_experts
        """,
    ),
    "only the stock model is kept": (
        "A part that a program keeps has all that it needs, or says what is gone.",
        """
        engine/test_life.py::test_a_part_of_a_whole_model_does
        engine/test_life.py::test_a_part_of_a_pruned_model_does_not_run_by_itself
        engine/test_life.py::test_contexts_and_caches_that_stay_keep_no_weights
        engine/test_model_face.py::test_it_assists_with_the_tokens_of_the_other[gemma3-1.0]
        """,
    ),
    "a cell that is run again keeps old models": (
        "A model goes with its last name.",
        """
        engine/test_life.py::test_a_model_goes_with_its_last_name[qwen3 | gemma3 | opt | gpt2]
        engine/test_generate.py::test_no_cycle_keeps_what_is_large_alive
        """,
    ),
    "save_pretrained writes a broken copy": (
        "What is saved is a checkpoint, or refused.",
        """
        engine/test_life.py::test_what_is_no_checkpoint_is_not_saved[options1-int8 | options2-always_stream]
        engine/test_life.py::test_a_whole_model_is_saved_as_it_is[gemma3-dtype1]
        engine/test_life.py::test_copies_and_pickles_are_refused
        engine/test_files_against_config.py::test_every_way_to_write_a_copy_keeps_another_head[saved]
        """,
    ),
    "hybrids called mixtures of experts": (
        "What is refused is refused for what it is.",
        """
        blocks/test_kept_state.py::test_the_true_reason_is_named[no KV cache at all | a past that]
        engine/test_hybrids.py::test_density_one_is_dense_and_half_is_masked[olmo_hybrid | granite_h | falcon_h1]
        blocks/test_feedforward.py::test_others_are_refused_by_name[jetmoe]
        """,
    ),
    "longrope of Phi-3 in exact mode": (
        "Positions that change with the length are those of the full model on both sides of the border.",
        """
        engine/test_rope.py::test_exact_mode_is_dense_on_both_sides_and_across[longrope-39 | phi3-60]
        engine/test_rope.py::test_plain_answers_at_density_one_are_dense_whatever_passed_before[dynamic | yarn]
        engine/test_rope.py::test_a_context_that_crosses_is_read_anew[True-longrope]
        engine/test_rope.py::test_a_saved_prompt_is_gone_on_from_on_its_own_side[longrope]
        engine/test_rope.py::test_refresh_across_the_border
        """,
    ),
    "use_cache false in config.json": (
        "A cache that training switched off is used by every way that Python has to generate.",
        """
        engine/test_transformers_habits.py::test_a_cache_that_training_has_switched_off[
            beams | a past | a conversation | logits]
        """,
    ),
    "objects of torch as options": (
        "Options may be names, objects, None or numbers of any library.",
        """
        engine/test_transformers_habits.py::test_what_loading_takes[dtype=np.float32 | device_map={"": "cpu"}-works]
        engine/test_transformers_habits.py::test_what_loading_takes[density=torch.tensor | exact=np.bool_]
        engine/test_transformers_habits.py::test_what_generate_takes[max_new_tokens=torch.tensor]
        """,
    ),
    "GriffinModel where a model is expected": (
        "Programs that take a model take it, or are told what they can take.",
        """
        engine/test_model_face.py::test_a_pipeline_takes_batches_beams_and_an_assistant
        engine/test_model_face.py::test_it_assists_with_the_tokens_of_the_other[opt-0.5]
        engine/test_model_face.py::test_its_defaults_can_be_changed
        engine/test_model_face.py::test_what_cannot_be_is_refused_with_what_can[<lambda>-train | <lambda>-whole numbers]
        """,
    ),
    "the tokenizer is loaded twice": (
        "Every command reads it once.",
        """
        cli/test_run.py::test_the_tokenizer_is_loaded_once[run-calibrated | chat-as stored]
        cli/test_run.py::test_other_commands_load_the_tokenizer_once[batch | eval ppl | inspect | convert | export]
        cli/test_run.py::test_the_tokenizer_of_a_model_is_what_its_matrices_were_quantised_by
        """,
    ),
    "answers that are cut without a word": (
        "An answer that ends by its length says so, and help names the length.",
        """
        engine/test_session.py::test_how_an_answer_ends_is_said[session | send]
        engine/test_structure.py::test_an_answer_that_ends_by_its_length_is_told
        serving/test_structured.py::test_an_answer_that_is_cut_says_so
        cli/test_help.py::test_every_option_has_help_that_names_its_default
        """,
    ),
    "a plan for a GPU elsewhere": (
        "A plan needs no device.",
        """
        cli/test_plan.py::test_a_device_of_another_machine[cuda | mps]
        engine/test_files_against_config.py::test_memory_of_the_host_is_not_the_devices
        planner/test_plan.py::test_planning_70b_from_its_config_alone
        """,
    ),
    "messages about other checkpoints": (
        "What cannot be loaded is named as what it is, with what to do.",
        """
        checkpoint/test_foreign.py::test_others_quantisation_is_named_by_its_method[hqq | gptq of 3 bits | sparse]
        checkpoint/test_foreign.py::test_plain_weights_under_a_config_that_says_otherwise[fp8 | compressed | mxfp4]
        checkpoint/test_foreign.py::test_other_kinds_of_models_are_named[llava | bart]
        checkpoint/test_foreign.py::test_directories_of_other_kinds[adapter_config.json | params.json | model.onnx]
        """,
    ),
    "a saved prompt that is not used": (
        "Of a saved prompt all that fits is used, and why not is said.",
        """
        cli/test_prompt_cache.py::test_a_conversation_is_used_as_far_as_it_goes
        cli/test_prompt_cache.py::test_another_prompt_is_said_and_not_saved
        cli/test_prompt_cache.py::test_exact_mode_uses_and_saves_prompts
        kv_cache/test_saved.py::test_another_setting_is_named[{'density' | {'quantize' | {'kv_bits']
        """,
    ),
    "past_key_values": (
        "A cache of an earlier call goes on, or is refused by what does not fit.",
        """
        engine/test_past.py::test_turns_are_those_of_transformers[gemma3 | bloom]
        engine/test_past.py::test_caches_of_the_caller_go_on_too[StaticCache]
        engine/test_past.py::test_a_pruned_model_goes_on_with_what_was_chosen[8]
        engine/test_past.py::test_what_does_not_belong_together_is_refused[short | more]
        """,
    ),
    "memory after del": (
        "Memory that nobody uses is the system's again.",
        """
        engine/test_life.py::test_the_heap_is_trimmed_when_the_weights_have_gone
        engine/test_life.py::test_closing_takes_the_weights_from_whoever_keeps_the_model
        engine/test_generate.py::test_a_pass_over_many_tokens_gives_freed_memory_back
        serving/test_worker.py::test_idle_memory_is_given_back_and_the_next_request_loads_again
        """,
    ),
    "memory of Gemma": (
        "Memory beside the budget is what is promised.",
        """
        cli/test_run.py::test_memory_beside_the_budget_with_a_large_vocabulary[--exact | --quantize-int8]
        cli/test_run.py::test_the_demo_needs_no_flags_and_less_memory_than_its_file
        devices/test_memory.py::test_what_a_run_gives_back_before_its_end_counts
        """,
    ),
    "threads that ask one model": (
        "Callers wait for each other.",
        """
        engine/test_turns.py::test_answers_of_threads_are_those_of_one_after_the_other[True]
        engine/test_turns.py::test_a_caller_that_gives_up_leaves_the_row
        engine/test_turns.py::test_closing_waits_for_the_answer_of_another_thread
        serving/test_openai_client.py::test_two_clients_at_once
        """,
    ),
    "the README's install line": (
        "What pages and errors say can be typed.",
        """
        test_documents.py::test_what_a_page_installs_is_the_checkout[evaluation.md | models_and_formats.md]
        test_documents.py::test_extras_that_errors_name_are_there
        test_documents.py::test_commands_that_a_page_shows_are_understood[README.md | server.md]
        cli/test_help.py::test_every_command_shows_an_example_that_it_understands
        cli/test_plan.py::test_remedies_of_plan_work_when_followed[--density 0.9]
        """,
    ),
}

Neighbour = tuple[str, str, str]
"""File, test, beginning of its parameters' id."""


def _neighbours(kind: Kind) -> list[Neighbour]:
    joined = kind[1].replace("[\n", "[")
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        file, _, rest = line.partition("::")
        name, _, ids = rest.removesuffix("]").partition("[")
        found += [(file, name, one.strip()) for one in ids.split(" | ")]
    return found


@functools.cache
def _tests_of(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)}


ALL = [(name, kind, 5) for name, kind in REPORTED.items()] + [(name, kind, 3) for name, kind in HABITS.items()]


@pytest.mark.parametrize(("kind", "least"), [one[1:] for one in ALL], ids=[one[0] for one in ALL])
def test_every_mistake_has_neighbours(kind: Kind, least: int):
    found = _neighbours(kind)
    assert len(set(found)) == len(found) >= least
    assert not [(file, name) for file, name, _ in found if name not in _tests_of(file)]


def test_parameters_that_are_named_are_there(request: pytest.FixtureRequest):
    """Of the tests that were collected with this one: all of them, where nobody chose some."""
    if request.config.option.keyword or request.config.option.markexpr or "::" in "".join(request.config.args):
        pytest.skip("some tests alone were chosen")
    ids: dict[tuple[str, str], list[str]] = {}
    for item in request.session.items:
        name, _, found = item.name.removesuffix("]").partition("[")
        if item.path.is_relative_to(TESTS):
            ids.setdefault((item.path.relative_to(TESTS).as_posix(), name), []).append(found)
    for _, kind, _ in ALL:
        meant = []
        for file, name, start in _neighbours(kind):
            there = [one for one in ids.get((file, name), [start]) if one.startswith(start)]
            assert there, f"{file}::{name} has no parameters {start}..."
            meant.append((file, name, there[0]))
        assert len(set(meant)) == len(meant), "two of them are one test"
