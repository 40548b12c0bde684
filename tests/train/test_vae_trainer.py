"""One update against one plain autograd graph of all terms, and what an update may not do: repeat, mix or redraw."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from toy import RANDOM_LPIPS, assert_same_bits, batch_of, pixels_of, toy, trainer_of

from flux2.adversarial import AdversarialStart
from flux2.equivariance import Transform
from flux2.losses import laplacian_loss
from flux2.teachers import TEACHERS, ViTConfig
from train.vae_config import PIXEL_TERMS, parse_vae

STEP = 5
HALFWAY = AdversarialStart(step=4, ramp=3)  # at step 5 the generator hears half of it
PICTURE = {"l1_weight": 1.0, "l2_weight": 0.5, "charbonnier_weight": 0.25, "laplacian_weight": 0.5, **RANDOM_LPIPS}
LATENT = {"kl_weight": 0.2, "align_weight": 0.3, "vf_weight": 0.4}
GAN = {"gan_weight": 40.0, "gan_adaptive": False, "gan_start": HALFWAY}  # a fresh discriminator says little
EVERYTHING = {**PICTURE, **LATENT, **GAN, "learn_logvar": True, "vf_adaptive": False}
SCHEDULES = ("lpips=0:2", "kl=0:3", "gan=0:0.5", "align=0:2", "vf=0:0.5")
QUARTER_TURN = Transform(scale=2 / 3, turns=1)


def expected_noise(trainer, shape):
    return trainer.noise(STEP, 0, shape) if trainer.config.sample_posterior else torch.zeros(shape)


def similarities(rows):
    """Cosines between all pairs of rows [N, P, D] of one image: [N, P, P]"""
    return F.cosine_similarity(rows[:, :, None], rows[:, None], dim=3)


def plain_terms(trainer, x, transform=None):
    """Each term by name, unweighted, in one graph from the pixels to the loss"""
    config, ae = trainer.config, trainer.ae
    mean, logvar = ae.encode_moments(x).chunk(2, dim=1)
    z = mean + (logvar / 2).exp() * expected_noise(trainer, mean.shape) if config.sample_posterior else mean
    target, moved = x, z
    if transform is not None:
        assert transform == QUARTER_TURN and x.shape[2:] == (48, 48)
        target = F.interpolate(x.rot90(1, (2, 3)), (32, 32), mode="bilinear", antialias=True)
        moved = F.interpolate(z.rot90(1, (2, 3)), (4, 4), mode="bilinear", antialias=True)
    recon = ae.decode_raw(moved)
    error = recon - target
    terms = {
        "l1": error.abs().mean(),
        "l2": (error**2).mean(),
        "charbonnier": ((error**2 + 1e-6).sqrt() - 1e-3).mean(),
        "laplacian": laplacian_loss(recon, target),
        "lpips": trainer.lpips(recon, target) if trainer.lpips else None,
        "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(),
    }
    if trainer.adversary is not None:
        discriminator = trainer.adversary.discriminator.eval()
        terms["gan"] = -discriminator(recon).mean()
        discriminator.train()
    if trainer.head is not None:
        pred = trainer.head(F.pixel_unshuffle(z, 2)).flatten(2).transpose(1, 2)  # [N, P, D]
        tokens = trainer.teacher(x).flatten(2).transpose(1, 2)
        cosines = F.cosine_similarity(pred, tokens, dim=2)
        differences = (similarities(pred) - similarities(tokens)).abs()
        terms["align"] = 1 - cosines.mean()
        terms["vf"] = (0.5 - cosines).clamp(min=0).mean() + (differences - 0.25).clamp(min=0).mean()
    return terms


def plain_loss(trainer, terms):
    """(the loss, weights of gan and vf): the weighted sum, its adaptive weights from norms at the last layers"""
    config, ae = trainer.config, trainer.ae
    factors = {"lpips": 2, "kl": 3, "gan": 0.5, "align": 2, "vf": 0.5} if config.schedules else {}

    def weight(name):
        return config.weight(name) * factors.get(name, 1)

    loss = sum(weight(n) * terms[n] for n in ("l1", "l2", "charbonnier", "laplacian", "lpips") if weight(n))
    if trainer.logvar is not None:
        loss = loss / trainer.logvar.logvar.exp() + trainer.logvar.logvar

    def ratio(term, layer):
        own, other = (torch.autograd.grad(t, layer, retain_graph=True)[0].norm() for t in (loss, term))
        return own / (other + 1e-4)

    used = {}
    if config.gan.weight:
        used["gan"] = config.gan.weight * 0.5 * factors.get("gan", 1)
        used["gan"] *= ratio(terms["gan"], ae.decoder.conv_out.weight) if config.gan.adaptive else 1
        loss = loss + used["gan"] * terms["gan"]
    if config.train == "decoder":
        return loss, used
    if config.vf_weight:
        used["vf"] = weight("vf") * (ratio(terms["vf"], ae.encoder.conv_out.weight) if config.vf_adaptive else 1)
        loss = loss + used["vf"] * terms["vf"]
    loss = loss + weight("kl") * terms["kl"]
    return loss + (weight("align") * terms["align"] if config.align_weight else 0), used


def shifted(trainer):
    """Nothing at a special value: biases and norms off zero and one, log-variance off zero"""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*trainer.ae.parameters(), *trainer.extra.parameters()]:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return trainer


def assert_gradients(got, expected, tolerance):
    """Each within `tolerance` of its own largest value; those that are zero but for rounding, of the largest of all"""
    assert got.keys() == expected.keys()
    floor = 2e-7 * max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max() + floor, (name, error, gradient.abs().max())


ONLY_DECODER = {"train": "decoder", **dict.fromkeys(LATENT, 0.0)}


@pytest.mark.parametrize(
    ("changes", "transform"),
    [
        ({}, None),
        ({"schedules": SCHEDULES}, None),
        ({"resolution": 48}, QUARTER_TURN),
        (ONLY_DECODER, None),
        ({"train": "encoder"}, None),
        ({"sample_posterior": False}, None),
        ({"gan_adaptive": True, "vf_adaptive": True}, None),
        ({"gan_adaptive": True, "vf_adaptive": True, "schedules": SCHEDULES, "resolution": 48}, QUARTER_TURN),
    ],
    ids=["all", "schedules", "eq", "decoder", "encoder", "mode", "adaptive", "adaptive eq"],
)
def test_gradients_are_those_of_one_graph(changes, transform):
    trainer = shifted(trainer_of(toy(**{**EVERYTHING, **changes})))
    x = pixels_of(trainer.config)
    named = list(trainer.trained.named_parameters())
    _, recon, found = trainer.generate(STEP, 0, x, transform, 1.0)
    got = {n: p.grad for n, p in named if p.grad is not None}
    terms = plain_terms(trainer, x, transform)
    loss, used = plain_loss(trainer, terms)
    trained = [(n, p) for n, p in named if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in trained], retain_graph=True)
    assert_gradients(got, {n: g for (n, _), g in zip(trained, gradients, strict=True)}, 2e-5)
    assert not recon.requires_grad
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    pixels = [n for n in found if n in PIXEL_TERMS]
    factors = [2 if trainer.config.schedules and n == "lpips" else 1 for n in pixels]
    recon_loss = sum(f * trainer.config.weight(n) * found[n] for n, f in zip(pixels, factors, strict=True))
    torch.testing.assert_close(found["recon"], recon_loss)
    for name, weight in used.items():
        if f"{name}_weight" in found:
            torch.testing.assert_close(found[f"{name}_weight"], torch.as_tensor(weight), rtol=1e-4, atol=1e-7)
    for name in found.keys() & terms.keys():
        torch.testing.assert_close(found[name], terms[name].detach(), rtol=1e-4, atol=1e-6)
    assert ("gan_weight" in used or "gan" in used) and ("vf" in used) == (trainer.config.train != "decoder")
    # the comparison would notice a term that went missing, wherever it leads
    last = {n: p for n, p in trained if n.endswith(("conv_out.weight", "head.weight"))}
    for name in found.keys() & terms.keys() - {"loss"}:
        parts = torch.autograd.grad(terms[name], list(last.values()), retain_graph=True, allow_unused=True)
        weight = used.get(name, trainer.config.weight(name) if name not in used else 0)
        shares = [float(weight * g.norm() / got[n].norm()) for n, g in zip(last, parts, strict=True) if g is not None]
        assert max(shares) > 1e-3, (name, shares)


def test_gan_share_compares_lengths_at_the_last_layer():
    """As they will be once the ramp is over"""
    trainer = shifted(trainer_of(toy(**PICTURE, **GAN)))
    x = pixels_of(trainer.config)
    found = trainer.generate(STEP, 0, x, None, 1.0)[2]
    terms, layer = plain_terms(trainer, x), trainer.ae.decoder.conv_out.weight
    recon = sum(trainer.config.weight(n) * terms[n] for n in ("l1", "l2", "charbonnier", "laplacian", "lpips"))
    own, other = (torch.autograd.grad(t, layer, retain_graph=True)[0].norm() for t in (recon, terms["gan"]))
    torch.testing.assert_close(found["gan_share"], 40.0 * other / own, rtol=1e-4, atol=0)
    torch.testing.assert_close(found["recon"], recon.detach())


def gradients_of_a_step(config, step=STEP):
    """{optimiser: {parameter: its gradient}} as they came to the update, and the step's scalars"""
    trainer, seen = shifted(trainer_of(config)), {}
    for name, guard in trainer.guards.items():

        def update(step, terms, *more, name=name, guard=guard, call=guard.update):
            seen[name] = {n: p.grad.clone() for n, p in guard.named.items() if p.grad is not None}
            return call(step, terms)

        guard.update = update
    return seen, trainer.step(step, batch_of(config))


