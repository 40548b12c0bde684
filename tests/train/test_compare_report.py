"""A comparison's report: numbers of a made-up study have closed forms, and what is missing is said."""

import json
import math

import numpy as np
import pytest
import study

from flux2.images import load_image
from train.compare_findings import Models, findings, judge, verdicts
from train.compare_plots import LOOKS, looks, number, triangle_axes
from train.compare_report import write_comparison_report
from train.compare_rows import ORDER, PUBLISHED, cell_id, in_order, pairs_alike, read_comparison, rows_from_csv, slope
from train.compare_summary import CHOICES, best_setting, heat_map, sensitivity, summarise, tables
from train.compare_tables import best_table, sensitivity_table, state, triangle_table

ROWS = study.study_rows(checkpoints=2)
SHORT = {"names": ("flux.2", "flux.2-nosem"), "shifts": (1.0, 2.95, 6.93), "checkpoints": 2}


def of(name, rows=ROWS):
    return [r for r in rows if r.autoencoder == name and r.nimg == 4000]


def tests_of(found, finding, measure, **fields):
    return [
        t
        for t in found
        if (t["finding"], t["measure"]) == (finding, measure) and all(t[k] == v for k, v in fields.items())
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two seeds with noise, and its report."""
    rows = study.study_rows(shifts=(1.0, 2.95, 6.93), seeds=2, checkpoints=2, noise=0.05)
    folder = study.write_study(tmp_path_factory.mktemp("study"), rows)
    return folder, write_comparison_report(folder), rows


@pytest.mark.parametrize("name", study.CHANNELS)
def test_best_setting_is_the_optimum(name):
    best = tables(ROWS)["best"][name]
    optimum = {"law": "logit_normal", "train_shift": study.TRAIN[name], "sampling_shift": study.SAMPLING[name]}
    for label, repa in (("best", "hog"), ("best with REPA", "hog"), ("best without REPA", "none")):
        assert {k: best[label][k] for k in optimum} == optimum and best[label]["repa"] == repa
        assert best[label]["fd"] == pytest.approx(study.LEVEL[name] * study.REPA[repa])
        assert best[label]["velocity"] == pytest.approx(0.05 * study.LEVEL[name] * study.REPA[repa])
    assert best["best uniform without REPA"]["fd"] == pytest.approx(1.3 * study.LEVEL[name])
    assert best["uniform, both shifts 1"]["fd"] == pytest.approx(study.fd_of(name, "uniform", 1.0, 1.0, "none"))
    assert best["best"]["cell"] == f"{name}-logit_normal-{study.TRAIN[name]:.2f}-hog-0"
    edge = [
        kind for kind, at in (("train", study.TRAIN[name]), ("sampling", study.SAMPLING[name])) if at in (1.0, 6.93)
    ]
    assert best["best"]["edge"] == edge


def test_best_of_seeds_is_by_their_mean():
    fields = {"autoencoder": "sd", "channels": 16, "repa": "none", "nimg": 1, "sampling_shift": 1.0, "velocity": 0.5}
    steady, lucky = ({"law": law, "train_shift": 1.0, **fields} for law in ("logit_normal", "uniform"))
    rows = [study.Row(seed=i, fd=fd, **steady) for i, fd in enumerate((3.0, 3.5))]
    rows += [study.Row(seed=i, fd=fd, **lucky) for i, fd in enumerate((1.0, 9.0))]
    best = best_setting(rows)
    assert (best["law"], best["fd"], best["seeds"]) == ("logit_normal", 3.25, 2)
    assert best["fd_error"] == pytest.approx(0.5 / 2) and best["cell"].endswith("-none-0")
    assert best_setting([]) is None
    # of one seed more of a bad setting nothing changes
    assert best_setting([*rows, study.Row(seed=2, fd=4.0, **lucky)])["law"] == "logit_normal"


def test_earlier_checkpoints_do_not_count():
    low = [study.Row(**{**vars(r), "fd": 1e-3}) for r in ROWS if r.nimg == 2000]
    last = [r for r in ROWS if r.nimg == 4000]
    assert tables(last + low)["best"] == tables(last)["best"] and findings(last + low) == findings(last)
    curve = tables(low + last)["curves"]["sd"]["best without REPA"]
    assert [point[0] for point in curve] == [2000, 4000] and curve[0][1] == 1e-3


@pytest.mark.parametrize("name", study.CHANNELS)
def test_sensitivity_is_the_change_from_best_to_worst(name):
    plain = [r for r in of(name) if r.repa == "none"]
    whole = {factor: sensitivity(plain, factor, cutoff=1e9) for factor in ("law", "train_shift", "sampling_shift")}
    assert whole["law"]["percent"] == pytest.approx(30.0) and whole["law"]["settings"] == 25
    for factor, best in (("train_shift", study.TRAIN), ("sampling_shift", study.SAMPLING)):
        farthest = max(abs(math.log(s / best[name])) for s in study.SHIFTS)
        change = math.expm1(study.CURVE[factor.partition("_")[0]] * farthest**2)
        assert whole[factor]["percent"] == pytest.approx(100 * change) and whole[factor]["settings"] == 15
    assert all(found["dropped"] == 0 and found["of"] == 75 for found in whole.values())


def test_sensitivity_leaves_out_what_is_far_from_the_best():
    plain = [r for r in of("sd") if r.repa == "none"]
    limit = 2 * min(r.fd for r in plain)
    found = sensitivity(plain, "train_shift", cutoff=2.0)
    assert found["dropped"] == sum(r.fd > limit for r in plain) > 0
    changes = []
    for law in study.LAW:
        for s in study.SHIFTS:
            kept = [r.fd for r in plain if (r.law, r.sampling_shift) == (law, s) and r.fd <= limit]
            changes += [max(kept) / min(kept) - 1] if len(kept) > 1 else []
    assert found["percent"] == pytest.approx(100 * np.mean(changes)) and found["settings"] == len(changes)
    assert sensitivity([], "law") == {"percent": None, "settings": 0, "dropped": 0, "of": 0}
    assert sensitivity(plain[:1], "law")["percent"] is None


def test_heat_map_is_by_sampling_shift_then_train_shift():
    rows = [r for r in of("flux.1") if r.repa == "none" and not (r.train_shift == 1.0 and r.sampling_shift == 6.93)]
    found = heat_map(rows, "plateau_logit_normal")
    assert found["train_shifts"] == found["sampling_shifts"] == list(study.SHIFTS)
    assert found["fd"][4][0] is None
    assert found["fd"][0][4] == pytest.approx(study.fd_of("flux.1", "plateau_logit_normal", 6.93, 1.0, "none"))
    assert found["fd"][2][1] == pytest.approx(1.1 * study.LEVEL["flux.1"])


def test_judge():
    found = judge([1.0, 2.0, 3.0, 4.0])
    assert found["mean"] == 2.5 and found["standard_error"] == pytest.approx(math.sqrt(5 / 3) / 2) and found["n"] == 4
    assert found["margin"] == pytest.approx(3.182446 * found["standard_error"], rel=1e-6)  # Student, 3 degrees
    assert found["verdict"] == "shows" and judge([-1.0, -2.0, -3.0, -4.0])["verdict"] == "the opposite shows"
    assert judge([0.1, 2.0, 3.0, 4.0, -1.0])["verdict"] == "does not show"
    assert judge([20.0, 23.0])["verdict"] == "shows" and judge([20.0, 29.0])["verdict"] == "does not show"  # 12.7 s.e.
    many = judge([1.0, 2.0] * 100)
    assert many["margin"] == 2 * many["standard_error"]
    assert judge([])["verdict"] == judge([5.0])["verdict"] == "no data" and judge([5.0])["mean"] == 5.0
    assert judge([0.0, 0.0])["verdict"] == judge([1e-14, 1e-14])["verdict"] == "does not show"


def test_judge_of_at_least():
    assert judge([0.0, 0.0], at_least=True)["verdict"] == "shows"
    assert judge([0.0, 5.0, 0.0], at_least=True)["verdict"] == "shows"
    assert judge([-0.1, 0.2, 0.0], at_least=True)["verdict"] == "does not show"
    assert judge([-1.0, -1.1, -0.9], at_least=True)["verdict"] == "the opposite shows"


def test_findings_of_the_known_study():
    found = findings(ROWS)
    for measure, n in (("fd", 30), ("velocity", 30), ("fd_tuned", 6)):
        (a,) = tests_of(found, "a", measure)
        assert a["n"] == n and a["mean"] == pytest.approx(100 * math.log(2)) and a["verdict"] == "shows"
    for name in study.CHANNELS:
        for law, ratio in (("logit_normal", 1.3), ("plateau_logit_normal", 1.3 / 1.1)):
            for measure, n in (("fd", 10), ("velocity", 10), ("fd_tuned", 2)):
                (d,) = tests_of(found, "d", measure, autoencoder=name, factor=law)
                assert d["n"] == n and d["mean"] == pytest.approx(100 * math.log(ratio)) and d["verdict"] == "shows"
        for measure, n in (("fd", 15), ("velocity", 15), ("fd_tuned", 3)):
            (e,) = tests_of(found, "e", measure, autoencoder=name)
            assert e["n"] == n and e["mean"] == pytest.approx(-100 * math.log(0.9)) and e["verdict"] == "shows"
        (c,) = tests_of(found, "c", "fd", autoencoder=name)
        assert c["n"] == 6 and c["differences"] == pytest.approx(
            [math.log(study.SAMPLING[name] / study.TRAIN[name])] * 6
        )
    (c,) = tests_of(found, "c", "fd", autoencoder=None)
    gaps = [math.log(study.SAMPLING[name] / study.TRAIN[name]) for name in study.CHANNELS for _ in study.REPA]
    assert c["n"] == 10 and sorted(c["differences"]) == pytest.approx(sorted(gaps))
    channels = np.log([study.CHANNELS[n] for n in study.CHANNELS])
    expected = np.polyfit(channels, np.log([study.TRAIN[n] for n in study.CHANNELS]), 1)[0]
    for measure in ("fd", "velocity"):
        (b,) = tests_of(found, "b", measure)
        assert b["n"] == 6 and b["differences"] == pytest.approx([expected] * 6) and b["verdict"] == "shows"
    words = verdicts(found)
    assert words["a"]["fd"] == "shows (+69.3 ± 0.0%)" and words["b"]["fd"].startswith(f"shows (slope {expected:+.2f}")
    assert words["d"]["fd"] == words["e"]["velocity"] == "shows for 5 of 5 autoencoders"


def test_findings_that_do_not_hold(monkeypatch):
    monkeypatch.setattr(study, "REPA", {"none": 1.0, "hog": 1.2})
    monkeypatch.setattr(study, "LAW", {"uniform": 1.0, "logit_normal": 1.0, "plateau_logit_normal": 1.5})
    monkeypatch.setattr(study, "SAMPLING", dict.fromkeys(study.CHANNELS, 1.0))
    monkeypatch.setattr(study, "TRAIN", dict.fromkeys(study.CHANNELS, 2.95))
    found = findings(study.study_rows(checkpoints=1))
    words = verdicts(found)
    others = ", ".join(ORDER)
    assert words["e"]["fd"] == f"shows for 0 of 5 autoencoders, the opposite for {others}"
    assert words["c"]["fd"].startswith(f"shows for 0 of 5 autoencoders, the opposite for {others}; all, ")
    assert words["d"]["fd"] == "shows for 0 of 5 autoencoders"  # logit-normal neither way
    assert words["b"]["fd"].startswith("does not show")
    assert {t["verdict"] for t in tests_of(found, "d", "fd", factor="plateau_logit_normal")} == {"the opposite shows"}
    assert {t["verdict"] for t in tests_of(found, "d", "fd", factor="logit_normal")} == {"does not show"}


def test_pairs_need_both_sides():
    rows = [r for r in of("sd") if not (r.repa == "hog" and r.train_shift > 2)]
    (e,) = tests_of(findings(rows), "e", "fd")
    assert e["n"] == 3 * 2
    models = Models([r for r in rows if r.repa == "none" or r.sampling_shift == 1.78])  # in common: one sampling shift
    assert models.pairs("repa", "hog", "none")["fd"] == pytest.approx([-100 * math.log(0.9)] * 6)
    # optima are of whole grids alone: with a train shift missing there is none
    holes = [r for r in of("sd") if not (r.law == "uniform" and r.train_shift == 4.63)]
    (c,) = tests_of(findings(holes), "c", "fd", autoencoder="sd")
    assert c["n"] == 4
    assert all(t["verdict"] == "no data" for t in findings(of("sd")) if t["finding"] in "ab")
    holes = [
        r for r in ROWS if not ((r.autoencoder, r.law, r.train_shift) == ("sd", "uniform", 1.0) and r.nimg == 4000)
    ]
    names = [n for n in study.CHANNELS if n != "sd"]
    without = slope([study.CHANNELS[n] for n in names], [study.TRAIN[n] for n in names])
    (b,) = tests_of(findings(holes), "b", "fd")
    assert b["n"] == 6 and sum(d == pytest.approx(without) for d in b["differences"]) == 2
    unknown = [study.Row(**{**vars(r), "channels": 0}) if r.autoencoder == "sd" else r for r in ROWS]
    assert tests_of(findings(unknown), "b", "fd")[0]["differences"] == pytest.approx([without] * 6)
    assert verdicts(findings([]))["a"] == dict.fromkeys(("fd", "fd_tuned", "velocity"), "no data")


def test_noise_is_in_the_error_of_pairs():
    rows = study.study_rows(names=("sd",), seeds=3, checkpoints=1, noise=0.1)
    (e,) = tests_of(findings(rows), "e", "fd")
    assert e["n"] == 45
    assert e["standard_error"] == pytest.approx(100 * 0.1 * math.sqrt(2 / 45), rel=0.4)
    assert abs(e["mean"] + 100 * math.log(0.9)) < 4 * e["standard_error"]
    (tuned,) = tests_of(findings(rows), "e", "fd_tuned")
    best = {
        (law, repa, seed): min(r.fd for r in rows if (r.law, r.repa, r.seed) == (law, repa, seed))
        for law in study.LAW for repa in study.REPA for seed in range(3)
    }  # fmt: skip
    expected = [100 * math.log(fd / best[law, "hog", seed]) for (law, repa, seed), fd in best.items() if repa == "none"]
    assert sorted(tuned["differences"]) == pytest.approx(sorted(expected)) and tuned["n"] == 9


def test_rows_helpers():
    assert in_order(["x", "rae", "sd", "flux.2-nosem", "flux.2", "sd"]) == ["sd", "flux.2", "flux.2-nosem", "rae", "x"]
    assert cell_id("a/b", "uniform", 1, "dinov2-b", 3) == "a_b-uniform-1.00-dinov2-b-3"
    assert slope([16, 64, 768], [1, 2, math.sqrt(48)]) == pytest.approx(0.5)
    assert math.isnan(slope([128, 128], [1, 2])) and math.isnan(slope([], []))
    assert pairs_alike(["a", "b", "c"], ["b", "a", "x", "c"]) == (2, 3)
    assert [number(v) for v in (0.01234, 1.2345, 123.45, 12345.6, 0, None, math.nan, 1.5e7)] == [
        "0.0123", "1.23", "123", "12,346", "0", "-", "-", "1.5e+07",
    ]  # fmt: skip


def test_published_figures_are_the_articles():
    """One by one against the text that the article's changes to FLUX.2 are given in."""
    gfid, psim = ({n: row[k] for n, row in PUBLISHED.items()} for k in ("gfid", "psim"))
    changes = {"flux.1": (-63.5, -21.1), "sd": (-52.1, -72.0), "rae": (19.3, -84.1)}
    for name, (fid, perceptual) in changes.items():
        assert 100 * (gfid["flux.2"] / gfid[name] - 1) == pytest.approx(fid, abs=0.06)
        assert 100 * (psim["flux.2"] / psim[name] - 1) == pytest.approx(perceptual, abs=0.06)


def test_summary_reads_what_was_written(finished):
    folder, _, rows = finished
    assert sorted(map(str, read_comparison(folder).rows)) == sorted(map(str, rows_from_csv(folder / "cells.csv")))
    assert sorted(map(str, rows)) == sorted(map(str, rows_from_csv(folder / "cells.csv")))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == summarise(folder)
    json.dumps(summary, allow_nan=False)
    assert state(summary) == "180 of 180 models are done."
    assert list(summary["autoencoders"]) == list(summary["best"]) == list(ORDER)
    assert set(summary["best"]["sd"]) == set(CHOICES)
    assert summary["grid"]["law"] == list(study.LAW) and summary["last_nimg"] == 4000
    assert summary["models"] == {"planned": 180, "done": 180, "failed": 0, "missing": 0, "not_finite": 0}
    assert summary["published"]["pairs"] == 6
    assert summary["order"] == sorted(ORDER, key=lambda n: summary["best"][n]["best"]["fd"])


def test_page_shows_tables_and_pictures(finished):
    folder, page, _ = finished
    text, summary = page.read_text(), summarise(folder)
    for header, rows in (triangle_table(summary), best_table(summary), sensitivity_table(summary)):
        for row in (header, *rows):
            assert len(row) == len(header)
            for cell in row:
                assert f">{cell}<" in text, cell
    assert text.count("<img ") == 4 + 5 + 5 and "no picture" not in text
    order = ["Learnability, quality", "against images", "Train shift and", "Sensitivity", "Best models", "findings"]
    at = [text.index(f"{heading}") for heading in [*order, "Reconstructions</h2>", "Samples of", "Protocol</h2>"]]
    assert at == sorted(at)
    assert (
        "http" not in text.replace("https", "http").replace("data:image/png", "").split("<h2>Config")[0].split(",")[0]
    )
    for name in ("triangle", "curves", "heat_maps", "findings"):
        image = load_image(folder / "figures" / f"{name}.png")
        assert image.shape[1] == 1430 and 0.02 < (image < 250).any(2).mean() < 0.9


def test_triangle_axes_run_from_worst_to_best(finished):
    axes = triangle_axes(summarise(finished[0]))
    assert axes["compression"].place(16) == 1 and axes["compression"].place(192) == 0
    assert axes["compression"].place(math.sqrt(16 * 192)) == pytest.approx(0.5)
    assert axes["quality"].place(18.9) == 0 and axes["quality"].place(30.4) == 1
    assert axes["rfd"].place(0.7) == 1 and axes["compression"].ticks() == [16, 64, 128, 192]
    best = max(axes["learnability"].values, key=lambda n: axes["learnability"].place(axes["learnability"].values[n]))
    assert best == "flux.2"
    assert len({looks(n) for n in ORDER}) == len({c for c, _ in LOOKS.values()}) == 5 and looks("x") == looks("x")


def test_partial_comparison(tmp_path):
    folder = study.write_study(tmp_path, study.study_rows(**SHORT), pictures=False)
    results = sorted((folder / "results").glob("*.json"))
    assert len(results) == 36
    for path in results[:6]:
        path.unlink()
    failed = json.loads(results[6].read_text()) | {"status": "failed", "error": "Traceback\nRuntimeError: <b>lost</b>"}
    results[6].write_text(json.dumps(failed))
    results[7].write_text('{"status": "done", "cell"')
    results[8].write_text('{"status": "done"}')
    odd = json.loads(results[9].read_text())
    odd["checkpoints"][-1]["fd"]["1.00"] = math.nan
    odd["checkpoints"][-1]["fd"]["2.95"] = None
    results[9].write_text(json.dumps(odd))
    text = write_comparison_report(folder).read_text()
    assert "27 of 36 models are done, 3 failed, 6 are not there yet; 2 figures are not finite and left out." in text
    assert "RuntimeError: &lt;b&gt;lost&lt;/b&gt;" in text and "<b>lost" not in text
    assert text.count("its result cannot be read") == 2 and text.count("no picture") == 4
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"]["flux.2"]["best without REPA"]["fd"] == pytest.approx(4.4)  # plateau: the first six are gone


def test_comparison_without_results(tmp_path):
    folder = study.write_study(tmp_path, study.study_rows(**SHORT), pictures=False)
    for path in (folder / "results").glob("*.json"):
        path.unlink()
    text = write_comparison_report(folder).read_text()
    assert "0 of 36 models are done, 36 are not there yet." in text and text.count("Nothing to draw yet.") == 3
    (folder / "comparison.json").write_text('{"preset": "toy"}')
    for path in (folder / "autoencoders").glob("*.json"):
        path.unlink()
    text = write_comparison_report(folder).read_text()
    assert "0 models are done." in text and text.count("Nothing to draw yet.") == 4
    assert not list((folder / "figures").glob("*.png"))


def test_one_autoencoder_of_one_setting(tmp_path):
    rows = study.study_rows(names=("sd",), laws=("uniform",), shifts=(1.0,), repas=("none",), checkpoints=1)
    folder = study.write_study(tmp_path, rows, pictures=False)
    assert "1 of 1 models are done." in write_comparison_report(folder).read_text()
    assert json.loads((folder / "summary.json").read_text())["best"]["sd"]["best"]["edge"] == []


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a comparison, with comparison.json"):
        write_comparison_report(tmp_path)
    (tmp_path / "comparison.json").write_text("[1]")
    with pytest.raises(ValueError, match="comparison.json: expected a JSON object, got list"):
        write_comparison_report(tmp_path)
    folder = study.write_study(tmp_path / "a", study.study_rows(**SHORT), pictures=False)
    (folder / "figures").write_text("in the way")
    with pytest.raises(OSError):
        write_comparison_report(folder)
    assert not (folder / "report.html").exists()
    (tmp_path / "cells.csv").write_text("autoencoder,law\nsd,uniform\n")
    with pytest.raises(ValueError, match="missing: channels, train_shift, repa"):
        rows_from_csv(tmp_path / "cells.csv")
