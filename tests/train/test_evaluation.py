"""Results: what figures are called, when two compare, and what is no result."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flux2.distances import Moments
from train.evaluation import Kernel, Protocol, comparison_table, compatible, distances, load_result, padded, result_of
from train.references import Collected, Reference

CPU = torch.device("cpu")
PROTOCOL = Protocol(
    task="reconstruct",
    count=50,
    crop="as stored",
    features="hog-v1",
    reference="ab" * 32,
    reference_count=9,
    notes="x",
)
METRICS = ("fd", "sfd", "kd", "is", "pr")


class Named:
    """All that `distances` asks of features"""

    def __init__(self, name, label, channels=3):
        self.name, self.label, self.channels = name, label, channels


HOG, INCEPTION, RANDOM = Named("hog", "FD-HOG"), Named("inception", "FID"), Named("inception", "FD-inception-random")


def collected(x, *, logits=False):
    found = Collected(len(x), len(x))
    more = {"spatial": x[:, :2], "logits": x} if logits else {}
    found.add({"pool": x, **more})
    return found


def reference(x, **changes):
    found = collected(x, logits=True)
    fields = {"name": "those", "digest": "cd", "crop": "as stored", "count": len(x), "features": "f"}
    return dataclasses.replace(
        Reference(pool=found.pool, spatial=found.spatial, rows=found.rows(), **fields), **changes
    )


def judged(features, x, y, *, logits=False, metrics=METRICS, prefix="g", **changes):
    kernel = Kernel(subsets=4, subset_size=10)
    found, other = collected(x, logits=logits), reference(y, **changes)
    return distances(found, other, features, CPU, prefix=prefix, metrics=metrics, kernel=kernel)


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((40, 3))), torch.from_numpy(rng.standard_normal((50, 3)) + 1)


def test_figures_by_hand(sets):
    x, y = sets
    figures = judged(HOG, x, y)
    assert list(figures) == ["gFD-HOG", "KD-HOG", "precision-HOG", "recall-HOG"]
    a, b = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    root = np.sqrt(np.linalg.eigvals(a @ b)).real.sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert figures["gFD-HOG"] == (pytest.approx(expected.item(), rel=1e-9), None)
    distance = torch.cdist(x.float().double(), y.float().double())
    radius = torch.cdist(y, y).kthvalue(4).values  # the third neighbour beside itself
    assert figures["precision-HOG"][0] == (distance <= radius).any(1).double().mean().item()
    mean, std = figures["KD-HOG"]
    assert mean > 0 and std > 0


def test_only_the_published_inception_has_an_fid(sets):
    x, y = sets
    names = list(judged(INCEPTION, x, y, logits=True))
    assert names == ["gFID", "sFID", "KID", "precision", "recall", "IS"]
    names = list(judged(RANDOM, x, y, logits=True, prefix="r"))
    assert names[0] == "rFD-inception-random" and names[-1] == "IS-inception-random"
    assert not any("FID" in n or "KID" in n for n in names)
    assert list(judged(HOG, x, y, metrics=("fd",), prefix="r")) == ["rFD-HOG"]


def test_a_whole_set_has_one_subset(sets):
    x, y = sets
    value, spread = judged(HOG, x[:8], y[:8], metrics=("kd",))["KD-HOG"]
    kernel = lambda a, b: (a.float().double() @ b.float().double().T / 3 + 1) ** 3  # noqa: E731
    within = [(kernel(a, a).sum() - kernel(a, a).trace()) / 56 for a in (x[:8], y[:8])]
    assert spread is None and value == pytest.approx((sum(within) - 2 * kernel(x[:8], y[:8]).mean()).item(), rel=1e-9)


def test_what_cannot_be_had_is_said(sets, capsys):
    x, y = sets
    figures = judged(INCEPTION, x, y, logits=True, rows=torch.empty(0, 3), spatial=None)
    assert list(figures) == ["gFID", "IS"]
    err = capsys.readouterr().err
    for line in (
        "no spatial distance",
        "no kd: expected at least 2",
        "no pr: expected at least 4 pictures of each set",
    ):
        assert line in err
    judged(Named("hog", "FD-HOG", channels=3), x[:3], y, metrics=("fd",))
    assert "3 pictures for 3 numbers of hog: gFD-HOG says little" in capsys.readouterr().err
    judged(HOG, x, y, metrics=("fd",))
    assert capsys.readouterr().err == ""


def test_statistics_alone_do_for_a_frechet_distance(sets):
    x, y = sets
    other = Moments.from_mean_cov(y.mean(0), torch.cov(y.T), 10_000)
    (name, (value, _)), = judged(INCEPTION, x, y, metrics=("fd",), pool=other, count=0).items()  # fmt: skip
    assert name == "gFID" and value == pytest.approx(judged(INCEPTION, x, y, metrics=("fd",))["gFID"][0], rel=1e-9)


def result(name="a", **changes):
    return result_of(name, dataclasses.replace(PROTOCOL, **changes), {"PSNR": (30.0, 0.5), "rFD-HOG": (0.1, None)})


OTHERS = {"task": "generate", "count": 60, "crop": "other", "features": "inception-0", "reference": "cd"}


@pytest.mark.parametrize("key", OTHERS)
def test_results_taken_otherwise_do_not_compare(key):
    own, other = result("runs/a"), result("runs/b", **{key: OTHERS[key]})
    expected = f"runs/a and runs/b do not compare: {key} .* and {json.dumps(OTHERS[key])}$"
    with pytest.raises(ValueError, match=expected):
        compatible(own, other)
    with pytest.raises(ValueError, match=expected):
        comparison_table([own, result(), other])


def test_a_table_of_what_compares():
    other = result("a longer name", notes="other", reference_count=0)
    other |= {"figures": {"PSNR": 31.25, "LPIPS-vgg": 0.1234567}, "spread": {}}
    lines = comparison_table([result(), other]).splitlines()
    assert lines[0].split() == ["PSNR", "rFD-HOG", "LPIPS-vgg"]
    assert lines[1].split() == ["a", "30", "±0.5", "0.1", "-"]
    assert lines[2].split() == ["a", "longer", "name", "31.25", "-", "0.1235"]
    assert padded([["", "x"], ["ab", "yz"]]) == "     x\nab  yz"


def test_results_are_read_back_and_others_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(result()))
    assert load_result(tmp_path) == load_result(path) == {**result(), "path": str(path)}
    for text in (
        "{}",
        '{"format": "flux2-tokenizer evaluation", "version": 1}',
        json.dumps({**result(), "version": 2}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a result of train.evaluate, version 1, got something else"):
            load_result(path)
    path.write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        load_result(path)
    with pytest.raises(FileNotFoundError, match="no such result"):
        load_result(tmp_path / "none.json")


def test_protocol_in_words():
    reference = "reference abababababab (9 pictures, as stored)"
    assert str(PROTOCOL) == f"50 pictures, 8-bit values; {reference}; features hog-v1; x"
    stored = dataclasses.replace(PROTOCOL, reference_count=0)
    assert "(statistics as stored, as stored)" in str(stored)


def test_kernel_configs_that_make_no_sense():
    with pytest.raises(ValueError, match="expected at least 1 subset of 2, got 0 and 1000"):
        Kernel(subsets=0)