def test_accumulation_is_the_same_update():
    eq = {"eq_probability": 1.0, "eq_scales": (2 / 3,), "resolution": 48}
    config = toy(**EVERYTHING, **eq, gan_augment=1.0, batch=4)
    whole, scalars = gradients_of_a_step(config)
    parts, also = gradients_of_a_step(dataclasses.replace(config, accumulate=4))
    assert whole.keys() == parts.keys() == {"autoencoder", "discriminator"}
    for side, gradients in whole.items():
        assert_gradients(parts[side], gradients, 1e-4)
    del scalars["gan_share"], also["gan_share"]  # a mean of each part's ratio
    torch.testing.assert_close(scalars, also, rtol=1e-4, atol=1e-5)


def counted(monkeypatch, owner, name, calls):
    plain = getattr(owner, name)

    def call(x, *rest):
        calls.append((name, len(x), torch.is_grad_enabled()))
        return plain(x, *rest)

    monkeypatch.setattr(owner, name, call)


def test_each_network_runs_once_a_part(monkeypatch):
    config = toy(**EVERYTHING | {"vf_adaptive": True, "gan_adaptive": True}, batch=4, accumulate=2)
    trainer = trainer_of(config)
    calls = {}
    owners = {
        "encoder": (trainer.ae.encoder, "with_features"),
        "decoder": (trainer.ae.decoder, "with_features"),
        "teacher": (trainer.teacher, "tokens"),
        "lpips": (trainer.lpips, "features"),
        "discriminator": (trainer.adversary.discriminator, "forward"),
    }
    for key, (owner, name) in owners.items():
        counted(monkeypatch, owner, name, calls.setdefault(key, []))
    trainer.step(STEP, batch_of(config))
    assert calls["encoder"] == calls["decoder"] == [("with_features", 2, True)] * 2
    assert calls["teacher"] == [("tokens", 2, False)] * 2
    assert calls["lpips"] == [("features", 2, False), ("features", 2, True)] * 2  # the photograph's without a graph
    assert calls["discriminator"] == [("forward", 2, True)] * 6  # for the autoencoder; on photographs; on ours


