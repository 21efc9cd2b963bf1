"""Run notebooks of the book as a reader does, where only the package and Jupyter are installed.

    python tests/book/run_notebooks.py                  # with the models of runs/cpu
    python tests/book/run_notebooks.py --alone 10-ppo   # one, with no model there: it trains them
    python tests/book/run_notebooks.py solutions/10-ppo # one, with its solutions

Makes a wheel and a new environment in a temporary folder, copies the notebooks there, and runs them
two at a time, each in a kernel of its own. Prints the seconds until something is to be seen and in
all. Without names it runs the students' notebooks that have checks of exercises and a few others;
`make book` has run all cells of all pages. In a student's notebook every check must say that its
exercise is not written yet; in one with solutions it must then say that all properties hold.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "book" / "notebooks"
# Pages without checks: one reads a run, one trains on files, one reads recorded results.
OTHERS = ("01-from-gpt-to-chatgpt", "13-gpu-and-real-data", "22-what-the-runs-say")


def check_reports(notebook, solutions: bool) -> None:
    """Raise an error if a check of an exercise does not say what it should."""
    said: dict[str, list[str]] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (found := re.search(r'^check\("([\w-]+)"', cell.source,
                                                            re.MULTILINE)):
            said.setdefault(found[1], []).append(str(cell.outputs))
    for label, reports in said.items():
        assert f"{label}: not written yet" in reports[0], reports[0]
        assert len(reports) == 1 + solutions, (label, len(reports))
        assert not solutions or f"{label}: all properties hold" in reports[1], reports[1]


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
    notebook = client.execute()
    check_reports(notebook, path.parent.name == "solutions")
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
    parser.add_argument("names", nargs="*", help="NAME for students, or solutions/NAME")
    parser.add_argument("--alone", action="store_true", help="with no model there")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(run_one(args.inside))
        return 0
    names, failed = args.names or [
        *(p.stem for p in sorted(NOTEBOOKS.glob("*.ipynb"))
          if 'check(\\"' in p.read_text(encoding="utf-8")),
        *(f"solutions/{name}" for name in OTHERS)], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = install(folder)

        def run(name: str) -> subprocess.CompletedProcess:
            place = folder / name.replace("/", "-") / f"{name}.ipynb"  # each in a folder of its own
            place.parent.mkdir(parents=True)
            shutil.copy(NOTEBOOKS / f"{name}.ipynb", place)
            runs = place.parent / "runs" if args.alone else ROOT / "runs"
            return subprocess.run(
                [python, __file__, "--inside", place],
                env=os.environ | {"RLHF_MINI_RUNS": str(runs)}, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:
            for name, result in zip(names, pool.map(run, names), strict=True):
                failed += result.returncode != 0
                print(f"{name:36}", result.stdout.strip() if result.returncode == 0
                      else f"FAILED\n{result.stderr[-3000:]}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
