"""The functional boundary: an NNX class becomes pure functions over plain nested-dict parameters.

Nothing outside this folder sees flax. A family is a class built as
``cls(config, rngs=, dtype=, param_dtype=, remat=)`` that holds only ``nnx.Param`` leaves and has
``hidden_states(batch, features)``, ``head_weight()``, ``prefill(batch, cache_size, features)``,
``decoder()`` and, when it reads media, ``encode_media(media)`` and
``tower_features(media)``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import ConfigError, ModelError
from aa_jax.models.layers import REMAT_POLICIES, check_choice
from aa_jax.models.names import Names, flatten, unflatten
from aa_jax.models.variants import Variant
from aa_jax.models.variants import axes as variant_axes

Params = dict[str, Any]
Batch = dict[str, Any]
Cache = dict[str, Any]

DTYPES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model as pure functions; parameters are always the first argument.

    Every function may be called inside `jax.jit`, `jax.grad` and `jax.vmap`. Batches follow the
    library's batch layout (tokens, positions, intervals, feature_index, media, last_positions).

    Attributes:
        family: name of the architecture, e.g. "llava".
        config: the family's frozen config dataclass.
        hf_config: the config.json it was built from.
        names: the family's name map.
        init: ``key -> params``, drawn as transformers draws them.
        abstract: ``() -> tree of ShapeDtypeStruct``; needs no memory.
        axes: ``() -> the same tree`` of tuples of logical axis names (None or str per dim).
        encode_media: ``(params, media) -> features [B,F,D]``: tower and projector.
        tower_features: ``(params, media) -> [B,I,P,Dv]`` (Qwen2-VL: [B,P,Dv]): the tower alone;
            handed back as ``media["tower_features"]`` it spares `encode_media` the tower's run.
        hidden_states: ``(params, batch, features=None) -> [B,T,D]`` after the final norm; encodes
            ``batch["media"]`` when features are not given.
        head: ``params -> [V,D]``, the output head, tied or not.
        prefill: ``(params, batch, cache_size, features=None) -> (hidden [B,T,D], cache)``.
        decode: ``(params, tokens [B], cache) -> (hidden [B,D], cache)``: one token per row,
            appended at the row's own length. The cache is {"k": [L,B,K,S,Dh], "v": the same,
            "length": [B]}, and where positions have three axes "position" [B], the next token's.
            Rows that share prompts, W = B / P of each standing together, are decoded from
            {"prompt_k": [L,P,K,S,Dh], "prompt_v": the same, "prompt_length": [P], "k":
            [L,B,K,R,Dh], "v": the same, "spot": [B] where in R this token goes (R: nowhere),
            "position": [B]}, of which "k" and "v" come back changed. In either, the entries with
            L may be tuples of L arrays, see `models.caches`.
        decoder: ``params -> ((tokens, cache) -> (hidden, cache))``, `decode` for a loop: what the
            parameters alone decide is done by the first call, before the loop.
        variant: its adapters and quantised kernels. A model with adapters takes parameters
            without them too, and is then its base.
        edit: ``variant -> Model``: the same architecture as another variant.
        frozen: paths of the parameters that do not train: those under adapters, quantised ones.
        dtype: type of activations and matmuls, e.g. "bfloat16".
        tower: the branch of the parameters that `tower_features` reads; None: there is none.
    """

    family: str
    config: Any
    hf_config: dict[str, Any]
    names: Names
    init: Callable[..., Params]
    abstract: Callable[[], Params]
    axes: Callable[[], Params]
    encode_media: Callable[..., Array]
    tower_features: Callable[..., Array]
    hidden_states: Callable[..., Array]
    head: Callable[[Params], Array]
    prefill: Callable[..., tuple[Array, Cache]]
    decode: Callable[..., tuple[Array, Cache]]
    decoder: Callable[[Params], Callable[[Array, Cache], tuple[Array, Cache]]]
    variant: Variant
    edit: Callable[[Variant], "Model"]
    frozen: tuple[str, ...]
    dtype: str
    tower: str | None


def dtype_named(what: str, name: str) -> Any:
    """The floating type a string names.

    Raises:
        ConfigError: for any other string, with the list.
    """
    check_choice(what, name, DTYPES)
    return DTYPES[name]


