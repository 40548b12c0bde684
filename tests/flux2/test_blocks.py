"""The backends of the autoencoder's blocks: one function, the same parameters, less memory, one graph."""

import pytest
import torch
from gradients import DEVICE
from tolerance import assert_no_worse
from torch import nn

from flux2 import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.blocks import Block, ResBlock

# Two levels, attention at the coarse one, widths that change, three channels a group
SHAPE = AutoencoderConfig(
    z_channels=4, ch=12, decoder_ch=12, num_groups=4, ch_mult=(1, 2), attn_levels=(1,), num_res_blocks=1
)


def twins(cfg, *backends):
    """One autoencoder a backend, of the same weights."""
    models = [AutoEncoder(cfg, backend=b).to(DEVICE) for b in backends]
    with torch.no_grad():
        for p in models[0].parameters():  # norms and biases of one and zero hide what they do
            p.add_(0.1 * torch.randn_like(p))
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    return models


def train_step(ae, x, noise):
    """Reconstruction, moments and the gradient of every parameter."""
    recon, posterior = ae(x, sample=True, noise=noise)
    loss = (recon - x).square().mean() + posterior.kl().mean()
    grads = torch.autograd.grad(loss, list(ae.parameters()))
    return [recon.detach(), posterior.mean.detach(), *grads]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_backends_agree_in_values_and_gradients(backend):
    plain, ours = twins(SHAPE, "torch", backend)
    x, noise = torch.rand(2, 3, 16, 12, device=DEVICE) * 2 - 1, torch.randn(2, 4, 8, 6, device=DEVICE)
    base, got = train_step(plain, x, noise), train_step(ours, x, noise)
    truth = train_step(plain.double(), x.double(), noise.double())
    assert len(got) == 2 + len(list(ours.named_parameters()))
    for g, b, t in zip(got, base, truth, strict=True):
        assert_no_worse(g, b, t)


def test_no_backend_calls_what_another_one_is_for(monkeypatch):
    called = []
    for name in ("norm_silu_conv2d", "add_bias_group_stats", "group_norm", "upsample_conv2d"):
        real = getattr(__import__("kernels"), name)
        monkeypatch.setattr(
            f"flux2.blocks.{name}", lambda *a, real=real, name=name, **k: called.append(name) or real(*a, **k)
        )
    x, used = torch.rand(1, 3, 16, 16, device=DEVICE), {}
    for backend in ("torch", "auto", "triton"):
        called.clear()
        with torch.no_grad():
            AutoEncoder(SHAPE, backend=backend).to(DEVICE)(x)
        used[backend] = set(called)
    every = {"norm_silu_conv2d", "add_bias_group_stats", "group_norm", "upsample_conv2d"}
    assert used["torch"] == set() and used["triton"] == every
    assert used["auto"] == (every if DEVICE == "cuda" else every - {"add_bias_group_stats"})


def test_statistics_travel_from_block_to_block(monkeypatch):
    """In Triton every norm but the second of a residual block, and the first behind the 1x1 skip, is given its own."""
    given = []
    real = __import__("kernels").norm_silu_conv2d

    def noting(x, nw, nb, w, b, groups, eps, stride, padding, stats, *rest):
        given.append(stats is not None)
        return real(x, nw, nb, w, b, groups, eps, stride, padding, stats, *rest)

    monkeypatch.setattr("flux2.blocks.norm_silu_conv2d", noting)
    with torch.no_grad():
        AutoEncoder(SHAPE, backend="triton").to(DEVICE).encoder(torch.rand(1, 3, 8, 8, device=DEVICE))
    assert given == [True, False] * 4 + [True]  # down.0, down.1, mid.block_1, mid.block_2; norm_out


