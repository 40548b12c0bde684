"""A run in which something breaks: what is skipped and named, when it stops, what it leaves; and exact resumption."""

import re

import pytest
import torch
from toy import few_pixels, run, saved

from flux2 import load_autoencoder
from flux2.checkpoint_folders import Checkpoints
from train import adversary, vae_trainer
from train.loop import read_log
from train.run import _means

GAN = ["--gan.weight", "0.5", "--gan.width", "8"]
QUIET = ["--align-weight", "0", "--kl-weight", "0"]

pytestmark = pytest.mark.filterwarnings("ignore:LPIPS with a random backbone")


@pytest.fixture(autouse=True)
def small_fits(monkeypatch):
    few_pixels(monkeypatch)


@pytest.fixture
def at_step(monkeypatch):
    """Lets a fault know which step the trainer is in"""
    now = {}
    step = vae_trainer.VaeTrainer.step

    def noted(self, number, batch):
        now["step"] = number
        return step(self, number, batch)

    monkeypatch.setattr(vae_trainer.VaeTrainer, "step", noted)
    return lambda *steps: now["step"] in steps


def break_term(monkeypatch, name, bad, when):
    plain = vae_trainer.PIXEL_LOSSES[name]
    monkeypatch.setitem(vae_trainer.PIXEL_LOSSES, name, lambda a, b: plain(a, b) * (bad if when() else 1.0))


def records(folder, key):
    return [r for r in read_log(folder / "log.jsonl") if key in r]


def assert_finite(folder):
    for name, tensors in saved(folder).items():
        for key, value in tensors.items():
            if name != "discriminator_state.safetensors":
                assert torch.isfinite(value).all(), (name, key)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_term_skips_its_update_and_is_named(tmp_path, monkeypatch, at_step, capsys, bad):
    break_term(monkeypatch, "l1", bad, lambda: at_step(3, 12))
    assert run(tmp_path, *GAN, "--steps", "20", "--stop-after", "14", "--name", "x") == 0
    skipped = records(tmp_path / "x", "skipped")
    assert [(r["step"], r["nimg"], r["skipped"], r["broke"]) for r in skipped] == [
        (4, 8, "autoencoder", ["l1"]),
        (13, 26, "autoencoder", ["l1"]),
    ]
    assert all(len(r["samples"]) == 2 and all(s.endswith((".png", ".jpg")) for s in r["samples"]) for r in skipped)
    error = capsys.readouterr().err
    assert "1 updates of the autoencoder skipped (step 3: l1), 1 in all" in error and "(step 12: l1), 2 in all" in error
    losses = records(tmp_path / "x", "loss")
    assert [r["step"] for r in losses] == [10, 14] and all(abs(r["l1"]) < 10 for r in losses)
    assert_finite(tmp_path / "x")
    steps = saved(tmp_path / "x")["optimiser.safetensors"]
    assert {int(v) for k, v in steps.items() if k.endswith(".step")} == {12}  # of 14, two did not happen


def test_a_broken_gradient_skips_its_update_and_is_named(tmp_path, monkeypatch, at_step):
    generate = vae_trainer.VaeTrainer.generate

    def broken(self, *arguments):
        found = generate(self, *arguments)
        if at_step(2):
            self.ae.encoder.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(vae_trainer.VaeTrainer, "generate", broken)
    assert run(tmp_path, "--steps", "20", "--stop-after", "4", "--name", "x") == 0
    (skipped,) = records(tmp_path / "x", "skipped")
    assert (skipped["step"], skipped["broke"]) == (3, ["gradient of encoder.conv_in.weight"])
    assert_finite(tmp_path / "x")
    assert "grad_norm" in records(tmp_path / "x", "loss")[-1]  # the mean of the steps that have one


def test_a_broken_discriminator_is_skipped_alone(tmp_path, monkeypatch, at_step):
    plain = adversary.discriminator_loss
    broken = [plain, lambda *a: plain(*a) * float("inf")]
    monkeypatch.setattr(adversary, "discriminator_loss", lambda *a: broken[at_step(3)](*a))
    flags = [*GAN, "--gan.norm", "batch", "--gan.lecam", "0.1"]
    assert run(tmp_path, *flags, "--steps", "20", "--stop-after", "6", "--name", "x") == 0
    (skipped,) = records(tmp_path / "x", "skipped")
    assert (skipped["step"], skipped["skipped"], skipped["broke"]) == (4, "discriminator", ["d_loss"])
    assert_finite(tmp_path / "x")
    files = saved(tmp_path / "x")
    for name, count in (("optimiser.safetensors", 6), ("discriminator_optimiser.safetensors", 5)):
        assert {int(v) for k, v in files[name].items() if k.endswith(".step")} == {count}
    assert "gan_diagnosis" in records(tmp_path / "x", "loss")[-1]


