"""On-policy batches: what stands in them, and that being killed changes nothing."""

import threading

import jax
import numpy as np
import pytest

from aa_jax.data.collate import plan_shapes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import RewardError
from aa_jax.rl.actor import Actor
from aa_jax.rl.algorithms import Controller
from aa_jax.rl.estimators import find_estimator
from aa_jax.rl.rollouts import Plan, Rollouts
from aa_jax.sharding import make_mesh
from aa_jax.training.jsonable import from_json, to_json

PLAN = Plan(prompts=4, samples=3, epochs=2, minibatches=2, iterations=4)


@pytest.fixture(scope="module")
def actor(world):
    model, _, processor, prompts = world
    shapes = plan_shapes(EncodedExamples(prompts, processor).sizes, "prompt")
    return Actor(
        model, processor, make_mesh(data=2, fsdp=4), prompt=shapes, max_new_tokens=6,
        batch_rows=8, temperature=0.7,
    )  # fmt: skip


def rollouts(world, actor, reward, **changes):
    _, params, processor, prompts = world
    data = EncodedExamples(prompts, processor)
    options = dict(
        prompts=data, sources=prompts, actor=actor, reward=reward,
        estimator=find_estimator("group"), plan=PLAN, seed=3,
    ) | changes  # fmt: skip
    return Rollouts(**options), params


def take(source, params, count):
    batches = []
    for _ in range(count):
        source.set_params(params)
        batches.append(jax.tree.map(np.array, next(source)))
    return batches


def test_a_batch_holds_what_the_sampler_wrote(world, actor, count_ones):
    source, params = rollouts(world, actor, count_ones)
    batches = take(source, params, 4)
    processor = world[2]
    assert source.figures["sampler_gap"] < 1e-5
    for batch in batches:
        assert batch["targets"].shape == (2, 3, 6) and batch["tokens"].shape[0] == 2
        rows = zip(batch["targets"], batch["loss_mask"], batch["advantages"], strict=True)
        for targets, mask, advantages in rows:
            counts = [
                processor.decode(t[m > 0]).split().count("1")
                for t, m in zip(targets, mask, strict=True)
            ]
            valid = mask.sum(-1) > 0
            expected = np.where(valid, counts, 0).astype(float)
            if valid.sum() > 1:
                mean = expected[valid].mean()
                deviation = expected[valid].std(ddof=1)
                expected = np.where(valid, (expected - mean) / (deviation + 1e-4), 0)
            else:
                expected = np.zeros(3)
            np.testing.assert_allclose(advantages, expected[:, None] * mask, atol=1e-5)
    # the scores are of the very parameters that sampled, at their temperature
    again = actor.logps(params, batches[0], 2)
    np.testing.assert_allclose(batches[0]["old_logps"], again, atol=1e-6)


def test_every_epoch_shows_every_response_once_and_every_pass_every_prompt(
    world, actor, count_ones
):
    source, params = rollouts(world, actor, count_ones)
    batches = take(source, params, 12)
    for start in range(0, 12, 4):
        first, second = (
            sorted(t.tobytes() for b in batches[i : i + 2] for t in b["tokens"])
            for i in (start, start + 2)
        )
        assert first == second
    seen = sorted(i for k in range(3) for i in chosen(source, k))
    assert seen == list(range(12))  # three iterations of four prompts: one pass over twelve


def chosen(source, iteration):
    source._iteration = iteration
    return source._chosen()


def test_it_ends_after_its_iterations(world, actor, count_ones):
    source, params = rollouts(
        world, actor, count_ones, plan=Plan(prompts=2, samples=2, iterations=2)
    )
    take(source, params, 2)
    with pytest.raises(StopIteration):
        next(source)


