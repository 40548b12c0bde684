"""Breaks the kernels on purpose, one way at a time, and says which breaks the comparison with fp64 lets through.

`TRITON_INTERPRET=1 PYTHONPATH=tests python tests/kernels/mutants.py FOLDER` copies kernels/ into FOLDER once
a mutant, under a name of its own, changes one piece of text, and runs the checks on the copy in Triton's interpreter,
each in a process of its own. The unchanged copy must pass.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import traceback
from itertools import product
from pathlib import Path

import torch
from gradients import LAYOUTS, check, eager_norm, randn
from interpreter import add_as_a_tree

ROOT = Path(__file__).parents[2]
BROKEN = 7  # exit code of a mutant that does not run

# name -> file, what to replace, by what
MUTANTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "no mask for the last rows in statistics": (
        ("group_stats.py", "welford(x - pivot, keep,", "welford(x - pivot, step > 0,"),
    ),
    "count of a cut chunk": (
        ("group_stats.py", "tl.minimum(L - chunk * chunk_rows, chunk_rows), 0)", "chunk_rows, 0)"),
    ),
    "gradient without the term of the variance": (("group_norm.py", " - k1 - centred * k2", " - k1"),),
    "gradient without the term of the mean": (("group_norm.py", " - k1 - centred * k2", " - centred * k2"),),
    "channels a group rounded up to a power of two": (
        ("group_norm.py", "p.channels // stats.shape[1],", "triton.next_power_of_2(p.channels // stats.shape[1]),"),
    ),
    "two spatial dimensions only": (
        ("tiles.py", "channels, x.numel() // (n * channels), strides", "channels, x.shape[2:4].numel(), strides"),
    ),
    "variance as the mean square less the squared mean": (
        ("group_stats.py", "m2 += tl.where(keep, delta * (x - mean), 0.0)", "m2 += tl.where(keep, x * x, 0.0)"),
        ("group_stats.py", "welford(x - pivot,", "welford(x,"),
        ("group_stats.py", "tl.sum(m2 + count * gap * gap, 0)", "tl.sum(m2, 0) - tl.sum(count, 0) * mean_c * mean_c"),
        ("group_stats.py", "tl.store(out, pivot, mask=c < C)", "tl.store(out, pivot * 0.0, mask=c < C)"),
    ),
    "derivative of SiLU without its second term": (("group_norm.py", " * (1.0 + z * (1.0 - sigmoid))", ""),),
    "input bias left out of the normalised value": (
        ("group_norm.py", "shift -= tl.load(input_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)", "shift -= 0.0"),
    ),
    "every chunk's partial sums in one place": (
        ("group_norm.py", "(n.to(tl.int64) * chunks + chunk) * (2 * C)", "(n.to(tl.int64) * chunks) * (2 * C)"),
    ),
    "statistics of the sum before it is rounded": (
        ("conv_block.py", "        y = y.to(y_ptr.dtype.element_ty)\n", ""),
        ("conv_block.py", "y_ss, y, mask=keep)", "y_ss, y.to(y_ptr.dtype.element_ty), mask=keep)"),
    ),
    "bias of the sum left out": (("conv_block.py", "    return y + bias\n", "    return y\n"),),
    "cosine's gradient without its second term": (("repa_loss.py", "(b * other - pull * mine)", "b * other"),),
    "rows cut after one block": (
        ("repa_loss.py", "for d0 in range(0, D, BLOCK_D):", "for d0 in range(0, BLOCK_D, BLOCK_D):"),
    ),
    "a row of zeros divided by eps": (
        ("repa_loss.py", "tl.sqrt(squares), 1e-8), 0.0)", "tl.sqrt(squares), 1e-8), 1e8)"),
    ),
    "the knee at the median": (("timesteps.py", "    y *= sign\n", "    y = location\n"),),
    "one quadrant's sign": (("timesteps.py", "tl.where(((quarter + 1) & 2) == 2, -cos, cos)", "cos"),),
    "the same noise for every sample": (
        ("timesteps.py", "first_index + sample, step, NOISE_STREAM", "first_index + sample * 0, step, NOISE_STREAM"),
    ),
    "noise in the order of memory": (("timesteps.py", "element = c * L + s", "element = i"),),
    "second moment without its bias correction": (
        ("adamw.py", "tl.sqrt_rn(_one_minus_power(log_b2, count))", "1.0"),
    ),
    "a skipped update that moves the weights": (("adamw.py", "tl.where(there, p_new, p)", "p_new"),),
    "average of the weights before the update": (("adamw.py", "at, keep, p_new, w0", "at, keep, p, w0"),),
    "last element of a tensor left out": (("adamw.py", "t, at, at < size, lr", "t, at, at < size - 1, lr"),),
}  # fmt: skip

# Three channels a group, odd sides, spatial rank 1 to 3, cut chunks; the last needs three of them in channels_last
SHAPES = [((2, 12, 5, 7), 4), ((3, 32, 40), 2), ((2, 6, 3, 3, 3), 3), ((1, 128, 13, 11), 8)]


def compare_norms(package) -> None:
    """Norms and their statistics."""
    tiles = importlib.import_module(f"{package.__name__}.tiles")
    tiles.MIN_PROGRAMS = 1  # chunks of several tiles, as large tensors have
    for shape, groups in SHAPES:
        for layout in LAYOUTS:
            x, dy = randn(shape, layout=layout), randn(shape, layout=layout)
            w, b, i = (randn(shape[1]) for _ in range(3))

            def op(x, w, b, i, groups=groups):
                return package.group_norm_silu(x, w, b, groups, input_bias=i, backend="triton")

            check(op, eager_norm(groups), [x, w, b, i], dy)
            y, _ = package.add_bias_group_stats(x, dy, b, groups, backend="triton")
            close(y, x.double() + dy.double() + b.double().view(-1, *[1] * (x.ndim - 2)), 1e-6, "sum")
            half = x.half() * 1000 + 7  # the sum is rounded by a lot
            y, stats = package.add_bias_group_stats(half, half, b, groups, backend="triton")
            values = y.double().reshape(shape[0], groups, -1)
            close(stats[..., 0], values.mean(2), 1e-6, "mean of what is stored", values.abs().max())
            close(stats[..., 1], values.var(2, correction=0), 2e-6, "variance of what is stored")
    far, w, b = randn((1, 8, 16, 24)) * 0.1 + 300, torch.ones(8), torch.zeros(8)
    y = package.group_norm(far, w, b, 2, backend="triton")
    close(y, eager_norm(2, silu=False)(far.double(), w.double(), b.double()), 1e-3, "norm of values far from zero")


def compare_cosines(package) -> None:
    """The cosine loss, with a row of zeros, in more columns than a block."""
    loss, cosine = package.repa_loss, torch.nn.functional.cosine_similarity
    p, y = randn((6, 600)), randn((6, 600))
    p[1] = 0
    grads = []
    for f, a, b in (
        (lambda a, b: loss(a, b, backend="triton"), p, y),
        (lambda a, b: -cosine(a, b, dim=-1).mean(), p.double(), y.double()),
    ):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        value = f(*leaves)
        grads.append([value, *torch.autograd.grad(value, leaves)])
    for i, (got, truth) in enumerate(zip(*grads, strict=True)):
        if i:
            truth[1] = 0
        close(got.detach(), truth.detach(), 1e-5, "cosine loss")


def compare_flow(package) -> None:
    """A law's knee and the flow inputs."""
    assert abs(importlib.import_module(f"{package.__name__}.timesteps").plateau(1.5325568, 1.0).knee - 0.913727) < 1e-5
    for shape, layout in product((shape for shape, _ in SHAPES), LAYOUTS):
        x = randn(shape, layout=layout)
        got, truth = (package.flow_match_inputs(x, shift=4.63, seed=3, backend=b) for b in ("triton", "torch"))
        for a, b in zip(got, truth, strict=True):
            close(a, b.double(), 1e-5, "flow inputs")


