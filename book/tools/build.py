"""Build the book: run the pages that changed, write the site, say what it took.

    python book/tools/build.py           # what `make book` calls, with the stages of runs/cpu done
    python book/tools/build.py --clean   # forget every earlier result first
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution
from myst_nb.core.read import myst_nb_reader_plugin
from nbformat import NotebookNode
from notebooks import pages
from tqdm import tqdm

from rlhf_mini.runtime import fingerprint, read_json

BOOK = Path(__file__).resolve().parent.parent
ROOT, BUILD = BOOK.parent, BOOK / "_build"


def inputs() -> str:
    """Return a fingerprint of what pages depend on: package, versions, run, recorded results."""
    stages = sorted((ROOT / "runs" / "cpu").glob("*/stage.json"))
    sources = [p for p in sorted((ROOT / "rlhf_mini").rglob("*")) if p.suffix in (".py", ".toml")]
    recorded = [p for p in sorted((ROOT / "data" / "recorded").rglob("*")) if p.is_file()]
    return fingerprint(*sources, *recorded, ROOT / "constraints.txt", BOOK / "_config.yml",
                       *(BOOK / "_ext").glob("*.py"),
                       {p.parent.name: read_json(p)["fingerprint"] for p in stages})


def forget_stale_results(clean: bool) -> None:
    """Drop results of earlier builds that were made with other inputs."""
    mark, now = BUILD / "inputs", inputs()
    if clean or not mark.exists() or mark.read_text() != now:
        for name in (".jupyter_cache", ".doctrees", "html", "jupyter_execute"):
            shutil.rmtree(BUILD / name, ignore_errors=True)
    BUILD.mkdir(exist_ok=True)
    mark.write_text(now)
    sources, known = BUILD / "sources", fingerprint(BOOK / "references.bib", BOOK / "_toc.yml")
    if not sources.exists() or sources.read_text() != known:  # the pages quote and number anew
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
        sources.write_text(known)


def kernel_settings() -> Path:
    """Return a folder of IPython's settings, so that those of the user do not change the pages."""
    profile = BUILD / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text(
        "c.IPKernelApp.log_level = 40  # not: the kernel talks over TCP, on this machine only\n")
    return BUILD / "ipython"


def run_page(page: Path) -> tuple[Path, NotebookNode, ExecutionResult]:
    """Run the cells of a page in a kernel of their own."""
    notebook = myst_nb_reader_plugin(str(page))
    return page, notebook, single_nb_execution(
        notebook, str(BOOK), timeout=600, allow_errors=False)


def run_pages() -> None:
    """Run the pages that have no result yet, one per core, and keep what they show.

    A page that fails is left to Sphinx, which runs it again and reports it.
    """
    cache, todo = get_cache(BUILD / ".jupyter_cache"), []
    for page in (BOOK / f"{name}.md" for name in pages()):
        try:
            cache.match_cache_notebook(myst_nb_reader_plugin(str(page)))
        except KeyError:
            todo.append(page)
    if not todo:
        return
    cores = min(len(todo), os.cpu_count() or 1, 4)  # a page takes a core and up to 1 GB
    with ProcessPoolExecutor(cores) as pool, tqdm(total=len(todo), desc="pages") as bar:
        for future in as_completed([pool.submit(run_page, page) for page in todo]):
            page, notebook, result = future.result()
            if result.err is None:
                data = {"execution_seconds": result.time}
                cache.cache_notebook_bundle(CacheBundleIn(notebook, str(page), data=data),
                                            check_validity=False, overwrite=True)
            bar.set_postfix_str(page.stem)
            bar.update()


def page_seconds() -> dict[str, float]:
    """Return the seconds that the cells of each page took when they were last run."""
    if not (BUILD / ".jupyter_cache").exists():
        return {}
    records = get_cache(BUILD / ".jupyter_cache").list_cache_records()
    newest = sorted(records, key=lambda record: record.created)
    return {Path(r.uri).stem: r.data.get("execution_seconds", 0.0) for r in newest}


def main() -> int:
    """Build; return the exit code of the builder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", action="store_true", help="forget every earlier result first")
    args = parser.parse_args()
    began = time.monotonic()
    forget_stale_results(args.clean)
    python = str(Path(sys.executable).parent)
    os.environ |= {"PATH": python + os.pathsep + os.environ.get("PATH", ""),
                   "PYTHONWARNINGS": "ignore:IProgress not found",
                   "IPYTHONDIR": str(kernel_settings()), "OMP_NUM_THREADS": "1",
                   "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    run_pages()
    code = subprocess.call([Path(sys.executable).with_name("jupyter-book"), "build", BOOK,
                            "-nW", "--keep-going", "-q"])
    if code:
        print("error: the book has warnings or pages that failed; they are listed above, and "
              f"tracebacks of cells are in {BUILD / 'html' / 'reports'}", file=sys.stderr)
        return code
    print("\nseconds that the cells of each page took when they were last run")
    for page, seconds in sorted(page_seconds().items()):
        print(f"  {page:24} {seconds:7.1f}")
    print(f"\nbuilt in {time.monotonic() - began:.0f} s; open {BUILD / 'html' / 'index.html'}\n"
          f"or serve it: python -m http.server --directory {BUILD / 'html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
