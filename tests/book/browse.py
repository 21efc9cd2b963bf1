"""Walk every page of the built book in a headless Chromium and say what is wrong.

    python tests/book/browse.py                    # exit code 1 if anything is wrong
    python tests/book/browse.py --shots DIR        # also screenshots: light, dark, phone
    python tests/book/browse.py --pages 03-tokens  # only these pages

Looked for: errors in the console, failed requests, requests to other hosts, formulas that were not
drawn, images without a text alternative or that did not load, folds that do not open, code with no
copy button, a page that is wider than a phone, a search that finds nothing, a chain of next buttons
that does not reach every page.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import websocket

SITE = Path(__file__).resolve().parents[2] / "book" / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOK = """(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  document.querySelectorAll(".toggle-hidden button.toggle-button").forEach(b => { b.click(); });
  for (const i of document.images) i.loading = "eager";
  await Promise.all([...document.images].map(i => i.complete || new Promise(
    done => { i.onload = i.onerror = done; })));
  const name = i => i.getAttribute("src").slice(-60);
  const bad = [];
  for (const e of document.querySelectorAll(".math"))
    if (!e.querySelector("mjx-container")) bad.push("formula not drawn: " + e.textContent);
  for (const e of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    bad.push("formula with an error: " + e.textContent);
  for (const i of document.images) {
    if (!(i.getAttribute("alt") || "").trim()) bad.push("image without alt text: " + name(i));
    else if (i.matches(".cell_output img, figure img") && i.alt.length < 15)
      bad.push("alt text says too little: " + i.alt);
    if (!i.naturalWidth) bad.push("image did not load: " + name(i));
  }
  for (const s of document.querySelectorAll(".cell_output svg:not([aria-hidden])"))
    if (!s.closest("button, summary") && !s.getAttribute("aria-label"))
      bad.push("drawing without aria-label");
  for (const e of document.querySelectorAll(".toggle-hidden"))
    bad.push("fold that does not open: " + e.textContent.trim().slice(0, 40));
  for (const e of document.querySelectorAll("div.highlight"))
    if (!e.querySelector("button.copybtn")) bad.push("code without a copy button");
  for (const a of document.querySelectorAll("a[href^='#']"))
    if (a.hash.length > 1 && !document.getElementById(decodeURIComponent(a.hash.slice(1))))
      bad.push("link to nowhere: " + a.hash);
  return bad;
})()"""
WIDE = """(() => {
  const limit = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= limit) return [];
  const scrolls = e => e && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX)
    || (e !== document.body && scrolls(e.parentElement)));
  return ["wider than " + limit + " px: " + [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > limit + 1 && !scrolls(e.parentElement))
    .slice(0, 4)
    .map(e => e.tagName + "." + e.className).join(", ")];
})()"""


class Browser:
    """A headless Chromium that is spoken to over its DevTools protocol."""

    def __init__(self, program: str):
        self.folder = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--remote-debugging-port=0", "--remote-allow-origins=*", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(self.folder) / "DevToolsActivePort"
        for _ in range(300):
            if port.exists() and port.read_text().strip():
                break
            time.sleep(0.1)
        self.address = f"http://127.0.0.1:{port.read_text().split()[0]}"
        with urllib.request.urlopen(f"{self.address}/json/list") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60)
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        """Send a command and return its result; events that come in are kept."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def evaluate(self, script: str):
        """Return the value of a script on the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"])[:500])
        return result["result"].get("value")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self.call("Page.navigate", url=url)
        for _ in range(600):
            if any(e["method"] == "Page.loadEventFired" for e in self.events):
                break
            self.evaluate("1")
            time.sleep(0.02)
        self.evaluate("document.readyState")

    def faults(self, home: str) -> list[str]:
        """Return what went wrong in the console and on the wire since the page was opened."""
        found = []
        for event in self.events:
            method, what = event["method"], event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"script error: {json.dumps(what['exceptionDetails'])[:300]}")
            elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
                found.append(f"console: {what['entry']['text']} {what['entry'].get('url', '')}")
            elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
                found.append(f"console: {what['args']}")
            elif method == "Network.requestWillBeSent":
                url = what["request"]["url"]
                if not url.startswith((home, "data:", "blob:")):
                    found.append(f"request to another host: {url}")
            elif method == "Network.loadingFailed" and not what.get("canceled"):
                found.append(f"request failed: {what.get('errorText')}")
            elif method == "Network.responseReceived" and what["response"]["status"] >= 400:
                found.append(f"{what['response']['status']}: {what['response']['url']}")
        return found

    def shot(self, path: Path, most: int = 8000) -> None:
        """Save a picture of the whole page; a long page in parts -2, -3, ..."""
        self.evaluate("document.head.append(Object.assign(document.createElement('style'), "
                      "{textContent: '* {transition: none !important}'})), 0")
        time.sleep(0.3)  # what was moving has arrived
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        for part, top in enumerate(range(0, int(size["height"]), most), start=1):
            data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={
                "x": 0, "y": top, "width": size["width"], "scale": 1,
                "height": min(size["height"] - top, most)})["data"]
            name = path if part == 1 else path.with_stem(f"{path.stem}-{part}")
            name.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Serve a folder on a free port of this machine."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def walk(site: Path = SITE, shots: Path | None = None, only: list[str] | None = None) -> list[str]:
    """Return all faults of a built site, as "page: what"."""
    pages = sorted(p.stem for p in site.glob("*.html") if p.stem not in ("genindex", "py-modindex"))
    server, home = serve(site)
    browser, faults = Browser(find_browser()), []
    try:
        for page in only or pages:
            for look, width, dark in (("light", 1280, False), ("dark", 1280, True),
                                      ("phone", 360, False)):
                browser.open(f"{home}{page}.html", width, dark=dark)
                found = browser.evaluate(LOOK) + (browser.evaluate(WIDE) if width < 600 else [])
                faults += [f"{page} ({look}): {f}" for f in browser.faults(home) + found]
                if shots:
                    shots.mkdir(parents=True, exist_ok=True)
                    browser.shot(shots / f"{page}-{look}.png")
        if not only:
            faults += _search(browser, home) + _next_buttons(browser, home, pages)
    finally:
        browser.close()
        server.shutdown()
    return sorted(set(faults))


def _search(browser: Browser, home: str) -> list[str]:
    browser.open(f"{home}search.html?q=temperature")
    for _ in range(50):
        if browser.evaluate("document.querySelectorAll('#search-results li').length"):
            return []
        time.sleep(0.1)
    return ["search: finds nothing for 'temperature'"]


def _next_buttons(browser: Browser, home: str, pages: list[str]) -> list[str]:
    seen, page = [], "index"
    while page and page not in seen:
        seen.append(page)
        browser.open(f"{home}{page}.html")
        link = browser.evaluate("(document.querySelector('a.right-next') || {}).href || ''")
        page = link.rpartition("/")[2].removesuffix(".html")
    return [f"{p}: no chain of next buttons leads here" for p in pages
            if p not in seen and p != "search"]


def main() -> int:
    """Walk the site and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--pages", nargs="*", help="only these pages, without .html")
    args = parser.parse_args()
    if find_browser() is None or not SITE.exists():
        print("error: needs a Chromium and the book built by `make book`", file=sys.stderr)
        return 2
    faults = walk(shots=args.shots, only=args.pages)
    print("\n".join(faults) or "every page is sound")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