@pytest.mark.parametrize("after", [4, 5, 7])
def test_a_saved_state_continues_bit_for_bit(world, actor, count_ones, after):
    """Between iterations and in the middle of one, through JSON."""
    make = lambda: rollouts(  # noqa: E731
        world, actor, count_ones, reference=world[1], controller=Controller(0.1, target=0.5)
    )
    source, params = make()
    whole = take(source, params, 10)
    first, _ = make()
    take(first, params, after)
    state = from_json(to_json(first.get_state()))
    second, _ = make()
    second.set_state(state)
    for got, expected in zip(take(second, params, 10 - after), whole[after:], strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert second._controller.coef == source._controller.coef
    assert "media" not in (state["buffer"] or {})


def test_the_state_of_another_plan_is_refused(world, actor, count_ones):
    source, _ = rollouts(world, actor, count_ones)
    other, _ = rollouts(world, actor, count_ones, seed=4)
    with pytest.raises(DataError, match="another seed.*3.*4"):
        other.set_state(source.get_state())
    old = {key: value for key, value in source.get_state().items() if key != "rows"}
    source.set_state(old)  # between two iterations: nothing is missing
    with pytest.raises(DataError, match="earlier version, in the middle of an iteration"):
        source.set_state(old | {"buffer": {}})


def test_a_response_that_cannot_be_judged_teaches_nothing(world, actor):
    calls = iter(range(10**6))

    def every_other(requests):
        return [None if next(calls) % 2 else 1.0 * (i % 4) for i, _ in enumerate(requests)]

    source, params = rollouts(
        world, actor, every_other, plan=Plan(prompts=4, samples=4, iterations=1)
    )
    (batch,) = take(source, params, 1)
    assert batch["sequence_mask"].sum() == 8
    unjudged = batch["sequence_mask"] == 0
    assert not batch["loss_mask"][unjudged].any() and not batch["advantages"][unjudged].any()
    assert source.figures["reward/invalid/skipped"] == 8


def test_a_gap_between_sampler_and_trainer_is_said(world, actor, count_ones, caplog, monkeypatch):
    source, params = rollouts(world, actor, count_ones)
    real = actor.logps
    monkeypatch.setattr(actor, "logps", lambda *a: real(*a) + 0.5)
    take(source, params, 1)
    assert source.figures["sampler_gap"] == pytest.approx(0.5, abs=1e-3)
    assert "disagree by 0.5" in caplog.text


@pytest.mark.parametrize(
    "sizes, words",
    [({"prompts": 0}, "rollout.prompts is 0"),
     ({"prompts": 6, "minibatches": 4}, "cannot be cut.*= 4")],
)  # fmt: skip
def test_impossible_plans_are_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        Plan(**sizes)


def test_nobody_judges(world, actor):
    """Every reward fails: masked and counted, and after `patience` iterations the run ends."""

    def down(requests):
        raise OSError("no route to host")

    plan = Plan(prompts=2, samples=2, iterations=9, patience=2)
    source, params = rollouts(world, actor, down, plan=plan)
    (batch,) = take(source, params, 1)
    assert not batch["sequence_mask"].any() and not batch["loss_mask"].any()
    assert source.figures["reward/invalid/exception OSError"] == 4
    with pytest.raises(RewardError, match="last 2 iterations.*exception OSError.*patience"):
        take(source, params, 1)


def test_passes_end_when_the_policy_has_moved(world, actor, count_ones):
    plan = Plan(prompts=4, samples=2, epochs=3, minibatches=2, iterations=2, max_kl=1e-3)
    source, params = rollouts(world, actor, count_ones, plan=plan)
    take(source, params, 4)  # the same policy: the second pass begins
    moved = jax.tree.map(lambda x: 1.3 * x, params)
    take(source, moved, 2)  # the third does not
    assert source.get_state()["iteration"] == 1 and source.get_state()["cursor"] == 2
    assert source.figures["sampler_gap"] < 1e-4


def test_other_data_stands_beside(world, actor, count_ones):
    asked = []

    def ptx(update, rows):
        asked.append((update, rows))
        return {"tokens": np.full((rows, 3), update)}

    source, params = rollouts(world, actor, count_ones, ptx=ptx)
    batches = take(source, params, 6)
    assert asked == [(update, 2) for update in range(6)]
    assert (batches[5]["ptx"]["tokens"] == 5).all()


def test_rewards_are_computed_beside_generation_and_scoring(world, actor, count_ones, monkeypatch):
    """The reward begins while responses are written and ends after they are scored; what is trained
    on is the same."""
    plain, params = rollouts(world, actor, count_ones)
    expected = take(plain, params, 1)
    begun, scored, seen = threading.Event(), threading.Event(), []

    def slow(requests):
        begun.set()
        seen.append(scored.wait(60))
        return count_ones(requests)

    slow.overlaps = True

    def respond(*args, done, **kwargs):
        def told(row, samples):
            done(row, samples)
            assert begun.wait(60)  # not only after all are written

        return type(actor).respond(actor, *args, done=told, **kwargs)

    def logps(*args):
        values = type(actor).logps(actor, *args)
        scored.set()
        return values

    monkeypatch.setattr(actor, "respond", respond)
    monkeypatch.setattr(actor, "logps", logps)
    source, _ = rollouts(world, actor, slow)
    jax.tree.map(np.testing.assert_array_equal, take(source, params, 1), expected)
    assert all(seen) and source.figures == plain.figures
