"""The README says what the committed results say, and names only what exists."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def make_picture():
    spec = importlib.util.spec_from_file_location("make_picture", ROOT / "docs" / "make_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_that_of_the_results(make_picture):
    assert f"<!-- figures -->\n{make_picture.table()}<!-- /figures -->" in README


@pytest.mark.parametrize("name", ["photos", "photos-long"])
def test_results_are_of_the_presets_that_ship(name):
    """But for options that came, or were renamed, after the run whose commit the README names"""
    from train.configs import differences, to_dict
    from train.vae_config import VAE_PRESETS

    saved = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    changed = differences(saved["config"], to_dict(VAE_PRESETS[name]))
    assert [line for line in changed if "absent" not in line and not line.startswith("precision")] == []


def test_quoted_last_line_is_the_runs():
    psnr = json.loads((ROOT / "benchmarks/results/photos.json").read_text())["held_out"]["ours (EMA)"]["psnr_db"]
    assert f"held-out PSNR {psnr:.2f} dB (EMA, 256 crops)" in README and psnr >= 33


def test_long_preset_passes_pca():
    held = json.loads((ROOT / "benchmarks/results/photos-long.json").read_text())["held_out"]
    pca = next(row for label, row in held.items() if label.startswith("PCA"))
    assert held["ours (EMA)"]["psnr_db"] > pca["psnr_db"]
    assert held["ours (EMA)"]["numbers_per_crop"] == pca["numbers_per_crop"]


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_recipe_tables_are_those_of_the_results():
    import recipe

    results, page = json.loads(recipe.RESULTS.read_text()), recipe.PAGE.read_text()
    for name, table in (("rows", recipe.rows_table(results)), ("phases", recipe.phases_table(results))):
        assert f"<!-- {name} -->\n{table}\n{recipe.machine(results)}<!-- /{name} -->" in page, name


def test_flow_table_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks/results/flow-evidence.json").read_text())
    page = (ROOT / "docs/flow.md").read_text().replace("**", "")

    def mean(key, channels, law, shift):
        return sum(results["cells"][f"{channels}/{law}/{shift}/none/{seed}"][key] for seed in range(3)) / 3

    for channels in (16, 128):
        for law, shown in (("uniform",) * 2, ("logit_normal", "logit-normal"), ("plateau_logit_normal", "plateau")):
            keys = [(key, shift) for key in ("held_out", "frechet") for shift in ("1", "2.95")]
            row = " | ".join(f"{mean(key, channels, law, shift):.3f}" for key, shift in keys)
            assert f"| {channels} | {shown} | {row} |" in page
    assert results["environment"]["commit"] in page
