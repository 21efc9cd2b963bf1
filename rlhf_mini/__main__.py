"""The command line: `rlhf-mini COMMAND`, the same as `python -m rlhf_mini COMMAND`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import rlhf_mini
from rlhf_mini.config import PRESETS, load_preset, override

STAGES_OF = {"town": ["town"], "pretrain": ["base"], "sft": ["sft"], "rank": ["rankings"],
             "reward": ["reward"], "ppo": ["ppo", "ppo_ptx"], "evaluate": ["evaluation"],
             "run": ["evaluation"]}

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")

EXAMPLES = """examples:
  rlhf-mini run --preset smoke --out runs/smoke         the whole chain in seconds
  rlhf-mini run --out runs/cpu                          the whole chain in minutes
  rlhf-mini run --out runs/cpu --resume                 go on after a stop
  rlhf-mini ppo --out runs/cpu --set kl_coef=0.02       another PPO; earlier stages are kept
  rlhf-mini reward --out runs/hh --model gpt2 --rankings pairs.jsonl.gz
  rlhf-mini chat --out runs/cpu base sft ppo            three models side by side
  rlhf-mini experiment noise --seeds 5                  one study of the book's last part
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="rlhf-mini", description="InstructGPT's recipe: SFT, reward model, PPO, evaluation.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=rlhf_mini.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {"run": "all stages and the report", "town": "build the town's files",
             "pretrain": "the base model", "sft": "fine-tune on demonstrations",
             "rank": "collect rankings", "reward": "train the reward model",
             "ppo": "optimise the policy", "evaluate": "judge all policies, write the report"}
    for name, text in helps.items():
        command = commands.add_parser(
            name, help=text, description=f"rlhf-mini {name}: {text}. Stages before it run as far "
            "as they are not done.", epilog=EXAMPLES if name == "run" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        _add_run_options(command)
        if name == "town":
            command.add_argument("--check", metavar="FOLDER", type=_folder,
                                 help="only check the files of a town in FOLDER")
            command.add_argument("--write", metavar="FOLDER", type=_folder,
                                 help="only write the town's files to FOLDER")
    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("--out", required=True, metavar="DIR", type=_folder,
                        help="folder of the run")
    _add_experiment_options(commands.add_parser(
        "experiment", help="put one criticism of the method to the test, over several seeds",
        description="Run a study over its conditions and seeds. What is finished is kept; the "
        "same command goes on after a stop."))
    _add_chat_options(commands.add_parser(
        "chat", help="talk to models, several side by side",
        description="Talk to models. Reads one prompt per line; an empty line or Ctrl-D ends.",
        epilog="example: rlhf-mini chat --out runs/cpu sft ppo"))
    return parser


def _text(value: str) -> str:
    if not value.strip():  # an unset variable of the shell
        raise argparse.ArgumentTypeError("it is empty; name a file or folder, or leave it out")
    return value


def _folder(value: str) -> Path:
    return Path(_text(value))


def _add_run_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", metavar="DIR", type=_folder, help="folder of the run (default: runs/PRESET)")
    add("--preset", default="cpu", metavar="NAME", help=f"{', '.join(PRESETS)} (default: cpu)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
        help="change a setting, e.g. ppo.kl_coef=0; may be repeated")
    add("--seed", type=int, default=0, help="of everything but the town (default: 0); the town's "
        "own is --set town.seed=N")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--rounds", type=int, default=1, metavar="N",
        help="how often rankings, reward model and PPO are made (default: 1)")
    add("--resume", action="store_true", help="go on from the checkpoint of a stopped stage")
    add("--force", action="store_true",
        help="run the stage (with `run`: all stages) even if nothing changed")
    add("--model", metavar="NAME_OR_PATH", type=_text,
        help="a GPT-2 style checkpoint instead of pretraining")
    for kind, use in (("corpus", " (text to pretrain on)"), ("demonstrations", ""),
                      ("rankings", ""), ("prompts", "")):
        add(f"--{kind}", metavar="SOURCE", type=_text,
            help=f"your own {kind}{use}: a .jsonl file (or .gz, .xz), a folder, or a hub dataset")


