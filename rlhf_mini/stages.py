"""The stages of the recipe: each reads the folders of earlier stages and fills one of its own.

A stage's folder is a plain transformers directory (where it makes a model) with `metrics.jsonl`,
`samples.jsonl` and `stage.json` beside the weights. `pipeline` decides which stages run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf_mini.config import EvaluationConfig
from rlhf_mini.data import Prompt, Ranking, write_jsonl
from rlhf_mini.evaluation import (
    Evaluation,
    compute_pair_accuracy,
    compute_win_rate,
    evaluate_policy,
    evaluate_zero_shot,
    mean_interval,
    measure_reward_model,
    ratio_interval,
    summarize,
)
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.ppo import train_ppo
from rlhf_mini.pretrain import (
    build_model,
    encode_documents,
    pack_rows,
    train_base_model,
    train_tokenizer,
)
from rlhf_mini.ranking import RankFunction, collect_rankings
from rlhf_mini.reward import (
    center_reward_model,
    encode_rankings,
    score_rankings,
    train_reward_model,
)
from rlhf_mini.rollout import score_with
from rlhf_mini.runtime import make_generator, make_rng, write_json
from rlhf_mini.sft import train_sft
from rlhf_mini.town import Labeler, build_town, grade, write_town
from rlhf_mini.workspace import (
    RANKINGS,
    SAMPLES,
    Run,
    check_limits,
    grader_of,
    in_round,
    write_lines,
    write_samples,
)


def run_town(run: Run, work: Path) -> str:
    """Build the town and write its files."""
    run.say("building the world, its prompts and its labelers")
    town = build_town(run.config.town)
    write_town(town, work)
    return (f"{len(town.prompts)} prompts, {len(town.demonstrations)} demonstrations, "
            f"{len(town.documents)} documents, {len(town.labelers)} labelers")


def run_base(run: Run, work: Path) -> str:
    """Pretrain the base model, or take the user's."""
    if "model" in run.sources:
        run.say(f"loading {run.sources['model']}")
        policy, tokenizer = load_policy(run.sources["model"], run.device)
    else:
        config = run.config.pretrain
        documents = run.documents("train")
        run.say(f"pretraining a GPT-2 on {len(documents)} documents")
        tokenizer = train_tokenizer([d.text for d in documents], config.vocab_size)
        policy = build_model(config, tokenizer, run.seed).to(run.device)
    check_limits(run.config, policy.config.n_positions)
    loss = ""
    if "model" not in run.sources:
        history = train_base_model(policy, tokenizer, documents, config, run.seed, work)
        loss = f", loss {history[-1]['loss']:.2f} nats per token"
    save_model(policy, tokenizer, work)
    write_samples(run, policy, tokenizer, work)
    return f"{sum(p.numel() for p in policy.parameters()):,} parameters{loss}"


def run_sft(run: Run, work: Path) -> str:
    """Fine-tune the base model on demonstrations."""
    policy, tokenizer = run.policy("base")
    train, valid = (run.demonstrations(split, tokenizer, run.config.sft)
                    for split in ("train", "valid"))
    run.say(f"fine-tuning on {len(train)} demonstrations")
    history = train_sft(policy, tokenizer, train, valid, run.config.sft, run.seed, work)
    save_model(policy, tokenizer, work)
    write_samples(run, policy, tokenizer, work)
    best = min(row["valid_loss"] for row in history if "valid_loss" in row)
    return f"validation loss {best:.3f}, {history[-1]['eos_rate']:.0%} of responses end"


def rank_by(labelers: list[Labeler]) -> RankFunction:
    """Return a function that lets one of the labelers, chosen at random, rank responses."""
    def rank(prompt, responses, rng):
        labeler = rng.choice(labelers)
        gold = tuple(grade(prompt, response).overall for response in responses)
        return labeler.rank(prompt, responses, rng), gold, labeler.id
    return rank


