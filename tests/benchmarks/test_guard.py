"""The throughput guard fails where an operation got slower, and only there."""

import dataclasses
import json

import guard
import pytest
import torch
from cases import OPS, Case, Contest, cases, contest
from guard import limit, main, measure, results_file, worse
from measure import DEVICE, interleaved, ratio

SMALL = Case("group_norm_silu", (1, 64, 48, 48), "fp32", "forward")


def slowed(case, device, only):
    """The contest, with an op that is called twenty times"""
    made = contest(case, device, only)
    ours = made.calls["ours"]
    made.calls["ours"] = lambda: [ours() for _ in range(20)]
    return made


def test_a_slowed_operation_fails_and_is_named():
    committed = {str(SMALL): measure(SMALL, DEVICE, 15)}
    said = []
    (line,) = worse(committed, [SMALL], DEVICE, rounds=15, enter=slowed, show=said.append)
    assert line.startswith(f"{SMALL}: ") and said == [f"WORSE {line}"]


def test_an_unchanged_operation_passes():
    """With times that a clock did not make: ours takes 1.3 of the reference, and noise of 5%."""

    def made_up(noise):
        return lambda case, device, rounds, enter: {"ratio": 1.3 * (1 + noise), "error": 0.01}

    committed = {str(SMALL): {"ratio": 1.3, "error": 0.01}}
    for noise, expected in ((0.0, 0), (0.05, 0), (-0.5, 0), (0.25, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "measure", made_up(noise))
            assert len(worse(committed, [SMALL], DEVICE, rounds=5, show=lambda _: None)) == expected


def test_a_case_is_measured_again_before_it_fails(monkeypatch):
    asked = []

    def twice_unlucky(case, device, rounds, enter):
        asked.append(rounds)
        return {"ratio": 2.0 if len(asked) < 3 else 1.0, "error": 0.0}

    monkeypatch.setattr(guard, "measure", twice_unlucky)
    assert worse({str(SMALL): {"ratio": 1.0, "error": 0.0}}, [SMALL], DEVICE, rounds=5, show=lambda _: None) == []
    assert asked == [5, 5, 5]


def test_what_is_committed_is_the_median_of_sets_and_half_their_range(monkeypatch):
    sets = iter([{"ratio": 1.4, "error": 0.01}, {"ratio": 1.0, "error": 0.02}, {"ratio": 1.1, "error": 0.3}])
    monkeypatch.setattr(guard, "measure", lambda *a: next(sets))
    assert guard.settle(SMALL, DEVICE, 5) == {"ratio": 1.1, "error": 0.3}
    sets = iter([{"ratio": 1.4, "error": 0.01}, {"ratio": 1.0, "error": 0.02}, {"ratio": 1.1, "error": 0.03}])
    assert guard.settle(SMALL, DEVICE, 5) == {"ratio": 1.1, "error": 0.2}


def test_limit_is_the_margin_and_the_noise_of_both():
    assert limit({"ratio": 2.0, "error": 0.0}, {"ratio": 9.0, "error": 0.0}) == pytest.approx(2.3)
    assert limit({"ratio": 2.0, "error": 0.3}, {"ratio": 9.0, "error": 0.4}) == pytest.approx(2.3 + 1.5)


def test_ratio_is_the_median_of_rounds_and_ignores_a_hiccup():
    middle, error = ratio([2.0, 2.2, 1.8, 90.0, 2.0], [1.0] * 5)
    assert middle == 2.0 and 0 < error < 0.3


def test_contestants_take_turns():
    order = []
    samples = interleaved({n: lambda n=n: order.append(n) for n in "ab"}, torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ab" * 3 and [len(s) for s in samples.values()] == [3, 3]


def test_without_ratios_of_this_device_the_guard_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    assert main([]) == 2
    assert "no ratios of" in capsys.readouterr().err
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    results_file(DEVICE).write_text(json.dumps({"ratios": {}}))
    assert main([]) == 2
    assert "has no ratio of group_norm 2x96x48x48 bf16 forward" in capsys.readouterr().err


def test_update_writes_what_the_guard_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    monkeypatch.setattr(guard, "measure", lambda *a: {"ratio": 1.0, "error": 0.0})
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main(["--update"]) == 0 and main([]) == 0
    assert " got worse by more than 15%" in capsys.readouterr().out


def test_committed_ratios_are_of_the_cases_there_are():
    every = {str(case) for op in OPS for case in cases(op, torch.device("cpu"))}
    files = list((guard.ROOT / "benchmarks" / "results").glob("guard-*.json"))
    assert files
    for file in files:
        committed = json.loads(file.read_text())
        if committed["environment"]["driver"] == "none":
            assert set(committed["ratios"]) == every, file.name


@pytest.mark.parametrize(("op", "direction"), [(n, d) for n, op in OPS.items() if not op.random for d in op.directions])
def test_contestants_of_every_op_agree_before_they_are_timed(op, direction):
    from cases import check

    case = Case(op, (2, 12, 6, 5), "fp32", direction)
    made = contest(case, DEVICE, only=("ours", "eager NCHW", "eager channels_last"))
    check(made, case)
    for call in made.calls.values():
        call()
    wrong = Contest(made.calls, outputs={**made.outputs, "ours": lambda: 2 * made.outputs["ours"]()})
    with pytest.raises(AssertionError, match="ours is off by"):
        check(wrong, case)
    name = "eager channels_last"
    peer = Contest(dict(made.calls), outputs={**made.outputs, name: lambda: 2 * made.outputs[name]()})
    check(peer, case)
    assert "off by" in peer.missing[name] and name not in peer.calls


def test_a_peer_that_fails_is_missing_and_ours_is_not_forgiven(monkeypatch):
    import cases as module

    case = Case("group_norm", (2, 12, 6, 5), "fp32", "forward")
    broken = dataclasses.replace(OPS["group_norm"], eager=lambda *a: 1 / 0)
    monkeypatch.setitem(module.OPS, "group_norm", broken)
    made = contest(case, DEVICE, only=("ours", "eager NCHW"))
    assert list(made.calls) == ["ours"] and made.missing["eager NCHW"].startswith("fails: ZeroDivisionError")
    monkeypatch.setitem(module.OPS, "group_norm", dataclasses.replace(broken, ours=lambda *a: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        contest(case, DEVICE, only=("ours",))


def test_many_cases_of_one_op_compile():
    """Dynamo gives a function up after eight compilations in one process."""
    for side in range(3, 14):
        made = contest(
            Case("repa_loss", (1, side, 8), "fp32", "forward"), DEVICE, only=("ours", "compiled channels_last")
        )
        assert "compiled channels_last" in made.calls, made.missing
