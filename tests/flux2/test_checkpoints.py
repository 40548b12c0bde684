"""Files of every layout are recognised from content; everything else is refused in one clear sentence."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2 import AUTOENCODERS, AutoEncoder, AutoencoderConfig, load_autoencoder, save_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.checkpoints import (
    config_from_dict,
    config_to_dict,
    diffusers_key,
    infer_config,
    load_tensors,
    save_tensors,
)

TINY = AutoencoderConfig(
    z_channels=4,
    ch=8,
    decoder_ch=16,
    num_groups=4,
    ch_mult=(1, 2, 1),
    num_res_blocks=1,
    latent_norm="batchnorm",
    shortcut="patch",
)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture
def tiny():
    ae = AutoEncoder(TINY).eval()
    ae.bn.running_mean.normal_()
    ae.bn.running_var.uniform_(0.5, 2)
    return ae


def as_ldm(state, prefix=""):
    """Native tensors under the names of the latent-diffusion code."""
    names = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
    renamed = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[prefix + key] = value
    return renamed


def test_own_file_carries_any_shape(tiny, tmp_path):
    save_autoencoder(tiny, tmp_path / "deep" / "er" / "ae.safetensors")
    back = load_autoencoder(tmp_path / "deep" / "er" / "ae.safetensors")
    assert back.cfg == TINY and not back.training and same(tiny.state_dict(), back.state_dict())
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(back.encode(x), tiny.encode(x))
    assert back.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad for p in back.parameters())
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["ae.safetensors"]  # nothing temporary is left


def test_type_is_fp32_unless_asked(tiny, tmp_path):
    save_autoencoder(tiny.bfloat16(), tmp_path / "ae.safetensors")
    assert load_autoencoder(tmp_path / "ae.safetensors").encoder.conv_in.weight.dtype == torch.float32
    half = load_autoencoder(tmp_path / "ae.safetensors", dtype=torch.bfloat16)
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_presets_are_recognised_from_names_and_shapes(name):
    with torch.device("meta"):
        state = AutoEncoder(AUTOENCODERS[name]).state_dict()
    if name in ("sd", "sdxl"):
        with pytest.raises(ValueError, match="sd and sdxl have the same tensors .* preset="):
            infer_config(state)
        assert infer_config(as_ldm(state), preset=name) == AUTOENCODERS[name]
    elif name == "va-vae":
        state = {k: v for k, v in state.items() if not k.startswith("latent_")}
        assert infer_config(as_ldm(state)) == AUTOENCODERS[name]
    else:
        assert infer_config(state) == AUTOENCODERS[name]
        renamed = {diffusers_key(k, 4): v for k, v in state.items()}
        assert infer_config(renamed) == AUTOENCODERS[name]
    with pytest.raises(ValueError, match=r"expected .*, got"):
        infer_config(state, preset="flux.1" if name != "flux.1" else "flux.2")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_latent_diffusion_layout_loads(prefix, tmp_path):
    ae = AutoEncoder(AUTOENCODERS["sd"])
    tensors = as_ldm(ae.state_dict(), prefix)
    beside = {"loss.logvar": torch.zeros(())} if not prefix else {"model.diffusion_model.out.0.weight": torch.zeros(3)}
    torch.save({"state_dict": tensors | beside}, tmp_path / "kl-f8.ckpt")
    save_file({k: v.contiguous() for k, v in (tensors | beside).items()}, tmp_path / "kl-f8.safetensors")
    for file in ("kl-f8.ckpt", "kl-f8.safetensors"):
        back = load_autoencoder(tmp_path / file, preset="sd")
        assert back.cfg == AUTOENCODERS["sd"] and same(ae.state_dict(), back.state_dict())


def test_va_vae_without_statistics_warns(tmp_path):
    ae = AutoEncoder(AUTOENCODERS["va-vae"])
    state = {k: v.contiguous() for k, v in ae.state_dict().items() if not k.startswith("latent_")}
    save_file(state, tmp_path / "vavae.safetensors")
    with pytest.warns(UserWarning, match="no latent statistics"):
        back = load_autoencoder(tmp_path / "vavae.safetensors")
    assert back.latent_std.eq(1).all()


def test_missing_batch_counter_is_filled_in(tiny, tmp_path):
    state = {k: v.contiguous() for k, v in tiny.state_dict().items() if k != "bn.num_batches_tracked"}
    save_tensors(tmp_path / "a.safetensors", state, {"flux2_config": json.dumps(config_to_dict(TINY))})
    assert load_autoencoder(tmp_path / "a.safetensors").bn.num_batches_tracked == 0


def test_run_folder_gives_the_newest_average(tiny, tmp_path, capsys):
    config = {"format": "flux2-tokenizer", "autoencoder": config_to_dict(TINY)}
    store, other = Checkpoints(tmp_path / "checkpoints", keep=9), AutoEncoder(TINY).state_dict()
    store.save(10, {"model": other, "ema": other}, config)
    store.save(20, {"model": other, "ema": tiny.state_dict()}, config)
    for path in (tmp_path, tmp_path / "checkpoints", store.path(20)):
        assert same(tiny.state_dict(), load_autoencoder(path).state_dict())
    store.save(30, {"model": other, "ema": other}, config)
    with (store.path(30) / "ema.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert same(tiny.state_dict(), load_autoencoder(tmp_path).state_dict())
    assert "step_00000030/ema.safetensors: expected" in capsys.readouterr().err
    with pytest.raises(ValueError, match="step_00000030/ema.safetensors: expected .* bytes, got 1000"):
        load_autoencoder(store.path(30))


def test_pipeline_folder_gives_its_vae(tmp_path):
    ae = AutoEncoder(AUTOENCODERS["flux.1"])
    save_autoencoder(ae, tmp_path / "vae", layout="diffusers")
    assert same(ae.state_dict(), load_autoencoder(tmp_path).state_dict())
    assert same(
        ae.state_dict(), load_autoencoder(tmp_path / "vae" / "diffusion_pytorch_model.safetensors").state_dict()
    )


def own_file(tmp_path, ae, change):
    """A file of ours after `change` was done to its tensors."""
    save_autoencoder(ae, tmp_path / "ae.safetensors")
    state = load_file(tmp_path / "ae.safetensors")
    change(state)
    save_file(state, tmp_path / "ae.safetensors", {"flux2_config": json.dumps(config_to_dict(ae.cfg))})
    return tmp_path / "ae.safetensors"


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("encoder.conv_in.bias"), r"missing keys: encoder\.conv_in\.bias$"),
        (put("encoder.extra.weight", torch.zeros(1)), r"unexpected keys: encoder\.extra\.weight$"),
        (
            put("decoder.conv_out.bias", torch.zeros(4)),
            r"wrong shapes: expected decoder\.conv_out\.bias \[3\], got \[4\]",
        ),
    ],
)
def test_strict_loading_names_keys(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_autoencoder(own_file(tmp_path, tiny, change))


def test_long_lists_are_cut(tiny, tmp_path):
    def drop_decoder(state):
        for key in [k for k in state if k.startswith("decoder.up")]:
            del state[key]

    with pytest.raises(ValueError, match=r"missing keys: (decoder\.\S+ ?){8}and \d+ more"):
        load_autoencoder(own_file(tmp_path, tiny, drop_decoder))


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def write_bad(kind, path):
    good = path.with_name("good.safetensors")
    save_autoencoder(AutoEncoder(TINY), good)
    content = {
        "truncated": good.read_bytes()[: good.stat().st_size // 2],
        "header only": good.read_bytes()[:4000],
        "html": b"<!doctype html><html>Not found</html>",
        "empty": b"",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "pickle": pickle.dumps(Evil()),
        "other network": None,
    }[kind]
    if content is None:
        save_file({"model.embed.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cut short or damaged"),
        ("header only", "cut short or damaged"),
        ("html", r"expected a \.safetensors file, got text that begins '<!doctype html"),
        ("empty", "got an empty file"),
        ("lfs", "Git LFS pointer"),
        ("pickle", "not a torch file of tensors alone"),
        ("other network", "not an autoencoder of this family: expected .*, got model.embed.weight"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(kind, message, tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    write_bad(kind, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_bad_places_are_refused_in_a_sentence(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a .safetensors"):
        load_autoencoder(tmp_path / "missing")
    with pytest.raises(ValueError, match="expected a diffusers folder .* got a folder with neither"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(
        ValueError, match="expected AutoencoderKL or AutoencoderKLFlux2 of diffusers, got UNet2DConditionModel"
    ):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": [8]}')
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors beside config\.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(tiny, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"got 'flux\.3'; did you mean 'flux\.\d'"):
        load_autoencoder(tmp_path / "ae.safetensors", preset="flux.3")
    with pytest.raises(ValueError, match=r"expected the shape of flux\.2 "):
        load_autoencoder(tmp_path / "ae.safetensors", preset="flux.2")


def test_saving_refuses_and_leaves_nothing_behind(tiny, tmp_path):
    with pytest.raises(ValueError, match="no counterpart of shortcut='patch'"):
        save_autoencoder(tiny, tmp_path / "vae", layout="diffusers")
    with pytest.raises(ValueError, match="layout: expected 'bfl' or 'diffusers', got 'onnx'"):
        save_autoencoder(tiny, tmp_path / "x", layout="onnx")
    with pytest.raises(ValueError, match="is one file, and this is a folder"):
        save_autoencoder(tiny, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_autoencoder(tiny, tmp_path / "file" / "ae.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_keeps_the_old_file(tiny, tmp_path, monkeypatch):
    save_autoencoder(tiny, tmp_path / "ae.safetensors")
    before = (tmp_path / "ae.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flux2.tensor_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_autoencoder(AutoEncoder(TINY), tmp_path / "ae.safetensors")
    assert (tmp_path / "ae.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ae.safetensors"]


def test_configs_round_trip_and_name_unknown_fields():
    for cfg in (*AUTOENCODERS.values(), TINY):
        assert config_from_dict(json.loads(json.dumps(config_to_dict(cfg)))) == cfg
    with pytest.raises(ValueError, match=r"unknown field 'z_chanels'; did you mean 'z_channels'\?"):
        config_from_dict({"z_chanels": 4})
    with pytest.raises(ValueError, match="z_channels"):
        config_from_dict({"ch": 32})


def test_tensors_and_metadata_round_trip(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).T}, {"k": "v"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], torch.arange(6).view(2, 3).T) and metadata == {"k": "v"}


def test_a_header_of_128_bytes_is_not_taken_for_a_pickle(tmp_path):
    """Its length begins the file as 0x80, which is also how a pickle begins."""
    path = tmp_path / "a.safetensors"
    for pad in range(200):
        save_tensors(path, {"x": torch.zeros(1)}, {"pad": "-" * pad})
        if path.read_bytes()[:8] == (128).to_bytes(8, "little"):
            break
    assert path.read_bytes()[0] == 0x80
    assert load_tensors(path)[1] == {"pad": "-" * pad}