def _add_experiment_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", metavar="NAME", help="of the study; an unknown one lists them")
    add("--seeds", type=int, default=5, metavar="N", help="runs per condition (default: 5)")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N",
        help="runs at a time, one thread each (default: the number of processors)")
    add("--base", metavar="DIR", type=_folder,
        help="run whose base and SFT model are used (default: runs/PRESET)")
    add("--out", metavar="DIR", type=_folder,
        help="folder of the results (default: data/recorded/NAME)")
    add("--preset", default="cpu", metavar="NAME", help=f"{', '.join(PRESETS)} (default: cpu)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
        help="change a setting; may be repeated")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def _add_chat_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", type=_text,
        help="folder, or stage of the run in --out")
    add("--out", metavar="DIR", type=_folder, help="folder of a run")
    add("--temperature", type=float, default=1.0, help="of the sampler (default: 1)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--max-response-tokens", type=int, default=40, metavar="N", help="default: 40")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after an error that was explained, or 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    args = build_parser().parse_args(arguments)
    try:
        if args.command == "chat":
            return _chat(args)
        if args.command == "experiment":
            return _experiment(args, shlex.join(["rlhf-mini", *arguments]))
        if args.command == "report":
            _quiet()
            from rlhf_mini.pipeline import report_run
            report_run(args.out)
            return 0
        return _run(args, shlex.join(["rlhf-mini", *arguments]))
    except (ValueError, OSError) as error:  # OSError: a full disk, a failed download
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            why = f"out of memory: {error or 'the system has no more'}"
        elif re.search("closed by peer|reset by peer", str(error)):
            why = ("another of the processes died, its own message says why; finished stages and "
                   "the last checkpoint are kept, go on with --resume")
        else:
            raise
        print(f"error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say_stopped(args, arguments)
        return 130


def _quiet() -> None:
    """Silence what is of no use to a user; must come before transformers is used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries
    warnings.showwarning = lambda message, category, *rest, **more: print(
        f"warning: {message}", file=sys.stderr)


def _run(args: argparse.Namespace, command: str) -> int:
    config = override(load_preset(args.preset), args.assignments)
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected at least 1")
    if args.command == "town" and (args.check or args.write):
        return _town_files(args, config)
    _quiet()
    from rlhf_mini.pipeline import plan_stages, report_run, run_stages
    from rlhf_mini.processes import is_first, join_processes
    from rlhf_mini.runtime import resolve_device
    from rlhf_mini.workspace import Run, in_round

    sources = {name: getattr(args, name) for name in ("model", "corpus", "demonstrations",
                                                      "rankings", "prompts") if getattr(args, name)}
    device = resolve_device(args.device)
    join_processes(device)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks
    run = Run(args.out or Path("runs") / args.preset, config, args.seed, device, args.rounds,
              sources)
    names = [stage.name for stage in plan_stages(run)]
    last = {in_round(name, args.rounds) for name in ("rankings", "reward", "ppo")}
    targets = [in_round(name, args.rounds) if in_round(name, args.rounds) in last else name
               for name in STAGES_OF[args.command]]
    targets = [name for name in targets if name in names]
    force = (names if args.command == "run" else targets) if args.force else []
    try:
        run_stages(run, targets, command, args.resume, tuple(force))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            stage = run.label.rpartition(" ")[2]
            raise MemoryError(f"stage {stage}; {_less_memory(stage, config)}. {error}") from error
        raise
    if "evaluation" in targets and is_first():
        report_run(run.directory)
    return 0


def _experiment(args: argparse.Namespace, command: str) -> int:
    _quiet()
    from rlhf_mini.experiments import STUDIES, run_study
    from rlhf_mini.runtime import resolve_device

    if args.name not in STUDIES:
        known = "\n".join(f"  {name:17} {study.question}" for name, study in STUDIES.items())
        raise ValueError(f"there is no study {args.name!r}; there are\n{known}")
    study = STUDIES[args.name]
    smaller = study.settings if args.preset == "cpu" else ()
    config = override(load_preset(args.preset), [*smaller, *args.assignments])
    run_study(study, config, args.base or Path("runs") / args.preset,
              args.out or Path("data/recorded") / args.name, args.seeds, args.jobs,
              resolve_device(args.device), command)
    return 0


def _less_memory(stage: str, config) -> str:
    """Say which settings halve the largest tensors of a stage."""
    kind = stage.partition("_")[0]
    if kind == "ppo":
        ppo = config.ppo  # episodes must stay a multiple of minibatches
        more = next((n for n in range(2 * ppo.minibatches, ppo.episodes + 1)
                     if ppo.episodes % n == 0), None)
        if more is None:
            return "take shorter responses (ppo.max_response_tokens) or a smaller model"
        fewer = ppo.episodes // 2 // more * more
        then = (f", and if that is not enough with --set ppo.episodes={fewer} (is {ppo.episodes})"
                if fewer else "")
        return ("hold less in memory at a time with --set "
                f"ppo.minibatches={more} (is {ppo.minibatches}){then}")
    section = {"base": "pretrain", "rankings": "ranking"}.get(kind, kind)
    size = getattr(getattr(config, section, None), "batch_size", None)
    if size is None:
        return "take a smaller model"
    return (f"halve what is in memory at a time with --set {section}.batch_size="
            f"{max(size // 2, 1)} (is {size}), or take a smaller model")


def _town_files(args: argparse.Namespace, config) -> int:
    from rlhf_mini.town import build_town, validate_town, write_town

    if args.write:
        write_town(build_town(config.town), args.write)
        print(f"wrote the town's files to {args.write}")
    if args.check:
        validate_town(args.check)
        print(f"{args.check}: the town's files are sound")
    return 0


def _say_stopped(args: argparse.Namespace, arguments: list[str]) -> None:
    if args.command == "experiment":
        print("\nstopped; finished runs are kept, the same command goes on", file=sys.stderr)
        return
    if args.command in ("chat", "report") or getattr(args, "write", None) or (
            getattr(args, "check", None)):
        print("\nstopped", file=sys.stderr)
        return
    again = [*arguments] if "--resume" in arguments else [*arguments, "--resume"]
    print("\nstopped; finished stages and the last checkpoint are kept. Go on with: "
          f"{shlex.join(['rlhf-mini', *again])}", file=sys.stderr)


# ---- chat --------------------------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> int:
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: expected a number above 0; --greedy "
                         "takes the likeliest token")
    if args.max_response_tokens < 1:
        raise ValueError(f"--max-response-tokens {args.max_response_tokens}: expected at least 1")
    _quiet()
    from rlhf_mini.loading import load_policy
    from rlhf_mini.runtime import make_generator, resolve_device

    device = resolve_device(args.device)
    folders = [_find_checkpoint(name, args.out) for name in args.checkpoints]
    models = {name: load_policy(folder, device)
              for name, folder in zip(args.checkpoints, folders, strict=True)}
    generator = make_generator(args.seed, "chat", device=device)
    width = max(map(len, models))
    while prompt := _read_prompt():
        for name, (policy, tokenizer) in models.items():
            print(f"{name:>{width}}: {_answer(policy, tokenizer, prompt, args, generator)}",
                  flush=True)
    return 0


def _read_prompt() -> str:
    terminal = sys.stdin.isatty()
    try:
        prompt = input("you> " if terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
    if not terminal and prompt:
        print(f"you> {prompt}")
    return prompt


def _answer(policy, tokenizer, prompt: str, args: argparse.Namespace, generator) -> str:
    from rlhf_mini.generation import sample_responses

    try:
        response = sample_responses(
            policy, tokenizer, [prompt], max_response_tokens=args.max_response_tokens,
            batch_size=1, temperature=0.0 if args.greedy else args.temperature,
            generator=generator)[0]
    except ValueError as error:
        return f"({error})"
    return response.text + ("" if response.finished else " ...")


def _find_checkpoint(name: str, out: Path | None) -> Path:
    for folder in ([out / name] if out else []) + [Path(name)]:
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    known = sorted(p.parent.name for p in out.glob("*/model.safetensors")) if out else []
    raise ValueError(f"{name}: no checkpoint there"
                     + (f"; {out} has {', '.join(known) or 'none'}" if out else
                        "; give a folder with config.json and model.safetensors, or --out DIR and "
                        "the name of a stage"))


if __name__ == "__main__":
    sys.exit(main())
