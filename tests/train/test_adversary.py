"""The adversarial game inside an update: what each side sees, what it may not touch, and what is saved of it."""

import dataclasses

import pytest
import torch
from toy import RANDOM_LPIPS, assert_same_bits, batch_of, pixels_of, toy, trainer_of

from flux2.adversarial import ADAPTIVE_MAX, AdversarialStart
from train import adversary

PATCH = {"gan_weight": 0.5}
VIT = {**PATCH, "gan_discriminator": "vit", "gan_backbone": "random-tiny"}
KINDS = {"group": PATCH, "batch": {**PATCH, "gan_norm": "batch"}, "vit": VIT}
KINDS["all"] = {**VIT, "gan_augment": 1.0, "gan_lecam": 0.1, "gan_r1": 0.1, "gan_quantise": True, **RANDOM_LPIPS}


def state(module):
    """Copies of parameters, buffers and gradients, and what is in train mode"""
    tensors = {k: v.clone() for k, v in module.state_dict().items()}
    gradients = {f"{k}.grad": p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
    flags = {f"{k}.training": torch.tensor(m.training) for k, m in module.named_modules()}
    return tensors | gradients | flags | {f"{k}.q": torch.tensor(p.requires_grad) for k, p in module.named_parameters()}


def changed(before, module):
    after = state(module)
    return {k for k in before.keys() | after.keys() if k not in before or not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_of_one_side_reaches_the_other(kind):
    config = toy(**KINDS[kind])
    trainer = trainer_of(config)
    game, x = trainer.adversary, pixels_of(config)
    before = state(game.discriminator)
    target, recon, found = trainer.generate(0, 0, x, None, 1.0)
    assert found["gan"].item() != 0 and changed(before, game.discriminator) == set()
    assert all(p.grad is None for p in game.discriminator.parameters())
    assert torch.equal(target, x) and not (target.requires_grad or recon.requires_grad)

    ours = state(trainer.trained)
    assert any(k.endswith(".grad") for k in ours)
    game.judge(0, 0, target, recon, 1.0)
    assert changed(ours, trainer.trained) == set()
    moved = changed(before, game.discriminator)
    assert {f"{k}.grad" for k, _ in game.discriminator.named_parameters()} <= moved
    buffers = {"group": (), "batch": ()}.get(kind, ("._u", "._v"))
    assert all(any(k.endswith(b) for k in moved) for b in buffers)
    assert not any(k.endswith((".training", ".q")) for k in moved)
    game.update(0, dict.fromkeys(("d_loss", "d_real_mean", "d_fake_mean"), torch.zeros(())), 1.0)
    assert changed(ours, trainer.trained) == set()
    still = {k for k, _ in game.discriminator.named_parameters()} - changed(before, game.discriminator)
    # inside hinge's margin on both, the last bias is pulled up and down alike
    assert all(k == "main.11.bias" or k.endswith(".out.bias") for k in still)
    if kind in ("vit", "all"):
        assert all(p.grad is None and not p.requires_grad for p in game.discriminator.backbone.parameters())


def test_the_gradient_of_both_sides_is_their_loss_s():
    """The autoencoder hears the discriminator of before; with regularisers, augmentation and 8-bit reconstructions"""
    changes = {"gan_lecam": 0.3, "gan_r1": 0.2, "gan_r1_every": 2, "gan_augment": 1.0, "gan_quantise": True}
    config = toy(**PATCH, **changes)
    game = trainer_of(config).adversary
    x, recon = pixels_of(config), 1.2 * pixels_of(config, 1)
    game.lecam.update(torch.tensor(2.0), torch.tensor(-3.0))
    terms = game.judge(4, 0, x, recon, 0.5)
    got = {n: p.grad for n, p in game.discriminator.named_parameters()}

    draws = game._draws(4, 0, len(x))
    levels = ((recon.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # what a photograph's values are
    real, fake = (game.discriminator(game.augment(pixels, draws)) for pixels in (x, levels))
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    lecam = ((real + 3).clamp(min=0) ** 2).mean() + ((2 - fake).clamp(min=0) ** 2).mean()
    pixels = x.clone().requires_grad_()
    mean = game.discriminator(pixels).mean((1, 2, 3)).sum()
    (slope,) = torch.autograd.grad(mean, pixels, create_graph=True)
    r1 = 0.5 * x[0].numel() * (slope**2).sum((1, 2, 3)).mean()
    loss = 0.5 * (hinge + 0.3 * lecam + 2 * 0.2 * r1)
    expected = torch.autograd.grad(loss, list(game.discriminator.parameters()), allow_unused=True)
    for (name, gradient), wanted in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in (("d_loss", hinge), ("lecam", lecam), ("r1", r1)):
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-4, atol=1e-6)
    assert "r1" not in game.judge(5, 0, x, recon, 0.5)

    loss, gradient = game.gradient(4, 0, recon)
    leaf = recon.clone().requires_grad_()
    said = -game.discriminator(game.augment(leaf, draws)).mean()  # not quantised: that has no gradient
    torch.testing.assert_close(loss, said.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(said, leaf)[0], rtol=1e-4, atol=1e-7)

    assert (game.lecam.real_anchor, game.lecam.fake_anchor) == (2.0, -3.0)  # of the steps before, whatever the parts
    game.update(4, terms, 1.0)
    for anchor, old, mean in ((game.lecam.real_anchor, 2.0, real), (game.lecam.fake_anchor, -3.0, fake)):
        torch.testing.assert_close(anchor, 0.99 * old + 0.01 * mean.mean().detach())


@pytest.mark.parametrize("transformed", [False, True])
def test_the_discriminator_sees_detached_draws_of_the_posterior(transformed, monkeypatch):
    changes = {"resolution": 64, "eq_probability": 1.0, "eq_scales": (0.5,)} if transformed else {}
    config = toy(**PATCH, **changes)
    trainer = trainer_of(config)
    with torch.no_grad():
        trainer.ae.encoder.conv_out.bias[32:] += 1.0  # a wide posterior
    x, seen, judge = pixels_of(config), [], trainer.adversary._judge
    posterior = trainer.ae.posterior(x)
    transform = trainer.transform(0)
    assert (transform is not None) == transformed

    def moved(tensor, side):
        return tensor if transform is None else transform(tensor, (side, side))

    with torch.no_grad():
        sample = posterior.mean + (0.5 * posterior.logvar).exp() * trainer.noise(0, 0, posterior.mean.shape)
        drawn, mode = (trainer.ae.decode_raw(moved(z, 4)) for z in (sample, posterior.mean))
    monkeypatch.setattr(trainer.adversary, "_judge", lambda *a: seen.append(a) or judge(*a))
    trainer.step(0, batch_of(config))
    ((real, fake, draws),) = seen
    torch.testing.assert_close(real, moved(x, 32))
    torch.testing.assert_close(fake, drawn, rtol=1e-4, atol=1e-5)
    assert (fake - mode).abs().max() > 0.01 and not fake.requires_grad and not real.requires_grad
    assert torch.equal(draws, trainer.adversary._draws(0, 0, 2))


def test_augmentation_is_a_function_of_seed_step_and_sample():
    config = toy(**PATCH, gan_augment=1.0)
    game, other = trainer_of(config).adversary, trainer_of(dataclasses.replace(config, seed=1)).adversary
    draws = game._draws(3, 0, 4)
    assert torch.equal(draws, torch.cat([game._draws(3, 0, 2), game._draws(3, 2, 2)]))
    assert not torch.equal(draws, game._draws(4, 0, 4)) and not torch.equal(draws, other._draws(3, 0, 4))


def test_it_begins_when_told_and_the_generator_hears_later():
    start = AdversarialStart(step=1, warmup=1, ramp=1)
    config = toy(**PATCH, gan_start=start, gan_adaptive=False, align_weight=0.0, kl_weight=0.0)
    trainer = trainer_of(config)
    weights = []
    for step in range(5):
        terms = trainer.step(step, batch_of(config, step))
        assert ("d_loss" in terms) == ("d_grad_norm" in terms) == (step >= 1)
        weights.append(terms["gan_weight"].item() if "gan" in terms else None)
        assert trainer.remarks({k: v.item() for k, v in terms.items()}).keys() == (
            {"gan_diagnosis"} if step >= 1 else set()
        )
    assert weights == [None, None, 0.25, 0.5, 0.5]


def test_it_begins_where_reconstruction_stops_falling(monkeypatch):
    start = AdversarialStart(when="plateau", window=2, threshold=0.99, step=5)
    config = toy(**PATCH, gan_start=start, batch=4, accumulate=2, learn_logvar=True)
    trainer, shown = trainer_of(config), []
    observe = trainer.adversary.start.observe
    monkeypatch.setattr(trainer.adversary.start, "observe", lambda s, v: shown.append((s, v)) or observe(s, v))
    steps = [trainer.step(s, batch_of(config, s)) for s in range(8)]
    assert [s for s, terms in enumerate(steps) if "d_loss" in terms] == [6, 7]  # the first window to end after step 5
    assert shown == [(s, terms["recon"]) for s, terms in enumerate(steps)]  # of the whole batch
    for terms in steps:
        torch.testing.assert_close(terms["recon"], terms["l1"] + terms["laplacian"])


def test_a_broken_reconstruction_reaches_no_statistic_of_the_discriminator():
    """NaN would stay in a running statistic for ever"""
    for kind in ("batch", "vit"):
        config = toy(**KINDS[kind], gan_lecam=0.1)
        game = trainer_of(config).adversary
        x = pixels_of(config)
        game.update(0, game.judge(0, 0, x, -x, 1.0), 1.0)
        before, anchors = state(game.discriminator), state(game.lecam)
        broken = x.clone()
        broken[0, 0, 0, 0] = torch.nan
        game.update(1, game.judge(1, 0, x, broken, 1.0), 1.0)
        moved = changed(before, game.discriminator)  # spectral norms iterate on weights, whatever the picture
        assert all(k.endswith(("._u", "._v")) for k in moved) and changed(anchors, game.lecam) == set()
        (skipped,), _ = game.guard.read()
        assert skipped.step == 1 and "d_loss" in skipped.broke
        assert torch.isfinite(game.gradient(2, 0, x)[1]).all()


def test_an_adaptive_weight_at_its_end_is_remarked_on():
    game = trainer_of(toy(**PATCH)).adversary
    means = {"d_real_accuracy": 0.7, "d_fake_accuracy": 0.7, "gan_adaptive": ADAPTIVE_MAX, "gan_share": 0.3}
    assert "G is ignored" in game.remark(means)
    assert game.remark({**means, "gan_adaptive": 3.0}) == "D is learning (70% of real, 70% of fake)"
    assert "D has won" in game.remark({"d_real_accuracy": 1.0, "d_fake_accuracy": 0.99})
    assert game.remark({"step": 0}) == "" and game.remark({"step": 9}) == "GAN is broken (no finite value)"


@pytest.mark.parametrize("kind", ["batch", "all"])
def test_what_is_saved_goes_on_as_before(kind):
    plateau = AdversarialStart(when="plateau", window=2, threshold=0.99, warmup=1, ramp=2)
    config = toy(**KINDS[kind], gan_start=plateau)
    first, second = trainer_of(config), trainer_of(config)
    for step in range(5):
        first.step(step, batch_of(config, step))
    kept = {k: {n: v.clone() for n, v in group.items()} for k, group in first.tensors().items()}
    assert {"real_anchor", "fake_anchor", "updates", "started_at"} <= kept["discriminator_state"].keys()
    assert kept["discriminator_state"]["started_at"] == 4
    assert not any("backbone" in k for k in kept["discriminator"])
    second.load(kept)
    again = [t.step(5, batch_of(config, 5)) for t in (first, second)]
    torch.testing.assert_close(*again, rtol=0, atol=0)
    assert "gan" in again[0]
    assert_same_bits(first.tensors(), second.tensors())


def test_the_networks_are_what_the_config_says():
    assert adversary.build_discriminator(toy(**PATCH, gan_n_layers=2).gan).n_layers == 2
    assert adversary.build_discriminator(toy(**VIT).gan).side == 32
    assert trainer_of(toy()).adversary is None
