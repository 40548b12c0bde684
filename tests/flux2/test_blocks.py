"""The backends of the autoencoder's blocks: one function, the same parameters, less memory, one graph."""

import sys

import pytest
import torch
from gradients import DEVICE, randn
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
    """In Triton every norm but the second of a residual block is given its statistics."""
    given = []
    for name in ("norm_silu_conv2d", "group_norm"):
        real = getattr(__import__("kernels"), name)

        def noting(*args, real=real, name=name, **kwargs):
            stats = args[9] if name == "norm_silu_conv2d" else args[5]
            given.append((name == "group_norm", stats is not None))
            return real(*args, **kwargs)

        monkeypatch.setattr(f"flux2.blocks.{name}", noting)
    ae = AutoEncoder(SHAPE, backend="triton").to(DEVICE)
    block, attention, last = [(False, True), (False, False)], [(True, True)], [(False, True)]
    with torch.no_grad():
        ae.encoder(torch.rand(1, 3, 8, 8, device=DEVICE))
        assert given == block + block + attention + block + attention + block + last  # down.0, .1, mid, norm_out
        given.clear()
        ae.decoder(torch.rand(1, 4, 4, 4, device=DEVICE))
        assert given == block + attention + block + 2 * (block + attention) + 2 * block + last  # mid, up.1, up.0


def test_a_block_moves_16_bytes_an_element(monkeypatch):
    """Counted from the launches: every activation that a kernel is given is read or written once. Plain: 34."""
    block = ResBlock(32, 32, 8).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    block.backend = "triton"
    x = randn((1, 32, 32, 32), torch.bfloat16, "channels_last")
    moved = []

    def counted(kernel, programs, *args, **options):
        moved.append(sum(a.nbytes for a in args if isinstance(a, torch.Tensor) and a.shape == x.shape))
        return launch(kernel, programs, *args, **options)

    from kernels.tiles import launch

    for module in ("conv_block", "group_norm", "group_stats"):  # kernels.group_norm is the function
        monkeypatch.setattr(sys.modules[f"kernels.{module}"], "launch", counted)
    with torch.no_grad():
        y, stats = block(x, None)
        assert [b // x.numel() for b in moved if b] == [2, 4, 2, 4, 6]  # the first block has to find x's statistics
        moved.clear()
        block(y, stats)
    assert [b // x.numel() for b in moved if b] == [4, 2, 4, 6]  # apply, statistics, apply, add
    assert sum(moved) == 16 * x.numel()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_block_saves_at_most_045_of_the_bytes(backend):
    kept = {}
    for name in ("torch", backend):
        block = ResBlock(32, 32, 8).to(DEVICE, memory_format=torch.channels_last)
        block.backend = name
        x = randn((2, 32, 16, 16), layout="channels_last").requires_grad_()
        kept[name] = saved_bytes(block, lambda x=x, block=block: block(x)[0])
    assert kept[backend] <= 0.45 * kept["torch"], kept


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_a_block_takes_fp32_under_autocast(backend):
    block, x = ResBlock(8, 8, 4).to(DEVICE), randn((1, 8, 6, 6))
    plain = block(x)[0]
    block.backend = backend
    with torch.autocast(DEVICE, torch.bfloat16):
        y, _ = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=0.02, atol=0.02)


def saved_bytes(module, forward):
    """What forward() keeps for backward, module's parameters left out."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept = {}

    def note(t):
        kept[t.untyped_storage()._cdata] = t  # held, so that no address comes again
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


def test_the_whole_autoencoder_saves_at_most_040_of_the_bytes():
    def bytes_of(ae, side, dtype=torch.float32):
        x = torch.rand(1, 3, side, side, device=next(ae.parameters()).device, dtype=dtype)
        return saved_bytes(ae, lambda: ae(x, sample=True))

    with torch.device("meta"):
        models = [AutoEncoder(AUTOENCODERS["flux.2"], backend=b).bfloat16() for b in ("torch", "auto")]
    plain, ours = (bytes_of(m, 256, torch.bfloat16) for m in models)
    assert 0.37 * plain <= ours <= 0.39 * plain, f"{ours} of {plain}: {ours / plain:.3f}"  # README and docs say 0.38
    small, folded = (bytes_of(m, 32) for m in twins(SHAPE, "auto", "triton"))
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
    """In fp16, which the interpreter rounds as a GPU does; it cuts bf16."""
    plain, ours = twins(SHAPE, "torch", "triton")
    x = torch.rand(1, 3, 8, 8, device=DEVICE)

    def gradients(ae):
        with torch.autocast(DEVICE, torch.float16):
            recon, _ = ae(x)
        grads = torch.autograd.grad(recon.float().square().mean(), list(ae.decoder.parameters()))
        assert recon.dtype == torch.float16 and all(g.dtype == torch.float32 for g in grads)
        return [recon.detach().float(), *grads]

    got, base = gradients(ours), gradients(plain)
    exact, _ = plain.double()(x.double())
    truth = [exact.detach(), *torch.autograd.grad(exact.square().mean(), list(plain.decoder.parameters()))]
    # As one vector, each tensor in units of its largest value: which backend is luckier in one of fifty is chance.
    units = [t.abs().max() for t in truth]
    assert_no_worse(*(torch.cat([(t / u).to(t.dtype).flatten() for t, u in zip(ts, units, strict=True)])
                      for ts in (got, base, truth)))  # fmt: skip


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