def compare_adamw(package) -> None:
    """Three updates, the second skipped, of tensors that end in a block and at its end."""
    adamw = importlib.import_module(f"{package.__name__}.adamw")
    shapes = ((5,), (adamw.BLOCK,), (adamw.BLOCK + 3,))
    start = [[randn(s) for s in shapes], *([torch.zeros(s) for s in shapes] for _ in range(2))]
    found = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        torch.manual_seed(1)
        p, m, v = ([t.to(dtype, copy=True) for t in row] for row in start)
        steps, averages = [torch.zeros(()) for _ in shapes], [t.clone() for t in p]
        for broken in (False, True, False):
            grads = [torch.randn(s).to(dtype) for s in shapes]
            adamw.adamw_(p, grads, m, v, steps, [averages], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                         weights=[0.3], skip=torch.tensor(broken), backend=backend)  # fmt: skip
        found.append([*p, *m, *v, *steps, *averages])
    for got, truth in zip(*found, strict=True):
        close(got, truth, 1e-5, "update")


# A file's mutants are held against these; the unchanged package against all. Others are the norms'.
CHECKS = {"repa_loss.py": compare_cosines, "timesteps.py": compare_flow, "adamw.py": compare_adamw}


def compare(package, files: list[str]) -> None:
    """The package's ops in those files against fp64; AssertionError where one is worse than eager torch."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    checks = [CHECKS.get(file, compare_norms) for file in files] or [compare_norms, *CHECKS.values()]
    for check_of in dict.fromkeys(checks):
        check_of(package)


def close(got, truth, tolerance: float, what: str, size=None) -> None:
    """Relative to `size`, truth's own if not given."""
    error = (got.double() - truth).abs().max() / (truth.abs().max() if size is None else size)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def rejected(folder: Path, name: str, changes: tuple[tuple[str, str, str], ...]) -> str | None:
    """The error that a copy of the package with those changes runs into, or None."""
    package = "mutant_" + "".join(c if c.isalnum() else "_" for c in name)
    shutil.copytree(ROOT / "kernels", folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        path = folder / package / file
        text = path.read_text()
        assert old in text, f"{name}: {file} has no {old!r}"
        path.write_text(text.replace(old, new))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # a mutant may write where it should not
        try:
            compare(importlib.import_module(package), [file for file, _, _ in changes])
        except AssertionError as error:
            os.write(writer, (str(error) or "assertion").encode())
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    said = os.fdopen(reader).read()
    assert os.waitstatus_to_exitcode(status) != BROKEN, f"{name}: does not run at all, which proves nothing"
    return said or (None if status == 0 else f"ended by signal {-os.waitstatus_to_exitcode(status)}")


def main() -> None:
    add_as_a_tree()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder))
    for name, changes in {"unchanged": (), **MUTANTS}.items():
        print(f"{name}: {rejected(folder, name, changes) or 'passed'}", flush=True)


if __name__ == "__main__":
    main()
