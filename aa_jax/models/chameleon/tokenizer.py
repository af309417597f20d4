"""The image tokenizer as pure functions over plain parameters, with a checkpoint folder of its own.

tokenizer, params = load_tokenizer("/ckpt/chameleon-vqgan")
indices = tokenizer.encode(params, pixels)      # [N, 3, H, W] -> [N, h, w]
pixels = tokenizer.decode(params, indices)
"""

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from aa_jax.errors import CheckpointError, ModelError
from aa_jax.hosts import to_host
from aa_jax.models import safetensors
from aa_jax.models.chameleon import vq_params
from aa_jax.models.chameleon.vocabulary import ImageVocabulary
from aa_jax.models.chameleon.vq import VQ, VQConfig
from aa_jax.models.config import Reader
from aa_jax.models.functional import Model, Params, dtype_named
from aa_jax.models.hf import read_config, read_params, write_checkpoint
from aa_jax.models.names import Names, flatten, unflatten

FAMILY = "chameleon_vqgan"
# A whole Chameleon folder keeps the tokenizer below this root; the rest of it is another model.
ROOT = r"model\.vqmodel\."
OTHERS = (r"model\.(?!vqmodel\.).*", r"lm_head\..*")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTokenizer:
    """Pure functions; parameters are the first argument. All run in fp32.

    Attributes:
        family: "chameleon_vqgan".
        config: sizes.
        hf_config: the config.json it was built from.
        names: its name map.
        has_decoder: whether `decode` and `reconstruct` work.
        init: ``key -> params``, drawn for training from scratch.
        abstract: ``() -> tree of ShapeDtypeStruct``.
        axes: ``() -> the same tree`` of logical axis names.
        encode: ``(params, pixels [N,C,H,W]) -> indices [N,h,w] int32``.
        decode: ``(params, indices [N,h,w]) -> pixels [N,C,H,W]``.
        latents: ``(params, pixels) -> [N,h,w,E]``: what `encode` compares with the codebook.
        render: ``(params, vectors [N,h,w,E]) -> pixels``: `decode` after the look-up.
        nearest: ``(params, latents) -> indices``.
    """

    family: str
    config: VQConfig
    hf_config: dict[str, Any]
    names: Names
    has_decoder: bool
    init: Callable[[PRNGKeyArray], Params]
    abstract: Callable[[], Params]
    axes: Callable[[], Params]
    encode: Callable[..., Int[Array, "N h w"]]
    decode: Callable[..., Float[Array, "N C H W"]]
    latents: Callable[..., Float[Array, "N h w E"]]
    render: Callable[..., Float[Array, "N C H W"]]
    nearest: Callable[..., Int[Array, "N h w"]]


def build_tokenizer(
    hf_config: dict[str, Any], *, decoder: bool = True, param_dtype: str = "float32"
) -> ImageTokenizer:
    """A tokenizer from a decoded config.json; allocates nothing.

    Args:
        hf_config: of a `ChameleonVQVAE`, or of a Chameleon model, whose `vq_config` counts.
        decoder: whether there are parameters that turn tokens into pixels.
        param_dtype: type parameters are stored in.

    Raises:
        ModelError: another architecture, or attributes that are not handled.
    """
    whole = hf_config.get("model_type") == "chameleon"
    if not whole and hf_config.get("model_type") not in (None, FAMILY):
        raise ModelError(
            f"config.json is of model_type {hf_config['model_type']!r}; an image tokenizer is "
            f"{FAMILY!r}, or part of a 'chameleon'."
        )
    reader = Reader(hf_config.get("vq_config") or {} if whole else hf_config, "vq_config")
    config = VQConfig.read(reader)
    reader.raise_problems(FAMILY)
    stored = dict(hf_config.get("vq_config") or {}) if whole else copy.deepcopy(hf_config)
    stored |= {"architectures": ["ChameleonVQVAE"], "model_type": FAMILY}
    return _functional(config, stored, decoder, dtype_named("param_dtype", param_dtype))


def _functional(
    config: VQConfig, hf_config: dict[str, Any], decoder: bool, dtype: Any
) -> ImageTokenizer:
    def split(key: Array) -> tuple[Any, Any]:
        rngs = nnx.Rngs(params=key)
        return nnx.split(VQ(config, decoder=decoder, rngs=rngs, param_dtype=dtype), nnx.Param)

    graphdef, state = jax.eval_shape(split, jax.random.key(0))
    abstract = nnx.to_pure_dict(state)
    leaves = flatten(abstract)
    own = vq_params.names(config)
    names = dataclasses.replace(own, layouts=((ROOT, ""),), buffers=OTHERS)

    def bind(params: Params) -> VQ:
        if (given := flatten(params).keys()) != leaves.keys():
            raise ModelError(
                "These are not the parameters of this image tokenizer: missing "
                f"{sorted(leaves.keys() - given)}, unknown {sorted(given - leaves.keys())}. Take "
                "them from tokenizer.init or load_tokenizer."
            )
        return nnx.merge(graphdef, nnx.State(params))

    def with_decoder(params: Params) -> VQ:
        if not decoder:
            raise ModelError(
                "This image tokenizer has no decoder, so tokens cannot become pixels: transformers "
                "checkpoints of Chameleon leave it out. Load the tokenizer from a folder that "
                "holds decoder.* tensors (the original VQGAN, converted to safetensors)."
            )
        return bind(params)

    def axes() -> Params:
        return unflatten({path: rule.all_axes for path, rule in names.for_leaves(leaves).items()})

    return ImageTokenizer(
        family=FAMILY,
        config=config,
        hf_config=hf_config,
        names=names,
        has_decoder=decoder,
        init=lambda key: nnx.to_pure_dict(split(key)[1]),
        abstract=lambda: abstract,
        axes=axes,
        encode=lambda params, pixels: bind(params).encode(jnp.asarray(pixels)),
        decode=lambda params, indices: with_decoder(params).decode(jnp.asarray(indices)),
        latents=lambda params, pixels: bind(params).latents(jnp.asarray(pixels)),
        render=lambda params, vectors: with_decoder(params).pixels(jnp.asarray(vectors)),
        nearest=lambda params, latents: bind(params).nearest(jnp.asarray(latents)),
    )


