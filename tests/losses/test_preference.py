"""Preference losses against their papers' equations written again in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.errors import ConfigError
from aa_jax.losses.preference import Pairs, find_variant, needs_reference, with_divergence
from aa_jax.losses.preference.loss import ALIASES, REFERENCE_FREE
from aa_jax.losses.stable import bounded_exp, log1mexp

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 9, (2, 6)).astype(np.float64)
LOGPS = -2.0 * LENGTHS * RNG.random((2, 6))
REF = LOGPS + RNG.normal(size=(2, 6))
W, L = LOGPS - REF


def pairs(logps=LOGPS, ref=REF, lengths=LENGTHS, mask=None):
    mask = np.ones(logps.shape[1]) if mask is None else mask
    columns = (*logps, *ref, *lengths, mask)
    return Pairs(*(jnp.asarray(x, jnp.float32) for x in columns))


def logsig(x):
    return -np.logaddexp(0, -x)


def sig(x):
    return 1 / (1 + np.exp(-x))


def odds(p):
    return np.log(p / (1 - p))


MEAN = LOGPS / LENGTHS
WIN_RATES = np.tile([0.8, 0.3], (6, 1)).astype(np.float32)
CLOSED = {
    "cdpo": ({"label_smoothing": 0.2, "beta": 0.3},
             -0.8 * logsig(0.3 * (W - L)) - 0.2 * logsig(-0.3 * (W - L))),
    "dpop": ({"variant": "dpop", "penalty": 5.0},
             -logsig(0.1 * (W - L - 5.0 * np.maximum(0, -W)))),
    "dpop, default": ({"variant": "dpop"}, -logsig(0.1 * (W - L - 50 * np.maximum(0, -W)))),
    "exo": ({"variant": "exo", "label_smoothing": 0.01},
            sig(0.1 * (W - L)) * (logsig(0.1 * (W - L)) - np.log(0.99))
            + sig(-0.1 * (W - L)) * (logsig(-0.1 * (W - L)) - np.log(0.01))),
    "bco": ({"variant": "bco", "beta": 0.5},
            -logsig(0.5 * W - 0.25 * (W + L).mean()) - logsig(0.25 * (W + L).mean() - 0.5 * L)),
    "bco, running": ({"variant": "bco", "delta": 0.7},
                     -logsig(0.1 * W - 0.7) - logsig(0.7 - 0.1 * L)),
    "sppo": ({"variant": "sppo", "beta": 0.5, "win_rates": jnp.asarray(WIN_RATES)},
             (W - 0.3 / 0.5) ** 2 + (L + 0.2 / 0.5) ** 2),
    "nca": ({"variant": "nca"}, -logsig(0.1 * W) - 0.5 * logsig(-0.1 * W) - 0.5 * logsig(-0.1 * L)),
    "apo_zero": ({"variant": "apo_zero"}, 1 - sig(0.1 * W) + sig(0.1 * L)),
    "apo_down": ({"variant": "apo_down"}, sig(0.1 * W) + 1 - sig(0.1 * (W - L))),
    "discopop": ({"variant": "discopop", "tau": 0.2},
                 -logsig(0.1 * (W - L)) * (1 - sig(0.5 * (W - L)))
                 + np.exp(-0.1 * (W - L)) * sig(0.5 * (W - L))),
    "aot_unpaired": ({"variant": "aot_unpaired"}, -logsig(0.1 * (np.sort(W) - np.sort(L)))),
    "aot": ({"variant": "aot"},
            -logsig(0.1 * (np.sort(LOGPS[0] - LOGPS[1]) - np.sort(REF[0] - REF[1])))),
    "forward_kl": ({"divergence": "forward_kl"}, -logsig(0.1 * (np.exp(-L) - np.exp(-W)))),
    "js": ({"divergence": "js"}, -logsig(0.1 * np.log(2 * sig(W) / (2 * sig(L))))),
    "alpha": ({"divergence": "alpha", "alpha": 0.25},
              -logsig(0.1 * (np.exp(-0.25 * L) - np.exp(-0.25 * W)) / 0.25)),
    "simpo": ({"variant": "simpo"}, -logsig(2.0 * (MEAN[0] - MEAN[1]) - 1.0)),
    "cpo": ({"variant": "cpo"},
            -logsig(0.1 * (LOGPS[0] - LOGPS[1])) - LOGPS[0].sum() / LENGTHS[0].sum()),
    "orpo": ({"variant": "orpo", "beta": 0.3},
             -0.3 * logsig(odds(np.exp(MEAN[0])) - odds(np.exp(MEAN[1])))
             - LOGPS[0].sum() / LENGTHS[0].sum()),
    "selm": ({"optimism": 0.01, "beta": 0.2},
             -logsig(0.2 * (W - L)) + 0.01 * 0.2 * (W + L) / 2),
    "selm, samples": ({"optimism": 0.01, "explored": jnp.arange(6.0)},
                      -logsig(0.1 * (W - L)) + 0.01 * 0.1 * np.arange(6)),
    "weights": ({"weights": jnp.arange(6.0)}, -np.arange(6) * logsig(0.1 * (W - L))),
}  # fmt: skip


def test_closed_forms():
    @jax.jit
    def run(example):
        return {name: losses.preference_loss(example, **o) for name, (o, _) in CLOSED.items()}

    for name, (loss, metrics) in run(pairs()).items():
        want = CLOSED[name][1].mean()
        np.testing.assert_allclose(loss, want, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(losses.total_loss(metrics["loss"]), want, rtol=1e-5)


def one(logps):
    """A pair with these mean log-probs, of responses of two tokens."""
    logps = 2 * np.array(logps)[:, None]
    return pairs(logps, 0 * logps, 2 * np.ones((2, 1)))


def test_simpo_and_orpo_worked_examples():
    """Mean log-probs (-0.5, -0.8): acceptance facts of SimPO (β 2.5, γ 1.4) and ORPO (λ 0.5)."""
    example = one([-0.5, -0.8])
    loss, metrics = losses.preference_loss(example, variant="simpo", beta=2.5, gamma=1.4)
    np.testing.assert_allclose(loss, 1.070055, atol=1e-6)
    np.testing.assert_allclose(metrics["margin"].mean, 2.5 * 0.3, rtol=1e-5)
    loss, metrics = losses.preference_loss(example, variant="orpo", beta=0.5)
    np.testing.assert_allclose(loss, 0.712416, atol=1e-6)
    np.testing.assert_allclose(metrics["sft_loss"].mean, 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["preference_loss"].mean, 0.5 * 0.424833, atol=1e-6)
    alone = losses.preference_loss(example, variant="orpo", beta=0.5, sft_coef=0.0)[0]
    np.testing.assert_allclose(alone, 0.5 * 0.424833, atol=1e-6)


def test_limits_that_connect_the_losses():
    same = [
        ({"variant": "dpop", "penalty": 0.0}, {}),
        ({"divergence": "alpha", "alpha": 1.0}, {"divergence": "forward_kl"}),
        ({"variant": "bco_pair"}, {"variant": "bco", "delta": 0.0}),
        ({"variant": "simpo", "beta": 0.1, "gamma": 0.0},
         {"variant": "sigmoid_norm"}),
        ({"variant": "cpo", "sft_coef": 0.0}, {}),
    ]  # fmt: skip
    without_reference = pairs(ref=0 * REF)
    for left, right in same:
        a, b = (losses.preference_loss(without_reference, **x)[0] for x in (left, right))
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=str(left))
    small = losses.preference_loss(pairs(), divergence="alpha", alpha=1e-3)[0]
    np.testing.assert_allclose(small, losses.preference_loss(pairs())[0], rtol=1e-3)
    single = Pairs(*(x[:1] for x in pairs()))
    for name in ("aot", "aot_unpaired"):  # one pair has nothing to sort
        a = losses.preference_loss(single, variant=name)[0]
        np.testing.assert_allclose(a, losses.preference_loss(single)[0], rtol=1e-6)


def test_slopes_of_divergences_agree_at_the_reference():
    """f''(1) = 1: around π = π_ref every divergence is the same loss."""
    near = pairs(REF + 1e-3 * RNG.normal(size=(2, 6)), REF)
    for name in ("forward_kl", "js", "alpha"):
        moved = with_divergence(near, name)
        scale = 0.5 if name == "js" else 1.0  # f'' of log 2u/(1+u) is 1/2
        want = scale * (near.chosen - near.ref_chosen)
        np.testing.assert_allclose(moved.chosen, want, atol=2e-6)


def test_reference_free_losses_read_no_reference():
    assert [name for name in losses.PREFERENCE_LOSSES if not needs_reference(name)] == [
        *REFERENCE_FREE
    ]
    logps, lengths, mask = jnp.asarray(LOGPS.T, jnp.float32), jnp.ones((6, 2)), jnp.ones((6, 2))
    for name in REFERENCE_FREE:
        found = [
            losses.preference_loss(losses.pair_up(logps, ref, lengths, mask), variant=name)[0]
            for ref in (None, 1e3 * logps)
        ]
        np.testing.assert_array_equal(*found)


def test_names_of_trl():
    for alias, name in ALIASES.items():
        assert find_variant(alias) is losses.PREFERENCE_LOSSES[name]


def test_wpo_weights_by_hand():
    p = np.array([[0.5, 0.2], [0.25, 0.9]])
    squares = np.array([[0.4, 0.3], [0.5, 0.9]])
    mask = jnp.array([[[1.0, 1.0], [1.0, 0.0]]])
    logps, squares = (jnp.asarray(np.log(x), jnp.float32)[None] for x in (p, squares))
    got = losses.wpo_weights(logps, squares, mask)
    np.testing.assert_allclose(got[0], [np.sqrt(0.5 / 0.4 * 0.2 / 0.3), 0.25 / 0.5], rtol=1e-6)
    dirty = logps.at[0, 1, 1].set(jnp.nan)
    np.testing.assert_array_equal(losses.wpo_weights(dirty, squares, mask), got)
    assert (losses.wpo_weights(dirty, squares, 0 * mask) == 1).all()


def test_stable_formulas():
    x = jnp.array([-50.0, -1.0, 0.0, 5.0, 29.0])
    np.testing.assert_allclose(bounded_exp(x), np.exp(np.float64(x)), rtol=1e-6)
    value, slope = jax.vmap(jax.value_and_grad(bounded_exp))(jnp.array([30.0, 1e4]))
    np.testing.assert_allclose(slope, np.exp(30.0), rtol=1e-5)
    np.testing.assert_allclose(value[1], np.exp(30.0) * (1 + 1e4 - 30), rtol=1e-5)
    x = jnp.array([-40.0, -3.0, -0.7, -0.69, -1e-3])
    np.testing.assert_allclose(log1mexp(x), np.log1p(-np.exp(np.float64(x))), rtol=2e-6)
    slope = jax.vmap(jax.grad(log1mexp))(x)
    np.testing.assert_allclose(slope, -1 / np.expm1(-np.float64(x)), rtol=1e-5)
    edge = jax.value_and_grad(log1mexp)(jnp.float32(0.0))
    assert np.isfinite(edge).all()


def test_errors_list_the_choices():
    example = pairs()
    with pytest.raises(ConfigError, match="no divergence 'kl'; choose one of.*'forward_kl'"):
        losses.preference_loss(example, divergence="kl")
    with pytest.raises(ConfigError, match="'simpo' has no form with divergence='js'"):
        losses.preference_loss(example, variant="simpo", divergence="js")
    with pytest.raises(ConfigError, match=r"alpha divergence must lie in \(0, 1\], got 1.5"):
        losses.preference_loss(example, divergence="alpha", alpha=1.5)
    with pytest.raises(ConfigError, match=r"\(0, 0.5\), got 0.0"):
        losses.preference_loss(example, variant="exo", label_smoothing=0.0)
    with pytest.raises(ConfigError, match=r"'orpo' takes no gamma, only \['beta'\]"):
        losses.preference_loss(example, variant="orpo", gamma=1.0)