def test_too_many_in_a_row_stop_the_run_with_the_weights_of_before(tmp_path, monkeypatch, at_step, capsys):
    assert run(tmp_path, *QUIET, "--steps", "50", "--stop-after", "5", "--name", "before") == 0
    capsys.readouterr()
    break_term(monkeypatch, "laplacian", float("nan"), lambda: at_step(*range(5, 50)))
    flags = ["--steps", "50", "--patience", "3", "--save-every", "50"]
    assert run(tmp_path, *QUIET, *flags, "--name", "x") == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: 5 updates of the autoencoder in a row were skipped; step 9: laplacian, samples \S+\.(png|jpg),"
        r" \S+\.(png|jpg) \(all in \S+log\.jsonl\)\. The weights of before were saved; try a lower --lr or"
        r" --precision fp32",
        last,
    ), last
    assert "Traceback" not in error
    assert Checkpoints(tmp_path / "x" / "checkpoints", keep=9).steps() == [10]
    before, after = saved(tmp_path / "before"), saved(tmp_path / "x")
    for name in ("model.safetensors", "optimiser.safetensors"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert torch.isfinite(load_autoencoder(tmp_path / "x").decoder.conv_out.weight).all()


def test_a_row_that_ended_before_the_log_was_written_stops_it_too(tmp_path, monkeypatch, at_step, capsys):
    break_term(monkeypatch, "l1", float("nan"), lambda: at_step(3, 4, 5))
    assert run(tmp_path, *QUIET, "--steps", "50", "--patience", "3", "--name", "x") == 2
    assert "error: 3 updates of the autoencoder in a row were skipped; step 5: l1" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "x" / "checkpoints", keep=9).steps() == [10]
    assert_finite(tmp_path / "x")


def test_fewer_than_patience_in_a_row_do_not_stop_it(tmp_path, monkeypatch, at_step):
    break_term(monkeypatch, "l1", float("nan"), lambda: at_step(*range(7, 11), *range(12, 16)))
    flags = [*QUIET, "--steps", "50", "--stop-after", "20", "--patience", "5"]
    assert run(tmp_path, *flags, "--name", "x") == 0
    assert len(records(tmp_path / "x", "skipped")) == 8


def test_parameters_that_no_gradient_reaches_are_reported_once(tmp_path, monkeypatch, capsys):
    generate = vae_trainer.VaeTrainer.generate

    def cut(self, *arguments):
        found = generate(self, *arguments)
        self.ae.decoder.mid.block_1.conv2.weight.grad.zero_()
        return found

    monkeypatch.setattr(vae_trainer.VaeTrainer, "generate", cut)
    assert run(tmp_path, "--steps", "50", "--stop-after", "21", "--name", "x") == 0
    (dead,) = records(tmp_path / "x", "dead")
    assert (dead["step"], dead["dead"]) == (10, ["decoder.mid.block_1.conv2.weight"])
    message = "no gradient reaches parameters of the autoencoder: decoder.mid.block_1.conv2.weight\n"
    assert capsys.readouterr().err.count(message) == 1


def test_a_healthy_run_reports_nothing(tmp_path, capsys):
    """Not even in its first step, in which layers that start from zero pass no gradient on"""
    for stop in ("1", "12"):
        assert run(tmp_path, *GAN, "--steps", "50", "--stop-after", stop, "--resume", "auto", "--name", "x") == 0
    assert not records(tmp_path / "x", "dead") and not records(tmp_path / "x", "skipped")
    assert capsys.readouterr().err == ""


def test_means_are_of_the_finite_steps_that_have_a_term():
    window = [{"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, {"a": torch.tensor(float("inf"))}]
    assert _means([*window, {"a": torch.tensor(2.0), "c": torch.tensor(5)}]) == {"a": 1.5, "c": 5.0}
    assert _means([]) == {}
