r"""Run every shell command that the README and the pages of the book print.

    python tests/book/commands.py              # in a clone of this repository, at smoke size
    python tests/book/commands.py --install    # only those that install, in a new environment

A block of commands runs as it is printed, with four stand-ins so that it takes seconds and no
network: `rlhf-mini`, `torchrun` and `accelerate` get `--preset smoke` and two iterations of PPO
behind their own options (a study `--seeds 2`), a loop over five seeds goes over two, a folder
`gpt2` with a small random model stands for the hub's, and made-up lines for the data that a reader
brings.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_mini.pretrain import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "book").glob("*.md"))]
PROGRAM = r"(?:rlhf-mini|python3?|pip|make|conda|jupyter|torchrun|accelerate)(?= )"
ELSEWHERE = {  # the beginning of a block, and why it is not run here
    "make ": "continuous integration calls make itself",
    "conda ": "needs conda",
    "python tests/mutants.py": "tests/test_mutants.py does the same",
    "python -m pytest tests/book": "it is what continuous integration runs",
    "pip install 'rlhf-mini[": "needs a release in the package index",
    "python benchmarks/gpu_suite.py": "needs a GPU; tests/test_gpu_suite.py runs it small",
    "python benchmarks/against_trl.py": "takes long; tests/test_against_trl.py runs it small",
}
TORCHRUN = """#!/usr/bin/env bash
exec {python} -m torch.distributed.run --standalone "$@" --preset smoke --device cpu \\
  --set ppo.iterations=2
"""
ACCELERATE = """#!/usr/bin/env bash
shift  # the word launch
exec {python} -m accelerate.commands.launch --main_process_port=0 "$@" --preset smoke \\
  --device cpu --set ppo.iterations=2
"""
SHIM = """#!/usr/bin/env bash
case "$1" in
  chat) printf 'Good morning!\\n\\n' | {python} -m rlhf_mini "$@" ;;
  report | -*) exec {python} -m rlhf_mini "$@" ;;
  experiment) exec {python} -m rlhf_mini "$@" --preset smoke --seeds 2 ;;
  *) exec {python} -m rlhf_mini "$@" --preset smoke --set ppo.iterations=2 ;;
esac
"""


def blocks_of(text: str) -> list[str]:
    r"""Return the commands that a page prints: indented or `$` blocks, and whole lines of code.

    >>> blocks_of("To train:\n\n    make run  # all\n    pip list\n\nor `make book`, `make`.\n")
    ['make run  # all\npip list', 'make book']
    """
    found = []
    for block in re.findall(r"(?:^ {4,}\S.*\n|^\$ .*\n)+", text + "\n", re.MULTILINE):
        lines = re.sub(r"^\$ ", "", textwrap.dedent(block).rstrip(), flags=re.MULTILINE)
        if re.match(rf"(?:for .* do )?{PROGRAM}", lines):
            found.append(lines)
    prose = re.sub(r"^```(?s:.*?)^```$|^    .*$", "", text, flags=re.MULTILINE)
    return found + list(dict.fromkeys(re.findall(rf"`({PROGRAM}[^`\n]+)`", prose)))


def printed_commands() -> list[tuple[str, str]]:
    """Return (page, block) for all blocks of all pages, each block once."""
    seen: dict[str, str] = {}
    for page in PAGES:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            seen.setdefault(block, page.name)
    return [(page, block) for block, page in seen.items()]


def reason_to_skip(block: str) -> str | None:
    """Return why a block is not run here, or None."""
    return next((why for start, why in ELSEWHERE.items() if block.startswith(start)), None)


def is_installation(block: str) -> bool:
    """Whether a block sets up an environment."""
    return "pip install" in block


def write_judged(folder: Path) -> None:
    """Write judged responses of made-up systems in AlpacaEval's form."""
    prompts = [f"Is mill {i} open?" for i in range(60)]
    for n, name in enumerate([*(f"system-{i}" for i in range(156)), "NullModel"]):
        texts = [f"Yes, mill {i} is open, says {n}." for i in range(60)]
        (folder / name / "weighted_alpaca_eval_gpt4_turbo").mkdir(parents=True)
        (folder / name / "model_outputs.json").write_text(json.dumps(
            [{"instruction": p, "output": t} for p, t in zip(prompts, texts, strict=True)]))
        (folder / name / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json").write_text(
            json.dumps([{"instruction": p, "generator_2": name, "output_2": t,
                         "preference": 1 + (n * 37 + i) % 101 / 100}
                        for i, (p, t) in enumerate(zip(prompts, texts, strict=True))]))


def prepare(folder: Path) -> dict[str, str]:
    """Clone the repository, add the stand-ins, and return the environment to run blocks in."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    pair = {"chosen": "\n\nHuman: Is mill {0} open?\n\nAssistant: Yes, mill {0} is open.",
            "rejected": "\n\nHuman: Is mill {0} open?\n\nAssistant: Go away, number {0}."}
    lines = [json.dumps({key: text.format(i) for key, text in pair.items()}) for i in range(60)]
    for name in ("pairs.jsonl.gz", "hh/train.jsonl.gz", "hh-rlhf/harmless-base/test.jsonl.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    write_judged(folder / "alpaca_eval" / "results")
    tokenizer = train_tokenizer(lines, 320)
    policy = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id))
    policy.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    shims = folder / ".shims"
    shims.mkdir()
    for name, text in {"rlhf-mini": SHIM, "torchrun": TORCHRUN, "accelerate": ACCELERATE}.items():
        (shims / name).write_text(text.format(python=sys.executable))
        (shims / name).chmod(0o755)
    path = os.pathsep.join([str(shims), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def install(folder: Path, block: str) -> subprocess.CompletedProcess:
    """Run a block that installs, in a clone without an environment; Jupyter is ended after 20 s."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    block = re.sub(r"^(jupyter lab .*)$",
                   r"timeout 20 \1 --no-browser --allow-root || [ $? = 124 ]", block, flags=re.M)
    return run(folder, block, dict(os.environ))


def run(folder: Path, block: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a block in a folder and return what came out."""
    return subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL)


def main() -> int:
    """Run the commands; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="run those that install instead")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        environment = None if args.install else prepare(Path(folder) / "clone")
        for number, (page, block) in enumerate(printed_commands()):
            if reason_to_skip(block) or is_installation(block) != args.install:
                continue
            began = time.monotonic()
            result = (install(Path(folder) / str(number), block) if args.install else run(
                Path(folder) / "clone", block.replace("in 0 1 2 3 4", "in 0 1"), environment))
            failed += result.returncode != 0
            print(f"{'ok    ' if result.returncode == 0 else 'FAILED'} "
                  f"{time.monotonic() - began:5.0f} s  {page}: {block.splitlines()[0]}", flush=True)
            if result.returncode:
                print(textwrap.indent("\n".join(result.stdout.splitlines()[-30:]), "    "))
    for block, why in ((b, reason_to_skip(b)) for _, b in printed_commands()):
        if why and not args.install:
            print(f"left out: {block.splitlines()[0]} ({why})")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