def load_tokenizer(
    path: str | os.PathLike[str], *, shardings: Any = None, param_dtype: str = "float32"
) -> tuple[ImageTokenizer, Params]:
    """A tokenizer and its parameters.

    Args:
        path: folder of a `ChameleonVQVAE` (with or without decoder), or of a whole Chameleon
            model, of which only the tokenizer is read.
        shardings: tree of `jax.sharding.Sharding` like the parameters; None leaves it to jax.
        param_dtype: type parameters are stored in.

    Raises:
        CheckpointError: files are missing or damaged, or tensors and config disagree.
        ModelError: see `build_tokenizer`.
    """
    config = read_config(path)
    decoder = any(name.startswith("decoder.") for name in _stored_names(Path(path)))
    tokenizer = build_tokenizer(config, decoder=decoder, param_dtype=param_dtype)
    return tokenizer, read_params(path, tokenizer, shardings)


def _stored_names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= set(safetensors.read_header(file))
        except safetensors.BadFile as error:
            raise CheckpointError(f"{file} {error}.") from error
    return {name.removeprefix("model.vqmodel.") for name in found}


def image_encoder(
    tokenizer: ImageTokenizer, params: Params, vocabulary: ImageVocabulary
) -> Callable[[Float[np.ndarray, "N C H W"]], Int[np.ndarray, "N P"]]:
    """``pixels -> tokens of the vocabulary`` on the host, compiled once per shape: what
    `aa_jax.data.processor.Processor.from_pretrained` takes as ``image_encoder``.

    Args:
        tokenizer: the model's image tokenizer, or another with the same codebook size.
        params: its parameters.
        vocabulary: `config.images` of the Chameleon model.

    Raises:
        ModelError: the vocabulary does not name a token for each code.
    """
    table = np.asarray(vocabulary.code_tokens, np.int32)
    if len(table) != tokenizer.config.num_embeddings:
        raise ModelError(
            f"The model's vocabulary_map names {len(table)} image tokens, but the image tokenizer "
            f"has {tokenizer.config.num_embeddings} codes; use the tokenizer it was trained with."
        )
    encode = jax.jit(tokenizer.encode)

    def tokens(pixels: Float[np.ndarray, "N C H W"]) -> Int[np.ndarray, "N P"]:
        return table[np.asarray(encode(params, pixels))].reshape(len(pixels), -1)

    return tokens


def own_image_encoder(
    model: Model, params: Params
) -> Callable[[Float[np.ndarray, "N C H W"]], Int[np.ndarray, "N P"]] | None:
    """`image_encoder` of the tokenizer a Chameleon carries; None for any other model, and where
    the vocabulary does not name the tokens of the codes.

    Args:
        model: any model.
        params: its parameters; the tokenizer's are copied, so that they may be donated later.
    """
    if model.family != "chameleon" or not model.config.images.code_tokens:
        return None
    tokenizer = build_tokenizer(model.hf_config, decoder=False)
    copied = jax.tree.map(lambda x: jnp.array(to_host(x)), params["vq"])
    return image_encoder(tokenizer, copied, model.config.images)


def save_tokenizer(
    path: str | os.PathLike[str],
    tokenizer: ImageTokenizer,
    params: Params,
    extra_files_from: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes config.json and model.safetensors; transformers' `ChameleonVQVAE` reads the encoder
    half. Arguments as for `aa_jax.models.save`.

    Raises:
        CheckpointError: the folder exists, or the parameters are another tokenizer's.
    """
    write_checkpoint(
        path,
        tokenizer,
        params,
        extra_files_from=extra_files_from,
        dtype=dtype,
        overwrite=overwrite,
    )


def to_uint8(pixels: Float[np.ndarray, "*batch C H W"]) -> UInt8[np.ndarray, "*batch H W C"]:
    """Decoded pixels in [-1, 1] as 8-bit colours, channels last; what lies outside is clipped."""
    levels = np.rint((np.clip(np.asarray(pixels, np.float32), -1.0, 1.0) + 1.0) * 127.5)
    return np.moveaxis(levels, -3, -1).astype(np.uint8)
