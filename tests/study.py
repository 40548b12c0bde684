"""A comparison's folder with made-up figures of a known optimum, for tests of its report.

FD = level x law x exp(train (ln s - ln best)^2 + sampling (ln r - ln best)^2 + noise) x REPA x (1 + progress), so that
the ratio of any two cells has a closed form.
"""

import csv
import itertools
import json
import math

import numpy as np

from flux2.images import save_png
from train.compare_rows import Row, cell_id

CHANNELS = {"sd": 16, "flux.1": 64, "flux.2": 128, "flux.2-nosem": 128, "rae": 192}
PSNR = {"sd": 24.1, "flux.1": 28.4, "flux.2": 30.2, "flux.2-nosem": 30.4, "rae": 18.9}
RFD = {"sd": 3.1, "flux.1": 1.2, "flux.2": 0.72, "flux.2-nosem": 0.7, "rae": 5.2}
LEVEL = {"sd": 7.0, "flux.1": 9.0, "flux.2": 4.0, "flux.2-nosem": 8.0, "rae": 5.0}
TRAIN = {"sd": 1.0, "flux.1": 1.78, "flux.2": 2.95, "flux.2-nosem": 2.95, "rae": 6.93}
SAMPLING = {"sd": 2.95, "flux.1": 2.95, "flux.2": 6.93, "flux.2-nosem": 6.93, "rae": 6.93}
LAW = {"uniform": 1.3, "logit_normal": 1.0, "plateau_logit_normal": 1.1}
REPA = {"none": 1.0, "hog": 0.9}
CURVE = {"train": 0.3, "sampling": 0.1}
SHIFTS = (1.0, 1.78, 2.95, 4.63, 6.93)


def fd_of(name, law, train, sampling, repa, progress=0.0, noise=0.0):
    bend = (
        CURVE["train"] * math.log(train / TRAIN[name]) ** 2
        + CURVE["sampling"] * math.log(sampling / SAMPLING[name]) ** 2
    )
    return LEVEL[name] * LAW[law] * math.exp(bend + noise) * REPA[repa] * (1 + progress)


def velocity_of(name, law, train, repa, noise=0.0):
    return 0.05 * fd_of(name, law, train, SAMPLING[name], repa, noise=noise)


def study_rows(
    names=tuple(CHANNELS), laws=tuple(LAW), shifts=SHIFTS, repas=tuple(REPA), seeds=1, checkpoints=4, noise=0.0
):
    """Rows of every cell; noise: deviation of ln FD between models, drawn from a fixed seed."""
    draws = np.random.default_rng(0)
    rows = []
    for name, law, train, repa, seed in itertools.product(names, laws, shifts, repas, range(seeds)):
        e = noise * draws.standard_normal()
        for k in range(checkpoints):
            for sampling in shifts:
                fd = fd_of(name, law, train, sampling, repa, 3.0 * 0.4**k if k < checkpoints - 1 else 0.0, e)
                fields = {"law": law, "train_shift": train, "repa": repa, "seed": seed, "sampling_shift": sampling}
                velocity = velocity_of(name, law, train, repa, e)
                nimg = 2000 * (k + 1)
                rows.append(
                    Row(autoencoder=name, channels=CHANNELS[name], nimg=nimg, fd=fd, velocity=velocity, **fields)
                )
    return rows


def write_study(folder, rows, pictures=True):
    """The files of a comparison with these rows, all its cells done."""
    names = list(dict.fromkeys(r.autoencoder for r in rows))
    axes = {"laws": "law", "train_shifts": "train_shift", "sampling_shifts": "sampling_shift", "repa": "repa"}
    config = {key: sorted({getattr(r, field) for r in rows}) for key, field in axes.items()}
    config |= {"autoencoders": names, "seeds": len({r.seed for r in rows})}
    environment = {"commit": "0123456789ab", "processor": "a processor", "threads": 1, "gpu": "none"}
    header = {
        "preset": "toy",
        "config": config,
        "features": {"name": "hog", "label": "FD-HOG", "identity": "hog-1"},
        "samples": 256,
        "environment": environment | {"packages": {"torch": "2.13.0"}, "command": ["train.compare"]},
    }
    _save(folder / "comparison.json", header)
    draws = np.random.default_rng(1)
    for name in names:
        pixels = 256
        info = {"name": name, "channels": CHANNELS[name], "tokens": 16, "pixels_per_token": pixels}
        info |= {"bits_per_pixel": CHANNELS[name] * 16 / pixels, "psnr": PSNR[name], "ssim": PSNR[name] / 40}
        info |= {
            "rfd": RFD[name],
            "rfd_count": 256,
            "probe_r2": 0.3,
            "effective_rank": CHANNELS[name] / 3,
            "lpips": None,
        }
        _save(folder / "autoencoders" / f"{name}.json", info | {"source": "--preset photos"})
        if pictures:
            save_png(folder / "autoencoders" / f"{name}.png", draws.integers(0, 255, (132, 526, 3), dtype=np.uint8))
    models = {}
    for r in rows:
        key = (r.autoencoder, r.law, r.train_shift, r.repa, r.seed)
        checkpoint = models.setdefault(key, {}).setdefault(r.nimg, {"nimg": r.nimg, "velocity": r.velocity, "fd": {}})
        checkpoint["fd"][f"{r.sampling_shift:.2f}"] = r.fd
        checkpoint["bins"] = [r.velocity] * 10
    for key, checkpoints in models.items():
        cell = dict(zip(("autoencoder", "law", "train_shift", "repa", "seed"), key, strict=True))
        result = {"id": cell_id(*key), "status": "done", "cell": cell, "checkpoints": list(checkpoints.values())}
        _save(folder / "results" / f"{cell_id(*key)}.json", result | {"seconds": 10.0, "host": "here"})
        if pictures:
            save_png(
                folder / "cells" / cell_id(*key) / "samples.png", draws.integers(0, 255, (64, 256, 3), dtype=np.uint8)
            )
    fields = list(Row.__dataclass_fields__)
    with (folder / "cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, "status"])
        writer.writerows([*(getattr(r, f) for f in fields), "done"] for r in rows)
    return folder


def _save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
