"""Worked numbers, and what every loss promises about masks, padding and accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa_jax import losses
from aa_jax.errors import ConfigError, DataError
from aa_jax.losses.preference import PREFERENCE_LOSSES, Pairs, pair_up
from aa_jax.losses.preference.loss import OF_THE_MARGIN
from aa_jax.losses.unpaired import UNPAIRED_LOSSES, Unpaired


def pairs(*columns, mask=None, lengths=(5.0, 5.0)):
    chosen, rejected, ref_chosen, ref_rejected = (jnp.array(x, jnp.float32) for x in columns)
    ones = jnp.ones_like(chosen)
    mask = ones if mask is None else jnp.array(mask, jnp.float32)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *(n * ones for n in lengths), mask)


EXAMPLE = ([-10.0], [-14.0], [-12.0], [-13.0])  # Δ_w = 2, Δ_l = -1, Δ = 3


def random_pairs(n=6, seed=0, mask=None):
    rng = np.random.default_rng(seed)
    return pairs(*(-20 + 5 * rng.normal(size=(4, n))), mask=mask)


# ---------------------------------------------------------------- worked numbers


def test_dpo_worked_example():
    loss, metrics = losses.preference_loss(pairs(*EXAMPLE))
    np.testing.assert_allclose(loss, 0.554355, atol=1e-6)
    means = {name: float(metric.mean) for name, metric in metrics.items()}
    assert means["chosen_rewards"] == pytest.approx(0.2)
    assert means["rejected_rewards"] == pytest.approx(-0.1)
    assert means["margin"] == pytest.approx(0.3)
    assert means["accuracy"] == 1
    assert means["chosen_logps"] == -10 and means["rejected_logps"] == -14


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # beta Δ = 0.3: log(1 + e^-0.3) = 0.554355, log(1 + e^0.3) = 0.854355
        ({"label_smoothing": 0.1}, 0.9 * 0.554355 + 0.1 * 0.854355),
        ({"variant": "robust", "label_smoothing": 0.1}, (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8),
        ({"variant": "hinge"}, 0.7),
        ({"variant": "hinge", "beta": 1.0}, 0.0),
        ({"variant": "ipo"}, (2 / 4 + 1 / 2 - 5) ** 2),
        ({"variant": "sigmoid_norm", "beta": 0.3}, 0.554355),
    ],
)
def test_variants_worked_by_hand(options, expected):
    example = pairs(*EXAMPLE, lengths=(4.0, 2.0))
    loss, _ = losses.preference_loss(example, **options)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_equal_policy_and_reference_is_log_two_at_chance():
    loss, metrics = losses.preference_loss(pairs([-3.0], [-4.0], [-3.0], [-4.0]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["accuracy"].mean == 0.5 and metrics["margin"].mean == 0


def test_robust_loss_is_unbiased_under_flips():
    """The expectation over labels flipped at rate ε is the loss of the clean labels."""
    clean = random_pairs()
    flipped = Pairs(*(clean[i] for i in (1, 0, 3, 2, 5, 4, 6)))
    noisy = [
        float(losses.preference_loss(p, variant="robust", label_smoothing=0.2)[0])
        for p in (clean, flipped)
    ]
    expected = losses.preference_loss(clean)[0]
    np.testing.assert_allclose(0.8 * noisy[0] + 0.2 * noisy[1], expected, rtol=1e-5)


def test_reward_worked_example():
    arguments = jnp.array([1.5]), jnp.array([0.5]), jnp.ones(1)
    np.testing.assert_allclose(losses.reward_loss(*arguments)[0], 0.313262, atol=1e-6)
    loss, metrics = losses.reward_loss(*arguments, regularization=0.001)
    np.testing.assert_allclose(loss, 0.314512, atol=1e-6)
    assert metrics["accuracy"].mean == 1 and metrics["margin"].mean == 1
    loss = losses.reward_loss(*arguments, margin=jnp.array([1.0]), centering=0.01)[0]
    np.testing.assert_allclose(loss, np.log(2) + 0.04, rtol=1e-6)


def test_sft_worked_example():
    logps = jnp.log(jnp.array([[[0.5, 0.25, 0.9]], [[0.125, 0.9, 0.9]]]))
    mask = jnp.array([[[1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]])
    loss, metrics = losses.sft_loss(logps, mask, jnp.ones((2, 1)))
    np.testing.assert_allclose(loss, np.log(2) * (1 + 2 + 3) / 3, rtol=1e-6)  # not a mean of means
    assert metrics["response_tokens"].mean == 1.5 and metrics["loss"].count == 3
    weighted = losses.sft_loss(
        logps, mask * jnp.array([0.5, 2.0, 1.0])[None, None], jnp.ones((2, 1))
    )
    np.testing.assert_allclose(weighted[0], np.log(2) * (0.5 + 4 + 1.5) / 3, rtol=1e-6)
    lse = jnp.full_like(logps, 2.0)
    loss, metrics = losses.sft_loss(logps, mask, jnp.ones((2, 1)), lse=lse, z_loss=0.1)
    np.testing.assert_allclose(loss, np.log(2) * 2 + 0.1 * 4, rtol=1e-6)
    assert metrics["z_loss"].mean == 4
    np.testing.assert_allclose(metrics["nll"].mean, np.log(2) * 2, rtol=1e-6)


def test_sequence_logps_sum_exactly_the_masked_tokens():
    logps = jnp.array([[-1.0, -2.0, jnp.nan], [-4.0, jnp.nan, -jnp.inf]])
    total, length = losses.sequence_logps(logps, jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(total, [-3, -4])
    np.testing.assert_array_equal(length, [2, 1])


# ---------------------------------------------------------------- promises


def losses_of(x, mask):
    """Every loss on the numbers x [4, n] under a mask [n]: name -> (loss, metrics)."""

    def preference(**options):
        lengths = 3 + jnp.abs(x[0]), 3 + jnp.abs(x[1])
        return losses.preference_loss(Pairs(*x[:4], *lengths, mask), **options)

    table = {name: preference(variant=name) for name in PREFERENCE_LOSSES}
    table["with more terms"] = preference(sft_coef=0.5, label_smoothing=0.2, optimism=0.1)
    table["reward"] = losses.reward_loss(
        x[0], x[1], mask, margin=x[2], regularization=0.1, centering=0.1
    )
    table["sft"] = losses.sft_loss(
        x.T[:, None, :],
        jnp.ones((len(mask), 1, 4)),
        mask[:, None],
        lse=2 * x.T[:, None],
        z_loss=0.1,
    )
    for name in UNPAIRED_LOSSES:
        label = (jnp.arange(len(mask)) % 2).astype(jnp.float32)
        table[f"unpaired {name}"] = losses.unpaired_loss(
            Unpaired(x[0], x[1], label, mask), variant=name
        )
    table["cost"] = losses.cost_loss(*x, mask)
    return table


@jax.jit
def values(x, mask):
    """name -> (loss, metrics)."""
    return losses_of(x, mask)


@jax.jit
def slopes(x, mask):
    """name -> gradient of the loss, [4, n]; all of them in one program."""
    return jax.jacrev(lambda x: {name: loss for name, (loss, _) in losses_of(x, mask).items()})(x)


def numbers(n, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, n)), jnp.float32)


def test_masked_equals_compressed_with_finite_gradients():
    mask = np.array([1, 0, 0, 1, 1, 0], np.float32)
    kept = np.array([0, 3, 4])  # the label of unpaired examples is their parity: as 0, 1, 2
    x = numbers(6)
    dirty = jnp.where(mask[None] > 0, x, jnp.nan)
    got, grads = values(dirty, jnp.asarray(mask)), slopes(dirty, jnp.asarray(mask))
    want, want_grads = values(x[:, kept], jnp.ones(3)), slopes(x[:, kept], jnp.ones(3))
    for name, (loss, metrics) in got.items():
        np.testing.assert_allclose(loss, want[name][0], rtol=1e-6, err_msg=name)
        grad = np.asarray(grads[name])
        np.testing.assert_allclose(grad[:, kept], want_grads[name], atol=1e-6, err_msg=name)
        assert (grad[:, mask == 0] == 0).all(), name
        for a, b in zip(jax.tree.leaves(metrics), jax.tree.leaves(want[name][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_vmap_over_batches_is_a_loop_over_them():
    both = jnp.stack([numbers(6), numbers(6, seed=1)])
    together = jax.jit(jax.vmap(lambda x: losses_of(x, jnp.ones(6))))(both)
    for i in (0, 1):
        for name, (loss, _) in values(both[i], jnp.ones(6)).items():
            np.testing.assert_allclose(together[name][0][i], loss, rtol=1e-5, err_msg=name)


def test_loss_is_the_sum_of_the_means_of_its_terms():
    for name, (loss, metrics) in values(numbers(6), jnp.ones(6)).items():
        assert loss.shape == () and loss.dtype == jnp.float32, name
        np.testing.assert_allclose(loss, losses.total_loss(metrics["loss"]), rtol=1e-6)
        flat = jax.tree.leaves(metrics)
        assert all(leaf.shape == () for leaf in flat) and len(flat) >= 4, name


# These compare an example with the rest of the batch, so a micro-batch is a batch of its own.
OF_THE_BATCH = {"aot", "aot_unpaired", "bco", "unpaired bco"}


def test_sums_and_counts_add_up_over_unequal_micro_batches():
    x = numbers(6)
    whole = values(x, jnp.array([1.0, 1, 0, 1, 1, 1]))
    first = values(x, jnp.array([1.0, 1, 0, 0, 0, 0]))
    second = values(x, jnp.array([0.0, 0, 0, 1, 1, 1]))
    for name in whole.keys() - OF_THE_BATCH:
        summed = jax.tree.map(jnp.add, first[name][1]["loss"], second[name][1]["loss"])
        want = whole[name][0]
        np.testing.assert_allclose(losses.total_loss(summed), want, rtol=1e-6, err_msg=name)


def test_nothing_but_padding_gives_zero_loss_and_gradient():
    grads = slopes(numbers(6), jnp.zeros(6))
    for name, (loss, _) in values(numbers(6), jnp.zeros(6)).items():
        assert loss == 0 and (grads[name] == 0).all(), name


def test_descent_prefers_the_chosen():
    """Around equal policy and reference, a better chosen and a worse rejected lower the loss."""

    def run(x):
        equal = pairs([-10.0], [-14.0], [-10.0], [-14.0])
        equal = equal._replace(chosen=x[0], rejected=x[1])
        return {name: losses.preference_loss(equal, variant=name)[0] for name in PREFERENCE_LOSSES}

    found = jax.jit(jax.jacrev(run))(jnp.array([[-10.0], [-14.0]]))
    # apo_down lowers both sides, discopop rises around a margin of zero (its paper says so).
    for name in found.keys() - {"apo_down", "discopop"}:
        assert found[name][0] < 0 < found[name][1], name


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite(size):
    def run(x):
        whole = {name: losses.preference_loss(x, variant=name)[0] for name in PREFERENCE_LOSSES}
        return whole | {
            f"{name}, {divergence}": losses.preference_loss(
                x, variant=name, divergence=divergence, sft_coef=0.1, optimism=0.1
            )[0]
            for name in OF_THE_MARGIN
            for divergence in ("forward_kl", "js", "alpha")
        }

    extreme = pairs([size, 0.0], [-size, 0.0], [0.0, -size], [0.0, size])
    # One backward pass: a single gradient that is not finite makes the sum so.
    both = jax.jit(lambda x: (run(x), jax.grad(lambda y: sum(run(y).values()))(x)))
    found, gradient = both(extreme)
    assert all(np.isfinite(value) for value in found.values())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@jax.jit
def every_variant(x):
    return {name: losses.preference_loss(x, variant=name)[0] for name in PREFERENCE_LOSSES}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)))
def test_order_of_the_pairs_does_not_matter(order):
    x, order = random_pairs(5), np.array(order)
    shuffled = every_variant(Pairs(*(column[order] for column in x)))
    for name, want in every_variant(x).items():
        np.testing.assert_allclose(shuffled[name], want, rtol=1e-5, err_msg=name)


def test_no_gradient_flows_into_the_reference():
    def loss(ref):
        logps, ones = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2))
        return losses.preference_loss(pair_up(logps, ref, ones, ones))[0]

    assert (jax.grad(loss)(jnp.array([[-1.5, -1.0]])) == 0).all()


def test_both_layouts_make_the_same_pairs():
    rng = np.random.default_rng(0)
    columns = [jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for _ in range(3)]
    mask = jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    shared = pair_up(*columns, mask)
    rows = pair_up(*(x.reshape(6, 1) for x in (*columns, mask)))
    for a, b in zip(shared, rows, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(shared.mask, [1, 0, 1])
    np.testing.assert_array_equal(shared.chosen, columns[0][:, 0])


def test_ratio_of_nothing_is_zero():
    assert losses.Ratio(jnp.float32(0), jnp.float32(0)).mean == 0
    assert losses.ratio(jnp.array([jnp.nan]), jnp.zeros(1)) == (0, 0)
    assert losses.Ratio(jnp.float32(1), jnp.float32(0.5)).mean == 2


# ---------------------------------------------------------------- response log-probs


def response_problem(seed=0):
    rng = np.random.default_rng(seed)
    b, t, d, v, s, r = 2, 9, 5, 11, 2, 4
    return dict(
        hidden=jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32),
        head=jnp.asarray(rng.normal(size=(v, d)), jnp.float32),
        target_positions=jnp.asarray(rng.integers(0, t, (b, s, r)), jnp.int32),
        targets=jnp.asarray(rng.integers(0, v, (b, s, r)), jnp.int32),
        loss_mask=jnp.asarray(rng.random((b, s, r)) < 0.6, jnp.float32),
    )


def test_response_logps_equal_log_softmax_of_all_logits():
    p = response_problem()
    p["target_positions"] = p["target_positions"].at[:, :, 0].set(3)  # shared by two sequences

    def dense(hidden, head):
        logits = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
        rows = jnp.arange(2)[:, None, None]
        return logits[rows, p["target_positions"], p["targets"]] * p["loss_mask"]

    def ours(hidden, head):
        return losses.response_logps(**(p | {"hidden": hidden, "head": head})).logps

    got, pull = jax.vjp(jax.jit(ours), p["hidden"], p["head"])
    want, pull_want = jax.vjp(jax.jit(dense), p["hidden"], p["head"])
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(pull(jnp.cos(want)), pull_want(jnp.cos(want)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_padding_slots_may_hold_anything():
    p = response_problem()
    off = p["loss_mask"] == 0
    dirty = p | {
        "targets": jnp.where(off, -100, p["targets"]),
        "target_positions": jnp.where(off, 10**6, p["target_positions"]),
    }
    run = jax.jit(lambda p: losses.response_logps(**p, need_entropy=True))
    for a, b in zip(run(dirty), run(p), strict=True):
        np.testing.assert_array_equal(a, b)
    clean = run(p)
    for x in (clean.logps, clean.entropy, clean.lse):
        assert (np.asarray(x)[np.asarray(off)] == 0).all()


def test_more_padding_changes_nothing():
    p = response_problem()
    pad = [(0, 0), (0, 0), (0, 3)]
    wide = p | {k: jnp.pad(p[k], pad) for k in ("target_positions", "targets", "loss_mask")}
    wide["hidden"] = jnp.pad(p["hidden"], [(0, 0), (0, 4), (0, 0)], constant_values=jnp.nan)
    run = jax.jit(lambda p: losses.response_logps(**p).logps)
    got = np.asarray(run(wide))
    np.testing.assert_allclose(got[..., :4], run(p), atol=1e-6)
    assert (got[..., 4:] == 0).all()


# ---------------------------------------------------------------- errors


def test_errors_name_the_cause():
    example = pairs(*EXAMPLE)
    with pytest.raises(ConfigError, match=r"no preference loss 'dpo'.*'hinge', 'ipo'"):
        losses.preference_loss(example, variant="dpo")
    with pytest.raises(ConfigError, match=r"'hinge' takes no label_smoothing, only \['beta'\]"):
        losses.preference_loss(example, variant="hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"\[0, 0.5\), got 0.5"):
        losses.preference_loss(example, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="beta must be positive, got 0.0"):
        losses.preference_loss(example, beta=0.0)
    three = jnp.ones((3, 1))
    with pytest.raises(DataError, match="has 3 sequences.*'preference_rows'"):
        pair_up(three, three, three, three)
