"""Logs and folders of a run, interruption, the optimiser's state."""

import os
import signal

import pytest
import torch

from train.loop import (
    Interrupt,
    Log,
    choose_device,
    choose_precision,
    latest_run_folder,
    load_optimiser_tensors,
    new_run_folder,
    optimiser_tensors,
    parameters_by_rate,
    read_log,
)


def test_optimiser_state_round_trips_bit_for_bit():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
        model.to(memory_format=torch.channels_last)  # moments come back contiguous from a file
        groups = [{"params": list(model[0].parameters()), "rate": 0.5}, {"params": list(model[1].parameters())}]
        return model, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def update(model, optimiser):
        model(torch.arange(75.0).view(1, 3, 5, 5).sin()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    model, optimiser = make()
    update(model, optimiser)
    saved, weights = optimiser_tensors(optimiser), {k: v.clone() for k, v in model.state_dict().items()}
    saved = {k: v.clone(memory_format=torch.contiguous_format) for k, v in saved.items()}
    update(model, optimiser)
    other, fresh = make()
    other.load_state_dict(weights)
    load_optimiser_tensors(fresh, saved)
    update(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert fresh.param_groups[0]["rate"] == 0.5


def test_log_drops_what_comes_again_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, start=0)
    for step in (0, 10, 20):
        log.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 3')
    assert [r["step"] for r in read_log(path)] == [0, 10, 20]
    Log(path, start=10).write({"step": 20, "again": True})
    assert read_log(path) == [{"step": 0}, {"step": 10}, {"step": 20, "again": True}]


def test_run_folders_are_numbered(tmp_path):
    assert new_run_folder(tmp_path, "", "photos") == latest_run_folder(tmp_path, "", "photos") == tmp_path / "photos"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos-2").mkdir()
    assert new_run_folder(tmp_path, "", "photos").name == "photos-3"
    assert latest_run_folder(tmp_path, "", "photos").name == "photos-2"
    with pytest.raises(ValueError, match="exists: choose another --name, or continue that run with --resume auto"):
        new_run_folder(tmp_path, "photos", "x")
    assert latest_run_folder(tmp_path, "photos", "x").name == "photos"


def test_first_signal_is_a_flag_and_the_second_acts(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.signal
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM" in capsys.readouterr().out


def test_device_and_precision():
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) in ("bf16", "fp32")
    with pytest.raises(ValueError, match="device: expected one this machine has, got 'tpu'"):
        choose_device("tpu")


def test_parameters_are_split_by_module_name():
    model = torch.nn.ModuleDict({"shortcut": torch.nn.Linear(1, 1), "shortcuts": torch.nn.Linear(2, 2)})
    groups = dict(parameters_by_rate(model, "shortcut"))
    assert [p.numel() for p in groups[True]] == [1, 1] and [p.numel() for p in groups[False]] == [4, 2]
    assert list(dict(parameters_by_rate(model["shortcuts"], "shortcut"))) == [False]
