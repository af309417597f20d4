"""Best-of-n, online DPO and PPO-Lagrangian: advantages, and what the loss is then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import models
from aa_jax.errors import ConfigError
from aa_jax.losses.logps import TokenLogps
from aa_jax.rl import objectives
from aa_jax.rl.algorithms import CostLimit
from aa_jax.rl.estimators import Experience, best, best_and_worst, gae, lagrangian

MODEL = models.build({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8,
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
})  # fmt: skip
REWARDS = np.float32([[1, 3, 2], [2, 2, 2], [5, 0, 4], [0, 0, 7]])
VALID = np.float32([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]])


def experience(**more):
    lengths = np.array([[4, 2, 3], [1, 4, 2], [2, 3, 4], [3, 1, 2]])
    mask = (np.arange(4) < lengths[..., None]) * VALID[..., None]
    rng = np.random.default_rng(0)
    logps, ref = rng.normal(-1, 0.3, (2, *mask.shape)).astype(np.float32)
    return Experience(
        REWARDS * VALID, VALID, logps, ref, None, mask.astype(np.float32), 0.1, **more
    )


def signs(found):
    return np.sign(found["advantages"].max(-1) + found["advantages"].min(-1))


def test_the_best_and_the_worst_of_those_that_can_be_judged():
    """Ties, a single valid response and invalid ones (reward 0, not the worst) make no pair."""
    np.testing.assert_array_equal(
        signs(best_and_worst(experience())), [[-1, 1, 0], [0, 0, 0], [1, 0, -1], [0, 0, 0]]
    )
    np.testing.assert_array_equal(
        signs(best(experience())), [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    )
    np.testing.assert_array_equal(signs(best(experience(), least=4.0))[0], [0, 0, 0])


@pytest.fixture
def batch(monkeypatch):
    """What the objectives read; the "model" is a table of log-probs."""
    own = experience()
    table = jnp.asarray(own.logps)

    def token_logps(model, params, batch, **options):
        return TokenLogps(params["scale"] * table, None, table, jnp.asarray(own.mask))

    monkeypatch.setattr(objectives.objectives, "token_logps", token_logps)
    return own, {"loss_mask": own.mask, "sequence_mask": own.valid,
                 "ref_token_logps": own.ref_logps}  # fmt: skip


def test_online_dpo_is_dpo_on_these_pairs(batch):
    own, arrays = batch
    arrays["advantages"] = best_and_worst(own)["advantages"]
    loss, metrics = objectives.policy(MODEL, loss="online_dpo", beta=0.2)(
        {"scale": jnp.float32(1)}, arrays
    )
    ratios = ((own.logps - own.ref_logps) * own.mask).sum(-1)
    margins = 0.2 * np.array([ratios[0, 1] - ratios[0, 0], ratios[2, 0] - ratios[2, 2]])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert float(metrics["accuracy"].count) == 2


def test_raft_is_the_likelihood_of_the_best(batch):
    own, arrays = batch
    arrays["advantages"] = best(own)["advantages"]
    loss, _ = objectives.policy(MODEL, loss="raft")({"scale": jnp.float32(1)}, arrays)
    taken = np.concatenate([own.logps[0, 1, :2], own.logps[2, 0, :2]])
    assert float(loss) == pytest.approx(-taken.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["online_dpo", "raft"])
def test_groups_that_teach_nothing_give_no_gradient(batch, name):
    _, arrays = batch
    arrays["advantages"] = np.zeros_like(arrays["loss_mask"])
    objective = objectives.policy(MODEL, loss=name)
    loss, gradient = jax.value_and_grad(lambda p: objective({"scale": p}, arrays)[0])(
        jnp.float32(1)
    )
    assert float(loss) == 0 and float(gradient) == 0


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="no policy loss 'x'.*online_dpo, raft"):
        objectives.policy(MODEL, loss="x")
    with pytest.raises(ConfigError, match="no preference loss 'nonsense'"):
        objectives.policy(MODEL, loss="online_dpo", variant="nonsense")


def test_lagrangian_advantages():
    """The published combination of two GAEs; the KL counts as a cost with the other sign."""
    rng = np.random.default_rng(1)
    values, cost_values = rng.normal(size=(2, 4, 3, 4)).astype(np.float32)
    costs = rng.normal(size=(4, 3)).astype(np.float32) * VALID
    own = experience(costs=costs, cost_values=cost_values, multiplier=3.0)
    own = Experience(**{**vars(own), "values": values})
    found = lagrangian(own, whiten=False)
    paid = gae(own, whiten=False)
    costly = Experience(**{**vars(own), "rewards": costs, "values": cost_values, "kl_coef": -0.1})
    cost = gae(costly, whiten=False)
    expected = (paid["advantages"] - 3 * cost["advantages"]) / 4
    np.testing.assert_allclose(found["advantages"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["cost_returns"], cost["returns"])
    np.testing.assert_array_equal(found["returns"], paid["returns"])


def test_the_price_of_a_cost():
    """align-anything's numbers: 10 -> e^3.3026 -> capped at 20; the first iteration only looks."""
    limit = CostLimit(threshold=-0.5, initial=10.0, lr=0.1, maximum=20.0, window=4, delay=1)
    costs, valid = np.full((2, 2), 0.5), np.ones((2, 2))
    limit.update(costs, valid)
    assert limit.multiplier == pytest.approx(10) and limit.mean_cost == pytest.approx(0.5)
    again = CostLimit(threshold=-0.5, initial=1.0, maximum=20.0, window=4)
    again.set_state(limit.get_state())
    for one in (limit, again):
        one.update(costs, valid)
        assert one.multiplier == pytest.approx(20, rel=1e-5)
    before = limit.get_state()["state"]
    limit.update(costs + 9, 0 * valid)  # nothing that counts
    np.testing.assert_array_equal(before[1], limit.get_state()["state"][1])
