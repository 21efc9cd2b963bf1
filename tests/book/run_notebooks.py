"""Run notebooks of the book as a reader does, where only the package and Jupyter are installed.

    python tests/book/run_notebooks.py                  # all, with the models of runs/cpu
    python tests/book/run_notebooks.py --alone 10-ppo   # one, with no model there: it trains them

Makes a wheel and a new environment in a temporary folder, copies the notebooks there, and runs them
two at a time, each in a kernel of its own. Prints the seconds until something is to be seen and in
all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "book" / "notebooks"


def run_one(path: Path) -> str:
    """Run a notebook; return what it took. Called inside the new environment."""
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        seen = None

        def output(self, *args):
            self.seen = self.seen or time.monotonic()
            return super().output(*args)

    began = time.monotonic()
    client = Client(nbformat.read(path, 4), timeout=1800, kernel_name="python3",
                    resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    return f"{client.seen - began:5.1f} s to the first output, {time.monotonic() - began:5.0f} s"


def install(folder: Path) -> Path:
    """Install the package's wheel and what runs notebooks; return the environment's Python."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(["git", "clone", "-q", ROOT, folder / "clone"], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, folder / "clone"], check=True)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", wheel, "ipykernel", "nbclient", "-c",
                    ROOT / "constraints.txt"], check=True)
    return python


def main() -> int:
    """Run the notebooks; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; all if none is given")
    parser.add_argument("--alone", action="store_true", help="with no model there")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(run_one(args.inside))
        return 0
    names, failed = args.names or sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = install(folder)

        def run(name: str) -> subprocess.CompletedProcess:
            (folder / name).mkdir()
            shutil.copy(NOTEBOOKS / f"{name}.ipynb", folder / name)
            runs = folder / name / "runs" if args.alone else ROOT / "runs"
            return subprocess.run(
                [python, __file__, "--inside", folder / name / f"{name}.ipynb"],
                env=os.environ | {"RLHF_MINI_RUNS": str(runs)}, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:
            for name, result in zip(names, pool.map(run, names), strict=True):
                failed += result.returncode != 0
                print(f"{name:26}", result.stdout.strip() if result.returncode == 0
                      else f"FAILED\n{result.stderr[-3000:]}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