@pytest.mark.parametrize("preset", ["photos", "rae-tiny"])
def test_draws_are_functions_of_seed_step_and_sample(preset):
    config = toy() if preset == "photos" else parse_vae(["--preset", preset, "--precision", "fp32"])[0]
    config = dataclasses.replace(config, eq_probability=0.5)
    trainer = trainer_of(config)
    shape = (4, trainer.ae.cfg.z_channels, 4, 4)
    noise = trainer.noise(3, 0, shape)
    assert torch.equal(noise, trainer.noise(3, 0, shape))
    parts = [trainer.noise(3, first, (2, *shape[1:])) for first in (0, 2)]
    assert torch.equal(noise, torch.cat(parts))
    others = [trainer.noise(4, 0, shape), trainer_of(dataclasses.replace(config, seed=1)).noise(3, 0, shape)]
    assert not any(torch.equal(noise[i], other[i]) for other in others for i in range(4))
    assert len({n.sum().item() for n in noise}) == 4
    levels = noise.std((1, 2, 3))
    if preset == "rae-tiny":  # tau U(0, 1) a sample
        assert levels.max() < 0.8 and levels.std() > 0.05
    else:
        torch.testing.assert_close(levels, torch.ones(4), rtol=0.2, atol=0)
    transforms = [trainer.transform(s) for s in range(60)]
    assert transforms == [trainer.transform(s) for s in range(60)]
    assert 15 < sum(t is None for t in transforms) < 45 and len(set(transforms)) > 6
    assert trainer_of(dataclasses.replace(config, sample_posterior=False)).noise(3, 0, shape) is None