def run_rankings(run: Run, work: Path, start: str, number: int) -> str:
    """Collect rankings of a policy's responses, or take the user's.

    Args:
        start: the stage whose policy is ranked.
        number: of the round, from 1.
    """
    config = run.config.ranking
    if "rankings" in run.sources and number == 1:
        run.say(f"reading {run.sources['rankings']}")
        sets = {split: [r for r in run.user_records("rankings") if r.split == split]
                for split in RANKINGS}
    else:
        sets = {}
        policy, tokenizer = run.policy(start)
        run.say(f"collecting {config.prompts} rankings of the responses of {start}")
        counts = {"train": config.prompts, "valid": config.valid_prompts,
                  "test": config.test_prompts}
        for split, count in counts.items():
            seed = run.seed_of("rankings", split, str(number))
            prompts = run.fit([p for p in run.town.prompts if p.split == split], tokenizer,
                              policy.config.n_positions - config.max_response_tokens, 2)
            prompts = make_rng(seed, "prompts").sample(prompts, min(count, len(prompts)))
            group = "test" if split == "test" else "train"
            labelers = [x for x in run.town.labelers if x.group == group]
            sets[split] = collect_rankings(policy, tokenizer, prompts, rank_by(labelers), config,
                                           seed)
    for split, rankings in sets.items():
        write_jsonl(work / RANKINGS[split], rankings)
    pairs = sum(len(r.ranks) * (len(r.ranks) - 1) // 2 for r in sets["train"])
    return (f"{len(sets['train'])} rankings to learn from ({pairs} pairs), "
            f"{len(sets['valid'])} to watch, {len(sets['test'])} to judge")


def run_reward(run: Run, work: Path, number: int) -> str:
    """Train a reward model on the rankings of all rounds so far, and measure it.

    Args:
        number: of the round, from 1; a later round's model is compared with the one before.
    """
    config, folders = run.config.reward, [in_round("rankings", n) for n in range(1, number + 1)]
    policy, tokenizer = run.policy("sft")
    train, valid = ([r for folder in folders for r in run.rankings(folder, split, tokenizer)]
                    for split in ("train", "valid"))
    test = run.rankings(folders[-1], "test", tokenizer)
    run.say(f"training a reward model on {len(train)} rankings")
    generator = make_generator(run.seed, "reward-head", str(number))
    reward_model = RewardModel.from_policy(policy, generator)
    del policy
    train_reward_model(reward_model, tokenizer, train, valid, config, run.seed_of("reward"), work)
    shift = center_reward_model(reward_model, tokenizer,
                                run.demonstrations("train", tokenizer, config), config)
    save_model(reward_model, tokenizer, work)
    measured = EvaluationConfig()  # the same intervals whatever the evaluation is set to
    results = measure_reward_model(reward_model, tokenizer, test, config, measured)
    results["valid"] = measure_reward_model(reward_model, tokenizer, valid, config, measured)
    results["mean_score_of_demonstrations_before_centering"] = shift
    if agreement := measure_agreement(run, test):
        results["labelers_agreement"] = agreement
    if number > 1:
        before = in_round("reward", number - 1)
        older = RewardModel.load(run.directory / before, run.device)
        results["round_before"] = measure_reward_model(older, tokenizer, test, config, measured)
    write_json(work / "reward.json", results)
    samples = (valid or train)[:SAMPLES]
    scores = score_rankings(reward_model, encode_rankings(tokenizer, samples, config),
                            tokenizer.pad_token_id)
    write_lines(work / "samples.jsonl", [
        {"id": r.id, "prompt": r.prompt, "responses": r.responses, "ranks": r.ranks,
         "scores": s.tolist()} for r, s in zip(samples, scores, strict=True)])
    shown = {"accuracy_labelers": "labelers", "accuracy_gold": "gold",
             "accuracy_length_baseline": "length alone"}
    return "agrees with " + ", ".join(f"{words} {results[name]['mean']:.3f}"
                                      for name, words in shown.items() if name in results)


def measure_agreement(run: Run, rankings: list[Ranking]) -> dict | None:
    """Let two training labelers rank the same responses and count the pairs they agree on."""
    if any(r.gold is None for r in rankings):
        return None
    prompts = {p.prompt: p for p in run.town.prompts}
    rng = make_rng(run.seed, "agreement")
    people = [x for x in run.town.labelers if x.group == "train"]
    first, second = [], []
    for ranking in rankings:
        decoys = ranking.decoys or (False,) * len(ranking.responses)
        own = [r for r, decoy in zip(ranking.responses, decoys, strict=True) if not decoy]
        for ranks, labeler in zip((first, second), rng.sample(people, 2), strict=True):
            ranks.append(-np.array(labeler.rank(prompts[ranking.prompt], own, rng), dtype=float))
    every = [np.ones((len(r), len(r)), dtype=bool) for r in first]
    return compute_pair_accuracy(second, first, every, EvaluationConfig())


def run_ppo(run: Run, work: Path, start: str, number: int, ptx: bool = False) -> str:
    """Optimise a policy against the reward model of its round.

    Args:
        start: the stage whose policy is optimised; it is also the reference of the KL penalty.
        number: of the round, from 1.
        ptx: mix in pretraining text, with `ptx_coef`.
    """
    config = run.config.ppo if ptx else replace(run.config.ppo, ptx_coef=0.0)
    policy, tokenizer = run.policy(start)
    prompts = run.prompts("train", tokenizer)
    rows = None
    if ptx:
        rows = pack_rows(encode_documents(tokenizer, run.documents("train")),
                         run.config.pretrain.row_tokens, make_generator(run.seed, "ptx"))
    run.say(f"{config.iterations} iterations of {config.episodes} episodes from {start}"
            + (f", with pretraining text (ptx_coef {config.ptx_coef:g})" if ptx else ""))
    reward_model = RewardModel.load(run.directory / in_round("reward", number), run.device)
    value_model = ValueModel.from_reward_model(reward_model)
    grader = grader_of(run)
    history = train_ppo(
        policy, value_model, score_with(reward_model), tokenizer, prompts, config,
        run.seed if number == 1 else run.seed_of("round", str(number)), rows, work,
        grade=(lambda prompt, response: grader(prompt, response)["gold"]) if grader else None)
    save_model(policy, tokenizer, work)
    save_model(value_model, tokenizer, work / "value_model")
    write_samples(run, policy, tokenizer, work)
    first, last = history[0], history[-1]
    return (f"score {first['score']:.2f} -> {last['score']:.2f}, "
            + (f"gold {first['gold']:.2f} -> {last['gold']:.2f}, " if grader else "")
            + f"KL {last['kl_per_sequence']:.2f} nats")


def run_evaluation(run: Run, work: Path, models: list[str], pairs: list[tuple[str, str]]) -> str:
    """Judge all policies on held-out customers.

    Args:
        models: the stages that made them.
        pairs: (ours, theirs) to compare.
    """
    config, modes = run.config.evaluation, {"sampled": False, "greedy": True}
    ref_policy, tokenizer = run.policy("sft")
    prompts = run.prompts(config.split, tokenizer)
    run.say(f"{', '.join(models)} on {len(prompts)} {config.split} prompts")
    reward_model = RewardModel.load(run.directory / "reward", run.device)
    tasks = [] if "corpus" in run.sources else run.town.zero_shot  # they ask about the town
    answers: dict[str, dict[str, Evaluation]] = {}
    results: dict[str, dict] = {"eval": {}, "zero_shot": {}, "win_rate": {}, "gain": {},
                                "win_rate_labelers": {}, "rm_agreement": {}}
    for model in models:
        policy, _ = run.policy(model)
        answers[model] = {
            mode: evaluate_policy(policy, ref_policy, tokenizer, prompts, grader_of(run),
                                  reward_model, config, run.seed, greedy)
            for mode, greedy in modes.items()}
        results["eval"][model] = {m: summarize(e, config) for m, e in answers[model].items()}
        results["zero_shot"][model] = evaluate_zero_shot(policy, tokenizer, tasks,
                                                         run.documents("valid"), config)
    for ours, theirs in pairs if grader_of(run) else ():
        for mode in modes:
            compared = compare(run, prompts, answers[ours][mode], answers[theirs][mode])
            for name, result in compared.items():
                results[name].setdefault(f"{ours}_vs_{theirs}", {})[mode] = result
    write_json(work / "evaluation.json", {k: v for k, v in results.items() if v})
    write_lines(work / "responses.jsonl", [
        {"id": p.id, "prompt": p.prompt, "family": p.family, "customer": p.customer, "models": {
            model: {mode: [{"response": text} | {
                name: float(values[i, j]) for name, values in e.measures.items()}
                for j, text in enumerate(e.responses[i])] for mode, e in by_mode.items()}
            for model, by_mode in answers.items()}}
        for i, p in enumerate(prompts)])
    return f"{len(models)} policies judged"


def compare(run: Run, prompts: list[Prompt], ours: Evaluation, theirs: Evaluation) -> dict:
    """Compare two policies' answers to the same prompts by gold, by labelers and by the RM.

    Returns:
        `gain` and `win_rate` by gold, `win_rate_labelers` by one held-out labeler per prompt, and
        `rm_agreement`, the share of those labelers' decided comparisons that the reward model
        decides alike.
    """
    config, rng = run.config.evaluation, make_rng(run.seed, "judges")
    labelers = [x for x in run.town.labelers if x.group == "test"]
    gold = [e.measures["gold"] for e in (ours, theirs)]
    judged = np.zeros((2, *gold[0].shape))
    for i, prompt in enumerate(prompts):
        labeler = rng.choice(labelers)
        for j in range(judged.shape[2]):
            ranks = labeler.rank(prompt, (ours.responses[i][j], theirs.responses[i][j]), rng)
            judged[:, i, j] = [-rank for rank in ranks]
    margin = ours.measures["rm_score"] - theirs.measures["rm_score"]
    decided = judged[0] != judged[1]
    alike = decided * (1 + np.sign(margin) * np.sign(judged[0] - judged[1])) / 2
    results = {"gain": mean_interval(gold[0] - gold[1], config),
               "win_rate": compute_win_rate(*gold, config),
               "win_rate_labelers": compute_win_rate(*judged, config)}
    if decided.any():
        results["rm_agreement"] = ratio_interval(alike.sum(1), decided.sum(1), config)
    return results
