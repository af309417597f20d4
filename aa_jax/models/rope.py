"""Rotary position embeddings (Su et al., 2021) and the scalings Hugging Face configs name."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Everything that decides the rotary angles.

    Attributes:
        kind: "default", "linear", "llama3" or "yarn" (`rope_type` in config.json).
        theta: base wavelength (`rope_theta`).
        dim: size of a head.
        max_positions: `max_position_embeddings`.
        scaling: the kind's own numbers, as sorted (name, value) pairs.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    scaling: tuple[tuple[str, Any], ...] = ()

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Angles per position, fp32 [dim / 2], and the factor on cos and sin."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        base = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        frequencies, factor = KINDS[self.kind].apply(base, self, dict(self.scaling))
        return frequencies.astype(np.float32), factor


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


@dataclasses.dataclass(frozen=True)
class Kind:
    """One `rope_type`: its formula, the numbers it needs and those it may have."""

    apply: Any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "default": Kind(_default),
    "linear": Kind(_linear, ("factor",)),
    "llama3": Kind(
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
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
    rope: Rope, positions: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """cos and sin of every rotary angle, fp32, computed once per forward pass."""
    frequencies, factor = rope.frequencies()
    turned = positions[..., None].astype(jnp.float32) * jnp.broadcast_to(
        jnp.asarray(frequencies), (*positions.shape, frequencies.shape[0])
    )
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
