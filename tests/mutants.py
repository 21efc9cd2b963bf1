"""Known wrong variants of the algorithms, each with the test that must notice it.

    python tests/mutants.py            apply each one, run its test, print the table
    python tests/mutants.py NAME ...   only these

A mutant replaces a piece of one function's source. Many of them are bugs of published code. The
hunts of `rlhf_mini.check.hunts` are among them: readers of the book look for those.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_mini.check.hunts import HUNTS
from rlhf_mini.check.planting import planted

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """A known wrong variant of one function."""

    name: str
    why: str  # what is wrong, and who had it
    target: str  # "module:function" or "module:Class.method" below rlhf_mini
    old: str  # occurs exactly once in the function
    new: str
    test: str  # the test that must fail, "file.py::function" below tests/


MUTANTS = [
    # ---- masks and whitening
    Mutant("padding-in-means", "ratio, KL and entropy averaged over padding (TRL)",
           "tensors:masked_mean", "mask.sum().clamp(min=1)", "mask.numel()",
           "test_tensors.py::test_mean_var_and_whitening_equal_numpy_on_the_selected_entries"),
    Mutant("mask-by-multiplication", "x * mask: 0 * inf is nan",
           "tensors:masked_mean", "torch.where(mask, x, 0)", "x * mask",
           "test_tensors.py::test_garbage_off_the_mask_changes_neither_value_nor_gradient"),
    Mutant("whitening-by-variance", "divides by the variance, not by its root",
           "tensors:masked_whiten", "torch.rsqrt(masked_var(x, mask) + 1e-8)",
           "(1 / (masked_var(x, mask) + 1e-8))",
           "test_tensors.py::test_whitening_removes_the_mean"),
    Mutant("entropy-without-sign", "the sign of the entropy is lost",
           "tensors:compute_entropy", "-(logprobs.exp()", "(logprobs.exp()",
           "test_tensors.py::test_entropy_of_uniform_and_certain_and_random_distributions"),
    # ---- KL
    Mutant("k1-sign", "log pi_ref - log pi: the penalty becomes a reward (rlhf-book)",
           "kl:estimate_kl", "d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs",
           "test_kl.py::test_k1_and_k3_are_unbiased"),
    Mutant("k3-reversed", "exp(d) - 1 - d: a true KL of 0.411 is estimated as 0.701 (rlhf-book, "
           "trlx, minChatGPT)", "kl:estimate_kl", "torch.expm1(-d) + d", "torch.expm1(d) - d",
           "test_kl.py::test_k1_and_k3_are_unbiased"),
    Mutant("exact-kl-reversed", "KL(ref || policy) instead of KL(policy || ref)",
           "kl:compute_exact_kl", "logprobs.exp() * (logprobs - ref_logprobs)",
           "ref_logprobs.exp() * (ref_logprobs - logprobs)",
           "test_kl.py::test_exact_kl_has_the_right_direction"),
    Mutant("adaptive-kl-sign", "a KL above the target lowers the coefficient",
           "kl:KLController.update", "1 + error", "1 - error",
           "test_kl.py::test_adaptive_coefficient_follows_ziegler"),
    Mutant("adaptive-kl-unclipped", "one odd rollout may change the coefficient by any factor",
           "kl:KLController.update", "min(max(kl_per_sequence / self.target - 1, -0.2), 0.2)",
           "kl_per_sequence / self.target - 1",
           "test_kl.py::test_adaptive_coefficient_follows_ziegler"),
    # ---- rewards and advantages
    Mutant("kl-penalty-sign", "leaving the reference is rewarded",
           "advantages:compute_rewards", "-kl_coef *", "kl_coef *",
           "test_advantages.py::test_total_reward_is_score_minus_beta_times_kl"),
    Mutant("score-at-the-last-column", "the score lands on padding and is lost",
           "advantages:compute_rewards", "last_index(response_mask)",
           "torch.full_like(rows, response_mask.shape[1] - 1)",
           "test_advantages.py::test_rewards_equal_the_loop"),
    Mutant("score-at-every-token", "the score is paid at every token",
           "advantages:compute_rewards",
           "rewards.index_put((rows, last_index(response_mask)), scores, accumulate=True)",
           "rewards + torch.where(response_mask, scores[:, None], 0)",
           "test_advantages.py::test_total_reward_is_score_minus_beta_times_kl"),
    Mutant("bootstrap-past-the-end", "the value after EOS is taken for real",
           "advantages:compute_gae", "values = torch.where(response_mask, values, 0)",
           "values = values * 1",
           "test_advantages.py::test_the_end_of_the_row_is_the_end_of_the_episode"),
    Mutant("gae-ignores-the-mask", "rewards and values of the padding leak into the response",
           "advantages:compute_gae", "response_mask[:, t], delta",
           "torch.ones_like(response_mask[:, t]), rewards[:, t] * 0 + 1e-3 + delta",
           "test_advantages.py::test_gae_equals_the_double_sum"),
    Mutant("gae-without-lambda", "lambda left out of the recursion",
           "advantages:compute_gae", "gamma * gae_lambda *", "gamma *",
           "test_advantages.py::test_lambda_zero_is_the_one_step_error"),
    Mutant("returns-without-values", "returns are advantages only",
           "advantages:compute_gae", "advantages + values", "advantages",
           "test_advantages.py::test_lambda_one_is_the_discounted_return_minus_the_value"),
    Mutant("returns-from-whitened", "returns computed after whitening (a popular notebook series)",
           "rollout:compute_targets", "advantages = masked_whiten(advantages, mask)",
           "advantages = masked_whiten(advantages, mask)\n"
           "        returns = torch.where(mask, advantages + rollout.values, 0)",
           "test_ppo.py::test_targets_whiten_advantages_but_not_returns"),
    # ---- models
    Mutant("position-ids-ignore-padding", "learned positions shift with the padding",
           "models:compute_position_ids", "attention_mask.long().cumsum(-1)",
           "torch.ones_like(attention_mask).long().cumsum(-1)",
           "test_generation.py::test_greedy_takes_the_likeliest_token_of_an_uncached_forward"),
    Mutant("position-ids-past-the-context", "padding behind a full row gets a position too many",
           "models:compute_position_ids",
           "(attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
           "attention_mask.long().cumsum(-1) - attention_mask.long()",
           "test_models.py::test_position_ids_count_real_tokens"),
    Mutant("logits-off-by-one", "the logits after a token are read as those before it",
           "models:_predicting_states", "wanted[:, first:-1]", "wanted[:, first + 1:]",
           "test_models.py::test_response_logits_predict_the_response_tokens"),
    Mutant("value-off-by-one", "the value is read after the token was emitted",
           "models:ValueModel.forward", "_predicting_states(self.model, batch)",
           "_states_at(self.model, batch.input_ids, batch.attention_mask, torch.cat(\n"
           "            [torch.zeros_like(batch.prompt_mask), batch.response_mask], 1))",
           "test_models.py::test_value_model_reads_the_state_before_each_token"),
    Mutant("temperature-multiplies", "logits times T instead of logits / T",
           "tensors:temper", "logits / temperature", "logits * temperature",
           "test_models.py::test_logprobs_and_entropy_equal_transformers_one_unpadded_"
           "sequence_at_a_time"),
    Mutant("last-at-minus-one", "the last column is taken for the last token, padding or not",
           "tensors:last_index", "torch.where(mask, positions, -1).max(-1).values",
           "torch.full_like(mask[..., 0], mask.shape[-1] - 1, dtype=torch.long)",
           "test_tensors.py::test_last_index_equals_a_loop"),
    Mutant("score-before-the-end", "the reward model is read one token before EOS",
           "models:RewardModel.forward", "last_index(attention_mask)[:, None]",
           "last_index(attention_mask)[:, None] - 1",
           "test_models.py::test_reward_model_reads_the_last_real_token"),
    Mutant("rows-in-sorted-order", "rows come back in the order of their lengths",
           "models:_states_at", "[row_of.argsort(stable=True)]", "",
           "test_models.py::test_logprobs_and_entropy_equal_transformers_one_unpadded_"
           "sequence_at_a_time"),
    Mutant("real-tokens-shuffled", "padding is cut off, but where it was is forgotten",
           "models:_states_at", "wanted.gather(1, real_first).long()", "wanted.long()",
           "test_models.py::test_logprobs_and_entropy_equal_transformers_one_unpadded_"
           "sequence_at_a_time"),
    Mutant("read-column-sees-the-future", "the last block lets a state see the token that "
           "it is to predict", "models:run_layers",
           "read[:, :, None] >= torch", "read[:, :, None] + 1 >= torch",
           "test_models.py::test_a_state_that_is_read_sees_nothing_behind_it"),
    Mutant("read-column-forgets-its-mask", "in the last block a packed response sees the others",
           "models:run_layers", "seen = visible.gather(1, read[:, :, None].expand(-1, -1, "
           "x.shape[1]))", "seen = read[:, :, None] >= torch.arange(x.shape[1])",
           "test_models.py::test_packed_responses_do_not_see_each_other"),
    Mutant("attention-not-scaled-by-layer", "scale_attn_by_inverse_layer_idx is not heeded",
           "models:run_layers", "scale=block.attn.scaling", "scale=None",
           "test_models.py::test_layers_equal_transformers"),
    Mutant("logits-kept-for-the-backward-pass", "parts are made one by one, but all are kept",
           "models:compute_token_logprobs",
           "checkpoint(_predict, policy, *part, temperature, entropy, use_reentrant=False,\n"
           "                        preserve_rng_state=False)",
           "_predict(policy, *part, temperature, entropy)",
           "test_models.py::test_no_more_logits_than_the_budget_are_made_or_kept"),
    Mutant("zeros-in-the-vocabulary", "tokens that do not exist, with a logit of 0",
           "models:compute_logits", "[..., :-missing]", "",
           "test_models.py::test_rows_of_zeros_in_the_output_layer_change_nothing"),
    Mutant("packed-responses-see-each-other", "a causal mask only: the score of a response depends "
           "on those before it", "models:RewardModel.packed_scores",
           "causal & ((key == 0) | (key == query))", "causal & (key >= -1) & (query >= -1)",
           "test_models.py::test_packed_responses_do_not_see_each_other"),
    Mutant("head-too-wide", "head drawn from N(0, 1): scores start at +-10",
           "models:RewardModel.from_policy", "noise / math.sqrt(head.in_features + 1)", "noise",
           "test_models.py::test_reward_head_is_drawn_with_variance_one_over_d_plus_one"),
    Mutant("frozen-with-dropout", "the reference keeps dropout: the KL of a policy to itself is "
           "not 0", "models:freeze", ".requires_grad_(False).eval()", ".requires_grad_(False)",
           "test_models.py::test_freeze_copies"),
    Mutant("pad-is-eos", "PAD = EOS accepted: EOS is masked and the policy never stops",
           "loading:check_pad_token", "tokenizer.pad_token_id == tokenizer.eos_token_id", "False",
           "test_loading.py::test_pad_equal_to_eos_is_refused"),
    Mutant("every-activation-swapped", "a model with relu computes gelu",
           "loading:read_weights", 'activation_function == "gelu_new"', "activation_function",
           "test_loading.py::test_any_other_activation_is_kept"),
    # ---- sampling
    Mutant("sampling-ignores-temperature", "samples at T = 1 whatever was asked for",
           "tensors:pick_tokens", "temper(logits, temperature)", "logits",
           "test_tensors.py::test_a_token_owns_as_much_of_the_noise_as_its_probability"),
    Mutant("greedy-samples", "temperature 0 still samples",
           "tensors:pick_tokens", "if temperature == 0:\n        return logits.argmax(-1)",
           "temperature = temperature or 1.0",
           "test_generation.py::test_greedy_takes_the_likeliest_token_of_an_uncached_forward"),
    Mutant("eos-masked", "EOS counts as padding: it is in no loss and no mean",
           "generation:generate", "response_mask[rows, t] = token, True",
           "response_mask[rows, t] = token, token != eos_id",
           "test_generation.py::test_eos_is_real_and_padding_follows"),
    Mutant("no-pad-after-eos", "sampling goes on behind EOS",
           "generation:generate", "(token != eos_id).nonzero()[:, 0]",
           "torch.arange(len(token))",
           "test_generation.py::test_eos_is_real_and_padding_follows"),
    Mutant("cache-position", "the position stands still while the cache grows",
           "generation:generate", "position_ids[:, -1:] + 1", "position_ids[:, -1:]",
           "test_generation.py::test_sampling_with_cache_equals_sampling_from_uncached_forwards"),
    Mutant("decoding-stands-still", "the position stands still while the cache grows",
           "decoding:step", "state.position += 1", "pass",
           "test_decoding.py::test_any_batch_gets_the_tokens_of_the_plain_loop"),
    Mutant("cache-overwritten", "every token is written to the same slot",
           "decoding:step", "state.slot += 1", "pass",
           "test_decoding.py::test_any_batch_gets_the_tokens_of_the_plain_loop"),
    Mutant("new-tokens-unseen", "no token attends to itself or to the response before it",
           "decoding:step", "state.bias.index_fill_(3, state.slot, 0)", "pass",
           "test_decoding.py::test_any_batch_gets_the_tokens_of_the_plain_loop"),
    Mutant("caches-of-others", "after rows have left, the rest go on with caches of others",
           "decoding:decode", "smaller.take(state, going)",
           "smaller.take(state, going.new_tensor(range(len(going))))",
           "test_decoding.py::test_rows_that_leave_early_change_nothing"),
    Mutant("responses-of-others", "after rows have left, the rest write into responses of others",
           "decoding:decode", "smaller, rows[going],", "smaller, rows[:len(going)],",
           "test_decoding.py::test_rows_that_leave_early_change_nothing"),
    Mutant("padding-attended", "the response attends to the padding before the prompt",
           "decoding:read_prompts", "_bias(prompt_mask[:, None, None, :], state)",
           "_bias(torch.ones_like(prompt_mask)[:, None, None, :], state)",
           "test_decoding.py::test_any_batch_gets_the_tokens_of_the_plain_loop"),
    Mutant("idle-rows-attend", "slots that nothing was written to are open",
           "decoding:State.take", "self.bias.fill_(-torch.inf)", "self.bias.fill_(0)",
           "test_decoding.py::test_states_with_idle_rows_and_leftovers_of_other_prompts_change_"
           "nothing"),
    Mutant("tokens-after-eos", "rows that have ended but not left are part of the response",
           "decoding:decode", "ended.cumsum(1) - ended.long() == 0", "ids != pad_id",
           "test_decoding.py::test_it_does_not_matter_when_finished_rows_leave"),
    Mutant("logprob-without-temperature", "the log-probs are of another distribution than the "
           "tokens", "decoding:_pick", "temper(logits, temperature)", "logits",
           "test_decoding.py::test_logprobs_equal_those_of_a_full_forward"),
    Mutant("autocast-ignored", "sampling in full precision, at the price of it",
           "decoding:Runner.of", "torch.is_autocast_enabled(kind)", "False",
           "test_decoding.py::test_under_autocast_a_copy_decodes_in_bfloat16"),
    Mutant("responses-in-sorted-order", "responses come in the order of the batches",
           "generation:sample_responses", "responses[i] = Response(",
           "responses[responses.index(None)] = Response(",
           "test_generation.py::test_responses_come_in_the_order_of_the_prompts"),
    # ---- supervised fine-tuning
    Mutant("prompt-in-the-sft-loss", "the model learns to write prompts",
           "models:compute_response_logprobs",
           "unmask(logprobs, mask),", "unmask(logprobs, mask)"
           " - policy(batch.prompt_ids).logits.logsumexp(-1).mean(),",
           "test_sft.py::test_only_the_logits_before_response_tokens_get_a_gradient"),
    Mutant("eos-left-out-of-the-sft-loss", "the model never learns to stop",
           "sft:sft_loss", "-masked_mean(logprobs, response_mask)",
           "-masked_mean(logprobs, response_mask "
           "& torch.nn.functional.pad(response_mask[:, 1:], (0, 1)))",
           "test_sft.py::test_eos_is_in_the_loss"),
    Mutant("mean-of-row-means", "short responses weigh more than long ones",
           "sft:sft_loss", "-masked_mean(logprobs, response_mask)",
           "-masked_mean(logprobs, response_mask, dim=1).mean()",
           "test_sft.py::test_loss_of_a_padded_batch_is_the_token_weighted_mean_of_the_single_"
           "ones"),
    Mutant("last-epoch-kept", "the last epoch is returned and not the best",
           "sft:train_sft", "copy_weights(policy, best)", "pass",
           "test_sft.py::test_the_policy_returned_is_the_one_with_the_lowest_validation_loss"),
    Mutant("dropout-left-on", "the policy stays in train mode after fine-tuning",
           "sft:_sft_step", "policy.eval()", "pass",
           "test_sft.py::test_dropout_is_on_in_steps_only"),
    # ---- rankings
    Mutant("own-responses-as-decoys", "a prompt's own response is marked as a decoy",
           "ranking:_draw_decoys", "if i != owner and responses[i]]\n",
           "if responses[i]]\n    responses = [*responses, []]\n    owner = -1\n",
           "test_ranking.py::test_a_decoy_is_never_the_owners_own_response"),
    Mutant("all-tied-kept", "rankings that say nothing are kept",
           "ranking:collect_rankings", "if max(ranks) > 1:", "if ranks:",
           "test_ranking.py::test_all_tied_rankings_are_left_out"),
    # ---- reward model
    Mutant("divided-by-pairs-twice", "the K-way loss is divided by C(K, 2) twice (minChatGPT)",
           "reward:reward_loss", "sum((1, 2)) / counts", "sum((1, 2)) / counts**2",
           "test_reward.py::test_equal_scores_give_ln_2_whatever_k"),
    Mutant("pairs-pooled", "prompts with many responses weigh more",
           "reward:reward_loss", "loss = losses.mean()",
           "loss = (losses * counts).sum() / counts.sum()",
           "test_reward.py::test_a_prompt_with_nine_responses_weighs_as_much_as_one_with_four"),
    Mutant("ties-kept", "tied responses are pushed apart",
           "reward:reward_loss", "ranks[:, :, None] < ranks[:, None, :]",
           "ranks[:, :, None] <= ranks[:, None, :]",
           "test_reward.py::test_ties_are_dropped_from_sum_and_count"),
    Mutant("pairs-reversed", "rank 1 is taken for the worst",
           "reward:reward_loss", "ranks[:, :, None] < ranks[:, None, :]",
           "ranks[:, :, None] > ranks[:, None, :]",
           "test_reward.py::test_the_gradient_raises_the_chosen_and_lowers_the_rejected"),
    Mutant("missing-responses-compared", "padding of a smaller K takes part in pairs",
           "reward:reward_loss", "mask[:, :, None] & mask[:, None, :] &", "mask[:, None, :] &",
           "test_reward.py::test_loss_and_stats_equal_brute_force_over_pairs"),
    Mutant("centred-the-wrong-way", "demonstrations score twice their mean",
           "reward:center_reward_model", "bias -= mean", "bias += mean",
           "test_reward.py::test_centring_makes_demonstrations_score_zero_and_keeps_every_"
           "difference"),
    # ---- rollout
    Mutant("missing-eos-forgiven", "cut-off responses keep the reward model's score",
           "rollout:collect_rollout",
           "torch.where(finished, scores, config.missing_eos_score)", "scores",
           "test_rollout.py::test_missing_eos_gets_the_fixed_score_however_good_the_text_is"),
    Mutant("reference-without-temperature", "T divides the policy's logits only: the KL of the "
           "start policy is not 0", "rollout:collect_rollout",
           "ref_policy, batch, config.temperature,", "ref_policy, batch, 1.0,",
           "test_rollout.py::test_every_number_equals_that_of_a_single_unpadded_forward"),
    Mutant("prompts-drawn-again", "every epoch goes through the prompts in one order",
           "rollout:PromptSampler._at", '"ppo-prompts", str(epoch)', '"ppo-prompts", ""',
           "test_rollout.py::test_every_prompt_comes_once_before_any_comes_again"),
    Mutant("kl-over-padding", "the KL per sequence counts padding (TRL)",
           "rollout:compute_rollout_stats",
           "torch.where(mask, estimate_kl(rollout.old_logprobs, rollout.ref_logprobs), 0)",
           "estimate_kl(rollout.old_logprobs, rollout.ref_logprobs)",
           "test_ppo.py::test_rollout_stats_are_masked"),
    # ---- PPO
    Mutant("min-instead-of-max", "the optimistic bound: clipped where it should not be",
           "ppo:policy_loss", "torch.max(unclipped, clipped)", "torch.min(unclipped, clipped)",
           "test_ppo.py::test_every_case_of_the_clip"),
    Mutant("clip-on-one-side", "the ratio is clipped from above only",
           "ppo:policy_loss", "ratio.clamp(1 - clip_range, 1 + clip_range)",
           "ratio.clamp(max=1 + clip_range)", "test_ppo.py::test_every_case_of_the_clip"),
    Mutant("clip-always", "the clipped term alone: no way back into the range",
           "ppo:policy_loss", "masked_mean(torch.max(unclipped, clipped), response_mask)",
           "masked_mean(clipped, response_mask)", "test_ppo.py::test_every_case_of_the_clip"),
    Mutant("ratio-upside-down", "pi_old / pi",
           "ppo:policy_loss", "logprobs - old_logprobs", "old_logprobs - logprobs",
           "test_ppo.py::test_every_case_of_the_clip"),
    Mutant("approx-kl-reversed", "approx_kl estimates another direction",
           "ppo:policy_loss", "torch.expm1(log_ratio) - log_ratio",
           "torch.expm1(-log_ratio) + log_ratio",
           "test_ppo.py::test_stats_of_the_policy_loss_are_masked_means"),
    Mutant("value-clip-around-zero", "values are clipped to +-0.2, not to V_old +- 0.2",
           "ppo:value_loss", "old_values - value_clip_range, old_values + value_clip_range",
           "-value_clip_range, value_clip_range", "test_ppo.py::test_every_case_of_the_value_clip"),
    Mutant("value-loss-min", "the smaller of the two errors",
           "ppo:value_loss", "torch.max(unclipped, clipped)", "torch.min(unclipped, clipped)",
           "test_ppo.py::test_every_case_of_the_value_clip"),
    Mutant("value-loss-not-halved", "vf_coef is twice what the config says",
           "ppo:value_loss", "0.5 * masked_mean", "masked_mean",
           "test_ppo.py::test_every_case_of_the_value_clip"),
    Mutant("current-instead-of-old", "the ratio is taken to the current policy: always 1, the clip "
           "never binds", "ppo:update_minibatch", "policy_loss(logprobs, rollout.old_logprobs",
           "policy_loss(logprobs, logprobs.detach()",
           "test_ppo.py::test_the_ratio_is_one_on_the_first_minibatch"),
    Mutant("update-without-temperature", "the ratio on the first minibatch is not 1",
           "ppo:update_minibatch", "batch, config.temperature", "batch",
           "test_ppo.py::test_the_ratio_is_one_on_the_first_minibatch"),
    Mutant("ptx-not-scaled", "the pretraining loss has weight 1 whatever ptx_coef is",
           "ppo:update_minibatch", "return config.ptx_coef * loss", "return loss",
           "test_ppo.py::test_ptx_adds_its_coefficient_times_the_gradient_of_the_language_model_"
           "loss"),
    Mutant("non-finite-skipped", "non-finite losses pass in silence (rlhf-book)",
           "ppo:update_minibatch", 'check_finite(stats["loss"], step, "PPO minibatch")', "pass",
           "test_ppo.py::test_a_non_finite_loss_changes_nothing"),
    Mutant("gradient-not-clipped", "the value model's gradient is not clipped",
           "processes:run_backward", "None if model is None else clip(model)",
           "clip(model) if hasattr(model, 'lm_head') else None",
           "test_ppo.py::test_gradients_are_clipped_for_each_model_alone"),
    Mutant("minibatches-overlap", "every minibatch is the first one",
           "ppo:update", "order[i * size:(i + 1) * size]", "order[:size]",
           "test_ppo.py::test_every_episode_is_used_once_per_epoch"),
    Mutant("ema-reversed", "the average keeps 1 - decay of itself",
           "ppo:update_ema", "1 - decay", "decay",
           "test_ppo.py::test_ema_keeps_decay_of_the_average"),
    Mutant("warmup-absent", "the first, noisiest steps are the largest",
           "training:warmup_factor", "0.1 + 0.9 * iteration / warmup_iterations", "1.0",
           "test_ppo.py::test_warmup_runs_from_a_tenth_to_one_and_stays"),
    Mutant("beta-forgotten-on-resume", "a resumed run starts with the first KL coefficient",
           "ppo:train_ppo", 'KLController(kept["kl_coef"]', "KLController(config.kl_coef",
           "test_ppo.py::test_a_stopped_training_resumes_bit_for_bit"),
    # ---- evaluation
    Mutant("ties-as-losses", "a tie counts as a loss for both",
           "evaluation:compute_win_rate", "0.5 * (ours == theirs)", "0.0 * (ours == theirs)",
           "test_evaluation.py::test_win_rates_equal_counting"),
    Mutant("samples-as-prompts", "samples of one prompt are taken for independent",
           "evaluation:mean_interval", "values.mean(1) if values.ndim == 2 else values",
           "values.flatten()",
           "test_evaluation.py::test_copies_of_a_sample_do_not_narrow_the_interval"),
    Mutant("zero-shot-padding", "a short target fails beside a longer one: its padding is compared",
           "evaluation:_score_continuations", "mask) | ~mask)", "mask))",
           "test_evaluation.py::test_an_item_is_solved_if_transformers_writes_its_target"),
    Mutant("zero-shot-first-token", "an item counts as solved if its target begins right",
           "evaluation:_score_continuations", ".all(1)", "[:, 0]",
           "test_evaluation.py::test_an_item_is_solved_if_transformers_writes_its_target"),
    Mutant("evaluation-kl-over-padding", "the KL of a response is a mean that counts the padding",
           "evaluation:_score_tokens",
           "unmask(per_token, batch.response_mask).sum(1)",
           "unmask(per_token, batch.response_mask).mean(1)",
           "test_evaluation.py::test_measures_equal_unbatched_computation"),
    # ---- beside PPO
    Mutant("dpo-without-reference", "the implicit reward is log pi, not log pi / pi_ref",
           "dpo:dpo_loss", "logprobs - ref_logprobs, 0", "logprobs, 0",
           "test_dpo.py::test_two_responses_give_the_formula_of_the_paper"),
    Mutant("dpo-first-token-shifted", "the first token of a response is predicted from itself",
           "dpo:sum_logprobs", "(segments == 0).sum(1, keepdim=True) - 1",
           "(segments == 0).sum(1, keepdim=True)",
           "test_dpo.py::test_sums_are_those_of_single_unpadded_forwards"),
    Mutant("dpo-responses-see-each-other", "a packed response attends to those before it",
           "dpo:sum_logprobs", "(key == 0) | (key == query)", "(key >= 0) & (query >= 0)",
           "test_dpo.py::test_sums_are_those_of_single_unpadded_forwards"),
    Mutant("rloo-baseline-holds-itself", "the response is part of its own baseline",
           "rloo:rloo_advantages", "samples / (samples - 1)", "samples / samples",
           "test_rloo.py::test_the_gradient_is_an_unbiased_estimate_of_that_of_the_objective"),
    Mutant("rloo-length-normalised", "a long response learns less per token than a short one",
           "rloo:rloo_loss", "torch.where(response_mask, logprobs, 0).sum(1)",
           "torch.where(response_mask, logprobs, 0).sum(1) / response_mask.sum(1)",
           "test_rloo.py::test_the_loss_is_the_weighted_sum_over_tokens"),
    # ---- the book's bug hunts
    *(Mutant(label, HUNTS[label].why, HUNTS[label].target, HUNTS[label].old, HUNTS[label].new, test)
      for label, test in {
          "hunt-05": "test_training.py::test_an_epoch_visits_every_item_once_in_a_new_order",
          "hunt-06": "test_data.py::test_packed_row_by_hand",
          "hunt-07": "test_tensors.py::test_whitening_removes_the_mean",
          "hunt-08": "test_ppo.py::test_rollout_stats_are_masked",
          "hunt-09": "test_ppo.py::test_every_case_of_the_value_clip",
          "hunt-10": "test_ppo.py::test_every_episode_keeps_its_own_targets",
          "hunt-11": "test_evaluation.py::test_a_reward_model_is_measured_on_own_responses_and_on_"
                     "decoys_apart",
          "hunt-12": "test_evaluation.py::test_measures_equal_unbatched_computation",
      }.items()),
]


# The test of the tester: it changes nothing, so it must survive.
CONTROL = Mutant("control", "another way to write the same", "kl:estimate_kl", "d**2 / 2",
                 "d * d / 2", "test_kl.py::test_k2_is_biased")


def applied(mutant: Mutant) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the wrong variant is in place."""
    return planted(mutant.target, mutant.old, mutant.new)


