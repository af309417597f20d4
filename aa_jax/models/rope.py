"""Rotary position embeddings (Su et al., 2021) and the scalings Hugging Face configs name."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Everything that decides the rotary angles.

    Attributes:
        kind: key of `KINDS` (`rope_type` in config.json).
        theta: base wavelength (`rope_theta`).
        dim: size of a head.
        max_positions: `max_position_embeddings`.
        scaling: the kind's own numbers, as sorted (name, value) pairs.
        sections: angles per stretch of M-RoPE (Wang et al., 2024, section 2.1): stretch i of the
            angles turns with axis i mod 3 of the position (time, height, width); adds up to
            dim / 2. Empty where a position is one number.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    scaling: tuple[tuple[str, Any], ...] = ()
    sections: tuple[int, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long the row is."""
        return KINDS[self.kind].at is not None

    @property
    def context(self) -> int | None:
        """Positions up to which a row's length changes nothing; None: it never does."""
        original = dict(self.scaling).get("original_max_position_embeddings", self.max_positions)
        return original if self.by_length else None

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Angles per position, fp32 [dim / 2], and the factor on cos and sin.

        Where they depend on the row's length these are a short row's; see `frequencies_at`.
        """
        frequencies, factor = KINDS[self.kind].apply(self.base(), self, dict(self.scaling))
        return frequencies.astype(np.float32), factor

    def base(self) -> np.ndarray:
        """The angles per position without any scaling (Su et al., 2021, eq. 15)."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)

    def frequencies_at(self, lengths: Int[Array, "B"]) -> Float[Array, "B half"]:
        """As `frequencies`, for rows of given lengths (largest position + 1)."""
        return KINDS[self.kind].at(self, dict(self.scaling), lengths)


def _default(base: np.ndarray, rope: Rope, scaling: dict) -> tuple[np.ndarray, float]:
    return base, 1.0


def _linear(base: np.ndarray, rope: Rope, scaling: dict) -> tuple[np.ndarray, float]:
    return base / np.float32(scaling["factor"]), 1.0


def _llama3(base: np.ndarray, rope: Rope, scaling: dict) -> tuple[np.ndarray, float]:
    """Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1)."""
    context = scaling.get("original_max_position_embeddings", rope.max_positions)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (kept + (1 - kept) / scaling["factor"]), 1.0


def _yarn(base: np.ndarray, rope: Rope, scaling: dict) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023, section 3.2): a ramp over dimensions and a softmax temperature."""
    context = scaling.get("original_max_position_embeddings", rope.max_positions)
    factor = scaling.get("factor") or rope.max_positions / context

    def dimension(turns: float) -> float:
        return rope.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    stretched = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = temperature(1.0)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            scales = float(scaling["mscale"]), float(scaling["mscale_all_dim"])
            attention_factor = temperature(scales[0]) / temperature(scales[1])
    return base * (1 - stretched) + base / factor * stretched, float(attention_factor)


def _dynamic(rope: Rope, scaling: dict, lengths: Array) -> Array:
    """NTK-aware scaling: the base grows with the row once it is longer than the training context
    (`max_positions`), so that the longest wavelength just spans it."""
    longest = jnp.maximum(lengths, rope.max_positions).astype(jnp.float32)
    stretch = scaling["factor"] * longest / rope.max_positions - (scaling["factor"] - 1)
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    exponents = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
    return 1.0 / theta[:, None] ** exponents[None, :]


def _longrope(base: np.ndarray, rope: Rope, scaling: dict) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al., 2024, section 3.1): searched factors per angle, another set beyond
    the original context."""
    context = scaling.get("original_max_position_embeddings", rope.max_positions)
    factor = scaling.get("factor", rope.max_positions / context)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1
    return base / np.asarray(scaling["short_factor"], np.float32), float(attention_factor)


def _longrope_at(rope: Rope, scaling: dict, lengths: Array) -> Array:
    context = scaling.get("original_max_position_embeddings", rope.max_positions)
    short, long = (
        rope.base() / np.asarray(scaling[name], np.float32)
        for name in ("short_factor", "long_factor")
    )
    return jnp.where((lengths > context)[:, None], long[None, :], short[None, :])


