"""report.html in a real browser: nothing is asked for, a dot shows its picture, a click its neighbours."""

from pathlib import Path

import numpy as np
import pytest
from small import make_folder

from teachercache.analysis.report.write import analyze
from tests.teachercache.analysis.test_report import embeddings, samples_of, with_samples
from tests.teachercache.search.test_index import make_cache

EVIL = "<script>document.title='owned'</script><b>bold</b>"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    pictures, texts = embeddings(60)
    make_folder(folder / "photos", 60)
    files = sorted((folder / "photos").rglob("*.png"))
    first = make_cache(folder / "a.zarr", pictures, texts=texts)
    second = make_cache(folder / "b.zarr", pictures[:, ::-1] + texts[:, 0], texts=texts)
    samples = samples_of(
        60,
        image=lambda i: str(files[i].relative_to(folder)),
        texts=lambda i: (f"{EVIL} number {i}",),
        label=lambda i: EVIL if i % 2 else "odd",
    )
    for cache in (first, second):
        with_samples(cache, samples, folder)
    analyze(first.path, against=second.path, out=folder / "out")
    return folder / "out"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, out, scheme: str):
    page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # other work on the machine must not fail this
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((out / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    dot = page.evaluate(WHERE)

    assert page.is_hidden("#hover")
    page.mouse.move(dot["x"] - 4, dot["y"] - 4)
    page.mouse.move(dot["x"], dot["y"])
    page.wait_for_selector("#hover", state="visible")
    assert "blob:" in page.evaluate(
        "getComputedStyle(document.querySelector('#hover .thumb')).backgroundImage"
    )
    assert f"{EVIL} number {dot['at']}" in page.inner_text("#hover")

    page.mouse.click(dot["x"], dot["y"])
    page.wait_for_selector("#inspector .item")
    titles = page.locator("#inspector h3").all_inner_texts()
    assert titles == [
        "pictures like it",
        "texts for the picture",
        "pictures for its text",
        "pictures like it in the second cache",
    ]
    other = page.locator("#inspector .item").first
    name = other.inner_text().splitlines()[0]
    other.click()  # a neighbour leads on
    assert page.locator("#inspector").inner_text().splitlines()[0] == name

    page.fill("#search", "number 5")
    page.wait_for_function("document.getElementById('count').textContent.startsWith('15 of 60')")
    assert page.locator("#matches .thumb").count() == 15

    for section in page.locator("#sections section").all():
        section.scroll_into_view_if_needed()
        page.wait_for_function("node => node.children.length > 1", arg=section.element_handle())
    assert page.locator("#against .change").count() > 10
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    assert page.title() == "t over d"  # no script of a caption has run
    assert page.locator(".text b, #hover b, #inspector b, #matches b, td b").count() == 0
    assert errors == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [
        (out / "report.html").as_uri()
    ]
    page.close()


# Where on the screen the first dot of the map is, and which row it is
WHERE = """() => {
  const plot = document.getElementById("plot"), layout = plot._fullLayout, trace = plot.data[0];
  const box = plot.getBoundingClientRect();
  return { at: trace.customdata[0], x: box.x + layout.xaxis._offset + layout.xaxis.l2p(trace.x[0]),
           y: box.y + layout.yaxis._offset + layout.yaxis.l2p(trace.y[0]) };
}"""


def test_the_first_map_is_of_all_rows(out):
    """What the browser cannot tell: that no dot is missing."""
    from tests.teachercache.analysis.test_report import page_data

    points = page_data(out, "points")
    assert points["rows"] == list(range(60))
    assert points["thumbs"]["count"] == 60
    assert {column["name"] for column in points["columns"]} >= {"label", "split", "group", "surprise"}
    assert np.isfinite(points["lists"][0]["k"])
