"""Transformers: sizes, start, positions, time, classes, features, precision, one graph, memory, and FLUX.2's blocks
against diffusers. tests/flux2/test_checkpoints_transformer.py holds the networks against a second implementation."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from tolerance import assert_no_worse

from flux2 import TRANSFORMERS, SiT, TransformerConfig
from flux2.transformer import RepaProjector
from flux2.transformer_blocks import (
    TimeEmbed,
    rotary_positions,
    rotate,
    sincos_positions,
)

CPU = torch.device("cpu")
SMALL = {"width": 48, "depth": 3, "heads": 2, "repa_depth": 2}
LIGHTNING = {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True}
CONFIGS = {
    "sit": TransformerConfig(**SMALL),
    "lightningdit": TransformerConfig(**SMALL, **LIGHTNING),
    "ddt": TransformerConfig(**SMALL, **LIGHTNING, time_embed="fourier", head_width=64, head_depth=2, head_heads=4),
    "flux2": TransformerConfig(**SMALL, block="flux2", sincos=False, mlp_ratio=3.0, time_scale=1000.0),
}


def made(cfg, channels=6, classes=5, **options):
    """With weights as training leaves them: a fresh model's blocks do nothing."""
    model = SiT(CONFIGS[cfg] if isinstance(cfg, str) else cfg, channels, classes, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "modulation" in name or p.ndim == 1 else 0.1))
    return model


def inputs(h=4, w=6, dtype=torch.float32, channels=6):
    return torch.randn(3, channels, h, w).to(dtype), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 5])


def step(model, z, t, y, **options):
    """Velocity, features and the gradients of a loss of both with respect to z and all parameters."""
    z = z.detach().clone().requires_grad_()
    v, features = model(z, t, y, return_features=True, **options)
    loss = v.double().square().mean() + features.double().sin().mean()
    return [v.detach(), features.detach(), *torch.autograd.grad(loss, [z, *model.parameters()])]


# Sizes


@pytest.mark.parametrize(
    ("name", "sd", "flux2", "projector"),
    [
        ("sit-s", 33.0, 33.0, 6.6),
        ("sit-b", 130.5, 130.7, 7.3),
        ("sit-l", 458.1, 458.3, 7.9),
        ("sit-xl", 675.1, 675.4, 8.1),
    ],
)
def test_parameters_in_millions_are_the_published_ones(name, sd, flux2, projector):
    """Published counts include the table of positions for 256 tokens, and 4 channels come with 4 of learn_sigma."""
    cfg = dataclasses.replace(TRANSFORMERS[name], patch=2)

    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    with torch.device("meta"):
        narrow, wide = SiT(cfg, 4), SiT(cfg, 32)
        to_teacher = RepaProjector(cfg.width, 768)
    positions, sigma = 256 * cfg.width / 1e6, 4 * 4 * (cfg.width + 1) / 1e6
    assert round(millions(narrow) + positions + sigma, 1) == sd
    assert round(millions(wide) + positions, 1) == flux2
    assert round(millions(to_teacher), 1) == projector


def test_wide_head_has_the_published_size():
    with torch.device("meta"):
        model = SiT(TRANSFORMERS["ddt-xl"], 768)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6 + 256 * 1152 / 1e6) == 839  # RAE, DiT-DH-XL


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_row_runs(name):
    with torch.device("meta"):
        model = SiT(TRANSFORMERS[name], 128, 10)
        v, features = model(torch.empty(2, 128, 3, 5), torch.empty(2), torch.empty(2, dtype=int), return_features=True)
    assert v.shape == (2, 128, 3, 5) and features.shape == (2, 15, TRANSFORMERS[name].width)


# A fresh model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_model_is_zero_and_its_blocks_the_identity(name):
    model = SiT(CONFIGS[name], 6, 5)
    z, t, y = inputs()
    v, features = model(z, t, y, return_features=True)
    assert not v.any()
    embed = model.s_embedder if name == "ddt" else model.x_embedder
    tokens = embed(z)
    if CONFIGS[name].sincos:
        tokens = tokens + sincos_positions(4, 6, 48, CPU, torch.float32)
    assert torch.equal(features, tokens)
    *_, grad = torch.autograd.grad(model(z, t, y).sum(), [model.final_layer.linear.weight])
    assert grad.abs().max() > 0


