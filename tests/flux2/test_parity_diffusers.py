"""Against diffusers' AutoencoderKL and AutoencoderKLFlux2, random weights, both ways through both key layouts."""

import dataclasses

import pytest
import torch

from flux2 import AUTOENCODERS, AutoEncoder, load_autoencoder, save_autoencoder
from flux2.compat import ensure_torchvision

ensure_torchvision()
diffusers = pytest.importorskip("diffusers")
TOLERANCE = 1e-5  # relative error, fp32


def randomise(module):
    """Weights of a kind training gives: norms that differ, statistics that matter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "latent_mean")):
                buffer.normal_()
            elif name.endswith(("running_var", "latent_std")):
                buffer.uniform_(0.5, 3)
    return module.eval()


def narrow(name):
    row = AUTOENCODERS[name]
    return dataclasses.replace(row, ch=row.ch // 4, decoder_ch=row.decoder_ch // 4, num_groups=8)


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def class_of(cfg):
    return diffusers.AutoencoderKLFlux2 if cfg.latent_norm == "batchnorm" else diffusers.AutoencoderKL


def normalised_by_the_pipeline(vae, mean):
    """What diffusers' pipelines hand to the transformer, written out."""
    if isinstance(vae, diffusers.AutoencoderKLFlux2):
        b, c, h, w = mean.shape
        z = mean.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return (z - vae.bn.running_mean.view(1, -1, 1, 1)) / std
    if getattr(vae.config, "latents_mean", None):
        mean_, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (mean - mean_) / std
    z = (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


@torch.no_grad()
def assert_equal(ae, vae, side):
    x = torch.rand(1, 3, side, side + 16) * 2 - 1
    posterior = vae.encode(x).latent_dist
    moments = torch.cat((posterior.mean, posterior.logvar), 1)
    assert error(ae.encode_moments(x), moments) <= TOLERANCE
    z = normalised_by_the_pipeline(vae, posterior.mode())
    assert error(ae.encode(x), z) <= TOLERANCE
    assert error(ae.decode(z), vae.decode(posterior.mode()).sample) <= TOLERANCE


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(AUTOENCODERS["flux.2"], id="flux.2 at full width"),
        pytest.param(narrow("flux.2"), id="flux.2"),
        pytest.param(narrow("flux.2-small-decoder"), id="flux.2-small-decoder"),
        pytest.param(narrow("flux.1"), id="flux.1"),
        pytest.param(narrow("sd"), id="sd"),
        pytest.param(narrow("va-vae"), id="va-vae"),
    ],
)
def test_ours_to_diffusers_and_back(cfg, tmp_path):
    ae = randomise(AutoEncoder(cfg))
    save_autoencoder(ae, tmp_path / "vae", layout="diffusers")
    vae = class_of(cfg).from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False).eval()
    assert_equal(ae, vae, 32)
    back = load_autoencoder(tmp_path / "vae")
    assert dataclasses.replace(back.cfg, scale=cfg.scale) == cfg and back.cfg.scale == pytest.approx(cfg.scale)
    assert ae.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in ae.state_dict().items())


@pytest.mark.parametrize("kind", ["flux.2", "sd", "flux.1"])
def test_diffusers_to_ours_and_to_the_original_layout(kind, tmp_path):
    cfg = narrow(kind)
    widths = [cfg.ch * m for m in cfg.ch_mult]
    common = {
        "block_out_channels": widths,
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "latent_channels": cfg.z_channels,
    }
    if kind == "flux.2":
        vae = diffusers.AutoencoderKLFlux2(**common)
    else:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        quant = {"use_quant_conv": cfg.quant_conv, "use_post_quant_conv": cfg.quant_conv}
        scale = {"scaling_factor": cfg.scale, "shift_factor": cfg.shift}
        vae = diffusers.AutoencoderKL(**common, **blocks, **quant, **scale)
    randomise(vae).save_pretrained(tmp_path / "vae")
    ae = load_autoencoder(tmp_path / "vae")
    assert_equal(ae, vae, 32)
    save_autoencoder(ae, tmp_path / "ae.safetensors", layout="bfl")
    again = load_autoencoder(tmp_path / "ae.safetensors")
    assert again.cfg == ae.cfg
    assert_equal(again, vae, 48)


def test_legacy_attention_names_of_diffusers_load(tmp_path):
    """sd-vae-ft-mse and its time: query, key, value, proj_attn."""
    from safetensors.torch import load_file, save_file

    ae = randomise(AutoEncoder(narrow("sd")))
    save_autoencoder(ae, tmp_path / "vae", layout="diffusers")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    assert any(".query." in k for k in tensors)
    save_file(tensors, file)
    back = load_autoencoder(tmp_path / "vae")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in ae.state_dict().items())