def saved_bytes(ae, side):
    """What a training forward keeps for backward, parameters left out."""
    own = {p.untyped_storage()._cdata for p in ae.parameters()}
    kept = {}

    def note(t):
        kept[t.untyped_storage()._cdata] = t  # held, so that no address comes again
        return t

    device = next(ae.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ae(torch.rand(1, 3, side, side, device=device), sample=True)[0].sum()
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


def test_the_whole_autoencoder_saves_at_most_040_of_the_bytes():
    with torch.device("meta"):
        plain, ours = (saved_bytes(AutoEncoder(AUTOENCODERS["flux.2"], backend=b), 256) for b in ("torch", "auto"))
    assert ours <= 0.40 * plain, f"{ours} of {plain}: {ours / plain:.3f}"
    small, folded = (saved_bytes(m, 32) for m in twins(SHAPE, "auto", "triton"))
    assert folded <= 1.02 * small, f"with biases folded {folded}, without {small}"


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("auto", "inductor"), ("auto", "aot_eager"), ("triton", "aot_eager"), ("torch", "aot_eager")],
)
def test_a_training_step_compiles_to_one_graph(backend, compiler):
    (ae,) = twins(SHAPE, backend)
    x, noise = torch.rand(1, 3, 8, 8, device=DEVICE), torch.randn(1, 4, 4, 4, device=DEVICE)
    compiled = torch.compile(ae, backend=compiler, fullgraph=True)

    def loss(model):
        recon, posterior = model(x, sample=True, noise=noise)
        return recon.square().mean() + posterior.kl().mean()

    parameters = list(ae.parameters())
    got, expected = torch.autograd.grad(loss(compiled), parameters), torch.autograd.grad(loss(ae), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_strides_on_a_gpu_that_is_not_there(dtype):
    """ "auto" on fake CUDA tensors takes the path of the kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        ae = AutoEncoder(AUTOENCODERS["flux.2"])

    def fake(like):
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="cuda")

    def call(network, like):
        assert network.runs_triton(fake(like))
        return torch.func.functional_call(network, {k: fake(p) for k, p in network.named_parameters()}, fake(like))

    last = torch.channels_last
    pixels, latents = (torch.empty(s, device="meta", memory_format=last) for s in ((2, 3, 64, 96), (2, 32, 8, 12)))
    with FakeTensorMode(), torch.no_grad():
        moments, recon = call(ae.encoder, pixels), call(ae.decoder, latents)
    assert moments.shape == (2, 64, 8, 12) and recon.shape == (2, 3, 64, 96)
    for y in (moments, recon):
        assert y.dtype == dtype and y.device.type == "cuda"
    assert recon.is_contiguous(memory_format=last)


def test_autocast_runs_the_blocks_in_its_dtype():
    (ae,) = twins(SHAPE, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        recon, _ = ae(torch.rand(1, 3, 8, 8, device=DEVICE))
    assert recon.dtype == torch.bfloat16
    grads = torch.autograd.grad(recon.float().square().mean(), list(ae.parameters()), allow_unused=True)
    assert all(g is None or (g.dtype == torch.float32 and g.isfinite().all()) for g in grads)


def test_a_block_has_the_keys_of_stock_modules():
    block = ResBlock(8, 12, 4)
    assert [k for k, _ in block.named_parameters()] == [
        f"{m}.{p}" for m in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut") for p in ("weight", "bias")
    ]
    assert all(type(m) in (nn.GroupNorm, nn.Conv2d) for m in block.children())


def test_set_backend_reaches_every_block_and_names_what_it_does_not_know():
    ae = AutoEncoder(SHAPE)
    assert {m.backend for m in ae.modules() if isinstance(m, Block)} == {"auto"}
    assert {m.backend for m in ae.set_backend("torch").modules() if isinstance(m, Block)} == {"torch"}
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'cuda'"):
        AutoEncoder(SHAPE, backend="cuda")


def test_triton_where_it_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="Encoder: backend 'triton' cannot run: x has dtype torch.float64"):
        AutoEncoder(SHAPE, backend="triton").double()(torch.rand(1, 3, 8, 8, dtype=torch.float64))