def is_number(value: Any) -> bool:
    """Whether a decoded JSON value is a finite number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


_LISTS = ("short_factor", "long_factor")
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")  # there it means absent


def unusable(scaling: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a kind's numbers, whatever the kind: everything here divides or scales."""

    def positive(value: Any, zero: bool = False) -> bool:
        return is_number(value) and (value > 0 or (zero and value == 0))

    for name, value in scaling.items():
        if name == "truncate":
            if not isinstance(value, bool):
                yield f"has {name} {value!r}; it must be true or false"
        elif name in _LISTS:
            if not isinstance(value, list | tuple) or not all(map(positive, value)):
                yield f"has {name} {value!r}; it must be a list of numbers above 0"
        elif not positive(value, zero=name in _MAY_BE_ZERO):
            yield f"has {name} {value!r}; it must be a number above 0"


def _check_llama3(scaling: dict, dim: int) -> list[str]:
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", math.inf)
    return [] if low < high else [f"needs a high_freq_factor above its low_freq_factor, {low}"]


def _check_dynamic(scaling: dict, dim: int) -> list[str]:
    return ["needs heads of at least 4"] if dim < 4 else []


def _check_longrope(scaling: dict, dim: int) -> list[str]:
    names = [name for name in ("long_factor", "short_factor") if name in scaling]
    return [
        f"needs a list of {dim // 2} numbers as {name}, one per angle"
        for name in names
        if not isinstance(scaling[name], list | tuple) or len(scaling[name]) != dim // 2
    ]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One `rope_type`.

    Attributes:
        apply: its formula, ``(default frequencies, rope, numbers) -> (frequencies, factor)``.
        required: numbers it needs.
        optional: numbers it may have.
        at: ``(rope, numbers, lengths [B]) -> [B, half]`` where the row's length matters.
        check: ``(numbers, dim) -> `` what is wrong with them.
    """

    apply: Any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    at: Any = None
    check: Any = lambda scaling, dim: []


KINDS: dict[str, Kind] = {
    "default": Kind(_default),
    "linear": Kind(_linear, ("factor",)),
    "dynamic": Kind(_default, ("factor",), at=_dynamic, check=_check_dynamic),
    "longrope": Kind(
        _longrope,
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
        at=_longrope_at,
        check=_check_longrope,
    ),
    "llama3": Kind(
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
        check=_check_llama3,
    ),
    "yarn": Kind(
        _yarn,
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def angles(
    rope: Rope, positions: Int[Array, "B *rest"], *, per_axis: bool = False
) -> tuple[Float[Array, "B *dims"], Float[Array, "B *dims"]]:
    """cos and sin of every rotary angle, fp32, computed once per forward pass.

    Args:
        rope: the settings.
        positions: one number per token, [B, ...], or three, [B, ..., 3], with ``per_axis``.
        per_axis: the last axis of positions is (time, height, width); a text token has the same
            number three times, so text may as well come without the axis.

    Returns:
        [B, ..., half] each. Kinds whose angles depend on the length take a row's largest position
        for it, so a row means the same in every batch.
    """
    static, factor = rope.frequencies()
    if per_axis:
        stretches = np.arange(len(rope.sections)) % 3
        turned = positions[..., np.repeat(stretches, rope.sections)].astype(jnp.float32)
    else:
        turned = jnp.broadcast_to(
            positions[..., None].astype(jnp.float32), (*positions.shape, static.shape[0])
        )
    if rope.by_length:
        rows = positions.shape[0]
        lengths = positions.reshape(rows, -1).max(1) + 1
        frequencies = rope.frequencies_at(lengths).reshape(
            rows, *(1 for _ in turned.shape[1:-1]), -1
        )
    else:
        frequencies = jnp.asarray(static)
    turned = turned * jnp.broadcast_to(frequencies, turned.shape)
    return jnp.cos(turned) * factor, jnp.sin(turned) * factor


def rotate(
    x: Float[Array, "*batch H Dh"],
    cos: Float[Array, "*batch half"],
    sin: Float[Array, "*batch half"],
) -> Float[Array, "*batch H Dh"]:
    """Rotates the pairs (i, i + Dh/2) of every head in fp32 (the half-split convention)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
