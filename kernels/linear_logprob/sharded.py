"""The operator with tokens and vocabulary divided over a mesh, explicitly.

Every device runs the blocked driver on its tokens and its part of the vocabulary; the softmax
state of a token is combined over the parts exactly as over tiles of one device. Inside there is
nothing left for XLA to divide, so kernels run, and tokens that do not count are skipped, as on one
device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from aa_jax.errors import ConfigError
from aa_jax.kernels.dispatch import divides
from aa_jax.kernels.linear_logprob import blocked, tile, xla
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec
from aa_jax.platforms import target

TOKENS, VOCAB = ("data", "fsdp"), "tensor"
"""Mesh axes that divide the tokens and the vocabulary, as the library's own sharding rules do."""


def refuses(tokens: int, vocab: int) -> str | None:
    """Why the ambient mesh (``jax.set_mesh``) cannot divide so many tokens and entries, or None."""
    words = "tokens", "vocabulary"
    return divides(tokens, vocab, rows=TOKENS, parts=VOCAB, words=words)


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
    *,
    mesh: Mesh | AbstractMesh,
    tokens: tuple[str, ...] = TOKENS,
    vocab: str = VOCAB,
    engine: blocked.Engine = blocked.XLA,
) -> LogProbs:
    """`aa_jax.kernels.linear_logprob.api.linear_logprob` over a mesh.

    Args:
      hidden: divided along the tokens.
      head: divided along the vocabulary.
      targets: as hidden.
      mask: as hidden, or None.
      bias: as head, or None.
      spec: static choices; chunk and tile are of one device.
      mesh: where the arrays are.
      tokens: mesh axes the tokens are divided over.
      vocab: mesh axis the vocabulary is divided over.
      engine: what multiplies a block on a device.

    Raises:
      ConfigError: a mesh axis is missing, or does not divide tokens or vocabulary.
    """
    missing = {*tokens, vocab} - set(mesh.axis_names)
    if missing:
        raise ConfigError(
            f"linear_logprob: the mesh has the axes {mesh.axis_names} and not {sorted(missing)}; "
            "name its own axes with tokens= and vocab=."
        )
    rows = 1
    for axis in tokens:
        rows *= mesh.shape[axis]
    for what, size, parts in (
        ("tokens", targets.shape[0], rows), ("the vocabulary", head.shape[0], mesh.shape[vocab]),
    ):  # fmt: skip
        if size % parts:
            raise ConfigError(
                f"linear_logprob: {what} ({size}) cannot be divided over {parts} devices; pad it "
                "to a multiple (a bias of -inf hides entries of the vocabulary)."
            )
    known = (targets >= 0) & (targets < head.shape[0])
    counts = jnp.ones_like(known) if mask is None else mask
    most, width = xla.BLOCK.get(target.backend(), xla.DEFAULT_BLOCK)
    spec = spec._replace(
        chunk=xla.even_chunk(targets.shape[0] // rows, min(spec.chunk or most, most)),
        tile=blocked.tile_width(head.shape[0] // mesh.shape[vocab], spec.tile or width),
    )
    where = jnp.where(known & counts, targets, 0)
    outs = _logprob(hidden, head, bias, where, counts, _Static(spec, mesh, tokens, vocab, engine))
    return LogProbs(jnp.where(known | ~counts, outs[0], jnp.nan), *outs[1:])


class _Static:
    """What is not an array; compared by identity of mesh and engine, so jit can cache."""

    def __init__(self, *parts):
        self.parts = parts
        self.spec, self.mesh, self.tokens, self.vocab, self.engine = parts

    def __eq__(self, other):
        return isinstance(other, _Static) and self.parts == other.parts

    def __hash__(self):
        return hash(self.parts)

    def mine(self, targets, head):
        """Where targets are in this device's part of the vocabulary; -1 matches nothing.

        Other numbers would: a part is filled up to whole tiles.
        """
        targets = targets - jax.lax.axis_index(self.vocab) * head.shape[0]
        return jnp.where((targets >= 0) & (targets < head.shape[0]), targets, -1)

    def run(self, function, specs, outs, *arrays):
        """``function`` on every device; its arrays divided as `specs` say."""
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=outs, check_vma=False
        )
        return mapped(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _logprob(hidden, head, bias, targets, mask, static):
    return _fwd(hidden, head, bias, targets, mask, static)[0]


def _fwd(hidden, head, bias, targets, mask, static):
    rows, parts = P(static.tokens), P(static.vocab)

    def forward(hidden, head, bias, targets, mask):
        mine = static.mine(targets, head)
        partial = blocked.partials(
            hidden,
            head,
            bias,
            mine,
            mask,
            jnp.argsort(~mask, stable=True),
            static.spec,
            static.engine,
        )
        stacked = jax.tree.map(lambda x: jax.lax.all_gather(x, static.vocab), partial)
        return blocked.finish(tile.merge(stacked), mask)

    outs = static.run(
        forward, (rows, parts, parts, rows, rows), rows, hidden, head, bias, targets, mask
    )
    return outs, (hidden, head, bias, targets, mask, *outs[1:])


def _bwd(static, residuals, cotangents):
    hidden, head, bias, targets, mask, entropy, lse = residuals
    rows, parts = P(static.tokens), P(static.vocab)

    def backward(hidden, head, bias, targets, mask, values):
        mine = static.mine(targets, head)
        values = blocked.Rows(*values)
        dhidden, dhead, dbias = blocked.gradients(
            hidden,
            head,
            bias,
            mine,
            mask,
            jnp.argsort(~mask, stable=True),
            values,
            static.spec,
            static.engine,
        )
        dhead, dbias = jax.tree.map(lambda x: jax.lax.psum(x, static.tokens), (dhead, dbias))
        return jax.lax.psum(dhidden, static.vocab).astype(hidden.dtype), dhead, dbias

    dhidden, dhead, dbias = static.run(
        backward,
        (rows, parts, parts, rows, rows, rows),
        (rows, parts, parts),
        hidden, head, bias, targets, mask, (lse, entropy, *cotangents),
    )  # fmt: skip
    return dhidden, dhead, dbias, None, None


_logprob.defvjp(_fwd, _bwd)
