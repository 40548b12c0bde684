"""The GPU report at tiny sizes on a CPU, so that it works on a GPU: rows, resuming, missing peers, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from gpu_report import main, with_tables

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--tiny", "--minutes", "60"]
# What the report must do without
OPTIONAL = (
    "tyro",
    "timm",
    "lpips",
    "PIL",
    "skimage",
    "matplotlib",
    "diffusers",
    "transformers",
    "liger_kernel",
    "pytest",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(what a run printed, its JSON's path), in a process without optional packages, kernels interpreted"""
    out = tmp_path_factory.mktemp("report") / "report.json"
    code = (
        f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"import gpu_report\nsys.exit(gpu_report.main({[*TINY, '--out', str(out)]!r}))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout, out


def test_every_section_has_every_row_and_says_on_what(ran):
    said, out = ran
    report = json.loads(out.read_text())
    device = gpu_report.torch.device("cpu")
    for section in gpu_report.SECTIONS:
        rows = report["sections"][section]
        assert list(rows) == list(gpu_report.rows_of(section, device, True)) and all(row["ok"] for row in rows.values())
    assert {row["backend"] for row in report["sections"]["correctness"].values()} == {"triton"}
    env = report["environment"]
    assert env["tiny"] and env["sources"] == gpu_report.sources() and env["packages"]["torch"]
    assert {"commit", "device", "driver", "cuda", "threads", "python"} <= env.keys()
    assert "27 of 27 comparisons with fp64 pass" in said and "| decode 8x8 batch 1 |" in said


@pytest.mark.gpu
def test_kernels_are_right_at_full_size():
    """The report's correctness section, on the GPU that the suite has."""
    for name, (call, _) in gpu_report.rows_of("correctness", gpu_report.torch.device("cuda"), False).items():
        assert call()["backend"] == "triton", name


@pytest.mark.gpu
def test_a_cuda_graph_repeats_its_call():
    import whole_models

    x = gpu_report.torch.ones(4, device="cuda")
    replay = whole_models.graphed(lambda: x * 2)
    assert replay().tolist() == [2.0] * 4
    x.fill_(3)
    assert replay().tolist() == [6.0] * 4


def test_rows_hold_every_contestant_or_why_it_is_missing(ran):
    sections = json.loads(ran[1].read_text())["sections"]
    row = sections["kernels"]["group_norm_silu 1x8x6x6 fp32 forward"]
    assert {"ours", "eager NCHW", "eager channels_last", "compiled channels_last", "copy"} == set(row["contestants"])
    assert row["missing"] == {"Liger NCHW": "its kernels need a GPU"}
    assert row["bytes"] == 3 * 8 * 36 * 4 and row["contestants"]["copy"]["percent_of_copy"] == 100
    for c in row["contestants"].values():
        assert c["gb_per_s"] == pytest.approx(row["bytes"] / c["ms"] / 1e6)
    row = sections["autoencoder"]["decode 8x8 batch 1"]
    assert {"ours", "plain NCHW", "plain channels_last"} == set(row["contestants"])
    compiled = sections["autoencoder"]["decode 8x8 batch 1, compiled"]["contestants"]
    assert {"ours", "plain NCHW", "ours, compiled", "plain channels_last, compiled"} == set(compiled)
    assert "diffusers cannot be imported" in row["missing"]["diffusers channels_last"]
    assert all(c["error"] <= 0.05 for c in row["contestants"].values())


def test_a_second_run_measures_nothing_and_other_sources_start_anew(ran, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    out.write_bytes(ran[1].read_bytes())
    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: dict.fromkeys(rows, (None, 0)))
    monkeypatch.setattr(gpu_report, "environment", lambda device: dict(saved["environment"]))
    saved = json.loads(out.read_text())
    rows = saved["sections"]["correctness"]
    assert main([*TINY, "--only", "correctness", "--out", str(out)]) == 0
    assert "going on with" in capsys.readouterr().out and json.loads(out.read_text()) == saved
    monkeypatch.setattr(gpu_report, "sources", lambda: "other")
    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: {})
    assert main([*TINY, "--out", str(out)]) == 0
    assert "starting anew" in capsys.readouterr().out
    assert not any(json.loads(out.read_text())["sections"].values())


