"""`fuse` on diffusers' and the original code's autoencoders: the same function, in place, undone by `unfuse`."""

import copy
import io
import pickle
import re

import original
import pytest
import torch
from tolerance import assert_no_worse
from torch import nn
from torch.nn.utils import prune

from flux2 import AUTOENCODERS, AutoEncoder, fuse, unfuse
from flux2.compat import ensure_torchvision

ensure_torchvision()
diffusers = pytest.importorskip("diffusers")

WIDTHS = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


class Renamed(diffusers.AutoencoderKL):
    """A model's own subclass."""


def make(name):
    torch.manual_seed(1)
    if name == "original":
        model = original.AutoEncoder()
    else:
        classes = {"kl": diffusers.AutoencoderKL, "flux2": diffusers.AutoencoderKLFlux2, "subclass": Renamed}
        model = classes[name](**WIDTHS, **BLOCKS)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases of one and zero hide what they do
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


MODELS = ("kl", "flux2", "original")
COUNTS = {"residual": 10, "upsample": 1, "attention": 2}


def pixels(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.sample


def values_and_gradients(model, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = pixels(model, x)
    used = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().mean() if y.dtype != torch.float64 else
                                             y.square().mean(), [x, *used])]  # fmt: skip


def state_of(model):
    return {
        name: (m.training, dict(m._forward_hooks), {k: v for k, v in vars(m).items() if k not in NESTED})
        for name, m in model.named_modules()
    }


NESTED = ("_parameters", "_modules", "_buffers", "_forward_hooks", "_internal_dict")


