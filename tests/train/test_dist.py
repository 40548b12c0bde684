"""Shares of a batch, what a process does alone, and how processes that are started again find each other."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy
from torch.distributed import HashStore

from train import dist
from train.adversary import Adversary
from train.dist import Agreement, Share


def shares(monkeypatch, count, **fields):
    monkeypatch.setattr(dist, "size", lambda: count)
    return Share(**fields)


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 3)])
def test_shares_are_the_batch_and_each_part_is_a_part_of_it(monkeypatch, count, parts):
    share = shares(monkeypatch, count, batch=24, parts=parts)
    assert sorted(i for r in range(count) for i in share.samples(r)) == list(range(24))
    for part in range(parts):
        found = sorted(first + i for r in range(count) for first in [share.firsts(r)[part]] for i in range(share.piece))
        assert found == list(range(part * 24 // parts, (part + 1) * 24 // parts))  # as of one process
    assert share.of_processes([0]) == share.samples(0) and share.of_processes([]) == list(range(24))


def test_batch_that_cannot_be_shared_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"multiple of 8 \(2 parts, 4 processes\), got 20"):
        shares(monkeypatch, 4, batch=20, parts=2)


def test_alone_everything_is_the_identity():
    terms = {"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}
    means, ranks = dist.mean_terms(terms)
    assert means == terms and ranks is None
    x, f = torch.arange(3.0), torch.sin
    assert dist.mean(x) is x and dist.gathered(x) is x and dist.replicated(f, torch.nn.Linear(2, 2)) is f
    assert dist.from_main(lambda: 7) == 7 and Agreement().of(15) == 15 and dist.is_main() and dist.label() == ""
    dist.average([x])
    assert x.tolist() == [0, 1, 2]


def test_device_is_chosen_as_ever_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with dist.joined("cpu") as device:
        assert device.type == "cpu" and dist.size() == 1
    with pytest.raises(ValueError, match="device"), dist.joined("nonsense"):
        pass


def test_batch_norm_of_a_discriminator_is_refused_between_cpus(monkeypatch):
    monkeypatch.setattr(dist, "size", lambda: 2)
    config = toy.toy("--gan.weight", "0.5", gan_norm="batch")
    with pytest.raises(ValueError, match="gan.norm: expected group between several processes on CPUs, got batch"):
        Adversary(config, torch.device("cpu"), lambda f: f)


def start_together(store, count, late=None):
    """What each of `count` processes of one start gets; process `late` comes after the others."""
    with ThreadPoolExecutor(count) as pool:
        order = sorted(range(count), key=lambda number: number == late)
        futures = {}
        for number in order:
            if number == late:
                time.sleep(0.3)
            futures[number] = pool.submit(dist.fresh_store, store, number, count, 20.0)
        return [futures[number].result() for number in range(count)]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_processes_started_again_do_not_read_what_those_before_them_wrote(late):
    store = HashStore()
    for start in range(3):
        stores = start_together(store, 3, late if start else None)
        assert not any(own.check(["address"]) for own in stores)
        stores[1].set("address", str(start))
        assert [own.get("address") for own in stores] == [str(start).encode()] * 3


def test_fewer_processes_after_the_loss_of_one():
    store = HashStore()
    start_together(store, 3)
    (alone,) = start_together(store, 1)
    alone.set("a", "b")
    first, second = start_together(store, 2)
    assert not first.check(["a"]) and not second.check(["a"])


def test_process_that_does_not_come_is_reported():
    with pytest.raises(RuntimeError, match=r"Timed out: not all of 2 processes were here 0.2 seconds after process 0"):
        dist.fresh_store(HashStore(), 0, 2, 0.2)
