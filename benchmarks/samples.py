"""Follow the responses to a dozen prompts through PPO, token by token.

    rlhf-mini run --preset cpu --out runs/cpu
    python benchmarks/samples.py runs/cpu

Trains PPO again from the SFT model of a finished run, with its settings and its seed, and lets the
policy answer the same validation prompts at steps 0, 1, 2, 4, 8, ... and the last, always with the
same random numbers: a token changes because the policy did. Writes data/recorded/samples/:
samples.json and manifest.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measuring import provenance
from record import RECORDED
from sweeps import open_finished
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf_mini.compute import computing
from rlhf_mini.data import Prompt
from rlhf_mini.kl import estimate_kl
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.ppo import train_ppo
from rlhf_mini.rollout import Rollout, collect_rollout, compute_targets, score_with
from rlhf_mini.runtime import make_generator, write_json
from rlhf_mini.workspace import Run, grade_prompt

OUT = RECORDED / "samples"
PROMPTS = 12


def list_steps(iterations: int) -> list[int]:
    """Return 0, the powers of two below `iterations`, and `iterations`.

    >>> list_steps(20)
    [0, 1, 2, 4, 8, 16, 20]
    """
    return [0, *(2**i for i in range(iterations.bit_length()) if 2**i < iterations), iterations]


def choose_prompts(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Return the first prompt of each family, then the second of each, until there are `count`."""
    places: dict[str, int] = {}
    turns = []
    for prompt in prompts:
        turns.append(places.get(prompt.family, 0))
        places[prompt.family] = turns[-1] + 1
    order = sorted(range(len(prompts)), key=lambda i: (turns[i], list(places).index(
        prompts[i].family)))
    return [prompts[i] for i in order[:count]]


def describe_responses(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt],
                       rollout: Rollout, responses: list[str], advantages: Tensor) -> list[dict]:
    """Say what PPO knows of each response, numbers to three decimals.

    Args:
        tokenizer: of the responses.
        prompts: B prompts.
        rollout: their episodes.
        responses: as text.
        advantages: (B, T), before whitening.

    Returns:
        B rows: `tokens` (the last is "EOS" if the response ended), `logprobs`, `ref_logprobs`,
        `values` and `advantages` per token; `score`, `gold` and `kl` (nats) of the response.
    """
    mask = rollout.batch.response_mask
    columns = {"logprobs": rollout.old_logprobs, "ref_logprobs": rollout.ref_logprobs,
               "values": rollout.values, "advantages": advantages}
    rows = []
    for i, prompt in enumerate(prompts):
        tokens = [tokenizer.decode([token]) for token in rollout.batch.response_ids[i][mask[i]]]
        if rollout.finished[i]:
            tokens[-1] = "EOS"
        kl = estimate_kl(rollout.old_logprobs[i], rollout.ref_logprobs[i])[mask[i]].sum()
        rows.append({"tokens": tokens}
                    | {name: _round(x[i][mask[i]].tolist()) for name, x in columns.items()}
                    | dict(zip(("score", "gold", "kl"), _round([
                        rollout.scores[i].item(), grade_prompt(prompt, responses[i])["gold"],
                        kl.item()]), strict=True)))
    return rows


def _round(values: list[float]) -> list[float]:
    return [round(value, 3) + 0.0 for value in values]  # no -0.0


def follow(run: Run) -> dict:
    """Train PPO from SFT and keep the responses of some steps.

    Args:
        run: finished up to the reward model.

    Returns:
        `steps`; `prompts`, each with `id`, `family`, `prompt` and `responses`, one per step.
    """
    config, device = replace(run.config.ppo, ptx_coef=0.0, checkpoint_every=1), run.device
    (policy, tokenizer), (ref_policy, _) = run.policy("sft"), run.policy("sft")
    reward_model = RewardModel.load(run.directory / "reward", device)
    value_model, score = ValueModel.from_reward_model(reward_model), score_with(reward_model)
    prompts = choose_prompts(run.prompts("valid", tokenizer), PROMPTS)
    train, rows = run.prompts("train", tokenizer), []
    with tempfile.TemporaryDirectory() as folder:
        for step in list_steps(config.iterations):
            if step > 0:  # goes on from the checkpoint of the step before, bit for bit
                train_ppo(policy, value_model, score, tokenizer, train,
                          replace(config, iterations=step), run.seed, directory=Path(folder))
            rollout, responses = collect_rollout(
                policy, ref_policy, value_model, score, tokenizer, prompts, config,
                make_generator(run.seed, "samples", device=device))
            targets = compute_targets(rollout, config.kl_coef,
                                      replace(config, whiten_advantages=False))
            rows.append(describe_responses(tokenizer, prompts, rollout, responses,
                                           targets.advantages))
    return {"steps": list_steps(config.iterations), "prompts": [
        {"id": p.id, "family": p.family, "prompt": p.prompt, "responses": list(answers)}
        for p, answers in zip(prompts, zip(*rows, strict=True), strict=True)]}


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    run, report = open_finished(args.run, [])
    with computing(run.config.compute, run.device):
        result = follow(run)
    write_json(args.out / "samples.json", result)
    write_json(args.out / "manifest.json", provenance(run.device, run.seed, began)
               | {"run": {key: report[key] for key in ("command", "threads", "versions", "seconds",
                                                       "config")}})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