def residual(model):
    """(a block, the name of it)"""
    kinds = {name: m for name, m in model.named_modules() if type(m).__name__ in ("ResnetBlock", "ResnetBlock2D")}
    return next((m, name) for name, m in kinds.items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_same_values_and_gradients(name, dtype, layout):
    model = make(name).to(dtype).to(memory_format=layout)
    x = (torch.rand(2, 3, 16, 12) * 2 - 1).to(dtype).to(memory_format=layout)
    base = values_and_gradients(model, x)
    truth = values_and_gradients(copy.deepcopy(model).double(), x.double())
    fuse(model)
    got = values_and_gradients(model, x)
    assert len(got) == 2 + len(list(model.parameters()))
    # As one vector, each tensor in units of its largest value: which side is luckier in one of fifty is chance.
    units = [t.abs().max() for t in truth]
    assert_no_worse(*(torch.cat([(t / u).to(t.dtype).flatten() for t, u in zip(ts, units, strict=True)])
                      for ts in (got, base, truth)))  # fmt: skip
    assert_no_worse(got[0], base[0], truth[0])


@pytest.mark.parametrize("name", [*MODELS, "subclass"])
def test_in_place_and_undone(name):
    model = make(name)
    kind, before = type(model), state_of(model)
    classes = [type(m) for m in model.modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        y = pixels(model, x)
        report = fuse(model)
        assert report.counts == COUNTS | ({} if name == "original" else {"output": 2})
        assert set(report.left) == ({"encoder", "decoder"} if name == "original" else set())
        assert type(model) is kind and list(model.state_dict()) == keys and state_of(model) == before
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
        assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
        fused = pixels(model, x)
        torch.testing.assert_close(fused, y, rtol=1e-4, atol=1e-5)
        again = fuse(model)
        assert again == report and torch.equal(pixels(model, x), fused)
        unfuse(model)
        assert [type(m) for m in model.modules()] == classes and state_of(model) == before
        assert torch.equal(pixels(model, x), y)
        unfuse(model)


def test_fused_operations_run_and_stock_modules_do_not(monkeypatch):
    """A convolution that follows a norm is called by the fused operation, not as a module."""
    model = make("flux2")
    called = []
    real = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: called.append(self) or real(self, x))
    with torch.no_grad():
        pixels(model, torch.rand(1, 3, 16, 16))
        all_of_them = set(called)
        fuse(model)
        called.clear()
        pixels(model, torch.rand(1, 3, 16, 16))
    names = {m: name for name, m in model.named_modules()}
    assert len(all_of_them) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    left = {names[m].rpartition(".")[2] for m in called}
    assert left == {"conv_in", "conv_shortcut", "quant_conv", "post_quant_conv", "conv"}
    assert [names[m] for m in called if names[m].endswith(".conv")] == ["encoder.down_blocks.0.downsamplers.0.conv"]


def kept_bytes(model, x):
    """What a forward keeps for backward, parameters left out."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def note(t):
        kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        pixels(model, x)
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


@pytest.mark.parametrize(("name", "most"), [("kl", 0.5), ("flux2", 0.5), ("original", 0.65)])
def test_backward_keeps_less(name, most):
    """The original's last norm, SiLU and convolution stay as they are, and count for much in a network this small."""
    model, x = make(name), torch.rand(1, 3, 32, 32)
    before = kept_bytes(model, x)
    fuse(model)
    assert kept_bytes(model, x) <= most * before


def test_bytes_that_the_page_names():
    """docs/use-elsewhere.md: at FLUX.2's widths halved, of diffusers' own"""
    kept = []
    for change in (lambda model: None, fuse):
        with torch.device("meta"):
            model = diffusers.AutoencoderKLFlux2(block_out_channels=[64, 128, 256, 256], latent_channels=32)
            change(model)
            kept.append(kept_bytes(model, torch.rand(1, 3, 128, 128)))
    assert 0.38 <= kept[1] / kept[0] <= 0.40, kept


@pytest.mark.parametrize("name", ["flux2", "original"])
def test_one_graph(name):
    model = make(name)
    fuse(model)
    z, x = torch.randn(1, 4, 6, 8), torch.rand(1, 3, 12, 16)
    for network, data in ((model.decoder, z), (model.encoder, x)):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        expected, got = network(data), compiled(data)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        parameters = list(network.parameters())
        for a, b in zip(*(torch.autograd.grad(y.square().mean(), parameters) for y in (got, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fusing_a_model_that_was_compiled_before_takes_effect():
    model = make("original")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        plain = compiled(x)
        fuse(model)
        assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), plain)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_fused_models_of_their_own(name):
    model, x = make(name), torch.rand(1, 3, 16, 16)
    report = fuse(model, backend="torch")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        y = pixels(model, x)
        copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
        for other in copies:
            assert torch.equal(pixels(other, x), y)
            assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
            block, _ = residual(other)
            assert block.backend == "torch" and type(block) is type(residual(model)[0])
            unfuse(other)
        assert fuse(model, backend="torch") == report  # its copies' undoing is not its own


def test_moves_modes_and_files_are_untouched(tmp_path):
    model, x = make("flux2"), torch.rand(1, 3, 16, 16)
    fuse(model.train())
    assert all(m.training for m in model.modules())
    model.to(torch.float64)
    assert pixels(model, x.double()).dtype == torch.float64
    model.float().eval().save_pretrained(tmp_path)
    stock = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        torch.testing.assert_close(pixels(model, x), pixels(stock, x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(stock.state_dict())


@pytest.mark.parametrize("how", ["slicing", "tiling"])
def test_slicing_and_tiling(how):
    model = make("kl")
    getattr(model, f"enable_{how}")()
    model.tile_sample_min_size, model.tile_latent_min_size = 16, 8
    x = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        y = pixels(model, x)
        fuse(model)
        torch.testing.assert_close(pixels(model, x), y, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_of_diffusers():
    model, x = make("kl").train(), torch.rand(1, 3, 16, 16)
    fuse(model)
    plain = values_and_gradients(model, x)
    model.enable_gradient_checkpointing()
    for a, b in zip(values_and_gradients(model, x), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast():
    model, x = make("kl"), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        exact = pixels(model, x)
        fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            y = pixels(model, x)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


class Lora(nn.Module):
    """A convolution with a low-rank addition, as PEFT wraps one: its weight is the base's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def with_lora(block):
    block.conv1 = Lora(block.conv1)


def with_weight_norm(block):
    nn.utils.parametrizations.weight_norm(block.conv1)


def with_old_spectral_norm(block):
    nn.utils.spectral_norm(block.conv1)


def with_pruning(block):
    prune.random_unstructured(block.conv2, "weight", 0.5)


def with_hook(block):
    block.norm2.register_forward_hook(lambda m, args, y: 2 * y)


def with_dropout(block):
    block.dropout = nn.Dropout(0.5)


def with_circular_padding(block):
    block.conv1.padding_mode = "circular"


def with_another_convolution(block):
    block.conv1._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, 2 * weight, bias, padding=1)


CHANGES = [
    (with_lora, "conv1: expected a torch.nn.Conv2d, got .*Lora"),
    (with_weight_norm, "conv1: expected a torch.nn.Conv2d, got torch.nn.utils.parametrize.ParametrizedConv2d"),
    (with_old_spectral_norm, "conv1 has hooks"),
    (with_pruning, "conv2 has hooks"),
    (with_hook, "norm2 has hooks"),
    (with_dropout, "dropout: dropout of 0.5"),
    (with_circular_padding, "conv1: expected kernel, stride, padding"),
    (with_another_convolution, "conv1: its forward was replaced"),
]


@pytest.mark.parametrize("name", ["kl", "original"])
@pytest.mark.parametrize(("change", "why"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_block_with_a_part_that_is_not_plain_runs_its_own_forward(change, why, name):
    """Changed before `fuse` or after it."""
    before, after, plain = make(name), make(name), make(name)
    torch.manual_seed(2)
    change(residual(before)[0])
    report = fuse(before)
    block, where = residual(before)
    assert re.search(why, report.left[where]) and where not in report.fused and report.counts["residual"] == 9
    fuse(after)
    for model in (after, plain):
        torch.manual_seed(2)
        change(residual(model)[0])
    assert re.search(why, fuse(after).left[where])
    x = torch.rand(1, 8, 8, 8)
    args = (x,) if name == "original" else (x, None)
    with torch.no_grad():
        outputs = []
        for each in (residual(plain)[0], block, residual(after)[0]):
            torch.manual_seed(3)  # the dropout's
            outputs.append(each(*args))
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])


def test_hooks_of_a_block_itself_run():
    model, seen = make("original"), []
    block, _ = residual(model)
    block.register_forward_hook(lambda m, args, y: seen.append(y))
    fuse(model)
    y = block(torch.rand(1, 8, 8, 8))
    assert len(seen) == 1 and seen[0] is y


def test_other_arguments_take_the_blocks_own_forward():
    """An embedding of time; an output size; an attention mask."""
    block = original.TimedResnetBlock(8, 8, 4)
    x, embedding = torch.rand(1, 8, 6, 6), torch.rand(1, 8, 1, 1)
    with torch.no_grad():
        plain, timed = block(x, None), block(x, embedding)
        assert fuse(block).fused == {"": "residual"}
        assert torch.equal(block(x, embedding), timed) and torch.equal(block(x, temb=embedding), timed)
        torch.testing.assert_close(block(x, None), plain)
        up = make("kl").decoder.up_blocks[0].upsamplers[0]
        sized = up(torch.ones(1, 16, 4, 4), output_size=(7, 7))
        fuse(up)
        assert torch.equal(up(torch.ones(1, 16, 4, 4), output_size=(7, 7)), sized)


class WithoutSiLU(original.ResnetBlock):
    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Demanding(original.ResnetBlock):
    def forward(self, x):
        raise KeyError("style")


def test_the_parts_alone_are_not_enough():
    """A class that another project gave the same name and parts, but another forward."""
    with pytest.raises(ValueError, match="WithoutSiLU: its own forward gives something else"):
        fuse(WithoutSiLU(8, 8, 4))
    with pytest.raises(ValueError, match="Demanding: its forward could not be tried: KeyError"):
        fuse(Demanding(8, 8, 4))
    block = original.ResnetBlock(8, 8, 4)
    block.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward was replaced"):
        fuse(block)


def test_a_trial_changes_nothing():
    """Neither parameters nor the generator, and it looks through convolutions of zeros."""
    model = make("kl")
    nn.init.zeros_(residual(model)[0].conv2.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fuse(model)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    blind = WithoutSiLU(8, 8, 4)
    nn.init.zeros_(blind.conv2.weight)
    with pytest.raises(ValueError, match="gives something else"):
        fuse(blind)


def test_a_model_without_storage_is_fused_too():
    with torch.device("meta"):  # which is not where its trials are
        model = original.AutoEncoder()
        assert fuse(model).counts == COUNTS


@pytest.mark.parametrize("make_it", [lambda: nn.Linear(2, 2), lambda: AutoEncoder(AUTOENCODERS["sd"])])
def test_nothing_to_fuse_is_an_error(make_it):
    with torch.device("meta"):
        model = make_it()
    message = f"fuse: expected blocks of diffusers' AutoencoderKL .* got {type(model).__name__} without one"
    with pytest.raises(ValueError, match=message):
        fuse(model)


def test_backends():
    model, x = make("kl"), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'cuda'"):
        fuse(model, backend="cuda")
    with torch.no_grad():
        y = pixels(model, x)
        for backend in ("torch", "triton"):  # in the interpreter, or on a GPU
            fuse(model.to(DEVICE), backend=backend)
            assert residual(model)[0].backend == backend
            torch.testing.assert_close(pixels(model, x.to(DEVICE)).cpu(), y, rtol=1e-3, atol=1e-4)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_report_says_what_was_left():
    model = make("kl")
    with_lora(residual(model)[0])
    text = str(fuse(model))
    assert text.startswith("fused 14 blocks: ") and "9 residual" in text
    assert "\nleft encoder.down_blocks.0.resnets.0: ResnetBlock2D: conv1: expected a torch.nn.Conv2d, got" in text