def test_fresh_weights_are_dit_s():
    model = SiT(TransformerConfig(width=256, depth=1, heads=4, repa_depth=1), 16, 300)
    zero, small = [], []
    for name, p in model.named_parameters():
        if name.endswith(".bias") or "adaLN" in name or name == "final_layer.linear.weight":
            zero.append(name)
            assert not p.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            small.append(name)
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            fan_out, fan_in = p.shape[0], p[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert p.abs().max() <= bound and p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
    assert len(zero) == 13 and len(small) == 3


# Positions


def test_sincos_is_that_of_mae():
    table = sincos_positions(3, 5, 8, CPU, torch.float64)
    for n in range(15):
        row, column = divmod(n, 5)
        expected = [f(place * w) for place in (column, row) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
        np.testing.assert_allclose(table[n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flux2", [False, True])
def test_rotary_turns_pairs_as_complex_numbers(flux2):
    x = torch.randn(2, 1, 15, 16, dtype=torch.float64)
    got = rotate(x, rotary_positions(3, 5, 16, flux2, CPU, torch.float64))
    pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)))
    for n in range(15):
        ids = (0, *divmod(n, 5), 0) if flux2 else divmod(n, 5)
        share, theta = 8 // len(ids), 2000.0 if flux2 else 10000.0
        angles = torch.tensor([place * theta ** (-i / share) for place in ids for i in range(share)])
        expected = torch.view_as_real(pairs[:, :, n] * torch.polar(torch.ones(8), angles)).flatten(-2)
        torch.testing.assert_close(got[:, :, n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
def test_without_positions_a_model_follows_its_patches(patch):
    """Sides differ, so that rows taken for columns, on the way in or out, would show."""
    model = made(TransformerConfig(**SMALL, patch=patch, sincos=False))
    z, t, y = inputs(4, 6)
    for shift, axis in ((patch, 2), (2 * patch, 3)):
        torch.testing.assert_close(
            model(z.roll(shift, axis), t, y), model(z, t, y).roll(shift, axis), rtol=1e-4, atol=1e-4
        )
    assert (model(z.roll(1, 3), t, y) - model(z, t, y).roll(1, 3)).abs().max() > 1e-2 or patch == 1


@pytest.mark.parametrize("name", ["sit", "lightningdit", "flux2"])
def test_with_positions_it_does_not(name):
    model, (z, t, y) = made(name), inputs()
    assert (model(z.roll(1, 3), t, y) - model(z, t, y).roll(1, 3)).abs().max() > 1e-3


def test_tables_are_kept_and_serve_training_after_sampling():
    model, (z, t, y) = made("lightningdit"), inputs()
    expected = step(copy.deepcopy(model), z, t, y)
    with torch.inference_mode():
        model(z, t, y)
        model(z.transpose(2, 3), t, y)
    assert len(model._kept) == 2
    for a, b in zip(step(model, z, t, y), expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for side in range(1, 30):
            model(z[:, :, :1, :1].expand(-1, -1, 1, side), t, y)
    assert len(model._kept) <= 8
    assert "_kept" not in str(model.state_dict().keys()) and not list(model.buffers())


def test_tables_are_not_kept_of_tensors_that_are_not_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, (z, t, y) = made("lightningdit"), inputs()
    with FakeTensorMode() as mode, torch.no_grad():
        fake = {k: mode.from_tensor(p) for k, p in model.named_parameters()}
        v = torch.func.functional_call(model, fake, tuple(mode.from_tensor(x) for x in (z, t, y)))
    assert v.shape == z.shape and not model._kept


# Time and classes


@pytest.mark.parametrize("kind", ["sinusoid", "fourier"])
def test_time_features(kind):
    embed = TimeEmbed(12, kind, scale=1000.0 if kind == "sinusoid" else 1.0).double()
    t = torch.tensor([0.0, 0.25, 0.9371])
    seen = []
    embed.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert embed(t).shape == (3, 12)
    for got, x in zip(seen[0], t.tolist(), strict=True):
        if kind == "sinusoid":
            w = [1000 * x * 10000 ** (-i / 128) for i in range(128)]
            expected = [*np.cos(w), *np.sin(w)]
        else:
            w = 2 * np.pi * x * embed.W.numpy()
            expected = [*np.sin(w), *np.cos(w)]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_time_is_one_number_or_one_a_sample():
    model, (z, _, y) = made("sit"), inputs()
    t = torch.tensor(0.3)
    v = model(z, t, y)
    assert torch.equal(v, model(z, t.expand(3), y)) and torch.equal(v, model(z, t.double(), y))
    assert (v - model(z, t + 0.3, y)).abs().max() > 1e-3


def test_classes_left_out_are_no_class():
    model, (z, t, y) = made("sit"), inputs()
    y = torch.tensor([0, 4, 2])
    drop = torch.tensor([True, False, True])
    v, without = model(z, t, y, drop=drop), model(z, t)
    assert torch.equal(without, model(z, t, torch.full((3,), 5))) and torch.equal(without, model(z, t, drop=drop))
    torch.testing.assert_close(v[[0, 2]], without[[0, 2]])
    torch.testing.assert_close(v[1], model(z, t, y)[1])
    assert (v[1] - without[1]).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(v.square().sum(), model.y_embedder.embedding_table.weight)
    assert grad.any(1).tolist() == [False, False, False, False, True, True]


# Features


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_block_k_s_tokens(name):
    model, seen = made(name), []
    model.blocks[1].register_forward_hook(lambda module, given, out: seen.append(out))
    z, t, y = inputs()
    v, features = model(z, t, y, return_features=True)
    assert features.shape == (3, 24, 48) and features is seen[0]
    assert torch.equal(v, model(z, t, y))
    assert RepaProjector(48, 10, hidden=16)(features).shape == (3, 24, 10)


# Precision, backends, compile, memory


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_function(name):
    """Along a random direction of all parameters, in fp64."""
    model, (z, t, y) = made(name).double(), inputs(2, 3, torch.float64)
    grads = step(model, z, t, y)[3:]
    directions = [torch.randn_like(g) for g in grads]
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    def loss(size):
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(d, alpha=size)
            v, features = model(z, t, y, return_features=True)
            for p, d in zip(model.parameters(), directions, strict=True):
                p.sub_(d, alpha=size)
        return v.square().mean() + features.sin().mean()

    torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_lower_precision(name):
    model, (z, t, y) = made(name), inputs()
    exact = copy.deepcopy(model).double()(z.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        v, features, *grads = step(model, z, t, y)
    assert v.dtype == features.dtype == torch.float32 and {g.dtype for g in grads} == {torch.float32}
    assert (v - exact).norm() < 0.03 * exact.norm()
    low = model.bfloat16()(z.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16 and (low - exact).norm() < 0.06 * exact.norm()
    assert model(z, t, y).dtype == torch.float32  # as z, whatever the weights are


def test_attention_backend_is_handed_down():
    plain = made("ddt", backend="sdpa")
    chunked = SiT(plain.cfg, 6, 5, backend="torch")
    chunked.load_state_dict(plain.state_dict())
    z, t, y = inputs()
    truth = step(copy.deepcopy(plain).double(), z.double(), t, y)
    got = step(chunked, z, t, y)
    assert not torch.equal(got[0], step(plain, z, t, y)[0])
    for g, b, true in zip(got[:3], step(plain, z, t, y)[:3], truth[:3], strict=True):
        assert_no_worse(g, b, true)
    with pytest.raises(ValueError, match="attention: backend"):
        made("sit", backend="fast")(z, t, y)


@pytest.mark.parametrize(
    ("name", "recompute"), [("sit", True), ("lightningdit", False), ("ddt", True), ("flux2", False)]
)
def test_a_training_step_compiles_to_one_graph(name, recompute):
    torch.compiler.reset()
    cfg = CONFIGS[name]
    cfg = dataclasses.replace(cfg, depth=1, repa_depth=1, head_depth=min(1, cfg.head_depth))
    model, (z, t, y) = made(cfg, checkpoint=recompute), inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    drop = torch.tensor([True, False, False])
    expected = step(model, z, t, y, drop=drop)

    def same(z, t, y):
        v, features = compiled(z, t, y, return_features=True, drop=drop)
        loss = v.double().square().mean() + features.double().sin().mean()
        return [v, features, *torch.autograd.grad(loss, [z, *model.parameters()])]

    for a, b in zip(same(z.requires_grad_(), t, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_keeps_less_and_changes_nothing(name):
    model, (z, t, y) = made(name), inputs()
    kept, results = {}, {}
    for recompute in (False, True):
        model.checkpoint, sizes = recompute, {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x
        ):
            model(z, t, y)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[recompute] = sum(x.numel() for place, x in sizes.items() if place not in own)
        results[recompute] = step(model, z, t, y)
    assert kept[True] < 0.5 * kept[False]
    for a, b in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# FLUX.2's blocks


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 5)])
def test_flux2_blocks_are_diffusers_single_blocks(h, w):
    from flux2.compat import ensure_torchvision

    ensure_torchvision()
    diffusers = pytest.importorskip("diffusers")
    model = made("flux2")
    peer = diffusers.Flux2Transformer2DModel(
        in_channels=6, num_layers=0, num_single_layers=3, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(6, 6, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "x_embedder.weight": ours["x_embedder.proj.weight"].flatten(1),
        "proj_out.weight": ours["final_layer.linear.weight"],
        "norm_out.linear.weight": ours["final_layer.adaLN_modulation.1.weight"].roll(48, 0),  # scale, shift
        "single_stream_modulation.linear.weight": ours["modulation.1.weight"],
    }
    for i, j in ((0, 1), (2, 2)):
        theirs[f"time_guidance_embed.timestep_embedder.linear_{j}.weight"] = ours[f"t_embedder.mlp.{i}.weight"]
    for i in range(3):
        for a, b in (("linear1", "to_qkv_mlp_proj"), ("linear2", "to_out"), ("q_norm", "norm_q"), ("k_norm", "norm_k")):
            theirs[f"single_transformer_blocks.{i}.attn.{b}.weight"] = ours[f"blocks.{i}.{a}.weight"]
    missing, unexpected = peer.load_state_dict(theirs, strict=False)
    assert not unexpected and all("context" in k or "double" in k for k in missing)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()  # FLUX.2 has text instead
        z, t, _ = inputs(h, w)
        ids = torch.tensor([[0, row, column, 0] for row in range(h) for column in range(w)])
        expected = peer(
            hidden_states=z.flatten(2).transpose(1, 2), encoder_hidden_states=torch.zeros(3, 0, 8), timestep=t,
            img_ids=ids, txt_ids=torch.zeros(0, 4), return_dict=False,
        )[0]  # fmt: skip
        got = model(z, t)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "dit"}, "block: expected one of sit, flux2, got 'dit'"),
        ({"norm": "batch"}, "norm: expected one of layer, rms, got 'batch'"),
        ({"mlp": "relu"}, "mlp: expected one of gelu, swiglu, got 'relu'"),
        ({"time_embed": "raw"}, "time_embed: expected one of sinusoid, fourier, got 'raw'"),
        ({"repa_depth": 4}, "repa_depth: expected 1 to depth=3, got 4"),
        ({"repa_depth": 0}, "repa_depth: expected 1 to depth=3, got 0"),
        ({"heads": 5}, "width: expected a positive multiple of 5 heads x 1, got 48"),
        ({"width": 20, "rope": True}, "width: expected a positive multiple of 2 heads x 4, got 20"),
        ({"width": 24, "block": "flux2"}, "width: expected a positive multiple of 2 heads x 8, got 24"),
        ({"width": 6}, "width: expected a multiple of 4 for sincos, got 6"),
        ({"head_depth": 2, "head_width": 10, "head_heads": 4}, "head_width: expected a positive multiple of 4 heads"),
        ({"block": "flux2", "qk_norm": True}, "block 'flux2' has its own norms and SwiGLU: expected norm, mlp, qk_no"),
    ],
)  # fmt: skip
def test_configs_name_what_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SMALL | changes))


