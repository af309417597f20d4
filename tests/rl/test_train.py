"""Every algorithm trains, starts from ratio 1, leaves frozen parts alone and survives a kill."""

import dataclasses

import jax
import numpy as np
import pytest

from aa_jax.errors import ConfigError
from aa_jax.models import heads
from aa_jax.rl.algorithms import ALGORITHMS, Controller
from aa_jax.rl.objectives import OF_GROUPS
from aa_jax.rl.train import train
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

QUICK = ("ppo_lagrangian", "grpo", "online_dpo")


def run(world, reward, workdir, algorithm="grpo", iterations=2, **changes):
    model, params, processor, prompts = world
    samples = ALGORITHMS[algorithm].samples if algorithm in ALGORITHMS else 1
    options = dict(
        model=model, params=params, processor=processor, prompts=prompts, reward=reward,
        workdir=workdir, mesh=make_mesh(data=2, fsdp=4),
        rollout=dict(prompts=4, samples=samples, iterations=iterations),
        sampling=dict(max_new_tokens=6, batch_rows=8),
        optim=dict(lr=3e-3, schedule="constant", warmup_steps=0),
        frozen=("vision_tower/*",), log_every=1,
    ) | changes  # fmt: skip
    options.pop("log_every")
    return train(algorithm, **options)


