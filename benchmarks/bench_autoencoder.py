"""The default preset's autoencoder on this machine: encode, decode, forward + backward, in images a second.

`make bench`, or `pytest benchmarks --benchmark-only`. Eight 64-pixel crops, fp32, as modules in channels_last (what the
autoencoder runs) and in NCHW.
"""

import pytest
import torch

from flux2 import AutoEncoder
from train.vae_config import VAE_PRESETS

FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


@pytest.fixture(params=FORMATS)
def model(request):
    torch.manual_seed(0)
    ae = AutoEncoder(VAE_PRESETS["photos"].autoencoder).to(memory_format=FORMATS[request.param])
    x = torch.rand(8, 3, 64, 64).contiguous(memory_format=FORMATS[request.param]) * 2 - 1
    return ae, x


@pytest.mark.benchmark(group="encode")
def bench_encode(benchmark, model):
    ae, x = model
    with torch.no_grad():
        z = benchmark(ae.encoder, x)
    assert torch.isfinite(z).all()


@pytest.mark.benchmark(group="decode")
def bench_decode(benchmark, model):
    ae, x = model
    with torch.no_grad():
        z = ae.posterior(x).mode()
        assert torch.isfinite(benchmark(ae.decoder, z)).all()


@pytest.mark.benchmark(group="forward + backward")
def bench_forward_backward(benchmark, model):
    ae, x = model

    def step():
        recon, posterior = ae(x)
        (recon.square().mean() + posterior.kl().mean()).backward()

    benchmark(step)
    assert all(torch.isfinite(p.grad).all() for p in ae.parameters())
