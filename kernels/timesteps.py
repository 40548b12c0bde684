"""Timesteps of flow matching: one launch draws them from a law; one more draws noise, mixes and gives the target.

Time t in [0, 1]: 0 is data, 1 is noise; z_t = (1 - t) x + t eps, v = eps - x (Lipman et al. 2022, arXiv:2210.02747).

Randomness is that of philox.py: sample i of step s draws t from word 0 of STREAM_TIME and its noise from STREAM_NOISE,
whose words 2j and 2j + 1 are elements 2j and 2j + 1 by Box-Muller; elements are counted in the order of NCHW whatever
the layout. With u = ((r >> 9) + 0.5) 2^-23, s the time shift and q the normal quantile (AS 241, Wichura 1988), t is

    uniform               s(shift, u)
    logit_normal          sigmoid(m + sigma q(u)), m = mu + log shift
    plateau_logit_normal  the same below the mode t* of that density, and flat from there to 1 (`Plateau`)

Uniform draws are equal bit for bit on every device, what follows from them to about 1e-6: the kernels write logarithm,
sine and cosine out as polynomials, for a GPU's own are off by 1e-4 where u is close to 1.

Bytes an element in bf16: x read, z_t and v written, 6. The noise never touches memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import call, resolve, tl, triton
from .group_norm import NAMESPACE
from .philox import normal, uniform
from .tiles import launch, unsupported, walk

STREAM_TIME, STREAM_NOISE = 1, 2
LAWS = ("uniform", "logit_normal", "plateau_logit_normal")
SMALLEST = 2.0**-24  # t stays this far from 0 and 1
QUADS = 512  # Philox calls, of four elements each, a program makes: 8 elements a thread where a warp is 64 wide


class Plateau(NamedTuple):
    """Logit-normal density p up to its mode t*, flat from there.

    knee: t*; z: (logit t* - m) / sigma; density: p(t*); mass: P(t*); normaliser: P(t*) + (1 - t*) p(t*).
    """

    knee: float
    z: float
    density: float
    mass: float
    normaliser: float


def plateau(location: float, sigma: float) -> Plateau:
    """Of logit t ~ N(location, sigma^2). The mode solves logit t = location + sigma^2 (2 t - 1).

    With y = logit t that is y = location + sigma^2 tanh(y / 2). From location + sigma^2 (for location >= 0; the case
    below 0 is its mirror image) Newton's method falls monotonically to the largest root, which is the highest mode.
    """
    sign = -1.0 if location < 0 else 1.0
    centre = sign * location
    y = centre + sigma**2
    for _ in range(200):
        tanh = math.tanh(y / 2)
        step = (y - centre - sigma**2 * tanh) / (1 - sigma**2 * (1 - tanh * tanh) / 2)
        if not step > 1e-15 * abs(y):
            break
        y -= step
    y *= sign
    knee, z = 1 / (1 + math.exp(-y)), (y - location) / sigma
    density = math.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi) * knee * (1 / (1 + math.exp(y))))
    mass = 0.5 * math.erfc(-z / math.sqrt(2))
    return Plateau(knee, z, density, mass, mass + density / (1 + math.exp(y)))


# --- reference -----------------------------------------------------------------------------------------------------

# AS 241, PPND16: numerators and denominators, lowest degree first, of the centre and of the two parts of the tail
_A = (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3)  # fmt: skip
_B = (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
      3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3)  # fmt: skip
_C = (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
      1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2,
      7.74545014278341407640e-4)  # fmt: skip
_D = (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
      1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9)  # fmt: skip


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def normal_quantile(u: Tensor) -> Tensor:
    """q(u), Phi(q) = u in (2^-25, 1 - 2^-25), of u's shape and dtype: AS 241 without its part for smaller u."""
    centre = u - 0.5
    r = 0.180625 - centre * centre
    middle = centre * _horner(_A, r) / _horner(_B, r)
    r = torch.sqrt(-torch.log(torch.minimum(u, 1 - u))) - 1.6
    tail = torch.copysign(_horner(_C, r) / _horner(_D, r), centre)
    return torch.where(centre.abs() <= 0.425, middle, tail)


