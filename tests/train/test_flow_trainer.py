"""A step of flow-matching training by hand, what it must not touch, and the validation loss against a known optimum."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from flux2 import AutoEncoder, AutoencoderConfig, TransformerConfig
from flux2.images import from_uint8
from flux2.rae import RAE, RAES
from flux2.schedules import PlateauLogitNormal
from flux2.teachers import HOGTeacher
from kernels import flow_match_inputs
from kernels.philox import uniform
from train.cache import fingerprint
from train.flow_config import FlowConfig, FlowOptions
from train.flow_trainer import STREAM_LABELS, FlowTrainer, validate

AE = AutoencoderConfig(
    z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2, latent_norm="batchnorm"
)
SHAPE = TransformerConfig(width=16, depth=2, heads=2, repa_depth=1)
CONFIG = FlowConfig(
    preset="toy", transformer=SHAPE, resolution=32, batch=6, steps=10, repa="hog", repa_hidden=8, precision="fp32",
    ema_decays=(0.5, 0.9), label_dropout=0.5, clip=1e9,
)  # fmt: skip
CPU = torch.device("cpu")


def autoencoder():
    torch.manual_seed(0)
    ae = AutoEncoder(AE)
    ae.bn.running_mean.normal_()
    ae.bn.running_var.uniform_(0.5, 2)
    return ae


def make(options=None, **changes):
    trainer = FlowTrainer(dataclasses.replace(CONFIG, **changes), autoencoder(), 3, CPU, options=options)
    if "seed" not in changes:  # fresh weights give v = 0, which hides what reaches the model
        g = torch.Generator().manual_seed(5)
        for p in trainer.model.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    return trainer


def draw(seed=1):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (6, 3, 32, 32), generator=g, dtype=torch.uint8)
    return {"pixels": pixels, "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def gradients(trainer, step, batch):
    """Of one step, model and projector, by the change that plain gradient descent makes"""
    found = {}
    for guard in trainer.guards.values():
        real = guard.update

        def update(step, terms, *more, guard=guard, real=real):
            found.update({n: p.grad.clone() for n, p in guard.named.items() if p.grad is not None})
            return real(step, terms, *more)

        guard.update = update
    terms = trainer.step(step, batch)
    return found, terms


def test_a_step_is_the_formula():
    """Latents, timesteps, targets, dropped labels and both losses, put together again from their parts"""
    trainer, batch, step = make(), draw(), 3
    ae, model = autoencoder(), make().model
    projector = make().projector
    x = from_uint8(batch["pixels"])
    z, v, t = flow_match_inputs(ae.encode(x).detach(), law="plateau_logit_normal", shift=1.0, seed=0, step=step)
    assert torch.equal(t, PlateauLogitNormal(shift=1.0).sample(6, seed=0, step=step))
    drop = uniform(0, step, 0, 6, 1, STREAM_LABELS)[:, 0] < 0.5
    assert 0 < drop.sum() < 6
    y = torch.where(drop, 3, batch["labels"])
    pred, features = model(z, t, y, return_features=True)
    velocity = (pred - v).square().mean()
    tokens = HOGTeacher(patch=16)(x).permute(0, 2, 3, 1).reshape(6, 4, 108)
    repa = -F.cosine_similarity(projector(features), tokens, dim=-1).mean()
    (velocity + 0.5 * repa).backward()
    got, terms = gradients(trainer, step, batch)
    assert terms["velocity"].item() == pytest.approx(velocity.item(), rel=1e-5)
    assert terms["repa"].item() == pytest.approx(repa.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((velocity + 0.5 * repa).item(), rel=1e-5)
    for name, p in [*((f"model.{n}", p) for n, p in model.named_parameters()),
                    *((f"projector.{n}", p) for n, p in projector.named_parameters())]:  # fmt: skip
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-6)
    norm = torch.stack([g.norm() for g in got.values()]).norm()
    assert terms["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_shift_goes_by_the_latents_width():
    assert make().shift == 1.0  # 16 channels a token
    assert make(shift=2.5).shift == 2.5
    assert CONFIG.train_shift(128) == 4.63
    with pytest.raises(ValueError, match="transformer.patch: .* expected 1, got 2"):
        dataclasses.replace(CONFIG, transformer=dataclasses.replace(SHAPE, patch=2))


@pytest.mark.parametrize("parts", [2, 6])
def test_accumulation_changes_no_gradient(parts):
    whole, terms = gradients(make(), 0, draw())
    split, same = gradients(make(accumulate=parts), 0, draw())
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)
    for name in terms:
        assert same[name].item() == pytest.approx(terms[name].item(), rel=1e-4), name


def test_checkpointing_changes_no_gradient_and_compiles_as_one_graph(monkeypatch):
    """The whole losses and each block, fullgraph; the compiler is aot_eager, which any machine has"""
    plain, _ = gradients(make(), 0, draw())
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, **{**k, "backend": "aot_eager"}))
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **k: compile_module(self, **{**k, "backend": "aot_eager"})
    )
    for options in (
        FlowOptions(checkpoint_activations=True),
        FlowOptions(compile=True),
        FlowOptions(compile=True, compile_scope="blocks", checkpoint_activations=True),
    ):
        got, _ = gradients(make(options), 0, draw())
        for name in plain:
            torch.testing.assert_close(got[name], plain[name], rtol=1e-3, atol=1e-5, msg=f"{options} {name}")


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_everything_trains_but_the_autoencoder(optimiser):
    trainer = make(optimiser=optimiser, sample_posterior=True)
    trainer.ae.train()  # whatever a caller does to it
    before, weights = fingerprint(trainer.ae), {k: v.clone() for k, v in trainer.model.state_dict().items()}
    projector = fingerprint(trainer.projector)
    for step in range(3):
        trainer.step(step, draw(step))
    assert fingerprint(trainer.ae) == before
    assert not any(p.requires_grad or p.grad is not None for p in trainer.ae.parameters())
    still = [k for k, v in trainer.model.state_dict().items() if torch.equal(v, weights[k])]
    assert not still and fingerprint(trainer.projector) != projector


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    trainer = make(optimiser="muon")
    matrices, rest = set(trainer.guards["matrices"].named), set(trainer.guards["model"].named)
    assert matrices == {
        f"model.blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    everything = {f"model.{n}" for n, _ in trainer.model.named_parameters()}
    everything |= {f"projector.{n}" for n, _ in trainer.projector.named_parameters()}
    assert rest == everything - matrices


def test_averages_of_several_horizons():
    trainer = make()
    start = trainer.emas[0.5].model.blocks[0].attn.qkv.weight.clone()
    trainer.step(30, draw())
    now = trainer.model.blocks[0].attn.qkv.weight
    for decay, ema in trainer.emas.items():
        expected = start + (1 - min(decay, 31 / 40)) * (now - start)
        torch.testing.assert_close(ema.model.blocks[0].attn.qkv.weight, expected)
    assert trainer.ema is trainer.emas[0.5].model


def test_posterior_draws_are_functions_of_seed_step_and_sample():
    trainer, batch = make(sample_posterior=True), draw()
    whole, _ = trainer.inputs(4, batch)
    part, _ = trainer.inputs(4, {k: v[2:] for k, v in batch.items()}, first=2)
    torch.testing.assert_close(part, whole[2:], rtol=1e-4, atol=1e-4)
    other, _ = trainer.inputs(5, batch)
    mode, _ = make().inputs(4, batch)
    assert (other - whole).abs().mean() > 0.1 and (mode - whole).abs().mean() > 0.1
    torch.testing.assert_close(mode, autoencoder().encode(from_uint8(batch["pixels"])), rtol=1e-4, atol=1e-5)


def test_latents_of_a_cache_give_the_same_step():
    batch, ae = draw(), autoencoder()
    x = from_uint8(batch["pixels"])
    posterior = ae.posterior(x)
    cached = {"mean": posterior.mean, "logvar": posterior.logvar, "labels": batch["labels"]}
    cached = {k: v.detach() for k, v in cached.items()} | {"tokens": HOGTeacher(patch=16)(x)}
    for changes in ({}, {"sample_posterior": True}):
        expected, _ = gradients(make(**changes), 2, batch)
        got, _ = gradients(make(**changes), 2, cached)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_representation_autoencoder_serves_as_well():
    torch.manual_seed(0)
    ae = RAE(RAES["rae-tiny"])
    config = dataclasses.replace(CONFIG, resolution=64, batch=2, sample_posterior=True)
    trainer = FlowTrainer(config, ae, 3, CPU)
    batch = {"pixels": torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8), "labels": torch.tensor([0, 1])}
    x, tokens = trainer.inputs(0, batch)
    torch.testing.assert_close(x, ae.encode(from_uint8(batch["pixels"])))
    assert x.shape == (2, 192, 4, 4) and tokens.shape == (2, 16, 108)
    before = fingerprint(ae)
    assert trainer.step(0, batch)["loss"].isfinite() and fingerprint(ae) == before


def test_time_bins_of_training_are_those_of_its_errors():
    trainer = make()
    assert all(v != v for v in trainer.bins())
    trainer.step(0, draw())
    ((errors, t),) = trainer.seen
    bins = trainer.bins()
    for b in range(10):
        chosen = [e for e, time in zip(errors.tolist(), t.tolist(), strict=True) if b / 10 <= time < (b + 1) / 10]
        if chosen:
            assert bins[b] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
        else:
            assert bins[b] != bins[b]
    assert not trainer.seen


def test_a_broken_batch_changes_nothing_even_with_two_optimisers():
    trainer = make(optimiser="muon")
    trainer.step(0, draw())
    before = {name: {k: v.clone() for k, v in group.items()} for name, group in trainer.tensors().items()}
    mean, tokens = torch.full((6, 4, 4, 4), float("nan")), torch.zeros(6, 108, 2, 2)
    trainer.step(1, {"mean": mean, "tokens": tokens, "labels": draw()["labels"]})
    weight = trainer.model.final_layer.linear.weight  # AdamW's: the loss stays finite, and so do Muon's gradients
    handle = weight.register_hook(lambda g: g * float("inf"))
    trainer.step(2, draw())
    handle.remove()
    for name, group in trainer.tensors().items():
        if not name.startswith("ema"):  # which moves on towards the weights as they are
            assert all(torch.equal(v, before[name][k]) for k, v in group.items()), name
    assert [[s.step for s in g.read()[0]] for g in trainer.guards.values()] == [[1, 2], [1, 2]]


class Optimal(torch.nn.Module):
    """The velocity of independent Gaussian elements of standard deviation 2"""

    def forward(self, z, t, y):
        assert y.dtype == torch.int64
        t = t.view(-1, 1, 1, 1)
        return (t - (1 - t) * 4) / ((1 - t) ** 2 * 4 + t**2) * z


def test_validation_of_the_optimum_is_its_variance():
    """Unexplained is var(v | z) / var(v) = 1 - cov^2 / (var z var v), averaged over each bin"""
    x = 2 * torch.randn(400, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    loss = validate(Optimal(), x, torch.zeros(400, dtype=torch.int64), batch=150)
    assert loss.count.tolist() == [400] * 10
    for b, got in enumerate(loss.per_bin().tolist()):
        t = torch.linspace(b / 10, (b + 1) / 10, 1001, dtype=torch.float64)
        share = 1 - (t - (1 - t) * 4) ** 2 / (((1 - t) ** 2 * 4 + t**2) * 5)
        assert got == pytest.approx(share.mean().item(), rel=0.06), b
    again = validate(Optimal(), x, torch.zeros(400, dtype=torch.int64), batch=64)
    assert loss.mean() == pytest.approx(again.mean(), rel=1e-6)
