"""What --dry-run counts: operations in closed form, bytes as autograd saves them, and each preset at full size."""

import re

import pytest
import torch
from toy import RANDOM_LPIPS, toy

from flux2 import AutoEncoder
from flux2.losses import l1, laplacian_loss
from train.estimate import networks_beside, step_cost
from train.vae import main
from train.vae_config import VAE_PRESETS

PARAMETERS = {  # published, or of this project's own shapes
    "sd": 83_653_863, "flux.1": 83_819_683, "flux.2": 84_046_115, "flux.2-finetune": 84_046_115,
}  # fmt: skip
BESIDE = {
    "photos": (), "photos-long": (), "rae-tiny": (), "flux.2-finetune": ("LPIPS",),
    "sd": ("LPIPS", "discriminator patch"), "flux.1": ("LPIPS", "discriminator patch"),
    "flux.2": ("teacher dinov2-l", "LPIPS", "discriminator patch"),
    "va-vae": ("teacher dinov2-l", "LPIPS", "discriminator patch"), "rae": ("LPIPS", "discriminator vit"),
}  # fmt: skip


@pytest.mark.parametrize("preset", VAE_PRESETS)
def test_each_preset_passes_a_dry_run_at_full_size(preset, tmp_path, capsys):
    assert main(["--preset", preset, "--dry-run", "--precision", "bf16", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    counted = int(re.search(r"^parameters +([\d,]+), of which", out, re.MULTILINE)[1].replace(",", ""))
    assert counted == PARAMETERS.get(preset, counted) and counted > 1e6
    named = re.findall(r"^  (\S.*\S) +[\d,]+ parameters, ([\d,.]+) GFLOP a crop$", out, re.MULTILINE)
    assert tuple(re.sub(r"^LPIPS \w+", "LPIPS", n.strip()) for n, _ in named) == BESIDE[preset]
    assert all(float(flops.replace(",", "")) > 1 for _, flops in named)
    assert f"resolution: {VAE_PRESETS[preset].resolution}\n" in out and "memory, sum" in out


def test_dry_run_counts_arithmetic_and_bytes(capsys):
    def figures(*flags):
        assert main(["--preset", "flux.2", "--gan.weight", "0", "--lpips-weight", "0", "--vf-weight", "0", *flags]) == 0
        out = capsys.readouterr().out
        gflop = float(re.search(r"arithmetic +([\d.,]+) GFLOP a crop", out)[1].replace(",", ""))
        return gflop, float(re.search(r"activations +([\d.]+) GiB", out)[1])

    gflop, saved = figures("--dry-run")
    assert saved < 0.45 * figures("--dry-run", "--backend", "torch")[1]  # stock modules keep what they keep
    assert figures("--dry-run", "--batch", "64")[1] == pytest.approx(2 * saved, rel=0.01)
    assert figures("--dry-run", "--accumulate", "4")[1] == pytest.approx(saved / 2, rel=0.01)
    # 0.62 TFLOP decode, less 5/9 of the convolutions behind upsampling, and 0.27 encode; backward is twice that
    upsample = sum(2 * 9 * c * c * side * side for c, side in ((512, 64), (512, 128), (256, 256))) / 1e9
    assert gflop == pytest.approx(3 * (620 - 5 / 9 * upsample + 270), rel=0.02)


def test_networks_of_the_losses_are_counted_as_they_run():
    config = toy(**RANDOM_LPIPS, gan_weight=1.0)
    found = networks_beside(config)
    conv = [(3, 8, 16), (8, 16, 8), (16, 32, 4), (32, 64, 3), (64, 1, 2)]  # in, out, side of the output; 4x4 kernels
    forward = sum(2 * 16 * i * o * side * side for i, o, side in conv)
    first = 2 * 16 * 3 * 8 * 16 * 16  # photographs and reconstructions are leaves: no gradient on pixels
    game = 3 * forward + 2 * (3 * forward - first)  # for the autoencoder, weights included; on each, for itself
    assert found["discriminator patch"][1] == pytest.approx(game, rel=0.01)
    assert found.keys() == {"LPIPS alex", "discriminator patch"}


def test_estimated_bytes_are_those_autograd_saves():
    config = toy()
    cost = step_cost(config)
    ae = AutoEncoder(config.autoencoder)
    own = {p.data_ptr() for p in ae.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        x = torch.rand(1, 3, 32, 32)
        recon, posterior = ae(x, sample=True)
        loss = l1(recon, x) + laplacian_loss(recon, x) + posterior.kl().mean()
    measured = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert loss.requires_grad and cost.parameters == cost.trained == sum(p.numel() for p in ae.parameters())
    assert cost.flops > 0 and cost.saved_bytes == pytest.approx(measured, rel=0.1)


def test_what_is_frozen_costs_less():
    whole = step_cost(toy())
    decoder = step_cost(toy(train="decoder", kl_weight=0.0, align_weight=0.0))
    ae = AutoEncoder(toy().autoencoder)
    assert decoder.trained == sum(p.numel() for p in ae.decoder.parameters())
    assert decoder.parameters == whole.parameters
    assert decoder.flops < 0.9 * whole.flops and decoder.saved_bytes < 0.9 * whole.saved_bytes
