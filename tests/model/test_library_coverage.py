"""Which test here covers each test that transformers runs on every model, or why that test does not apply to BDH.

The wheel of transformers does not ship its tests. These are the names, without `test_`, in `ModelTesterMixin` and
`ConfigTester` of 5.24, and in `GenerationTesterMixin` and the tests of exporters of its repository at about that time.
"""

import ast
from pathlib import Path

COVERED = {
    # ModelTesterMixin
    "test_a_model_is_saved_and_loaded_exactly": """save_load can_use_safetensors correct_missing_keys
        base_model_prefix_loads_base_weights load_save_without_tied_weights
        model_weights_reload_no_missing_tied_weights""",
    "test_weights_are_taken_from_a_dictionary_or_a_checkpoint": """from_pretrained_no_checkpoint torch_save_load
        load_contiguous_weights""",
    "test_modules_kept_in_float32_are_in_the_model": "keep_in_fp32_modules_exist",
    "test_half_precision_keeps_the_gates_whole": "keep_in_fp32_modules bc_torch_dtype",
    "test_gates_are_made_in_float32_whatever_the_dtype": "keep_in_fp32_modules_strict_also_hardcode_fp32",
    "test_checkpointing_is_switched_on_and_off": """gradient_checkpointing_backward_compatibility
        gradient_checkpointing_enable_disable peft_gradient_checkpointing_enable_disable""",
    "test_every_weight_learns_with_and_without_checkpointing": """enable_input_require_grads training
        enable_input_require_grads_with_gradient_checkpointing training_gradient_checkpointing
        training_gradient_checkpointing_use_reentrant_false training_gradient_checkpointing_use_reentrant_true""",
    "test_a_model_made_of_a_configuration_is_initialized": "can_init_all_missing_weights",
    "test_every_tensor_of_a_module_is_a_parameter": "all_tensors_are_parameter_or_buffer init_weights_can_init_buffers",
    "test_a_row_computes_the_same_in_any_batch": "determinism batching_equivalence",
    "test_fields_that_every_configuration_has_are_kept": """model_forward_default_config_values
        check_config_arguments_init""",
    "test_the_loss_takes_what_the_trainer_gives": "causal_lm_loss_honors_shift_labels",
    "test_hidden_states_are_returned_where_the_configuration_says_so": "hidden_states_output",
    "test_some_hidden_states_can_be_chosen": "can_capture_specific_layers_hidden_states",
    "test_gradients_of_hidden_states_can_be_kept": "retain_grad_hidden_states_attentions",
    "test_embeddings_can_be_resized": """resize_tokens_embeddings resize_embeddings_untied
        resize_embeddings_untied_no_reinit_on_post_init""",
    "test_embeddings_can_be_given_instead_of_tokens": """model_get_set_embeddings inputs_embeds
        inputs_embeds_matches_input_ids""",
    "test_the_model_with_its_head_holds_the_model_without": "model_main_input_name model_base_model_prefix",
    "test_outputs_are_tuples_where_they_are_asked_for": "model_outputs_equivalence",
    "test_weights_of_other_sizes_are_refused_unless_allowed": """load_with_mismatched_shapes
        can_load_ignoring_mismatched_shapes""",
    "test_layers_can_be_left_on_the_disk": "disk_offload_bin disk_offload_safetensors cpu_offload",
    "test_devices_are_those_asked_for": """can_be_initialized_on_meta can_load_with_device_context_manager
        can_load_with_global_device_set cannot_load_with_meta_device_context_manager""",
    "test_a_compiled_model_learns_the_same": "torch_compile_for_training",
    "test_two_states_are_refused": "bc_cache_name_forward",
    # ConfigTester
    "test_a_configuration_survives_json_and_files": """config_to_json_string config_to_json_file
        config_from_and_save_pretrained config_from_and_save_pretrained_subfolder
        check_config_can_be_init_without_params""",
    "test_the_common_names_of_sizes_read_and_write_ours": "config_common_properties config_with_num_labels",
    # GenerationTesterMixin
    "test_outputs_have_the_forms_that_the_library_promises": """greedy_generate greedy_generate_dict_outputs
        greedy_generate_dict_outputs_use_cache sample_generate sample_generate_dict_output beam_search_generate
        beam_search_generate_dict_output beam_search_generate_dict_outputs_use_cache beam_sample_generate
        beam_sample_generate_dict_output past_key_values_format""",
    "test_a_text_begins_with_the_begin_of_text_where_there_is_no_prompt": "generate_without_input_ids",
    "test_left_padded_batch_writes_what_each_prompt_writes_alone": "left_padding_compatibility",
    "test_embeddings_count_where_tokens_are_given_too": "generate_from_random_inputs_embeds",
    "test_embeddings_as_a_prompt_write_what_their_tokens_write": "generate_from_inputs_embeds",
    "test_a_second_call_goes_on_from_the_state_of_the_first": "generate_continue_from_past_key_values",
    "test_a_second_call_goes_on_from_embeddings": "generate_continue_from_inputs_embeds",
    "test_keeping_the_logits_of_every_token_changes_no_text": "generate_methods_with_logits_to_keep",
    "test_only_the_last_logits_are_made_in_prefill": "forward_with_logits_to_keep",
    "test_arguments_reach_the_model_through_the_library": """inherits_generation_mixin
        prepare_inputs_for_generation_kwargs_forwards""",
    "test_positions_of_a_prompt_are_continued": "generate_with_and_without_position_ids",
    "test_positions_that_begin_anew_keep_packed_documents_apart": """
        eager_padding_matches_padding_free_with_position_ids""",
    "test_kinds_of_caches_of_keys_and_values_leave_the_state_as_it_is": """generate_with_static_cache
        generate_from_inputs_embeds_with_static_cache generate_with_quant_cache""",
    "test_the_model_compiles_to_one_graph": """generate_compile_model_forward_fullgraph
        generate_compilation_all_outputs""",
    "test_what_cannot_be_honoured_is_refused": "custom_4d_attention_mask",
    "test_assisted_decoding_is_refused_on_either_side": """assisted_decoding_matches_greedy_search
        assisted_decoding_sample""",
    "test_ways_that_need_keys_and_values_are_refused": """prompt_lookup_decoding_matches_greedy_search
        prompt_lookup_decoding_stops_at_eos""",
    # Exporters
    "test_the_exporters_of_the_library": "torch_export torch_export_generate onnx_export onnx_export_generate",
}

