"""The page of `tc serve` in a real browser: search, a dropped picture, neighbors, filters, two caches, no script of a caption."""

import base64
import shutil
from pathlib import Path

import pytest
from disturbed import run_build
from served import running
from small import build_cache, make_folder, save_teacher

from teachercache.teachers.registry import load

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"
DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name));
  window.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Squares whose captions hold markup, beside classes named with it; a second teacher; a picture that is none."""
    folder = tmp_path_factory.mktemp("served")
    make_folder(folder / "photos", 60, texts=2, splits=True)
    for path in (folder / "photos").rglob("*.txt"):
        path.write_text(f"{path.read_text().splitlines()[0]} {EVIL}\n{EVIL}\n")
    (folder / "photos/train/class0").rename(folder / "photos/train/<b>class0")
    for i in range(2):
        build_cache(folder / "photos", save_teacher(folder / f"t{i}", seed=i), folder / f"{'ab'[i]}.zarr")
    return folder


class Visit:
    """A page that records what it asks for and what goes wrong in it."""

    def __init__(self, browser, site, scheme: str = "light", fragment: str = "") -> None:
        self.page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(120_000)  # other work on the machine must not fail this
        self.site, self.asked, self.errors = site, [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(f"{site.url}{fragment}")
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def after(self, action) -> None:
        """Do something that searches, and wait for the answer."""
        count = int(self.page.evaluate("document.documentElement.dataset.searches"))
        action()
        self.until(f"Number(document.documentElement.dataset.searches) > {count}")

    def until(self, expression: str) -> None:
        """Wait until an expression is true; the page's policy forbids playwright's own loop, which evaluates a string."""
        for _ in range(6000):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(20)
        pytest.fail(f"never true: {expression}")

    def keys(self, cache: int = 0, where: str = "#columns") -> list[str]:
        cards = self.page.locator(f"{where} [data-cache='{cache}'] .card")
        return cards.evaluate_all("cards => cards.map((card) => card.dataset.key)")

    def close(self) -> None:
        """No script of a caption has run, nothing failed, and nothing was asked of another address."""
        assert self.page.title() != "owned"
        assert self.page.locator("main b, main script, dialog b, dialog script, img[src='x']").count() == 0
        assert self.errors == []
        assert [url for url in self.asked if not url.startswith((self.site.url, "data:"))] == []
        self.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_filter_and_neighbors(browser, folder: Path, scheme: str):
    with running(folder / "a.zarr") as site:
        visit = Visit(browser, site, scheme)
        page = visit.page
        assert len(visit.keys()) == 48  # rows before any query

        visit.after(lambda: (page.fill("#text", "square 7"), page.press("#text", "Enter")))
        expected = [result["key"] for result in site.search(text="square 7")[0]["results"]]
        assert visit.keys() == expected
        assert EVIL in page.locator(".card .caption").first.inner_text()
        assert page.locator(".card .rank").first.inner_text() == "1"
        visit.until("document.querySelector('.card img').naturalWidth > 0")

        visit.after(lambda: page.select_option("[data-facet='label']", "<b>class0"))
        visit.after(lambda: page.select_option("[data-facet='split']", "train"))
        where = {"label": "<b>class0", "split": "train"}
        expected = [result["key"] for result in site.search(text="square 7", where=where)[0]["results"]]
        assert 0 < len(expected) < 48
        assert visit.keys() == expected

        page.locator("#columns .card").nth(2).click()
        page.wait_for_selector("#large .neighbors .card")
        row = site.caches[0].row_of(expected[2])
        neighbors = [result["key"] for result in site.search(row=[0, row], where=where, top=12)[0]["results"]]
        assert visit.keys(where="#large") == neighbors
        words = page.inner_text("#large .facts-of")
        assert all(word in words for word in (EVIL, expected[2], "<b>class0", "train", "(rank 3)"))
        visit.until("document.querySelector('#large .picture img').naturalWidth > 0")
        page.press("body", "ArrowRight")  # to the next result
        visit.until(f"document.querySelector('#large dd').textContent === {expected[3]!r}")
        page.locator("#large .neighbors .card").first.click()  # a neighbor leads on
        visit.until(f"document.querySelector('#large dd').textContent !== {expected[3]!r}")
        visit.after(lambda: page.click("#large .action"))  # search by this row
        assert page.is_hidden("#large")
        assert page.locator("#parts .part").count() == 1

        visit.after(page.go_back)
        assert visit.keys() == expected
        visit.close()


def test_a_dropped_picture(browser, folder: Path):
    with running(folder / "a.zarr") as site:
        visit = Visit(browser, site)
        path = sorted((folder / "photos").rglob("*.png"))[9]
        content = base64.b64encode(path.read_bytes()).decode()
        visit.after(lambda: visit.page.evaluate(DROP, ["x.png", content]))
        assert visit.keys()[0].endswith(path.stem)
        assert visit.page.locator("#parts .part img").count() == 1

        visit.after(lambda: visit.page.set_input_files("#file", folder / "a.zarr" / "zarr.json"))
        assert "the picture cannot be read: not a picture" in visit.page.inner_text("#notice")
        visit.errors = [line for line in visit.errors if "400 (Bad Request)" not in line]
        visit.close()


def test_two_caches_side_by_side(browser, folder: Path):
    with running(folder / "a.zarr", folder / "b.zarr") as site:
        visit = Visit(browser, site, fragment="#q=square+4")
        page = visit.page
        answers = site.search(text="square 4")
        for cache in range(2):
            assert visit.keys(cache) == [result["key"] for result in answers[cache]["results"]]
        assert page.locator("#columns h2").all_inner_texts()[0].startswith("a")
        shown = page.locator("[data-cache='0'] .there").first.inner_text().split()
        assert shown == ["b", f"#{answers[0]['results'][0]['other']}"]

        page.locator("[data-cache='1'] .card").first.hover()
        same = page.locator(".card.same").evaluate_all("cards => cards.map((card) => card.dataset.key)")
        assert set(same) == {visit.keys(1)[0]}
        page.locator("[data-cache='1'] .card").first.click()
        page.wait_for_selector("#large .neighbors .card")
        assert page.locator("#large .neighbors h3").all_inner_texts() == ["Neighbors in a", "Neighbors in b"]
        assert visit.keys(0, "#large") != visit.keys(1, "#large")
        visit.close()


def test_a_teacher_of_pictures_alone_is_asked_by_keys(browser, folder: Path):
    made = run_build(load("own-colors"), folder / "photos", folder / "colors.zarr").cache
    with running(made.path) as site:
        visit = Visit(browser, site)
        assert "own-colors reads no texts: type the key of a row" in visit.page.get_attribute(
            "#text", "placeholder"
        )
        key = visit.keys()[5]
        visit.after(lambda: (visit.page.fill("#text", key), visit.page.press("#text", "Enter")))
        assert visit.keys() == [result["key"] for result in site.search(key=key)[0]["results"]]
        visit.close()


def test_a_picture_that_is_gone_and_a_server_that_ended(browser, folder: Path, tmp_path: Path):
    shutil.copytree(folder / "photos", tmp_path / "photos")
    built = build_cache(tmp_path / "photos", folder / "t0", tmp_path / "c.zarr")
    shutil.rmtree(tmp_path / "photos")
    with running(built) as site:
        visit = Visit(browser, site)
        visit.page.wait_for_selector(".card .words")
        assert "No picture: cannot read" in visit.page.locator(".card .words").first.inner_text()
    visit.after(lambda: (visit.page.fill("#text", "x"), visit.page.press("#text", "Enter")))
    assert "The server does not answer" in visit.page.inner_text("#notice")
    visit.errors = [line for line in visit.errors if "Failed to load resource" not in line]
    visit.close()
