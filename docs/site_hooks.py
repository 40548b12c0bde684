"""Hooks of `make docs`: the README is the first page, the API pages come from docstrings, links lead within the site.

What a page links to outside docs/ is named instead.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PACKAGES = {
    "kernels": "Fused operations: functions of tensors, differentiable, one graph under `torch.compile`."
    " `from kernels import` takes the public ones. [Kernels](../kernels.md) has the mathematics, the bytes"
    " each moves and its limits.",
    "flux2": "Models and mathematics. What is used most comes from `flux2` itself, the rest from its modules.",
    "train": "The programs and what they share. Each program prints its options with `--help`.",
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config) -> Files:
    """Adds the pages that lie beside docs/, and a page for each package with all of its modules."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for package, text in PACKAGES.items():
        modules = sorted(p.stem for p in (ROOT / package).glob("*.py") if not p.stem.startswith("__"))
        listed = "\n\n".join(f"::: {package}.{module}" for module in modules)
        files.append(File.generated(config, f"api/{package}.md", content=f"# {package}\n\n{text}\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links as seen from docs/: to a page or picture there, or just the words."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    of_docs = page.file.src_uri not in PAGES.values()
    here = (ROOT / "docs" / page.file.src_uri).parent if of_docs else ROOT

    def moved(link: re.Match) -> str:
        words, anchor = link[1], link[3] or ""
        target = (here / link[2]).resolve().relative_to(ROOT)
        up = "../" * page.file.src_uri.count("/")
        if str(target) in PAGES:
            return f"[{words}]({up}{PAGES[str(target)]}{anchor})"
        if target.parts[0] == "docs":
            return f"[{words}]({up}{'/'.join(target.parts[1:])}{anchor})"
        return words if str(target) in words.replace("\n", "") else f"{words} (`{target}`)"

    return LINK.sub(moved, markdown)