def test_errors_name_expected_and_got():
    model, (z, t, y) = made(dataclasses.replace(CONFIGS["sit"], patch=2)), inputs()
    for call, message in [
        (lambda: model(z[:, :5], t, y), r"z: expected floating-point \[B, 6, h, w\], got torch.float32 \[3, 5, 4, 6\]"),
        (lambda: model(z.int(), t, y), r"z: expected floating-point .*, got torch.int32"),
        (lambda: model(z[0], t, y), r"z: expected .*, got torch.float32 \[6, 4, 6\]"),
        (lambda: model(z[:, :, :3], t, y), "z: sides must be positive multiples of 2, got 3x6"),
        (lambda: model(z[:, :, :0], t, y), "z: sides must be positive multiples of 2, got 0x6"),
        (lambda: model(z, t[:2], y), r"t: expected floating-point \[3\] or \[\], got torch.float32 \[2\]"),
        (lambda: model(z, y, y), r"t: expected floating-point \[3\] or \[\], got torch.int64 \[3\]"),
        (lambda: model(z, t, y[:2]), r"y: expected integers \[3\], got torch.int64 \[2\]"),
        (lambda: model(z, t, t), r"y: expected integers \[3\], got torch.float32 \[3\]"),
        (lambda: model(z, t, y, drop=y), r"drop: expected bool \[3\], got torch.int64 \[3\]"),
        (lambda: SiT(CONFIGS["sit"], 0), "expected in_channels >= 1 and num_classes >= 0, got in_channels=0"),
    ]:
        with pytest.raises(ValueError, match=f"SiT: {message}"):
            call()
