"""Runs on archives, killed in mid-epoch while worker processes read: they go on to the same weights."""

import io
import os
import signal
import tarfile
import zipfile

import numpy as np
from PIL import Image
from programs import VAE, run, start, steps_logged, wait_for
from toy import saved


def encoded(i):
    file = io.BytesIO()
    smooth = np.random.default_rng(i).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((48, 40), Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()


def make_tar(place):
    place.mkdir()
    for shard in range(3):
        with tarfile.open(place / f"{shard}.tar", "w") as archive:
            for i in range(shard * 5, shard * 5 + 5):
                info = tarfile.TarInfo(f"{i}.png")
                content = encoded(i)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return place


def make_zip(place):
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(15):
            archive.writestr(f"{i}.png", encoded(i))
    return place


def same_weights(a, b):
    return all(v.equal(b[file][k]) or v.isnan().any() for file in a for k, v in a[file].items())


def test_killed_in_mid_epoch_it_goes_on_to_the_same_weights(soak, tmp_path):
    kills = 0
    for make in (make_tar, make_zip) if soak.long else (make_tar,):
        out = tmp_path / make.__name__
        out.mkdir()
        flags = (
            "--data",
            make(out / "data"),
            "--steps",
            "90",
            "--stop-after",
            "30",
            "--save-every",
            "10",
            "--workers",
            "2",
        )
        assert run(VAE, out, *flags, name="whole")[0] == 0
        for round in range(soak.rounds(1, 10)):
            name = f"killed{round}"
            process = start(VAE, out, *flags, name=name)
            wait_for(lambda place=out / name, least=10 + round: steps_logged(place) >= least, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            code, said = run(VAE, out, *flags, name=name)
            assert code == 0, said
            assert same_weights(saved(out / "whole"), saved(out / name))
            kills += 1
    soak.found("A run on an archive that is killed in mid-epoch goes on to the same weights", kills=kills)