def test_nothing_is_timed_while_a_kernel_is_wrong(tmp_path, monkeypatch, capsys):
    def broken():
        raise AssertionError("error 1.0, eager 0.1, floor 0.0")

    fine = {"good": (lambda: {}, 0)}
    rows = {"correctness": {"bad one": (broken, 0), **fine}, "kernels": fine, "updates": fine, "autoencoder": fine}
    monkeypatch.setattr(gpu_report, "rows_of", lambda section, *a: rows[section])
    monkeypatch.setattr(gpu_report, "markdown", lambda report: "")
    out = tmp_path / "report.json"
    assert main([*TINY, "--out", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == ["correctness"] and sections["correctness"]["good"]["ok"]
    assert sections["correctness"]["bad one"]["why"] == "error 1.0, eager 0.1, floor 0.0"
    said = capsys.readouterr()
    assert "1 wrong; nothing is timed before they are right: bad one" in said.err
    rows["correctness"]["bad one"] = fine["good"]  # mended: failed rows are measured again
    assert main([*TINY, "--out", str(out)]) == 0


def test_a_row_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: {"bad": (broken, 0), "good": (lambda: {}, 0)})
    monkeypatch.setattr(gpu_report, "markdown", lambda report: "")
    out = tmp_path / "report.json"
    assert main([*TINY, "--only", "kernels", "--out", str(out)]) == 1
    assert "1 rows failed: bad" in capsys.readouterr().err
    rows = json.loads(out.read_text())["sections"]["kernels"]
    assert rows["good"]["ok"] and rows["bad"]["why"] == "CUDA error: an illegal memory access"


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: {"bad": (broken, 0), "never": (lambda: {}, 0)})
    monkeypatch.setattr(gpu_report, "markdown", lambda report: "")
    monkeypatch.setattr(gpu_report, "answers", lambda device: False)
    out = tmp_path / "report.json"
    assert main([*TINY, "--only", "kernels", "--out", str(out)]) == 1
    assert list(json.loads(out.read_text())["sections"]["kernels"]) == ["bad"]
    assert "the device no longer answers" in capsys.readouterr().err


def test_out_of_time_is_said_and_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: {"quick": (lambda: {}, 0), "slow": (lambda: {}, 999)})
    out = tmp_path / "report.json"
    assert main([*TINY, "--only", "correctness", "--minutes", "1", "--out", str(out)]) == 3
    assert "1 rows left" in capsys.readouterr().out
    assert list(json.loads(out.read_text())["sections"]["correctness"]) == ["quick"]


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--device", "cpu"], None, "expected --tiny with it"),
        (TINY, b'{"environment": ', "expected a report of this program or no file"),
        (TINY, b"[]", "expected a report of this program or no file"),
        ([*TINY, "--only", "speed"], None, "invalid choice: 'speed'"),
        ([*TINY, "--minutes", "nan"], None, "--minutes: expected a positive number, got nan"),
    ],
)
def test_bad_input_is_named_and_touches_nothing(arguments, content, message, tmp_path, capsys):
    out = tmp_path / "report.json"
    if content:
        out.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(out)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert out.read_bytes() == content if content else not out.exists()


def test_tiny_sizes_are_not_written_among_results(capsys):
    with pytest.raises(SystemExit):
        main(TINY)
    assert "--tiny: expected --out FILE with it" in capsys.readouterr().err


def test_interruption_keeps_rows_and_says_so(tmp_path, monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "rows_of", lambda *a: {"done": (lambda: {}, 0), "cut": (stopped, 0)})
    out = tmp_path / "report.json"
    assert main([*TINY, "--only", "kernels", "--out", str(out)]) == 130
    assert "run again to go on" in capsys.readouterr().err
    assert list(json.loads(out.read_text())["sections"]["kernels"]) == ["done"]


def test_a_damaged_result_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu-bad.json").write_text("{")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        main(["--docs"])
    assert "gpu-bad.json: expected a report of this program" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([*TINY, "--out", str(tmp_path / "file" / "report.json")])
    assert "cannot be written" in capsys.readouterr().err


def test_the_page_holds_the_tables_of_the_committed_results():
    page = gpu_report.DOCS.read_text()
    assert with_tables(page) == page, "python benchmarks/gpu_report.py --docs"
    with pytest.raises(ValueError, match="expected the marks <!-- gpu -->"):
        with_tables("no marks")


def test_tables_are_written_from_reports(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    assert gpu_report.gpu_tables() == "No GPU has run the report yet: no figure is claimed.\n"
    file = tmp_path / "gpu-some.json"
    file.write_bytes(ran[1].read_bytes())
    assert gpu_report.gpu_tables().startswith("No GPU has run")  # tiny: not a result
    file.write_text(ran[1].read_text().replace('"tiny": true', '"tiny": false'))
    table = gpu_report.gpu_tables()
    ms = json.loads(ran[1].read_text())["sections"]["autoencoder"]["decode 8x8 batch 1"]["contestants"]["ours"]["ms"]
    assert "27 of 27 comparisons" in table and f"| decode 8x8 batch 1 | {ms:.4g} ms" in table
