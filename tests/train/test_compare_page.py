"""The page of a comparison in a browser: pictures are decoded, the console is silent, something is drawn."""

import json
import re
import shutil
import subprocess

import pytest
import study

from flux2.images import load_image
from train.compare_report import write_comparison_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000"]
# First in the head, so that it hears of everything; writes what it heard into the page once all is loaded.
LISTENER = """<script>
const heard = [];
addEventListener("error", e => heard.push(e.message || "not loaded: " + e.target.tagName), true);
console.error = (...words) => heard.push(words.join(" "));
addEventListener("load", () => {
  const note = document.createElement("pre");
  note.id = "heard";
  note.textContent = JSON.stringify({
    heard, title: document.title, widths: [...document.images].map(i => i.naturalWidth),
    overflow: [...document.querySelectorAll("table, img, p, pre")].filter(
      e => e.getBoundingClientRect().right > innerWidth).length,
  });
  document.body.append(note);
});
</script>"""


def browse(tmp_path, page, *flags):
    """Standard output of the browser on a page, with a profile of its own."""
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    profile.mkdir()
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--window-size=1280,5000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def listen(tmp_path, text):
    """What a page reports: errors heard, its title, the pictures' natural widths, elements wider than the window."""
    page = tmp_path / "page.html"
    assert text.count("<head>") == 1
    page.write_text(text.replace("<head>", "<head>" + LISTENER))
    dom = browse(tmp_path, page, "--dump-dom")
    return json.loads(re.search(r'<pre id="heard">(.*?)</pre>', dom, re.DOTALL)[1].replace("&amp;", "&"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rows = study.study_rows(shifts=(1.0, 2.95, 6.93), seeds=2, checkpoints=2, noise=0.05)
    return write_comparison_report(study.write_study(tmp_path_factory.mktemp("study"), rows))


def test_page_loads_whole(tmp_path, page):
    found = listen(tmp_path, page.read_text())
    assert found["heard"] == [] and found["title"] == "Comparison of autoencoders: toy"
    assert found["widths"][:4] == [1430] * 4 and found["widths"][4:] == [526] * 5 + [256] * 5
    assert found["overflow"] == 0


def test_faults_would_be_heard(tmp_path, page):
    """A broken picture, an exception and a line on the console"""
    text = page.read_text().replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    found = listen(tmp_path, text.replace("</body>", "<script>console.error('x'); nothing()</script></body>"))
    assert found["widths"][0] == 0 and min(found["widths"][1:]) > 0
    assert sorted(found["heard"]) == ["Uncaught ReferenceError: nothing is not defined", "not loaded: IMG", "x"]


def test_page_is_drawn(tmp_path, page):
    browse(tmp_path, page, f"--screenshot={tmp_path / 'page.png'}")
    image = load_image(tmp_path / "page.png")
    assert image.shape == (5000, 1280, 3)
    inked = (image < 200).any(2)
    assert 0.05 < inked.mean() < 0.9
    assert min(band.mean() for band in inked.reshape(10, 500, 1280)) > 0.005  # down to the pictures at its end
    assert len({tuple(c) for c in image[::5, ::5].reshape(-1, 3).tolist()}) > 500  # colours
