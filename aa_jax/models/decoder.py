"""The decoder every language model here shares; a frozen config says which variant it is.

Llama, Qwen2, Qwen3, Chameleon and the decoders of the multimodal families differ only in options
of one layer: biases, normalised queries and keys, where the norms stand, and rotary positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import ModelError
from aa_jax.models import rope
from aa_jax.models.attention import Angles, Attention, Window, windowed
from aa_jax.models.config import Reader
from aa_jax.models.layers import Embedding, GatedMLP, RMSNorm, one_layer, scan_layers, stacked
from aa_jax.sharding.rules import constrain

Batch = dict[str, Any]
Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What decides a decoder.

    Attributes:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: D, width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: number of layers.
        num_heads: H, query heads.
        num_kv_heads: K, key-value heads; divides H.
        head_dim: Dh, need not be D / H.
        hidden_act: key of `layers.ACTIVATIONS`.
        norm_eps: of every RMSNorm.
        rope: rotary positions.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the attention's output projection.
        mlp_bias: biases in the MLP.
        tied: the head is the embedding.
        initializer_range: standard deviation of fresh weights.
        qk_norm: key of `attention.QK_NORMS`: "none", "rms" (one scale for all heads; Qwen3) or
            "layer" (scale and bias of each head; Chameleon).
        post_norm: the norms follow attention and MLP, inside the residual branch (Swin
            Transformer V2, Liu et al., 2022, section 3.2), instead of preceding them.
        window: tokens a query sees, itself included; None: all before it.
        full_layers: the layers whose queries see all before them, whatever the window.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    norm_eps: float
    rope: rope.Rope
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    initializer_range: float = 0.02
    qk_norm: str = "none"
    post_norm: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What transformers' config class of a family assumes where config.json is silent.

    Attributes:
        vocab_size: of config.json's attribute of that name, as all that follow.
        hidden_size: the same.
        intermediate_size: the same.
        num_layers: the same.
        num_heads: the same.
        num_kv_heads: None means as many as query heads; null in config.json always does.
        head_dim: None means hidden_size / num_heads.
        max_positions: max_position_embeddings.
        norm_eps: rms_norm_eps.
        rope_theta: the same.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_positions: int
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0


def read_sizes(reader: Reader, defaults: Defaults, *, mrope: bool = False) -> dict[str, Any]:
    """The attributes all decoders share, as keyword arguments of `DecoderConfig`.

    Args:
        reader: of the text config; collects the problems.
        defaults: the family's.
        mrope: positions have three axes, as in Qwen2-VL.
    """
    heads = reader.size("num_attention_heads", defaults.num_heads)
    hidden = reader.size("hidden_size", defaults.hidden_size)
    head_dim = reader.size("head_dim", defaults.head_dim or max(hidden // heads, 1))
    silent = "num_key_value_heads" not in reader.raw
    kv_heads = reader.size("num_key_value_heads", (silent and defaults.num_kv_heads) or heads)
    if heads % kv_heads:
        reader.problem("num_key_value_heads", f"= {kv_heads} does not divide {heads} heads")
    if head_dim % 2:
        reader.problem("head_dim", f"is {head_dim}; rotary positions need an even one")
    max_positions = reader.size("max_position_embeddings", defaults.max_positions)
    return dict(
        vocab_size=reader.size("vocab_size", defaults.vocab_size),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size", defaults.intermediate_size),
        num_layers=reader.size("num_hidden_layers", defaults.num_layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=reader.activation("hidden_act", "silu"),
        norm_eps=reader.number("rms_norm_eps", defaults.norm_eps),
        rope=reader.rope(head_dim, max_positions, theta=defaults.rope_theta, mrope=mrope),
        tied=reader.flag("tie_word_embeddings", False),
        initializer_range=reader.number("initializer_range", 0.02),
    )


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
        self.attn_norm = RMSNorm(config.hidden_size, **norm)
        self.attn = Attention(
            config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            out_std=config.initializer_range,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            **kwargs,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=config.mlp_bias,
            **kwargs,
        )
        self.post_norm = config.post_norm

    def before(self, norm: RMSNorm, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """What a branch reads."""
        return x if self.post_norm else norm(x)

    def add(
        self, x: Float[Array, "*batch D"], norm: RMSNorm, y: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch D"]:
        """The residual stream after a branch."""
        return x + (norm(y) if self.post_norm else y)

    def feed_forward(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The layer's second half."""
        return self.add(x, self.mlp_norm, self.mlp(self.before(self.mlp_norm, x)))

    def __call__(
        self, x: Float[Array, "B T D"], angles: Angles, intervals: Int[Array, "B T 4"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        # Unless the stream is pinned to the batch axes, the compiler divides it like the weights
        # and gathers every row on every device (`sharding.rules`).
        x = constrain(x, "batch", "seq", "act_embed")
        y, kv = self.attn(self.before(self.attn_norm, x), angles, intervals)
        x = self.feed_forward(self.add(x, self.attn_norm, y))
        return constrain(x, "batch", "seq", "act_embed"), kv

    def decode(
        self,
        x: Float[Array, "B D"],
        angles: Angles,
        keys: Array,
        values: Array,
        layer: Int[Array, ""] | None,
        length: Int[Array, "B"],
        window: Window,
    ) -> tuple[Float[Array, "B D"], Array, Array]:
        """One token per row; see `Attention.decode`."""
        y, keys, values = self.attn.decode(
            self.before(self.attn_norm, x), angles, keys, values, layer, length, window
        )
        return self.feed_forward(self.add(x, self.attn_norm, y)), keys, values

    def decode_behind(
        self,
        x: Float[Array, "B D"],
        angles: Angles,
        prompts: tuple[Array, Array, Array],
        keys: Array,
        values: Array,
        layer: Int[Array, ""] | None,
        spot: Int[Array, "B"],
        window: Window,
    ) -> tuple[Float[Array, "B D"], Array, Array]:
        """One token per row; see `Attention.decode_behind`."""
        y, keys, values = self.attn.decode_behind(
            self.before(self.attn_norm, x), angles, prompts, keys, values, layer, spot, window
        )
        return self.feed_forward(self.add(x, self.attn_norm, y)), keys, values


class Decoder(nnx.Module):
    """Token embedding, decoder layers, final norm and output head.

    The methods on a batch are the family interface of `models.functional`; those on embeddings
    (`run`, `run_prefill`) let a multimodal family put features in between.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        kwargs = dict(std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        self.embed = Embedding(config.vocab_size, config.hidden_size, **kwargs)
        self.layers = stacked(
            lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
        # A tied head is the embedding's own array, so it has no parameter of its own.
        self.head = (
            None if config.tied else Embedding(config.vocab_size, config.hidden_size, **kwargs)
        )
        self.config, self.dtype, self.remat = config, dtype, remat

    def head_weight(self) -> Float[Array, "V D"]:
        """The output head, one row per token of the vocabulary."""
        table = self.embed if self.head is None else self.head
        return table.weight[...].astype(self.dtype)

    def angles(self, positions: Int[Array, "B T *axes"]) -> Angles:
        """cos and sin for a batch's positions: [B,T], or [B,T,3] where the model has M-RoPE."""
        if positions.ndim == 3 and not self.config.rope.sections:
            raise ModelError(
                f"The batch's positions are {list(positions.shape)}, three per token, but this "
                "model has one rotary position per token; positions of [B, T] are needed. The "
                "batch was made for a Qwen2-VL checkpoint."
            )
        return rope.angles(self.config.rope, positions, per_axis=positions.ndim == 3)

    def window(self, layer: int | Int[Array, ""]) -> Window:
        """Tokens a query of a layer sees."""
        config = self.config
        if not config.full_layers:
            return config.window
        every = 2**30  # more than a row has
        numbers = range(config.num_layers)
        table = [every if i in config.full_layers else config.window for i in numbers]
        return table[layer] if isinstance(layer, int) else jnp.asarray(table, jnp.int32)[layer]

    def run(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T *axes"],
        intervals: Int[Array, "B T 4"],
    ) -> Float[Array, "B T D"]:
        """Embeddings to hidden states after the final norm."""
        angles = self.angles(positions)

        def body(block: Block, x: Array, index: Array) -> tuple[Array, None]:
            return block(x, angles, windowed(intervals, self.window(index)))[0], None

        x, _ = scan_layers(self.layers, x, body, remat=self.remat)
        return self.norm(x)

    def run_prefill(
        self, x: Float[Array, "B T D"], batch: Batch, cache_size: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `run`, keeping every layer's keys and values in a cache of ``cache_size`` slots."""
        angles = self.angles(batch["positions"])
        room = cache_size - x.shape[1]

        def body(block: Block, x: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
            return block(x, angles, windowed(batch["intervals"], self.window(index)))

        x, kv = scan_layers(self.layers, x, body)
        keys, values = (
            jnp.pad(jnp.moveaxis(a, 2, 3), ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))) for a in kv
        )
        last = batch["last_positions"][:, 0].astype(jnp.int32)
        cache = {"k": keys, "v": values, "length": last + 1}
        if self.config.rope.sections:
            # An image takes fewer positions than tokens, so the next one is not the length.
            at_last = jnp.take_along_axis(
                batch["positions"].reshape(*x.shape[:2], -1), last[:, None, None], axis=1
            )
            cache["position"] = at_last.max((1, 2)).astype(jnp.int32) + 1
        return self.norm(x), cache

    def hidden_states(self, batch: Batch, features: None) -> Float[Array, "B T D"]:
        """Family interface; a text model takes no features."""
        x = self.embed(batch["tokens"], self.dtype)
        return self.run(x, batch["positions"], batch["intervals"])

    def prefill(
        self, batch: Batch, cache_size: int, features: None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Family interface."""
        x = self.embed(batch["tokens"], self.dtype)
        return self.run_prefill(x, batch, cache_size)

    def decoder(self) -> Callable[[Array, Cache], tuple[Array, Cache]]:
        """Family interface."""
        apart = [one_layer(self.layers, i) for i in range(self.config.num_layers)]

        def decode(tokens: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
            kind = self._decode_behind if "prompt_k" in cache else self._decode
            return kind(apart, tokens, cache)

        return decode

    def _decode(
        self, apart: list[Block], tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Appends one token per row at the row's own length."""
        length = cache["length"]
        angles = rope.angles(self.config.rope, cache.get("position", length))

        def body(
            block: Block, window: Window, x: Array, keys: Any, values: Any, layer: Any
        ) -> tuple:
            return block.decode(x, angles, keys, values, layer, length, window)

        x, keys, values = self._decode_layers(apart, tokens, cache, body)
        moved = {name: cache[name] + 1 for name in ("length", "position") if name in cache}
        return x, {"k": keys, "v": values, **moved}

    def _decode_behind(
        self, apart: list[Block], tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]:
        """The same with a cache of shared prompts, see `models.functional.Model`."""
        spot, lengths = cache["spot"], cache["prompt_length"]
        angles = rope.angles(self.config.rope, cache["position"])

        def body(
            block: Block, window: Window, x: Array, keys: Any, values: Any, layer: Any, *shared: Any
        ) -> tuple:
            prompts = (*shared, lengths)
            return block.decode_behind(x, angles, prompts, keys, values, layer, spot, window)

        shared = (cache["prompt_k"], cache["prompt_v"])
        x, keys, values = self._decode_layers(apart, tokens, cache, body, shared)
        return x, {**cache, "k": keys, "v": values}

    def _decode_layers(
        self,
        apart: list[Block],
        tokens: Int[Array, "B"],
        cache: Cache,
        body: Callable[..., tuple],
        shared: tuple = (),
    ) -> tuple[Float[Array, "B D"], Any, Any]:
        """All layers as one program, or one by one where each has arrays of its own.

        ``body`` is ``(block, window, x, keys, values, layer, *shared) -> (x, keys, values)``.
        """
        x, keys, values = self.embed(tokens, self.dtype), cache["k"], cache["v"]
        if isinstance(keys, tuple):
            written = []
            for i, (k, v, *own) in enumerate(zip(keys, values, *shared, strict=True)):
                x, *both = body(apart[i], self.window(i), x, k, v, None, *own)
                written.append(both)
            keys, values = zip(*written, strict=True)
            return self.norm(x), keys, values

        def step(block: Block, carry: tuple, index: Array) -> tuple[tuple, None]:
            return body(block, self.window(index), *carry, index, *shared), None

        (x, keys, values), _ = scan_layers(self.layers, (x, keys, values), step)
        return self.norm(x), keys, values
