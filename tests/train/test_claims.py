"""Claims in a shared folder: one holder, given back, taken over when stale or dead, never stolen by mistake."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.claims import Claims, _started, machine

OLD = 3600.0


def race(folder, barrier, won):
    """Tries once, with all others; holds what it got until everybody has tried."""
    claims = Claims(Path(folder), stale=60)
    barrier.wait()
    claim = claims.acquire("work")
    barrier.wait()
    won.put(claim is not None)
    if claim:
        claim.release()


def winners(folder, count=4):
    """How many of `count` processes get the claim at once."""
    spawn = multiprocessing.get_context("fork")
    barrier, won = spawn.Barrier(count), spawn.Queue()
    processes = [spawn.Process(target=race, args=(str(folder), barrier, won)) for _ in range(count)]
    for process in processes:
        process.start()
    found = sum(won.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return found


def abandon(claims, name="work", *, seconds=OLD, **fields):
    """A claim of a machine that is gone, last touched `seconds` ago."""
    path = claims.path(name)
    there = {"machine": "elsewhere", "pid": 1, "token": "theirs", "started": "1", **fields}
    path.write_text(json.dumps(there))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_one_of_many_gets_it(tmp_path):
    for _ in range(3):
        assert winners(tmp_path) == 1
        assert not list(tmp_path.glob("*.json"))


def test_one_of_many_takes_over_what_is_stale(tmp_path):
    claims = Claims(tmp_path, stale=60)
    for _ in range(3):
        abandon(claims)
        assert winners(tmp_path) == 1


def test_one_of_many_takes_over_what_a_dead_process_held(tmp_path):
    claims = Claims(tmp_path, stale=60)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    abandon(claims, seconds=0, machine=machine(), pid=dead.pid)
    assert winners(tmp_path) == 1


def test_slow_takeover_leaves_alone_what_is_somebody_elses_by_now(tmp_path):
    claims = Claims(tmp_path, stale=60)
    abandon(claims)
    looked_at = claims._read("work")
    abandon(claims, seconds=0, token="others")  # taken over between the look and the takeover
    assert not claims._take_over("work", looked_at, json.dumps({"token": "mine"}))
    assert json.loads(claims_file(claims).read_text())["token"] == "others"
    assert [p.name for p in tmp_path.iterdir()] == ["work.json"]


def test_held_until_released(tmp_path):
    first, second = Claims(tmp_path, stale=60), Claims(tmp_path, stale=60)
    with first.acquire("work") as claim:
        assert second.acquire("work") is None and not claim.lost
        assert second.acquire("other") is not None
        about = json.loads(claims_file(first).read_text())
        assert about["pid"] == os.getpid() and about["host"]
    taken = second.acquire("work")
    assert taken is not None
    taken.release()
    assert not claims_file(first).exists()


def claims_file(claims):
    return claims.path("work")


def test_living_claim_of_another_machine_is_respected_until_it_is_stale(tmp_path):
    claims = Claims(tmp_path, stale=60)
    abandon(claims, seconds=30)
    assert claims.acquire("work") is None
    abandon(claims, seconds=90)
    assert claims.acquire("work") is not None


def test_claim_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    code = "import sys; from train.claims import Claims; from pathlib import Path; import os\n"
    code += "c = Claims(Path(sys.argv[1]), stale=60).acquire('work'); assert c; os._exit(0)"
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": root})
    assert claims_file(Claims(tmp_path, stale=60)).exists()
    assert Claims(tmp_path, stale=60).acquire("work") is not None


def test_process_that_died_or_whose_id_is_anothers_by_now_holds_nothing(tmp_path):
    claims = Claims(tmp_path, stale=60)
    mine = {"machine": machine(), "pid": os.getpid()}
    abandon(claims, seconds=0, **mine, started="another time")
    assert claims.acquire("work") is not None
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    abandon(claims, "other", seconds=0, machine=machine(), pid=zombie.pid, started=_started(zombie.pid))
    assert claims.acquire("other") is None
    zombie.kill()
    deadline = time.monotonic() + 30  # before it would be stale
    while (taken := claims.acquire("other")) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert taken is not None and zombie.returncode is None  # it was not waited for
    zombie.wait()


def test_holder_that_has_not_learnt_yet_gives_back_nothing_of_the_next(tmp_path):
    claims = Claims(tmp_path, stale=60)  # touched every 7.5 s
    with pytest.raises(RuntimeError, match="in the work"), claims.acquire("work") as claim:
        theirs = abandon(claims, seconds=0)
        raise RuntimeError("in the work")
    assert not claim.lost and json.loads(theirs.read_text())["token"] == "theirs"


def test_holder_whose_claim_was_deleted_learns_that_it_lost(tmp_path):
    claims = Claims(tmp_path, stale=0.4)
    claim = claims.acquire("work")
    claims_file(claims).unlink()
    deadline = time.monotonic() + 60
    while not claim.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert claim.lost
    claim.release()
    claim.release()  # again, to no harm


def test_holder_touches_its_claim_and_a_slow_one_learns_that_it_lost(tmp_path):
    claims = Claims(tmp_path, stale=0.8)  # touched every 0.1 s
    claim = claims.acquire("work")
    old = time.time() - OLD
    os.utime(claims_file(claims), (old, old))
    deadline = time.monotonic() + 60
    while claims_file(claims).stat().st_mtime < old + 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert claims_file(claims).stat().st_mtime > old + 1
    theirs = abandon(claims, seconds=0)  # somebody else's by now
    while not claim.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert claim.lost
    claim.release()
    assert json.loads(theirs.read_text())["token"] == "theirs"


HERE = json.dumps({"token": "theirs", "machine": machine()}).encode()  # of this machine, and no process


@pytest.mark.parametrize("text", [b"", b"not json", b"[1]", b"{}", b"\xff\xfe\x00\x80", HERE], ids=range(6))
def test_unwritten_or_corrupt_claim_is_somebodys_until_it_is_stale(tmp_path, text):
    claims = Claims(tmp_path, stale=60)
    path = claims.path("work")
    path.write_bytes(text)
    assert claims.acquire("work") is None
    os.utime(path, (time.time() - OLD,) * 2)
    claim = claims.acquire("work")
    assert claim is not None and json.loads(path.read_text())["pid"] == os.getpid()
    claim.release()
    assert not path.exists()


def test_takeover_that_died_half_way_is_cleared(tmp_path):
    claims = Claims(tmp_path, stale=60)
    abandon(claims)
    tomb = tmp_path / ".work.theirs.taken"
    tomb.touch()
    assert claims.acquire("work") is None  # perhaps it is at it
    os.utime(tomb, (time.time() - OLD,) * 2)
    assert claims.acquire("work") is None and not tomb.exists()
    assert claims.acquire("work") is not None


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Claims(tmp_path / "file" / "claims", stale=60)


def test_folder_that_is_gone_or_cannot_be_written_is_an_error(tmp_path):
    claims = Claims(tmp_path / "claims", stale=60)
    claims.folder.rmdir()
    with pytest.raises(FileNotFoundError):
        claims.acquire("work")
    locked = Path("/proc/self")  # where root cannot write either
    if os.geteuid():
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    elif not locked.is_dir():
        pytest.skip("no folder that root cannot write")
    with pytest.raises(OSError):
        Claims(locked, stale=60).acquire("work")
