"""Llama (Touvron et al., 2023) and its relatives with the same layer, e.g. Vicuna."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.models import rope
from aa_jax.models.attention import Angles, Attention
from aa_jax.models.config import Reader
from aa_jax.models.layers import Embedding, GatedMLP, RMSNorm, scan_layers, stacked

Batch = dict[str, Any]
Cache = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What of a Llama config.json decides the model; defaults are transformers' own."""

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
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    initializer_range: float

    @classmethod
    def read(cls, reader: Reader) -> "LlamaConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        heads = reader.size("num_attention_heads", 32)
        hidden = reader.size("hidden_size", 4096)
        head_dim = reader.size("head_dim", max(hidden // heads, 1))
        kv_heads = reader.size("num_key_value_heads", heads)
        max_positions = reader.size("max_position_embeddings", 2048)
        if heads % kv_heads:
            reader.problem("num_key_value_heads", f"= {kv_heads} does not divide {heads} heads")
        if head_dim % 2:
            reader.problem("head_dim", f"is {head_dim}; rotary positions need an even one")
        config = cls(
            vocab_size=reader.size("vocab_size", 32000),
            hidden_size=hidden,
            intermediate_size=reader.size("intermediate_size", 11008),
            num_layers=reader.size("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=reader.activation("hidden_act", "silu"),
            norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope=reader.rope(head_dim, max_positions),
            attention_bias=reader.flag("attention_bias", False),
            mlp_bias=reader.flag("mlp_bias", False),
            tied=reader.flag("tie_word_embeddings", False),
            initializer_range=reader.number("initializer_range", 0.02),
        )
        # pretraining_tp splits matmuls and sums them: the same result in exact arithmetic.
        reader.finish(inert=("pretraining_tp",))
        return config


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
        self.attn_norm = RMSNorm(config.hidden_size, **norm)
        self.attn = Attention(
            config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            out_std=config.initializer_range,
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

    def __call__(
        self, x: Float[Array, "B T D"], angles: Angles, intervals: Int[Array, "B T 4"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        y, kv = self.attn(self.attn_norm(x), angles, intervals)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv

    def decode(
        self,
        x: Float[Array, "B D"],
        angles: Angles,
        keys: Array,
        values: Array,
        layer: Int[Array, ""],
        length: Int[Array, "B"],
    ) -> tuple[Float[Array, "B D"], Array, Array]:
        """One token per row; see `Attention.decode`."""
        y, keys, values = self.attn.decode(self.attn_norm(x), angles, keys, values, layer, length)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), keys, values


class Llama(nnx.Module):
    """Token embedding, decoder layers, final norm and output head.

    The methods on a batch are the family interface of `models.functional`; those on embeddings
    (`run`, `run_prefill`) let a multimodal family put features in between.
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
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

    def run(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        intervals: Int[Array, "B T 4"],
    ) -> Float[Array, "B T D"]:
        """Embeddings to hidden states after the final norm."""
        angles = rope.angles(self.config.rope, positions)

        def body(block: Block, x: Array, index: Array) -> tuple[Array, None]:
            return block(x, angles, intervals)[0], None

        x, _ = scan_layers(self.layers, x, body, remat=self.remat)
        return self.norm(x)

    def run_prefill(
        self, x: Float[Array, "B T D"], batch: Batch, cache_size: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `run`, keeping every layer's keys and values in a cache of ``cache_size`` slots."""
        angles = rope.angles(self.config.rope, batch["positions"])
        room = cache_size - x.shape[1]

        def body(block: Block, x: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
            return block(x, angles, batch["intervals"])

        x, kv = scan_layers(self.layers, x, body)
        keys, values = (jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))) for a in kv)
        length = batch["last_positions"][:, 0].astype(jnp.int32) + 1
        return self.norm(x), {"k": keys, "v": values, "length": length}

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

    def decode(self, tokens: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """Family interface: appends one token per row at the row's own length."""
        length = cache["length"]
        angles = rope.angles(self.config.rope, length)

        def body(block: Block, carry: tuple, index: Array) -> tuple[tuple, None]:
            x, keys, values = carry
            return block.decode(x, angles, keys, values, index, length), None

        start = (self.embed(tokens, self.dtype), cache["k"], cache["v"])
        (x, keys, values), _ = scan_layers(self.layers, start, body)
        return self.norm(x), {"k": keys, "v": values, "length": length + 1}
