"""The README says what the committed results say, and names only what exists."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def script(name):
    """A program of docs/, as a module"""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_picture():
    return script("make_picture")


@pytest.fixture(scope="module")
def make_comparison():
    return script("make_comparison")


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


def test_speed_table_is_that_of_the_results():
    assert script("make_speed").filled(README) == README


def test_first_pages_snippets_run(tmp_path, monkeypatch):
    import types

    import torch

    from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder
    from flux2.compat import ensure_torchvision

    ensure_torchvision()
    from diffusers import AutoencoderKL

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    cfg = AutoencoderConfig(z_channels=4, ch=8, decoder_ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=4)
    save_autoencoder(AutoEncoder(cfg), tmp_path / "runs" / "photos", layout="diffusers")
    pipe = types.SimpleNamespace(vae=AutoencoderKL(block_out_channels=(32,)))
    norm, conv = torch.nn.GroupNorm(32, 64, eps=1e-6), torch.nn.Conv2d(64, 64, 3, padding=1)
    given = {"pipe": pipe, "norm": norm, "conv": conv, "step": 1}
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 3
    for snippet, x in zip(snippets, (None, torch.randn(1, 64, 16, 16), torch.rand(1, 3, 32, 32)), strict=True):
        exec(compile(snippet, "README.md", "exec"), {**given, "x": x})
    assert (tmp_path / "ae.safetensors").is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_recipe_tables_are_those_of_the_results():
    import recipe

    results, page = json.loads(recipe.RESULTS.read_text()), recipe.PAGE.read_text()
    for name, table in (("rows", recipe.rows_table(results)), ("phases", recipe.phases_table(results))):
        assert f"<!-- {name} -->\n{table}\n{recipe.machine(results)}<!-- /{name} -->" in page, name


def test_reliability_table_is_that_of_the_last_soak():
    """And every reliability test is in it"""
    make_reliability = script("make_reliability")
    results, page = json.loads(make_reliability.RESULTS.read_text()), make_reliability.PAGE.read_text()
    assert make_reliability.fill(page, results) == page
    written = "".join(path.read_text() for path in (ROOT / "tests" / "reliability").glob("test_*.py"))
    promising = re.findall(r"def (test_\w+)\([^)]*\bsoak\b", written)
    ran = {row["test"].split("::")[1].split("[")[0] for row in results["rows"]}
    assert set(promising) - ran == set() and all(row["passed"] and row["promise"] for row in results["rows"])


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


def test_step_table_is_that_of_the_results():
    import compare_flow

    results = json.loads((ROOT / "benchmarks/results/flow-amd-epyc.json").read_text())
    assert f"<!-- step -->\n{compare_flow.table(results)}<!-- /step -->" in (ROOT / "docs/flow.md").read_text()


def test_comparison_tables_are_those_of_the_results(make_comparison):
    page = (ROOT / "docs/compare.md").read_text()
    marks = [(m["preset"], m["what"]) for m in make_comparison.MARKED.finditer(page)]
    assert len(marks) == page.count("<!-- ") / 2 and ("toy", "triangle") in marks
    assert make_comparison.fill(page) == page


def test_prose_about_the_comparison_has_no_number_of_its_own(make_comparison):
    """Figures in the text of the toy run stand in its tables, too."""
    page = (ROOT / "docs/compare.md").read_text()
    section = page[page.index("## Toy") :]
    prose = make_comparison.MARKED.sub("", section)
    written = "".join(m["body"] for m in make_comparison.MARKED.finditer(section))
    numbers = [n.rstrip(".") for n in re.findall(r"(?<![\w.])-?\d+\.\d+", prose)]
    assert [n for n in numbers if n not in written] == []


def test_comparison_results_follow_from_their_cells():
    """The committed summaries are what the committed rows say"""
    from train.compare_rows import rows_from_csv
    from train.compare_summary import tables

    for path in (ROOT / "benchmarks/results").glob("comparison-*.json"):
        summary, found = json.loads(path.read_text()), tables(rows_from_csv(path.with_suffix(".csv")))
        assert summary["verdicts"] == found["verdicts"] and summary["order"] == found["order"], path.name
        for name, best in found["best"].items():
            for label, setting in best.items():
                assert summary["best"][name][label]["fd"] == pytest.approx(setting["fd"], rel=1e-5)
                assert summary["best"][name][label]["cell"] == setting["cell"]
        for committed, test in zip(summary["findings"], found["findings"], strict=True):
            assert committed["n"] == test["n"]
            assert committed["differences"] == pytest.approx(test["differences"], rel=1e-5, abs=1e-9)
        for name, factors in found["sensitivity"].items():
            for factor, change in factors.items():
                percent = change["percent"]  # None of a factor with one value
                assert summary["sensitivity"][name][factor]["percent"] == (percent and pytest.approx(percent, rel=1e-5))


def test_comparison_is_copied_and_its_page_filled(make_comparison, tmp_path):
    import study

    (tmp_path / "docs").mkdir()
    rows = study.study_rows(names=("flux.2", "flux.2-nosem"), shifts=(1.0, 2.95), repas=("none",), checkpoints=1)
    folder = study.write_study(tmp_path / "run", rows)
    page = "".join(
        f"<!-- toy {what} -->\nNot run yet.\n<!-- /toy {what} -->\n"
        for what in (*make_comparison.TABLES, *make_comparison.SENTENCES, "pictures")
    )
    assert make_comparison.fill(page, tmp_path) == page
    assert make_comparison.copy_figures(folder, tmp_path) == "toy"
    filled = make_comparison.fill(page, tmp_path)
    assert make_comparison.fill(filled, tmp_path) == filled and "Not run yet" not in filled
    assert "12 of 12 models are done." in filled and "| flux.2 | 4.30 |" in filled
    assert "| (a) wide and semantic" in filled and "PSNR of flux.2 less that of flux.2-nosem is -0.20 dB" in filled
    for target in re.findall(r"\]\(([^)]+)\)", filled):
        assert (tmp_path / "docs" / target).is_file(), target
    assert len(list((tmp_path / "docs").glob("comparison-toy-*"))) == 4
    header = json.loads((folder / "comparison.json").read_text())
    header["config"]["weights"] = ["flux.2=/home/someone/runs/mine"]
    (folder / "comparison.json").write_text(json.dumps(header))
    assert make_comparison.copy_figures(folder, tmp_path, "longer") == "longer"
    longer = json.loads((tmp_path / "benchmarks/results/comparison-longer.json").read_text())
    assert longer["config"]["weights"] == ["flux.2=mine"]  # no folder of anybody's machine
    committed = json.loads((tmp_path / "benchmarks/results/comparison-toy.json").read_text())
    assert "command" not in committed["environment"] and committed["environment"]["commit"] in filled
    changed = filled.replace("| 4.30 |", "| 4.31 |")
    assert changed != filled and make_comparison.fill(changed, tmp_path) == filled
    with pytest.raises(ValueError, match="expected one of triangle, .* in the mark of toy, got 'nonsense'"):
        make_comparison.fill("<!-- toy nonsense -->\n<!-- /toy nonsense -->", tmp_path)
    for path in (folder / "results").glob("*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="expected a comparison with models that are done"):
        make_comparison.copy_figures(folder, tmp_path)