def test_schedules_change_the_loss_over_the_run():
    schedules = ("l1=0:1,0.5:3", "kl=0:0,0.5:1", "eq=0:0,1:0")
    config = toy(steps=10, schedules=schedules, kl_weight=1.0, align_weight=0.0, eq_probability=1.0)
    trainer = trainer_of(config)
    x = pixels_of(config)
    for step, l1, kl in ((0, 1, 0), (1, 1.4, 0.2), (5, 3, 1), (9, 3, 1)):
        terms = trainer.generate(step, 0, x, trainer.transform(step), 1.0)[2]
        expected = l1 * terms["l1"] + terms["laplacian"] + kl * terms["kl"]
        torch.testing.assert_close(terms["loss"], expected, rtol=1e-5, atol=1e-6)
    assert all(trainer.transform(s) is None for s in range(10))


def test_every_parameter_moves_and_terms_are_unweighted():
    config = toy(**EVERYTHING, ema_decays=(0.9, 0.5))
    trainer = trainer_of(config)
    before = {k: v.clone() for k, v in trainer.trained.state_dict().items()}
    averages = [{k: v.clone() for k, v in e.model.state_dict().items()} for e in trainer.emas]
    for step in range(STEP, STEP + 2):
        terms = trainer.step(step, batch_of(config, step))
    still = [k for k, v in trainer.trained.state_dict().items() if torch.equal(v, before[k])]
    assert all(".bn." in k for k in still), still
    assert set(terms) >= {"loss", "recon", "l1", "lpips", "kl", "align", "vf", "gan", "d_loss", "grad_norm"}
    assert all(v.ndim == 0 and not v.requires_grad and torch.isfinite(v) for v in terms.values())
    for old, ema, decay in zip(averages, trainer.emas, (0.9, 0.5), strict=True):
        name = "decoder.conv_out.weight"
        first, last = old[name], trainer.ae.state_dict()[name]
        assert (ema.model.state_dict()[name] - first).norm() < (last - first).norm()
        assert ema.decay == decay and not torch.equal(ema.model.state_dict()[name], first)
    assert trainer.ema_names() == ["ema", "ema_0.5"]


def test_the_learning_rates_follow_their_plan():
    config = toy(steps=12, **GAN | {"gan_lr": 3e-4})
    trainer = trainer_of(config)
    trainer.step(6, batch_of(config))
    rate = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * 0.4))  # step 6 of 12, after 2 of warm-up
    assert trainer.lr == pytest.approx(1e-3 * rate)
    groups = {len(g["params"]): g["lr"] for g in trainer.optimiser.param_groups}
    assert groups == {max(groups): pytest.approx(trainer.lr), min(groups): pytest.approx(0.1 * trainer.lr)}
    assert trainer.adversary.optimiser.param_groups[0]["lr"] == pytest.approx(3e-4 * rate)


def test_backends_train_alike():
    """An update on fused operations, on the real kernels (interpreted without a GPU) and on stock modules"""
    config = toy(batch=1)
    terms = {}
    for backend in ("auto", "triton", "torch"):
        trainer = trainer_of(config, backend)
        assert trainer.ema.model.decoder.backend == backend
        terms[backend] = trainer.step(2, batch_of(config))
    for backend in ("auto", "triton"):  # the norm is that of every gradient
        torch.testing.assert_close(terms[backend], terms["torch"], rtol=1e-4, atol=1e-5)