def _icdf(u: Tensor, law: str, shift: float, mu: float, sigma: float) -> Tensor:
    """u -> t, of u's dtype."""
    location = mu + math.log(shift)
    if law == "uniform":
        t = shift * u / (1 + (shift - 1) * u)
    elif law == "logit_normal":
        t = torch.sigmoid(location + sigma * normal_quantile(u))
    else:
        p = plateau(location, sigma)
        w = u * p.normaliser
        below = torch.sigmoid(location + sigma * normal_quantile(w.clamp(max=p.mass)))
        t = torch.where(w < p.mass, below, p.knee + (w - p.mass) / p.density)
    return t.clamp(SMALLEST, 1 - SMALLEST)


def sample_timesteps_reference(
    n: int, law: str, shift: float, mu: float, sigma: float, seed: int, step: int, first_index: int, device=None
) -> Tensor:
    """The definition: fp32 [n]."""
    u = uniform(seed, step, first_index, n, 1, STREAM_TIME, device)[:, 0]
    return _icdf(u, law, shift, mu, sigma)


def flow_match_inputs_reference(x: Tensor, noise: Tensor | None, t: Tensor, seed: int, step: int, first_index: int):
    """The definition: (z_t, v) of x's dtype, computed in fp32 (fp64 if given fp64); noise [N, ...] drawn if None."""
    acc = torch.promote_types(x.dtype, torch.float32)
    if noise is None:
        noise = normal(seed, step, first_index, tuple(x.shape), STREAM_NOISE, x.device)
    mix = t.to(acc).view(-1, *[1] * (x.ndim - 1))
    x32, noise = x.to(acc), noise.to(acc)
    return ((1 - mix) * x32 + mix * noise).to(x.dtype), (noise - x32).to(x.dtype)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def philox_words(seed_low, seed_high, block, index, step, stream):
    """Four uint32 words; all arguments hold the bits of 32-bit words."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = low | (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    zero = block * 0
    return tl.philox(seed, block, zero + index, zero + step, zero + stream)


@triton.jit
def unit(r):
    """u in (0, 1), exact in fp32."""
    return ((r >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def log_fp32(x):
    """Natural logarithm of normal x > 0 to about an ulp: x = 2^k m, m in [1/sqrt 2, sqrt 2), polynomial in m - 1
    (Cephes logf)."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    k = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = f * f * f * p + k * -2.12194440e-4 - 0.5 * f * f
    return k * 0.693359375 + (f + tail)


