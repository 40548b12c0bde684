"""Losses and penalties against closed forms in numpy; the start against a loop over recorded losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux2.adversarial import (
    D_HAS_WON,
    D_IS_GUESSING,
    G_IS_IGNORED,
    AdversarialStart,
    LeCAM,
    StartState,
    adaptive_weight,
    diagnose,
    discriminator_loss,
    generator_loss,
    logit_statistics,
    r1_penalty,
)
from flux2.discriminator import PatchDiscriminator, ViTDiscriminator, load_backbone

REAL = np.array([2.0, 0.5, -1.0, 0.0])
FAKE = np.array([[-3.0, 0.25], [1.5, -0.5], [0.0, -1.0]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# value of D's loss, its gradients to real and fake, value of G's loss, its gradient to fake
def closed_forms(kind):
    if kind == "hinge":
        real, d_real = np.maximum(1 - REAL, 0), -1.0 * (REAL < 1.0)
        fake, d_fake = np.maximum(1 + FAKE, 0), 1.0 * (FAKE > -1.0)
    else:
        real, d_real = -np.log(sigmoid(REAL)), sigmoid(REAL) - 1
        fake, d_fake = -np.log(1 - sigmoid(FAKE)), sigmoid(FAKE)
    g, d_g = (-np.log(sigmoid(FAKE)), sigmoid(FAKE) - 1) if kind == "non-saturating" else (-FAKE, -np.ones_like(FAKE))
    loss = (real.mean() + fake.mean()) / 2
    return loss, d_real / 2 / REAL.size, d_fake / 2 / FAKE.size, g.mean(), d_g / FAKE.size


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_losses_and_gradients_are_the_closed_forms(kind):
    real = torch.tensor(REAL, dtype=torch.float32, requires_grad=True)
    fake = torch.tensor(FAKE, dtype=torch.float32, requires_grad=True)
    loss, d_real, d_fake, g, d_g = closed_forms(kind)
    ours = discriminator_loss(real, fake, kind)
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    for got, expected in zip(torch.autograd.grad(ours, (real, fake)), (d_real, d_fake), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    ours = generator_loss(fake, kind)
    assert ours.item() == pytest.approx(g, rel=1e-6)
    np.testing.assert_allclose(torch.autograd.grad(ours, fake)[0].numpy(), d_g, rtol=1e-5)


def test_losses_are_fp32_of_bf16_logits():
    real, fake = torch.full((3,), 0.5).bfloat16(), torch.full((1000,), 1 / 3).bfloat16()
    for kind in ("hinge", "vanilla", "non-saturating"):
        with torch.autocast("cpu", torch.bfloat16):
            d, g = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
        assert d.dtype == g.dtype == torch.float32
        torch.testing.assert_close(d, discriminator_loss(real.double(), fake.double(), kind), check_dtype=False)
        torch.testing.assert_close(g, generator_loss(fake.double(), kind), check_dtype=False)


def test_losses_do_not_saturate_where_they_should_not():
    far = torch.tensor([-200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(generator_loss(far, "non-saturating"), far)
    assert gradient.item() == -1.0
    assert discriminator_loss(far.detach(), -far.detach(), "vanilla").item() == 200.0  # no overflow


@pytest.mark.parametrize(
    "loss",
    [
        lambda kind: discriminator_loss(torch.ones(1), torch.ones(1), kind),
        lambda kind: generator_loss(torch.ones(1), kind),
    ],
)
def test_unknown_losses_are_refused(loss):
    with pytest.raises(ValueError, match="expected one of hinge, vanilla, non-saturating, got 'wgan'"):
        loss("wgan")


def test_r1_of_a_linear_and_of_a_quadratic_discriminator():
    x, w = torch.randn(3, 2, 4, 5), torch.randn(2, 4, 5, requires_grad=True)
    penalty = r1_penalty(lambda p: (p * w).sum((1, 2, 3)), x)
    assert penalty.item() == pytest.approx(0.5 * 40 * w.square().sum().item(), rel=1e-5)  # P = 40; the gradient is w
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 40 * w.detach())

    scale = torch.tensor(0.7, requires_grad=True)
    # logits [N, 2] whose mean is scale * |x|^2: the gradient is 2 scale x
    penalty = r1_penalty(lambda p: scale * p.square().sum((1, 2, 3)).view(-1, 1) * torch.tensor([0.5, 1.5]), x)
    expected = 0.5 * 40 * 4 * x.square().sum((1, 2, 3)).mean().item()  # times scale^2
    assert penalty.item() == pytest.approx(expected * 0.49, rel=1e-5)
    assert torch.autograd.grad(penalty, scale)[0].item() == pytest.approx(expected * 2 * 0.7, rel=1e-5)
    assert not x.requires_grad


def test_r1_does_not_depend_on_resolution():
    """A fully convolutional D on a periodic picture, tiled; a D that shrinks what it sees, on a picture enlarged."""
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    x = torch.rand(2, 3, 8, 8)
    small = r1_penalty(lambda p: conv(p).square().mean(1, keepdim=True), x)
    assert small > 0
    torch.testing.assert_close(
        small, r1_penalty(lambda p: conv(p).square().mean(1, keepdim=True), x.repeat(1, 1, 2, 3))
    )

    def shrinking(p):
        return conv(F.adaptive_avg_pool2d(p, 8)).square().mean(1)

    large = F.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(r1_penalty(shrinking, x), r1_penalty(shrinking, large))


@pytest.mark.parametrize(
    "make", [lambda: PatchDiscriminator(width=8), lambda: ViTDiscriminator(load_backbone("random-tiny")).eval()]
)
def test_r1_trains_both_discriminators_under_autocast(make):
    """fp32 inside autocast, and second derivatives through attention; the gradient by a finite difference."""
    net, x = make(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(net, x)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, r1_penalty(net, x), rtol=1e-4, atol=0)
    net, x = net.double(), x.double()
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(r1_penalty(net, x), parameters, allow_unused=True)  # the last bias has none
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    for side in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(side * d)
        values.append(r1_penalty(net, x).item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3)
    assert all(b.grad is None for b in (net.backbone.parameters() if isinstance(net, ViTDiscriminator) else ()))


def test_lecam_follows_the_logits_and_holds_them():
    lecam = LeCAM(decay=0.9)
    assert lecam(torch.full((4,), 7.0), torch.full((4,), -7.0)).item() == 0
    real_anchor = fake_anchor = None
    for step in range(4):
        real, fake = torch.randn(3, 1, 2, 2) + 1, torch.randn(5) - 1
        means = real.double().mean().item(), fake.double().mean().item()
        first = step == 0
        real_anchor = means[0] if first else 0.9 * real_anchor + 0.1 * means[0]
        fake_anchor = means[1] if first else 0.9 * fake_anchor + 0.1 * means[1]
        lecam.update(real.requires_grad_(), fake.requires_grad_())
        assert lecam.real_anchor.item() == pytest.approx(real_anchor, rel=1e-5)
        assert lecam.fake_anchor.item() == pytest.approx(fake_anchor, rel=1e-5)
    loss = lecam(real, fake)
    above, below = (
        np.maximum(real.detach().numpy() - fake_anchor, 0),
        np.maximum(real_anchor - fake.detach().numpy(), 0),
    )
    assert loss.item() == pytest.approx((above**2).mean() + (below**2).mean(), rel=1e-5)
    d_real, d_fake = torch.autograd.grad(loss, (real, fake))
    np.testing.assert_allclose(d_real.numpy(), 2 * above / 12, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d_fake.numpy(), -2 * below / 5, rtol=1e-4, atol=1e-6)


def test_lecam_is_saved_and_not_poisoned():
    lecam, twin = LeCAM(), LeCAM()
    lecam.update(torch.ones(2), -torch.ones(2))
    lecam.update(torch.tensor([math.nan, 1.0]), torch.ones(2))
    assert (lecam.real_anchor, lecam.fake_anchor, lecam.updates) == (1, -1, 1)
    twin.load_state_dict(lecam.state_dict())
    assert (twin.real_anchor, twin.fake_anchor, twin.updates) == (1, -1, 1)
    assert list(lecam.parameters()) == []
    assert lecam(torch.tensor([math.nan]), torch.ones(1)).isnan()  # the step's own loss does not hide it
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\), got 1"):
        LeCAM(decay=1.0)


@pytest.mark.parametrize(
    ("reference", "other", "options", "expected"),
    [
        (3.0, 2.0, {"eps": 1.0}, 1.0),
        (3.0, 2.0, {}, 3 / 2.0001),
        (3.0, 2.0, {"eps": 1e-6}, 3 / 2.000001),
        (0.0, 2.0, {}, 0.0),
        (0.0, 0.0, {}, 0.0),
        (2.0, 0.0, {}, 1e4),
        (2.0, 0.0, {"max": 50.0}, 50.0),
        (0.5, 0.0, {}, 5000.0),
        (math.nan, 1.0, {}, math.nan),
        (1.0, math.nan, {}, math.nan),
        (math.inf, 1.0, {}, math.nan),
        (1.0, math.inf, {}, math.nan),
        (0.0, math.inf, {}, math.nan),
    ],
)
def test_adaptive_weight(reference, other, options, expected):
    norms = torch.tensor(reference, requires_grad=True), torch.tensor(other, requires_grad=True)
    weight = adaptive_weight(*norms, **options)
    assert weight.dtype == torch.float32 and weight.shape == () and not weight.requires_grad
    assert weight.item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_adaptive_weight_makes_the_gradients_equal():
    """In bf16 too, whose norms would swallow eps."""
    reference, other = torch.randn(100), 1e-2 * torch.randn(100)
    weight = adaptive_weight(reference.norm(), other.norm(), eps=1e-8)
    assert (weight * other).norm().item() == pytest.approx(reference.norm().item(), rel=1e-5)
    assert adaptive_weight(torch.tensor(1.0).bfloat16(), torch.tensor(1.0).bfloat16(), eps=1e-3).item() < 1


def test_start_on_a_step():
    start = StartState(AdversarialStart(step=5, warmup=3, ramp=2))
    start.observe(0, torch.tensor(1.0))
    assert [start.trains_discriminator(s) for s in range(7)] == [False] * 5 + [True] * 2
    factors = [start.generator_factor(s) for s in range(12)]
    assert factors == pytest.approx([0] * 8 + [1 / 3, 2 / 3, 1, 1])
    plain = StartState(AdversarialStart(step=5))
    assert [plain.generator_factor(s) for s in range(4, 7)] == [0, 1, 1]


def first_plateau(losses, cfg):
    """By the definition: means of whole windows, each against the one before."""
    means = [np.mean(losses[i : i + cfg.window]) for i in range(0, len(losses) - cfg.window + 1, cfg.window)]
    for k in range(1, len(means)):
        end = (k + 1) * cfg.window
        if means[k - 1] - means[k] < cfg.threshold * abs(means[k - 1]) and end >= cfg.step:
            return end
    return None


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("step", "threshold"), [(0, 0.02), (0, 0.2), (170, 0.2), (0, 0.0001)])
def test_start_on_a_plateau(sign, step, threshold):
    """The loss of a learned log-variance is negative, and falls away from 0."""
    cfg = AdversarialStart(when="plateau", step=step, window=10, threshold=threshold)
    noise = np.random.default_rng(0).normal(0, 0.001, 300)
    falling = np.exp(-np.arange(300) / 40) + 0.1
    losses = (falling if sign > 0 else falling - 2) + noise
    start, trained = StartState(cfg), []
    for s, loss in enumerate(losses):
        trained.append(start.trains_discriminator(s))
        start.observe(s, torch.tensor(loss))
    expected = first_plateau(losses, cfg)
    assert expected is not None and start.started_at == expected
    assert trained == [False] * expected + [True] * (300 - expected)


def test_start_does_not_come_while_the_loss_falls():
    start = StartState(AdversarialStart(when="plateau", window=5, threshold=0.01))
    for s in range(200):
        start.observe(s, torch.tensor(0.99**s))
    assert start.started_at is None and start.generator_factor(10**9) == 0
    assert not start.trains_discriminator(10**9)


def test_start_goes_on_where_it_was_saved():
    cfg = AdversarialStart(when="plateau", window=10, threshold=0.2)
    losses = [torch.tensor(1 / (1 + s)) for s in range(60)]
    for cut in (3, 14, 20, 59):
        straight, before = StartState(cfg), StartState(cfg)
        for s, loss in enumerate(losses):
            straight.observe(s, loss)
            if s < cut:
                before.observe(s, loss)
        after = StartState(cfg)
        saved = before.state_dict()
        assert all(isinstance(v, torch.Tensor) for v in saved.values())
        after.load_state_dict({k: v.clone() for k, v in saved.items()})
        for s in range(cut, 60):
            after.observe(s, losses[s])
        assert after.started_at == straight.started_at == 60
        for key, value in straight.state_dict().items():
            torch.testing.assert_close(after.state_dict()[key], value, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_decides_nothing():
    cfg = AdversarialStart(when="plateau", window=4, threshold=0.01)
    clean, broken = StartState(cfg), StartState(cfg)
    for s in range(8):
        clean.observe(s, torch.tensor(1.0))
        broken.observe(s, torch.tensor(math.nan if s in (1, 6) else 1.0))
    assert clean.started_at == broken.started_at == 8
    silent = StartState(cfg)
    for s in range(8):
        silent.observe(s, torch.tensor(math.inf))
    assert silent.started_at is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"when": "never"}, "when: expected step or plateau, got 'never'"),
        ({"step": -1}, "step: expected at least 0, got -1"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"warmup": -2}, "warmup: expected at least 0, got -2"),
        ({"ramp": -3}, "ramp: expected at least 0, got -3"),
        ({"threshold": 1.0}, r"threshold: expected a share in \(0, 1\), got 1.0"),
    ],
)
def test_start_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        AdversarialStart(**fields)


def test_statistics_count_logits():
    stats = logit_statistics(torch.tensor(REAL).requires_grad_(), torch.tensor(FAKE).bfloat16())
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        {"d_real_accuracy": 2 / 4, "d_fake_accuracy": 3 / 6, "d_real_mean": 1.5 / 4, "d_fake_mean": -2.75 / 6}, rel=1e-6
    )
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in stats.values())


@pytest.mark.parametrize(
    ("real", "fake", "state"),
    [
        (D_HAS_WON, D_HAS_WON, "D has won"),
        (1.0, 1.0, "D has won"),
        (1.0, D_HAS_WON - 0.01, "D is learning"),
        (D_HAS_WON - 0.01, 1.0, "D is learning"),
        (0.7, 0.6, "D is learning"),
        (0.5, 0.5, "D is guessing"),
        (D_IS_GUESSING, D_IS_GUESSING, "D is guessing"),
        (D_IS_GUESSING + 0.01, D_IS_GUESSING, "D is learning"),
        (1.0, 0.02, "D is guessing"),  # calls everything real
        (0.2, 0.3, "D is guessing"),
    ],
)
def test_diagnosis_of_the_discriminator(real, fake, state):
    line = diagnose(real_accuracy=real, fake_accuracy=fake)
    assert line == f"{state} ({real:.0%} of real, {fake:.0%} of fake)"


@pytest.mark.parametrize(
    ("seen", "ending"),
    [
        ({"weight": 0.0}, "; G is ignored (adaptive weight 0)"),
        ({"weight": 1e4}, "; G is ignored (adaptive weight 1e+04)"),
        ({"weight": 50.0, "max_weight": 50.0}, "; G is ignored (adaptive weight 50)"),
        ({"weight": 50.0, "gan_share": 0.009}, "; G is ignored (0.9% of the reconstruction's gradient)"),
        ({"gan_share": 0.0}, "; G is ignored (0.0% of the reconstruction's gradient)"),
        ({"weight": 50.0, "gan_share": G_IS_IGNORED}, ""),
        ({"weight": 9999.0, "gan_share": 0.5}, ""),
    ],
)
def test_diagnosis_of_the_generator(seen, ending):
    assert diagnose(real_accuracy=0.8, fake_accuracy=0.7, **seen) == f"D is learning (80% of real, 70% of fake){ending}"


def test_diagnosis_names_what_is_not_finite():
    line = diagnose(real_accuracy=1.0, fake_accuracy=1.0, weight=math.nan, gan_share=math.inf)
    assert line == "GAN is broken (weight nan, GAN share inf)"


def test_a_step_is_graphs_and_neither_player_moves_the_other():
    """D's and G's loss, compiled whole; D sees the reconstruction detached, G's gradient leaves D as it is."""
    net, lecam = PatchDiscriminator(width=4), LeCAM()
    lecam.update(torch.ones(1), -torch.ones(1))
    real, raw = torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24).requires_grad_()

    def d_loss(real, fake):
        a, b = net(real), net(fake)
        lecam.update(a, b)
        return discriminator_loss(a, b) + lecam(a, b) + adaptive_weight(a.norm(), b.norm())

    def g_loss(fake):
        return generator_loss(net(fake), "non-saturating")

    state = {k: v.clone() for k, v in lecam.state_dict().items()}
    for loss, inputs in ((d_loss, (real, torch.tanh(raw).detach())), (g_loss, (torch.tanh(raw),))):
        lecam.load_state_dict(state)
        expected = loss(*inputs)
        lecam.load_state_dict(state)
        torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), expected)
        assert lecam.updates == (2 if loss is d_loss else 1)
    net.requires_grad_(False)
    g_loss(torch.tanh(raw)).backward()
    assert raw.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())


def test_a_broken_discriminator_is_no_guess():
    """NaN > 0 is false: its accuracies would read 0"""
    broken, sound = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, -1.0])
    for real, fake in ((broken, sound), (sound, broken)):
        found = logit_statistics(real, fake)
        assert found["d_real_accuracy"].isnan() and found["d_fake_accuracy"].isnan()
    assert logit_statistics(sound, sound)["d_real_accuracy"] == 0.5