# ---------------------------------------------------------------- running the tests

class _Examiner:
    """A pytest plugin: collect the tests once, then run them as often as mutants need them."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants, self.results = mutants, {}

    def pytest_runtestloop(self, session) -> bool:
        """Take the place of pytest's own loop."""
        for mutant in self.mutants:
            path, name = mutant.test.split("::")
            items = [item for item in session.items
                     if item.path.name == path and item.nodeid.split("[")[0].endswith(f"::{name}")]
            if not items:
                self.results[mutant.name] = "there is no such test"
            elif any(failed(item) for item in items):
                self.results[mutant.name] = "its test fails without the mutant"
            else:
                self.results[mutant.name] = self.verdict(mutant, items)
        return True

    def verdict(self, mutant: Mutant, items: list) -> str:
        """Run the tests with the mutant in place until one fails."""
        try:
            with applied(mutant):
                return "killed" if any(failed(item) for item in items) else "SURVIVED"
        except LookupError as error:
            return str(error)


def failed(item) -> bool:
    """Run one collected test, with fixtures of its own; a skipped test has not failed."""
    from _pytest.runner import runtestprotocol

    item._initrequest()  # forget the fixtures of the run before
    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def examine(mutants: list[Mutant]) -> dict[str, str]:
    """Run the named test of each mutant, first without and then with the mutant.

    Returns:
        For each mutant "killed", or what went wrong.
    """
    import pytest

    examiner = _Examiner(mutants)
    files = sorted({mutant.test.partition("::")[0] for mutant in mutants})
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=no", "--rootdir", str(ROOT),
                 "-c", str(ROOT / "pyproject.toml"), *[str(ROOT / "tests" / f) for f in files]]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main(arguments, plugins=[examiner])
    if not examiner.results:
        raise SystemExit(f"the tests could not be collected:\n{output.getvalue()}")
    return examiner.results


def main(arguments: list[str]) -> int:
    """Print the table, or JSON with --json; 1 if a mutant is not killed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    names = [a for a in arguments if a != "--json"]
    mutants = [m for m in MUTANTS if not names or m.name in names]
    if "--json" in arguments:
        print(json.dumps(examine([*mutants, CONTROL])))
        return 0
    results = examine(mutants)
    for m in mutants:
        print(f"{m.name:34} {m.target:34} {results[m.name]}\n    {m.why}\n    {m.test}")
    killed = sum(result == "killed" for result in results.values())
    print(f"\n{killed} of {len(results)} mutants are killed")
    return int(any(result != "killed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