@triton.jit
def turn(r):
    """cos and sin of 2 pi u for the word r: exact reduction to an eighth of a turn, then polynomials (Cephes cosf)."""
    m = (r >> 9).to(tl.int32)
    quarter = (m + 1048576) >> 21
    x = ((m - (quarter << 21)).to(tl.float32) + 0.5) * 7.490140565847157e-07  # 2 pi 2^-23
    x2 = x * x
    s = x + x * x2 * ((-1.9515295891e-4 * x2 + 8.3321608736e-3) * x2 - 1.6666654611e-1)
    c = 1.0 - 0.5 * x2 + x2 * x2 * ((2.443315711809948e-5 * x2 - 1.388731625493765e-3) * x2 + 4.166664568298827e-2)
    odd = (quarter & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    return cos, tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def pair(r0, r1):
    """Two standard normals of two words."""
    radius = tl.sqrt(-2.0 * log_fp32(unit(r0)))
    cos, sin = turn(r1)
    return radius * cos, radius * sin


@triton.jit
def quantile(u):
    """The normal quantile of u: AS 241, as `normal_quantile`."""
    q = u - 0.5
    r = 0.180625 - q * q
    n = 2.5090809287301226727e3 * r + 3.3430575583588128105e4
    n = n * r + 6.7265770927008700853e4
    n = n * r + 4.5921953931549871457e4
    n = n * r + 1.3731693765509461125e4
    n = n * r + 1.9715909503065514427e3
    n = n * r + 1.3314166789178437745e2
    n = n * r + 3.3871328727963666080e0
    d = 5.2264952788528545610e3 * r + 2.8729085735721942674e4
    d = d * r + 3.9307895800092710610e4
    d = d * r + 2.1213794301586595867e4
    d = d * r + 5.3941960214247511077e3
    d = d * r + 6.8718700749205790830e2
    d = d * r + 4.2313330701600911252e1
    d = d * r + 1.0
    middle = q * n / d
    r = tl.sqrt(-log_fp32(tl.minimum(u, 1.0 - u))) - 1.6
    n = 7.74545014278341407640e-4 * r + 2.27238449892691845833e-2
    n = n * r + 2.41780725177450611770e-1
    n = n * r + 1.27045825245236838258e0
    n = n * r + 3.64784832476320460504e0
    n = n * r + 5.76949722146069140550e0
    n = n * r + 4.63033784615654529590e0
    n = n * r + 1.42343711074968357734e0
    d = 1.05075007164441684324e-9 * r + 5.47593808499534494600e-4
    d = d * r + 1.51986665636164571966e-2
    d = d * r + 1.48103976427480074590e-1
    d = d * r + 6.89767334985100004550e-1
    d = d * r + 1.67638483018380384940e0
    d = d * r + 2.05319162663775882187e0
    d = d * r + 1.0
    tail = n / d
    tail = tl.where(q < 0.0, -tail, tail)
    return tl.where(tl.abs(q) <= 0.425, middle, tail)


@triton.jit
def sigmoid_fp32(x):
    """1 / (1 + e^-x), small values to their own precision."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def time_of(r, shift, location, sigma, knee, density, mass, normaliser, LAW: tl.constexpr):
    """t of the word r. LAW: index into LAWS."""
    # cast: callers may hand numbers over as fp64, and fp64 arithmetic would follow
    shift, location, sigma = tl.cast(shift, tl.float32), tl.cast(location, tl.float32), tl.cast(sigma, tl.float32)
    knee, density = tl.cast(knee, tl.float32), tl.cast(density, tl.float32)
    mass, normaliser = tl.cast(mass, tl.float32), tl.cast(normaliser, tl.float32)
    u = unit(r)
    if LAW == 0:
        t = shift * u / (1.0 + (shift - 1.0) * u)
    elif LAW == 1:
        t = sigmoid_fp32(location + sigma * quantile(u))
    else:
        w = u * normaliser
        below = sigmoid_fp32(location + sigma * quantile(tl.minimum(w, mass)))
        t = tl.where(w < mass, below, knee + (w - mass) / density)
    return tl.minimum(tl.maximum(t, 5.960464477539063e-08), 0.9999999403953552)


_WORDS = ("seed_low", "seed_high", "step", "first_index", "n")


@triton.jit(do_not_specialize=list(_WORDS))
def _sample_timesteps_kernel(
    t_ptr, seed_low, seed_high, step, first_index, n, shift, location, sigma, knee, density, mass, normaliser,
    LAW: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t of BLOCK samples."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = i * 0
    r, _, _, _ = philox_words(seed_low, seed_high, zero, first_index + i, step, STREAM)
    t = time_of(r, shift, location, sigma, knee, density, mass, normaliser, LAW)
    tl.store(t_ptr + i, t, mask=i < n)


@triton.jit(do_not_specialize=list(_WORDS))
def _flow_match_kernel(
    x_ptr, noise_ptr, given_t_ptr, z_ptr, v_ptr, t_ptr, x_sn, x_sc, x_ss, e_sn, e_sc, e_ss, y_sn, y_sc, y_ss, C, L,
    seed_low, seed_high, step, first_index, n, shift, location, sigma, knee, density, mass, normaliser,
    LAW: tl.constexpr, STREAM: tl.constexpr, NOISE_STREAM: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_T: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_INNER: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """z_t, v and t of 4 QUADS elements of one sample, in the order of memory: NCHW, or NHWC for CHANNELS_INNER.

    DENSE: x, noise and outputs have no gaps and lie in that order.
    """
    size = C * L
    tiles = tl.cdiv(size, 4 * QUADS)
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if HAS_T:
        t = tl.load(given_t_ptr + sample).to(tl.float32)
    else:
        r, _, _, _ = philox_words(seed_low, seed_high, sample * 0, first_index + sample, step, STREAM)
        t = time_of(r, shift, location, sigma, knee, density, mass, normaliser, LAW)
    if tile == 0:
        tl.store(t_ptr + sample, t)
    i = tile * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    keep = i < size
    if CHANNELS_INNER:
        c, s = i % C, i // C
    else:
        c, s = i // L, i % L
    if DENSE:
        x_at, e_at, y_at = i, i, i
    else:
        c64, s64 = c.to(tl.int64), s.to(tl.int64)
        x_at, e_at, y_at = c64 * x_sc + s64 * x_ss, c64 * e_sc + s64 * e_ss, c64 * y_sc + s64 * y_ss
    n64 = sample.to(tl.int64)
    x = tl.load(x_ptr + n64 * x_sn + x_at, mask=keep, other=0.0).to(tl.float32)
    if HAS_NOISE:
        noise = tl.load(noise_ptr + n64 * e_sn + e_at, mask=keep, other=0.0).to(tl.float32)
    elif not CHANNELS_INNER:
        block = tile * QUADS + tl.arange(0, QUADS)
        r0, r1, r2, r3 = philox_words(seed_low, seed_high, block, first_index + sample, step, NOISE_STREAM)
        a, b = pair(r0, r1)
        c, d = pair(r2, r3)
        noise = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        element = c * L + s
        r0, r1, r2, r3 = philox_words(seed_low, seed_high, element // 4, first_index + sample, step, NOISE_STREAM)
        first = (element & 2) == 0
        cos, sin = pair(tl.where(first, r0, r2), tl.where(first, r1, r3))
        noise = tl.where((element & 1) == 0, cos, sin)
    z = (1.0 - t) * x + t * noise
    tl.store(z_ptr + n64 * y_sn + y_at, z.to(z_ptr.dtype.element_ty), mask=keep)
    tl.store(v_ptr + n64 * y_sn + y_at, (noise - x).to(v_ptr.dtype.element_ty), mask=keep)


# --- launchers -----------------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    """The int32 of the same bits: a kernel's integer argument has one type whatever its value."""
    return word - 2**32 if word >= 2**31 else word


def _constants(law: str, shift: float, mu: float, sigma: float) -> tuple[float, ...]:
    location = mu + math.log(shift)
    p = plateau(location, sigma) if law == LAWS[2] else Plateau(0.0, 0.0, 1.0, 0.0, 1.0)
    return shift, location, sigma, p.knee, p.density, p.mass, p.normaliser


def _words(seed: int, step: int, first_index: int) -> tuple[int, int, int, int]:
    return _signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(step), _signed(first_index)


def _triton_sample(n: int, law: str, shift, mu, sigma, seed: int, step: int, first_index: int, device) -> Tensor:
    t = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        launch(
            _sample_timesteps_kernel, -(-n // 256), t, *_words(seed, step, first_index), n,
            *_constants(law, shift, mu, sigma), LAW=LAWS.index(law), STREAM=STREAM_TIME, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return t


def _triton_flow(x: Tensor, noise, given_t, law, shift, mu, sigma, seed, step, first_index):
    z, v = torch.empty_like(x), torch.empty_like(x)
    t = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if noise is not None and (noise.dtype != x.dtype or walk(noise) is None):
        noise = torch.empty_like(x).copy_(noise)
    n, channels = x.shape[:2]
    rows = x.numel() // (n * channels)
    x_at, y_at = walk(x), walk(z)
    noise_at = y_at if noise is None else walk(noise)
    assert x_at is not None and y_at is not None and noise_at is not None
    inner = channels > 1 and rows > 1 and x_at.c < x_at.s
    step_c, step_s = (1, channels) if inner else (rows, 1)
    every = (x_at, noise_at, y_at)
    dense = all((channels == 1 or at.c == step_c) and (rows == 1 or at.s == step_s) for at in every)
    launch(
        _flow_match_kernel, n * -(-channels * rows // (4 * QUADS)), x, noise, given_t, z, v, t,
        *x_at, *noise_at, *y_at, channels, rows, *_words(seed, step, first_index), n,
        *_constants(law, shift, mu, sigma), LAW=LAWS.index(law), STREAM=STREAM_TIME, NOISE_STREAM=STREAM_NOISE,
        HAS_NOISE=noise is not None, HAS_T=given_t is not None, DENSE=dense, CHANNELS_INNER=inner, QUADS=QUADS,
        num_warps=4,
    )  # fmt: skip
    return z, v, t


# --- ops -----------------------------------------------------------------------------------------------------------

_SIGN = 2**64  # op arguments are signed 64-bit


@torch.library.custom_op(f"{NAMESPACE}::sample_timesteps", mutates_args=())
def sample_timesteps_op(
    n: int, law: str, shift: float, mu: float, sigma: float, seed: int, step: int, first_index: int,
    device: torch.device, backend: str,
) -> Tensor:  # fmt: skip
    """fp32 [n]."""
    f = _triton_sample if backend == "triton" else sample_timesteps_reference
    return f(n, law, shift, mu, sigma, seed % _SIGN, step, first_index, device)


@sample_timesteps_op.register_fake
def _(n, law, shift, mu, sigma, seed, step, first_index, device, backend):
    return torch.empty(n, dtype=torch.float32, device=device)


@torch.library.custom_op(f"{NAMESPACE}::flow_match_inputs", mutates_args=())
def flow_match_inputs_op(
    x: Tensor, noise: Tensor | None, t: Tensor | None, law: str, shift: float, mu: float, sigma: float, seed: int,
    step: int, first_index: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """z_t, v, t."""
    seed %= _SIGN
    if backend == "triton" and x.numel():
        return _triton_flow(x, noise, t, law, shift, mu, sigma, seed, step, first_index)
    if t is None:
        t = sample_timesteps_reference(x.shape[0], law, shift, mu, sigma, seed, step, first_index, x.device)
    z, v = flow_match_inputs_reference(x, noise, t, seed, step, first_index)
    out_z, out_v = torch.empty_like(x), torch.empty_like(x)
    return out_z.copy_(z), out_v.copy_(v), t.float().clone()


@flow_match_inputs_op.register_fake
def _(x, noise, t, law, shift, mu, sigma, seed, step, first_index, backend):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, dz, dv, _):
    (t,) = ctx.saved_tensors
    dx = None
    if dz is not None:
        dx = (1 - t.to(dz.dtype)).view(-1, *[1] * (dz.ndim - 1)) * dz
    if dv is not None:
        dx = -dv if dx is None else dx - dv
    return dx, *[None] * 10


flow_match_inputs_op.register_autograd(_backward, setup_context=_setup_context)


# --- public --------------------------------------------------------------------------------------------------------


def _check(op_name: str, n: int, law: str, shift: float, mu: float, sigma: float, seed: int, step: int, first: int):
    if law not in LAWS:
        raise ValueError(f"{op_name}: law: expected one of {', '.join(LAWS)}, got {law!r}")
    for name, value in (("shift", shift), ("sigma", sigma)):
        if not 0 < value < math.inf:
            raise ValueError(f"{op_name}: {name}: expected a positive number, got {value}")
    if not math.isfinite(mu):
        raise ValueError(f"{op_name}: mu: expected a finite number, got {mu}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op_name}: seed: expected a number in [0, 2^64), got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"{op_name}: step: expected a number in [0, 2^32), got {step}")
    if not 0 <= first <= first + n <= 2**32:
        raise ValueError(f"{op_name}: first_index: expected indices in [0, 2^32), got {first} and {n} of them")


def sample_timesteps(
    n: int,
    law: str = "plateau_logit_normal",
    shift: float = 1.0,
    mu: float = 0.0,
    sigma: float = 1.0,
    seed: int = 0,
    step: int = 0,
    first_index: int = 0,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """n timesteps, fp32 [n] in (0, 1), on `device` (default: torch's): draw i depends on (seed, step, first_index + i).

    law: "uniform", "logit_normal" or "plateau_logit_normal", after the shift; mu and sigma are of the last two, and
    "uniform" ignores them. `flux2.schedules` has the laws with their densities. Equal for any split of a batch.

    ValueError for an unknown law, shift or sigma not positive, seed not in [0, 2^64), step or an index not in
    [0, 2^32), and where the backend cannot run.
    """
    if n < 0:
        raise ValueError(f"sample_timesteps: n: expected 0 or more, got {n}")
    _check("sample_timesteps", n, law, shift, mu, sigma, seed, step, first_index)
    device = torch.empty(0, device=device).device
    backend = resolve("sample_timesteps", backend, torch.empty(0, device=device))
    seed = seed - _SIGN if seed >= 2**63 else seed
    return call(
        sample_timesteps_op, n, law, float(shift), float(mu), float(sigma), seed, step, first_index, device, backend
    )


def flow_match_inputs(
    x: Tensor,
    law: str = "plateau_logit_normal",
    shift: float = 1.0,
    mu: float = 0.0,
    sigma: float = 1.0,
    seed: int = 0,
    step: int = 0,
    first_index: int = 0,
    noise: Tensor | None = None,
    t: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, v, t) for data x [N, C, *S]: z_t = (1 - t) x + t eps and v = eps - x of x's dtype and layout, t fp32 [N].

    t is that of `sample_timesteps` with the same arguments, or `t` [N]; eps is standard normal, a function of (seed,
    step, first_index + i, element) whatever the layout, or `noise` of x's shape. Computed in fp32, rounded once. x's
    gradient is (1 - t) dz - dv; noise and t have none.

    ValueError as `sample_timesteps`, for wrong shapes and devices, and where the backend cannot walk x.
    """
    name = "flow_match_inputs"
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"{name}: x: expected floating-point [N, C, *S], got {x.dtype} {list(x.shape)}")
    _check(name, x.shape[0], law, shift, mu, sigma, seed, step, first_index)
    for what, given, shape in (("noise", noise, x.shape), ("t", t, x.shape[:1])):
        if given is not None and (given.shape != shape or not given.is_floating_point() or given.device != x.device):
            raise ValueError(
                f"{name}: {what}: expected floating-point {list(shape)} on {x.device}, got {given.dtype} "
                f"{list(given.shape)} on {given.device}"
            )
    if math.prod(x.shape[1:]) >= 2**31:
        raise ValueError(f"{name}: x: expected fewer than 2^31 elements a sample, got {list(x.shape)}")
    backend = resolve(name, backend, x, unsupported=unsupported)
    seed = seed - _SIGN if seed >= 2**63 else seed
    noise, t = (None if g is None else g.detach() for g in (noise, t))
    t = None if t is None else t.float().contiguous()
    return call(
        flow_match_inputs_op, x, noise, t, law, float(shift), float(mu), float(sigma), seed, step, first_index, backend
    )