NOT_APPLICABLE = {
    "BDH has no softmax: no attention weights to return, and no attention implementation to choose": """
        attention_outputs attn_implementation_composite_models can_set_attention_dynamically
        can_set_attention_dynamically_composite_model config_attn_implementation_setter eager_matches_sdpa_inference
        eager_matches_sdpa_generate eager_matches_fa2_generate eager_matches_fa3_generate eager_matches_fa4_generate
        flash_attention_2_continue_generate_with_position_ids
        flash_attention_2_padding_matches_padding_free_with_position_ids
        flash_attention_2_padding_matches_padding_free_with_position_ids_and_fa_kwargs
        flash_attention_3_padding_matches_padding_free_with_position_ids
        flash_attention_3_padding_matches_padding_free_with_position_ids_and_fa_kwargs
        flash_attention_4_padding_matches_padding_free_with_position_ids
        flash_attention_4_padding_matches_padding_free_with_position_ids_and_fa_kwargs
        flash_attn_2_can_compile_with_attention_mask_None_without_graph_break
        flash_attn_2_can_dispatch_composite_models flash_attn_2_fp32_ln flash_attn_2_from_config
        flash_attn_2_inference_equivalence flash_attn_2_inference_equivalence_right_padding
        flash_attn_3_can_dispatch_composite_models flash_attn_3_from_config flash_attn_3_inference_equivalence
        flash_attn_3_inference_equivalence_right_padding flash_attn_4_can_dispatch_composite_models
        flash_attn_4_from_config flash_attn_4_inference_equivalence flash_attn_4_inference_equivalence_right_padding
        flash_attn_kernels_inference_equivalence flash_attn_kernels_mps_inference_equivalence
        flex_attention_with_grads sdpa_can_compile_dynamic sdpa_can_dispatch_composite_models
        sdpa_can_dispatch_non_composite_models sdpa_can_dispatch_on_flash
        sdpa_padding_matches_padding_free_with_position_ids sliding_window_mask""",
    "BDH has kernels of its own, and no modules that the library replaces by kernels of the hub": """
        kernels_can_load_without_crashing""",
    "rotary phases hold at any position without scaling, and no positions are learned": """
        model_rope_scaling_from_config model_rope_scaling_frequencies model_rope_with_partial_rotation
        vision_axial_rope resize_position_vector_embeddings""",
    "BDH has no experts": """eager_matches_batched_and_grouped_inference moe_models_record_router_logits
        output_router_logits_from_config""",
    "BDH has no encoder, no other modality and no model inside of it": """encoder_decoder_loss_no_double_shift
        multimodal_outputs_are_returned internal_model_config_and_subconfig_are_same
        config_from_and_save_pretrained_composite config_from_pretrained_custom_kwargs get_text_features_output
        get_text_features_hidden_states get_text_features_attentions get_image_features_output
        get_image_features_pooler_output get_image_features_hidden_states get_image_features_attentions
        get_audio_features_output get_audio_features_hidden_states get_audio_features_attentions
        get_video_features_output get_video_features_pooler_output get_video_features_hidden_states
        get_video_features_attentions precomputed_inputs_match_eager""",
    "BDH has no feed-forward layers to cut into chunks; it ignores chunk_size_feed_forward": "feed_forward_chunking",
    "there is no BDH model for classification": "problem_types",
    "forward returns hidden states itself, without the library's recording": """capture_outputs_decorator
        format_of_can_record_outputs""",
    "BDH has no weights under older names, and no weights that are not saved": """reverse_loading_mapping
        can_load_from_already_mapped_keys save_load_keys_to_ignore_on_save""",
    "input and output embeddings are separate weights": "tied_weights_keys tied_weights_are_sharded_together",
    "bdh.distributed.tensor_parallel spreads a model over devices, not the library's plans": """tp_plan_matches_params
        model_parallelism model_parallel_beam_search""",
    "DeepSpeed is not supported; FSDP is": """resize_tokens_embeddings_with_deepspeed
        resize_tokens_embeddings_with_deepspeed_multi_gpu resize_embeddings_untied_with_deepspeed
        resize_embeddings_untied_with_deepspeed_multi_gpu""",
    "OpenVINO and ExecuTorch are not supported": """openvino_export openvino_export_generate executorch_export
        executorch_export_generate""",
    "these look at the library's test suite itself": """num_layers_is_small model_is_small
        generation_tester_mixin_inheritance""",
}


def test_every_check_of_the_library_is_covered_or_does_not_apply() -> None:
    modules = [ast.parse(file.read_text("utf-8")) for file in Path(__file__).parent.glob("test_*.py")]
    ours = {node.name for module in modules for node in module.body if isinstance(node, ast.FunctionDef)}
    assert not COVERED.keys() - ours
    checks = " ".join([*COVERED.values(), *NOT_APPLICABLE.values()]).split()
    assert len(checks) == len(set(checks))