def functional(
    cls: type[nnx.Module],
    *,
    family: str,
    config: Any,
    hf_config: dict[str, Any],
    names: Names,
    dtype: str,
    param_dtype: str,
    remat: str,
    variant: Variant | None = None,
) -> Model:
    """Splits a family's class once, abstractly, and closes its methods over the structure.

    Args:
        cls: the family's class.
        family: its name.
        config: its config dataclass.
        hf_config: the config.json behind it.
        names: its name map.
        dtype: type of activations and matmuls.
        param_dtype: type parameters are stored in.
        remat: key of `layers.REMAT_POLICIES`.
        variant: adapters and quantised kernels; None is the plain model.
    """
    check_choice("remat", remat, REMAT_POLICIES)
    variant = variant or Variant()
    kwargs = dict(
        dtype=dtype_named("dtype", dtype),
        param_dtype=dtype_named("param_dtype", param_dtype),
        remat=remat,
    )

    def split(key: Array, variant: Variant) -> tuple[Any, Any]:
        rngs = nnx.Rngs(params=key)
        module = cls(config, rngs=rngs, **kwargs)
        variant.apply(module, rngs, names)
        # Naming nnx.Param alone raises if a module holds any other state.
        return nnx.split(module, nnx.Param)

    def structure(variant: Variant) -> tuple[Any, Params]:
        graphdef, state = jax.eval_shape(lambda key: split(key, variant), jax.random.key(0))
        return graphdef, nnx.to_pure_dict(state)

    graphdef, abstract = structure(variant)
    leaves = flatten(abstract)
    base_graphdef, base = structure(variant.without_adapters()) if variant.lora else (None, {})
    base_leaves = flatten(base)

    def bind(params: Params) -> Any:
        given = flatten(params)
        if base and given.keys() == base_leaves.keys():
            return nnx.merge(base_graphdef, nnx.State(params))
        if given.keys() != leaves.keys():
            raise ModelError(
                f"These are not the parameters of this {family} model: missing "
                f"{sorted(leaves.keys() - given.keys())}, unknown "
                f"{sorted(given.keys() - leaves.keys())}. Take them from model.init or "
                "models.load with the same config."
            )
        return nnx.merge(graphdef, nnx.State(params))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(split(key, variant)[1])

    def axes() -> Params:
        plain = leaves if variant == Variant() else flatten(structure(Variant())[1])
        return unflatten(variant_axes(names, plain, leaves))

    def edit(variant: Variant) -> Model:
        return functional(
            cls,
            family=family,
            config=config,
            hf_config=hf_config,
            names=names,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            variant=variant,
        )

    def arrays(batch: Batch) -> Batch:
        return jax.tree.map(jnp.asarray, batch)  # host batches are numpy

    def media_method(name: str) -> Callable[[Params, dict[str, Any]], Array]:
        def call(params: Params, media: dict[str, Any]) -> Float[Array, "B ..."]:
            if not hasattr(cls, name):
                raise ModelError(f"A {family} model reads text only; drop the media of the batch.")
            return getattr(bind(params), name)(arrays(media))

        return call

    def check_text_only(batch: Batch, features: Array | None) -> None:
        if not hasattr(cls, "encode_media") and (features is not None or "media" in batch):
            raise ModelError(f"A {family} model reads text only; drop the media of the batch.")

    def hidden_states(
        params: Params, batch: Batch, features: Float[Array, "B F D"] | None = None
    ) -> Float[Array, "B T D"]:
        check_text_only(batch, features)
        return bind(params).hidden_states(arrays(batch), features)

    def head(params: Params) -> Float[Array, "V D"]:
        return bind(params).head_weight()

    def prefill(
        params: Params,
        batch: Batch,
        cache_size: int,
        features: Float[Array, "B F D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        check_text_only(batch, features)
        if cache_size < batch["tokens"].shape[1]:
            raise ConfigError(
                f"cache_size is {cache_size}, but the prompts are {batch['tokens'].shape[1]} "
                "tokens wide; it must hold the prompt and every token to be generated."
            )
        return bind(params).prefill(arrays(batch), cache_size, features)

    def decoder(params: Params) -> Callable[[Array, Cache], tuple[Array, Cache]]:
        return bind(params).decoder()

    def decode(
        params: Params, tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]:
        return decoder(params)(tokens, cache)

    return Model(
        family=family,
        config=config,
        hf_config=hf_config,
        names=names,
        init=init,
        abstract=lambda: abstract,
        axes=axes,
        encode_media=media_method("encode_media"),
        tower_features=media_method("tower_features"),
        hidden_states=hidden_states,
        head=head,
        prefill=prefill,
        decode=decode,
        decoder=decoder,
        variant=variant,
        edit=edit,
        frozen=variant.frozen(leaves),
        dtype=dtype,
        tower=getattr(cls, "tower", None),
    )
