"""A scalar head on a backbone: reward models score sequences, critics value tokens.

A score model's parameters are {"model": the backbone's, "score_head": {"kernel": [D, 1]}}. One that
grades several dimensions has a column of the kernel for each, and the thresholds between grades:
{"kernel": [D, K], "thresholds": [K, C]}.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from aa_jax.errors import CheckpointError
from aa_jax.hosts import to_host
from aa_jax.models import adapt, safetensors
from aa_jax.models import load as load_model
from aa_jax.models.functional import Batch, Model, Params
from aa_jax.models.hf import write_checkpoint

HEAD_FILE = "score_head.safetensors"
HEAD_TENSOR = "score_head.kernel"


def init_score_head(model: Model, key: PRNGKeyArray) -> Params:
    """A fresh head {"kernel": [D, 1]} in fp32.

    Drawn with standard deviation 1 / sqrt(D + 1) (Stiennon et al., 2020, appendix B.1), so that
    first scores of normed hidden states are of order one.
    """
    dim = jax.eval_shape(model.head, model.abstract()).shape[1]
    return {"kernel": jax.random.normal(key, (dim, 1), jnp.float32) * (dim + 1) ** -0.5}


def init_grade_head(model: Model, key: PRNGKeyArray, kinds: int, grades: int = 4) -> Params:
    """A fresh head that grades ``kinds`` dimensions, fp32.

    {"kernel": [D, kinds], "thresholds": [kinds, grades - 1]}. The kernel is drawn like a score
    head's. The thresholds, as `aa_jax.losses.ordered_thresholds` reads them, start evenly spaced by
    1 and centred at 0.
    """
    dim = jax.eval_shape(model.head, model.abstract()).shape[1]
    steps = grades - 1
    # softplus(log(e - 1)) = 1
    raw = jnp.full((kinds, steps), np.log(np.e - 1)).at[:, 0].set(-(steps - 1) / 2)
    kernel = jax.random.normal(key, (dim, kinds), jnp.float32) * (dim + 1) ** -0.5
    return {"kernel": kernel, "thresholds": raw.astype(jnp.float32)}


def axes(model: Model, head: Collection[str] = ("kernel",)) -> Params:
    """Logical axes of a score model's parameters.

    Args:
        model: the backbone.
        head: names of the head's arrays.
    """
    known = {"kernel": ("embed", None), "thresholds": (None, None)}
    return {"model": model.axes(), "score_head": {name: known[name] for name in head}}


def at_positions(
    hidden: Float[Array, "B T D"], positions: Int[Array, "B *slots"]
) -> Float[Array, "B *slots D"]:
    """Hidden states at given positions of each row."""
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0))(hidden, positions)


def scalars(head: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """The head applied to hidden states, in fp32."""
    kernel = head["kernel"].astype(jnp.float32)[:, 0]
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), kernel)


def score(
    model: Model, params: Params, batch: Batch, features: Float[Array, "B F D"] | None = None
) -> Float[Array, "B S"]:
    """One score per sequence, read at its last real token (batch["last_positions"])."""
    hidden = model.hidden_states(params["model"], batch, features)
    return scalars(params["score_head"], at_positions(hidden, jnp.asarray(batch["last_positions"])))


def grade_scores(
    model: Model, params: Params, batch: Batch, features: Float[Array, "B F D"] | None = None
) -> Float[Array, "B S K"]:
    """One score per sequence and graded dimension, read where `score` reads."""
    hidden = model.hidden_states(params["model"], batch, features)
    last = at_positions(hidden, jnp.asarray(batch["last_positions"]))
    kernel = params["score_head"]["kernel"].astype(jnp.float32)
    return jnp.einsum("bsd,dk->bsk", last.astype(jnp.float32), kernel)


def values(
    model: Model, params: Params, batch: Batch, features: Float[Array, "B F D"] | None = None
) -> Float[Array, "B S R"]:
    """One value per response slot, read at the position that predicts its token
    (batch["target_positions"]): the critic's estimate before the token is taken."""
    hidden = model.hidden_states(params["model"], batch, features)
    return scalars(
        params["score_head"], at_positions(hidden, jnp.asarray(batch["target_positions"]))
    )


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    extra_files_from: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a score model: the backbone as `aa_jax.models.save` writes it, the head beside it.

    transformers loads the folder as the backbone. The head keeps its own type, whatever ``dtype``
    the backbone is stored in. One that grades is also stored as a score head, the mean of its
    columns, so that `load` gives a reward model: the mean score over the dimensions.

    Raises:
        CheckpointError: see `aa_jax.models.save`.
    """
    if params.keys() != {"model", "score_head"}:
        raise CheckpointError(
            f"A score model's parameters are {{'model', 'score_head'}}, these are {set(params)}; "
            "save a plain model with aa_jax.models.save."
        )
    write_checkpoint(
        path,
        *adapt.pending(model, params["model"]),
        extra_files_from=extra_files_from,
        dtype=dtype,
        overwrite=overwrite,
        finish=writer(params),
    )


def writer(params: Params) -> Callable[[Path], None]:
    """``write(folder)``, which puts a score model's head into a folder."""
    head = {name: to_host(array) for name, array in params["score_head"].items()}
    tensors = {HEAD_TENSOR: head["kernel"]}
    if "thresholds" in head:
        tensors = {HEAD_TENSOR: head["kernel"].mean(axis=1, keepdims=True)}
        tensors |= {f"grade_head.{name}": array for name, array in head.items()}

    def write(folder: Path) -> None:
        spec = {name: (array.dtype, array.shape) for name, array in tensors.items()}
        safetensors.write(folder / HEAD_FILE, spec, list(tensors.items()))

    return write


def load(
    path: str | os.PathLike[str], *, shardings: Any = None, **build_kwargs: Any
) -> tuple[Model, Params]:
    """A score model from a folder that `save` wrote.

    Args:
        path: the folder.
        shardings: as for `aa_jax.models.load`, of the backbone's parameters; the head is small
            and left to jax.
        **build_kwargs: as for `aa_jax.models.load`.

    Raises:
        CheckpointError: the folder holds no score head, or one of another width; or see
            `aa_jax.models.load`.
    """
    file = Path(path) / HEAD_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no {HEAD_FILE}, so it is not a score model; start one from a backbone "
            "with models.load and heads.init_score_head."
        )
    try:
        entry = safetensors.read_header(file)[HEAD_TENSOR]
    except (safetensors.BadFile, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; save the model again.") from error
    model, backbone = load_model(path, shardings=shardings, **build_kwargs)
    dim = jax.eval_shape(model.head, model.abstract()).shape[1]
    if entry.shape != (dim, 1):
        raise CheckpointError(
            f"{file} holds a head of shape {list(entry.shape)}, but the backbone beside it needs "
            f"[{dim}, 1]; the two files come from different models."
        )
    return model, {
        "model": backbone,
        "score_head": {"kernel": jnp.asarray(np.array(entry.read()))},
    }
