"""Output head, log-softmax and gather as one operator."""

import jax
from jaxtyping import Array, Bool, Float, Int

from aa_jax.errors import ConfigError
from aa_jax.kernels.dispatch import Implementation, choose, hopper_refuses, undivided
from aa_jax.kernels.linear_logprob import blocked, reference, sharded, xla
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec
from aa_jax.platforms import target


def _pallas_tpu(*args):
    from aa_jax.kernels.linear_logprob import pallas_tpu  # Pallas takes a while to import

    return pallas_tpu.linear_logprob(*args)


def _pallas_tpu_refuses(hidden, **_):
    if str(hidden.dtype) not in ("bfloat16", "float32"):
        return f"hidden states are {hidden.dtype}, not bfloat16 or float32"
    if not undivided():
        return "arrays may be divided over devices outside jax.shard_map"
    return None


def _sharded(hidden, head, *args):
    engine = blocked.XLA
    if target.backend() == "tpu":
        from aa_jax.kernels.linear_logprob import pallas_tpu

        engine = pallas_tpu.ENGINE
    mesh = jax.sharding.get_abstract_mesh()
    return sharded.linear_logprob(hidden, head, *args, mesh=mesh, engine=engine)


def _sharded_refuses(hidden, head, **_):
    if str(hidden.dtype) not in ("bfloat16", "float32"):
        return f"hidden states are {hidden.dtype}, not bfloat16 or float32"
    return sharded.refuses(hidden.shape[0], head.shape[0])


def _pallas_hopper(*args):
    from aa_jax.kernels.linear_logprob import pallas_hopper

    return pallas_hopper.linear_logprob(*args)


def _pallas_hopper_refuses(hidden, **_):
    if str(hidden.dtype) not in ("bfloat16", "float16"):
        return f"hidden states are {hidden.dtype}, not bfloat16 or float16"
    return hopper_refuses()


IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(_pallas_tpu, ("tpu",), ("tpu",), _pallas_tpu_refuses),
    # The same kernel on every device of a mesh; elsewhere with XLA's blocks, when asked for.
    "sharded": Implementation(_sharded, None, ("tpu",), _sharded_refuses),
    # Compiled, never executed: only when asked for.
    "pallas_hopper": Implementation(_pallas_hopper, ("gpu", "cuda"), (), _pallas_hopper_refuses),
    "reference": Implementation(reference.linear_logprob),
    "xla": Implementation(xla.linear_logprob, preferred=None),
}


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    *,
    mask: Bool[Array, "N"] | Float[Array, "N"] | None = None,
    bias: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    need_entropy: bool = False,
    impl: str = "auto",
    chunk: int | None = None,
) -> LogProbs:
    r"""Log-probability of each target under ``softmax(z)``, never holding ``[N, V]`` at once.

    .. math::
      z = \mathrm{cap}(h W^\top + b) / \tau, \qquad \mathrm{cap}(x) = c \tanh(x / c)

      \log p_y = z_y - \mathrm{lse}(z), \qquad H = \mathrm{lse}(z) - \sum_v p_v z_v

    Matmuls run in ``hidden``'s type and accumulate in float32; everything after them is float32.
    All three results are differentiable with respect to ``hidden``, ``head`` and ``bias``; the
    backward pass forms the logits again (as Wijmans et al., "Cut Your Losses", 2024, without its
    gradient filter), and costs no matmul for a head that is not differentiated.

    Args:
      hidden: final hidden states, in the compute type.
      head: output embedding; gradients are accumulated in float32 and returned in its type.
      targets: token ids in ``[0, V)``. Any value is fine where the mask is zero; elsewhere an id
        out of range gives NaN.
      mask: nonzero (or True) on tokens that count. The others return exactly 0, receive exactly 0
        gradient and may hold anything, NaN included. Only zero or not matters: weights belong
        into the loss.
      bias: added to the logits.
      temperature: τ > 0, divides the capped logits.
      softcap: c > 0, or None for no cap (Gemma 2, arXiv:2408.00118, §2).
      need_entropy: also return the entropy.
      impl: ``"auto"`` or a key of `IMPLEMENTATIONS`.
      chunk: tokens per block of logits; None picks it so that a block stays within the budget of
        the implementation.

    Returns:
      Log-probabilities, entropies (or None) and log-partition sums.

    Raises:
      ConfigError: unknown or unavailable ``impl``, or a temperature, cap or chunk that is not
        positive.
    """
    for name, value in (("temperature", temperature), ("softcap", softcap), ("chunk", chunk)):
        if value is not None and not value > 0:
            raise ConfigError(f"linear_logprob: {name} must be positive, got {value!r}.")
    fn = choose("linear_logprob", IMPLEMENTATIONS, impl, hidden=hidden, head=head)
    spec = Spec(
        float(temperature), None if softcap is None else float(softcap), bool(need_entropy), chunk
    )
    return fn(hidden, head, targets, None if mask is None else mask != 0, bias, spec)