def test_autocast_leaves_weights_and_moments_in_fp32():
    changes = {**EVERYTHING, "vf_adaptive": True, "gan_adaptive": True, "gan_lecam": 0.1}
    config = toy(**changes)
    trainer, plain = trainer_of(dataclasses.replace(config, precision="bf16")), trainer_of(config)
    seen = []
    decode = trainer._decode
    trainer._decode = lambda z: seen.append(decode(z)[0].dtype) or decode(z)
    for step in range(STEP, STEP + 2):
        terms, exact = (t.step(step, batch_of(config, step)) for t in (trainer, plain))
    assert seen == [torch.bfloat16] * 2
    assert all(torch.isfinite(v) for v in terms.values()), terms
    torch.testing.assert_close(terms["l1"], exact["l1"], rtol=0.05, atol=0)
    assert not torch.equal(terms["l1"], exact["l1"])
    for optimiser in (trainer.optimiser, trainer.adversary.optimiser):
        moments = [v for s in optimiser.state.values() for v in s.values()]
        weights = [p for g in optimiser.param_groups for p in g["params"]]
        assert len(moments) == 3 * len(weights)
        assert {t.dtype for t in (*moments, *weights)} == {torch.float32}
        assert all(torch.isfinite(t).all() for t in (*moments, *weights))
    assert all(guard.read()[0] == [] for guard in trainer.guards.values())


@pytest.fixture
def tiny_vit(monkeypatch):
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    row = ViTConfig(model="vit_small_patch14_dinov2.lvd142m", channels=32, patch=14, options=options)
    monkeypatch.setitem(TEACHERS, "dinov2-s", row)


@pytest.mark.parametrize("networks", ["hog and patch", "vit", "decoder alone"])
def test_compiled_phases_are_whole_graphs_and_equal_eager(networks, monkeypatch, tiny_vit):
    """Each phase under fullgraph=True, traced but not lowered; with a quarter turn, which is another memory layout"""
    torch._dynamo.reset()
    phases = {"encode", "decode", "pixel_terms", "tokens", "fool", "judge_logits"}
    changes = {**EVERYTHING, "gan_augment": 1.0, "eq_probability": 0.5, "eq_scales": (1.0,)}
    if networks == "vit":
        changes |= {"teacher": "dinov2-s", "teacher_weights": "random", "lpips_weight": 0.0, "eq_probability": 0.0}
        changes |= {"gan_discriminator": "vit", "gan_backbone": "random-tiny"}
        phases = {"tokens", "fool", "judge_logits"}
    if networks == "decoder alone":
        changes, phases = {**ONLY_DECODER, **PICTURE, **GAN}, {"frozen_latent"}
    config, plain_compile, asked = toy(**changes), torch.compile, []

    def traced(f, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        asked.append(f.__name__)
        return plain_compile(f, **options, backend="aot_eager") if f.__name__ in phases else f

    eager = trainer_of(config)
    monkeypatch.setattr(torch, "compile", traced)
    compiled = trainer_of(config, compiled=True)
    assert phases <= set(asked) and len(asked) == 7
    turns = [t.turns if (t := eager.transform(s)) else 0 for s in range(4, 60)]
    for turn in {0, 1} if config.eq_probability else {0}:
        step = 4 + turns.index(turn)
        expected, got = (t.step(step, batch_of(config, step)) for t in (eager, compiled))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert "gan" in got and ("vf" in got) == (networks != "decoder alone")


def test_tensors_and_load_are_inverses():
    config = toy(**EVERYTHING, gan_lecam=0.1, ema_decays=(0.9, 0.5))
    first, second = trainer_of(config), trainer_of(dataclasses.replace(config, seed=5))
    for step in (4, 5):
        first.step(step, batch_of(config, step))
    saved = {k: {n: v.clone() for n, v in group.items()} for k, group in first.tensors().items()}
    assert set(saved) == {
        "model", "optimiser", "ema", "ema_0.5", "extra", "discriminator", "discriminator_optimiser",
        "discriminator_state",
    }  # fmt: skip
    assert {"head.weight", "logvar.logvar"} == set(saved["extra"])
    second.config = config  # its seed
    second.adversary.config = config
    second.load(saved)
    second.lpips = first.lpips  # random, so not the same
    again = [t.step(6, batch_of(config, 6)) for t in (first, second)]
    assert all(torch.equal(v, again[1][k]) for k, v in again[0].items())
    assert_same_bits(first.tensors(), second.tensors())


def test_a_latent_is_drawn_in_fp32_under_autocast(monkeypatch):
    """Moments come in bf16; rounded there, the posterior's noise and the KL's gradient would be"""
    trainer, seen = trainer_of(toy(precision="bf16")), []
    gradient = trainer.latent_gradient
    monkeypatch.setattr(trainer, "latent_gradient", lambda *a: seen.append((a[3].dtype, a[4].dtype)) or gradient(*a))
    trainer.step(0, batch_of(trainer.config))
    assert seen == [(torch.float32, torch.float32)]
