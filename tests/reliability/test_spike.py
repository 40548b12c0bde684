"""--rollback: where the loss explodes, the run goes back to the checkpoint before and on with other samples."""

import pytest
import torch
from toy import assert_same_bits, few_pixels, run, saved

from train import vae_trainer
from train.data import CropBatches
from train.guards import Spike, SpikeWatch
from train.loop import read_log
from train.run import MOST_ROLLBACKS

FLAGS = ("--steps", "200", "--save-every", "10", "--rollback", "3", "--align-weight", "0", "--learn-logvar")


@pytest.fixture
def bad_items(monkeypatch):
    """Items of the data set whose batches are black, and black batches a loss of a thousand times"""
    few_pixels(monkeypatch)
    items, plain, l1 = set(), CropBatches.read, vae_trainer.PIXEL_LOSSES["l1"]

    def read(self, item):
        samples = plain(self, item)
        return samples._replace(crops=samples.crops * (item not in items))

    monkeypatch.setattr(CropBatches, "read", read)
    monkeypatch.setitem(vae_trainer.PIXEL_LOSSES, "l1", lambda a, b: l1(a, b) * (1000.0 if (b == -1).all() else 1.0))
    return items


def records(folder, key):
    return [r for r in read_log(folder / "log.jsonl") if key in r]


def test_goes_back_and_on_with_other_samples(soak, tmp_path, bad_items, capsys):
    bad_items |= {63, 64}
    flags = (*FLAGS, "--stop-after", "90")
    assert run(tmp_path, *flags, "--name", "whole") == 0
    (back,) = records(tmp_path / "whole", "rolled_back_from")
    assert (back["step"], back["rolled_back_from"], back["data_offset"], back["rollbacks"]) == (60, 70, 10, 1)
    error = capsys.readouterr().err
    assert "more than 3 times its median" in error and "and on with other samples (1 of at most" in error
    losses = records(tmp_path / "whole", "loss")
    assert [r["step"] for r in losses] == list(range(10, 91, 10)) and max(r["recon"] for r in losses) < 5
    for stop in ("75", "90"):  # a run that was interrupted after going back has the same samples and weights
        assert run(tmp_path, *FLAGS, "--stop-after", stop, "--resume", "auto", "--name", "parts") == 0
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    soak.found("A loss spike: back to the checkpoint before, on with other samples; resumed to the same bits", spikes=1)


def test_updates_that_stay_broken_go_back_too_and_not_for_ever(tmp_path, bad_items, monkeypatch, capsys):
    bad_items |= set(range(23, 10_000))
    l1 = vae_trainer.PIXEL_LOSSES["l1"]
    monkeypatch.setitem(
        vae_trainer.PIXEL_LOSSES, "l1", lambda a, b: l1(a, b) * (float("nan") if (b == -1).all() else 1.0)
    )
    assert run(tmp_path, *FLAGS, "--patience", "5", "--name", "x") == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert (
        "updates of the autoencoder in a row were skipped" in last
        and f"after going back {MOST_ROLLBACKS} times" in last
    )
    assert "step_00000020 is whole" in last and "Traceback" not in error


def test_without_a_checkpoint_from_before_it_stops(tmp_path, bad_items, capsys):
    bad_items |= {63}
    assert run(tmp_path, *FLAGS, "--save-every", "200", "--name", "x") == 2
    assert "no checkpoint from before it to go back to: save more often" in capsys.readouterr().err


def test_watch_knows_its_median_first_and_nothing_is_a_spike_without_a_factor():
    watch = SpikeWatch(2.0)
    for loss in (50.0, 1.0, 1.0, 1.2, 1.0, 1.9):
        watch.observe(loss)
    with pytest.raises(Spike, match="the loss is 2.5, more than 2 times its median 1.1"):
        watch.observe(2.5)
    with pytest.raises(Spike, match="nan"):
        watch.observe(float("nan"))
    watch.forget()
    for loss in (1.0, 1e9, float("nan")):
        watch.observe(loss)
    never = SpikeWatch(0.0)
    for loss in (*torch.ones(9).tolist(), 1e9):
        never.observe(loss)
