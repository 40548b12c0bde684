"""Latent statistics fitted by several processes against one process on all pictures, and against numpy."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flux2 import RAE, RAES, AutoEncoder, AutoencoderConfig
from flux2.latents import fit_latent_statistics, patchify

TINY = AutoencoderConfig(
    z_channels=4, ch=8, decoder_ch=8, ch_mult=(1, 1), num_res_blocks=1, num_groups=4, latent_norm="batchnorm"
)
KINDS = ("batchnorm", "stats", "rae")


def build(kind):
    torch.manual_seed(0)
    if kind == "rae":
        return RAE(dataclasses.replace(RAES["rae-tiny"], resolution=32)).double()
    return AutoEncoder(dataclasses.replace(TINY, latent_norm=kind)).double()


def pictures():
    """Of unlike means, so that the parts of two processes are far apart"""
    x = torch.rand(13, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x - 0.5) * torch.linspace(0.1, 1, 13).view(-1, 1, 1, 1) + torch.linspace(-0.4, 0.4, 13).view(-1, 1, 1, 1)


def statistics(ae):
    return {k: v.clone() for k, v in ae.named_buffers() if "latent_" in k or "running" in k}


def work(rank, folder):
    """What each of two processes does; the third part is that of a process without pictures"""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, found = pictures(), {}
    shares = (x[:9].split(4), x[9:].split(3))
    for kind in KINDS:
        ae = build(kind)
        found[kind] = fit_latent_statistics(ae, shares[rank]), statistics(ae)
    ae = build("stats")
    found["alone"] = fit_latent_statistics(ae, (x.split(5), ())[rank]), statistics(ae)
    with pytest.raises(ValueError, match="got no batches or one"):
        fit_latent_statistics(build("stats"), ())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_fit_what_one_would(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x = pictures()
    for kind, (num_images, got) in first.items():
        ae = build("stats" if kind == "alone" else kind)
        assert fit_latent_statistics(ae, [x]) == num_images == second[kind][0] == 13
        expected = statistics(ae)
        assert got.keys() == expected.keys() and len(got) >= 2
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
            assert torch.equal(got[name], second[kind][1][name]), (kind, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_statistics_are_numpy_s(kind):
    ae, x = build(kind), pictures()
    fit_latent_statistics(ae, x.split(4))
    z = patchify(ae.posterior(x).mode(), ae.cfg.patch).detach().numpy()
    axes = 0 if kind == "rae" else (0, 2, 3)
    mean, std = (t.numpy()[0] for t in ae.latent_affine())
    eps = {"batchnorm": 1e-4, "stats": 0.0, "rae": 1e-5}[kind]
    np.testing.assert_allclose(mean.squeeze(), z.mean(axes), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std.squeeze(), np.sqrt(z.var(axes, ddof=1) + eps), rtol=1e-6)