@pytest.mark.parametrize(
    "algorithm",
    [
        name if name in ("ppo_lagrangian", "grpo") else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
def test_every_algorithm(world, count_ones, tmp_path, algorithm):
    more = {"kl": {"coef": 0.1}} if ALGORITHMS[algorithm].kl == "reward" else {}
    if ALGORITHMS[algorithm].costs:
        more |= {"cost": lambda requests: [len(r.response) - 9.0 for r in requests],
                 "limit": {"window": 8}}  # fmt: skip
    final, figures = run(world, count_ones, tmp_path, algorithm, **more)
    assert figures["updates"] == 2
    lines = read_metrics(tmp_path, stage="rl")
    ratios = series(lines, "ratio")[1]
    if len(ratios):  # rloo has none
        assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    if algorithm not in OF_GROUPS:
        assert series(lines, "approx_kl")[1][0] == pytest.approx(0.0, abs=1e-6)
    assert np.max(series(lines, "grad_norm")[1]) > 0
    rollouts = read_metrics(tmp_path, stage="rl.rollout")
    assert [line["step"] for line in rollouts] == [0, 1]
    assert rollouts[0]["sampler_gap"] < 1e-4
    # After the update the sampler acts with the updated weights: the gap stays zero.
    assert rollouts[1]["sampler_gap"] < 1e-4
    initial = world[1]
    same = jax.tree.map(np.array_equal, final["vision_tower"], initial["vision_tower"])
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(
        final["projector"]["linear_1"]["kernel"], initial["projector"]["linear_1"]["kernel"]
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_an_iteration(world, count_ones, tmp_path):
    """A checkpoint after the first of four minibatches; the same final parameters, bit for bit."""
    options = dict(
        algorithm="ppo", kl={"coef": 0.1, "target": 0.1},
        rollout=dict(prompts=4, samples=1, epochs=2, minibatches=2, iterations=2),
    )  # fmt: skip
    whole, _ = run(world, count_ones, tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill(params, step):
        if step == 3:
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(world, count_ones, tmp_path / "killed", evaluate=kill, eval_every=1,
            checkpoint_every=1, **options)  # fmt: skip
    again, _ = run(world, count_ones, tmp_path / "killed", checkpoint_every=1, **options)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    names = ("reward/mean", "kl", "response_length")
    for folder in ("whole", "killed"):
        lines = read_metrics(tmp_path / folder, stage="rl.rollout")
        assert [line["step"] for line in lines] == [0, 1]
    a, b = (read_metrics(tmp_path / f, stage="rl.rollout") for f in ("whole", "killed"))
    assert [[x[n] for n in names] for x in a] == [[x[n] for n in names] for x in b]


def test_a_policy_learns_what_is_paid_for(world, tmp_path):
    """Even of random weights: the word "1" becomes much more frequent."""

    def reward(requests):
        return [float("1" in request.response.split()) for request in requests]

    run(
        world, reward, tmp_path, "grpo", objective={"kl_coef": 0.0},
        rollout=dict(prompts=4, samples=8, iterations=25),
        optim=dict(lr=1e-2, schedule="constant", warmup_steps=0),
    )  # fmt: skip
    paid = series(read_metrics(tmp_path, stage="rl.rollout"), "reward/mean")[1]
    assert np.mean(paid[-5:]) > np.mean(paid[:5]) + 0.3


@pytest.mark.slow
def test_a_run_with_costs_and_other_data_survives_a_kill(world, count_ones, tmp_path):
    model, params, processor, prompts = world
    pairs = [prompts[i].replace(responses=("the sum is 4",)) for i in range(5)]
    options = dict(
        algorithm="ppo_lagrangian", kl={"coef": 0.1}, limit={"window": 8}, ptx=pairs, ptx_coef=0.5,
        cost=lambda requests: [len(r.response) - 9.0 for r in requests], alarms={},
        rollout=dict(prompts=4, samples=1, epochs=1, minibatches=1, iterations=3),
    )  # fmt: skip
    whole, _ = run(world, count_ones, tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill(params, step):
        if step == 2:
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(world, count_ones, tmp_path / "killed", evaluate=kill, eval_every=1,
            checkpoint_every=1, **options)  # fmt: skip
    again, _ = run(world, count_ones, tmp_path / "killed", checkpoint_every=1, **options)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    a, b = (read_metrics(tmp_path / f, stage="rl.rollout") for f in ("whole", "killed"))
    assert [x["multiplier"] for x in a] == [x["multiplier"] for x in b]
    assert "alarm/length" in a[-1] and "cost/mean" in a[-1]
    assert series(read_metrics(tmp_path / "whole", stage="rl"), "ptx_loss")[1][0] > 0


@pytest.mark.slow
def test_a_critic_of_its_own_and_its_learning_rate(world, count_ones, tmp_path):
    """The critic may start from a reward model; a rate of zero leaves it as it was."""
    model, params, *_ = world
    critic = {"model": params, "score_head": heads.init_score_head(model, jax.random.key(5))}
    run(world, count_ones, tmp_path / "a", "ppo", critic=(model, critic), critic_lr_scale=0.0,
        kl={"coef": 0.0})  # fmt: skip
    lines = read_metrics(tmp_path / "a", stage="rl")
    assert series(lines, "values")[1][0] != 0
    run(world, count_ones, tmp_path / "b", "ppo", kl={"coef": 0.0})
    assert series(read_metrics(tmp_path / "b", stage="rl"), "values")[1][0] == 0


@pytest.mark.parametrize(
    "algorithm, changes, words",
    [
        ("pop", {}, "no algorithm 'pop'; there are ppo, grpo"),
        ("grpo", {"rollout": dict(prompts=4, samples=1)}, "rollout.samples is 1.*at least 2"),
        ("grpo", {"kl": {"coef": 0.1}}, "set objective.kl_coef"),
        ("ppo", {"objective": {"kl_coef": 0.1}}, "set kl.coef"),
        ("raft", {"rollout": dict(prompts=4, samples=2), "kl": {"coef": 0.1}}, "has no KL"),
        ("ppo_lagrangian", {}, "give the cost section"),
        ("ppo", {"cost": len}, "has no cost"),
        ("grpo", {"objective": {"temperature": 0.5}}, "objective.temperature follows"),
    ],
)
def test_mistakes_are_named(world, count_ones, tmp_path, algorithm, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(world, count_ones, tmp_path, algorithm, **changes)


def test_angles_that_change_with_the_length_are_refused(world, count_ones, tmp_path):
    model = world[0]
    text = model.config.text
    rope = dataclasses.replace(text.rope, kind="dynamic", max_positions=8)
    config = dataclasses.replace(model.config, text=dataclasses.replace(text, rope=rope))
    with pytest.raises(ConfigError, match="beyond 8: .*sampling.max_new_tokens"):
        run(world, count_ones, tmp_path, model=dataclasses.replace(model, config=config))


def test_controller():
    """Closed form of Ziegler et al., and no change without tokens."""
    price = Controller(0.1, target=2.0, gain=0.5)
    price.update(2.2, 10)
    assert price.coef == pytest.approx(0.1 * (1 + 0.5 * 0.1))
    price.update(100.0, 10)
    assert price.coef == pytest.approx(0.1 * 1.05 * (1 + 0.5 * 0.2))
    before = price.coef
    price.update(0.0, 0)
    assert price.coef == before
    with pytest.raises(ConfigError, match="kl.coef"):
        Controller(-1.0)
