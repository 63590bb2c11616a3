"""Take the picture of `tc serve` in the docs: serve the demo's cache, search in chromium, and write docs/serve.png.

python -m scripts.screenshots                                     # docs/serve.png of caches/demo/clip-lite.zarr
python -m scripts.screenshots CACHE CACHE2 --out two.png --dark   # two caches side by side
python -m scripts.screenshots --open 3 --out large.png            # the large view of the third result
"""

import argparse
import io
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.progress import say
from teachercache.serve.opened import Served, open_served
from teachercache.serve.server import listen, make_server, url_of

SIZE = {"width": 1280, "height": 800}
MOST_BYTES = 400_000
COLORS = (256, 128, 64)  # of the palette, until the file is small enough


def main() -> int:
    """Take one picture and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("caches", nargs="*", default=["caches/demo/clip-lite.zarr"])
    parser.add_argument("--out", type=Path, default=Path("docs/serve.png"))
    parser.add_argument("--query", default="a red bird")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument(
        "--open", type=int, default=0, help="the result whose large view is shown; 0 for none"
    )
    options = parser.parse_args()
    try:
        content = smaller(photograph([open_served(path) for path in options.caches], options))
    except UserError as error:
        say(f"error: {error}")
        return 2
    write_whole(options.out, content)
    say(f"{options.out}: {len(content):,} bytes")
    return 0


def photograph(caches: list[Served], options: argparse.Namespace) -> bytes:
    """Serve caches, search in a browser and return the page as PNG."""
    opened = listen("127.0.0.1", 0)
    server = make_server(caches, "127.0.0.1")
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        return _visit(f"{url_of(opened)}#{urlencode({'q': options.query})}", options)
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


def _visit(url: str, options: argparse.Namespace) -> bytes:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if chromium is None:
        raise UserError("there is no chromium on this machine: apt-get install chromium")
    scheme: Any = "dark" if options.dark else "light"
    with sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(url)
        page.wait_for_selector("html[data-ready]", state="attached", timeout=300_000)
        if options.open:
            page.locator("#columns .card").nth(options.open - 1).click()
            page.wait_for_selector("#large .neighbors .card")
        page.wait_for_load_state("networkidle")
        page.mouse.move(SIZE["width"] - 1, SIZE["height"] - 1)
        page.wait_for_timeout(500)
        content = page.screenshot()
        browser.close()
    return content


def smaller(content: bytes) -> bytes:
    """Return a picture with a palette, in fewer than MOST_BYTES."""
    from PIL import Image

    for colors in COLORS:
        file = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").quantize(colors).save(file, "PNG", optimize=True)
        if file.tell() < MOST_BYTES:
            break
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
