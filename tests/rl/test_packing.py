"""Prompts that share rows: the same numbers as with rows of their own."""

import jax
import numpy as np
import pytest

from aa_jax import models
from aa_jax.data import arithmetic
from aa_jax.data.collate import plan_shapes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.processor import Processor
from aa_jax.models import heads
from aa_jax.rl import objectives
from aa_jax.rl.actor import Actor
from aa_jax.rl.algorithms import ALGORITHMS
from aa_jax.rl.estimators import find_estimator
from aa_jax.rl.packing import Packer
from aa_jax.rl.rollouts import Plan, Rollouts
from aa_jax.rl.train import train
from aa_jax.sharding import make_mesh
from aa_jax.small_models import text_config
from aa_jax.training.metrics import read_metrics, series


@pytest.mark.parametrize("share", [True, False])
def test_every_prompt_has_a_place_that_is_long_enough(share):
    drawn = np.random.default_rng(0)
    packer = Packer(96, share=share)
    before = (0, 0)
    for _ in range(30):
        needs = [int(n) for n in drawn.integers(1, 96, 16)]
        packer.fit(needs)
        packing = packer.pack(needs)
        assert sorted(i for row in packing.rows for i in row) == list(range(16))
        assert len(packing.rows) <= packing.size <= 16
        for row in packing.rows:
            assert sum(needs[i] for i in row) <= packer.length <= 96
            assert 1 <= len(row) <= packing.groups
        assert (packer.length, packing.size) >= before  # shapes never shrink
        before = packer.length, packing.size
        answers = drawn.normal(size=(16, 3, 5))
        placed = packing.place(answers)
        assert placed.shape == (packing.size, 3 * packing.groups, 5)
        np.testing.assert_array_equal(packing.take(placed), answers)
    assert share == any(len(row) > 1 for row in packing.rows)


def test_short_prompts_take_few_rows_and_few_shapes():
    drawn, packer, shapes = np.random.default_rng(0), Packer(80, share=True), set()
    for _ in range(100):
        needs = [12 + int(n) for n in np.minimum(drawn.exponential(16, 16), 68)]
        packer.fit(needs)
        packing = packer.pack(needs)
        shapes.add((packer.length, packing.size, packing.groups))
        full = sum(needs) / (packing.size * packer.length)
        assert full > 0.4  # alone in its row: 0.34 on average
    assert len(shapes) <= 8


@pytest.fixture(scope="module")
def text_world(tmp_path_factory):
    folder = arithmetic.write_processor(tmp_path_factory.mktemp("packing") / "p")
    processor = Processor.from_pretrained(folder)
    sizes = dict(dim=32, layers=2, heads=2, kv_heads=1, mlp_dim=48, max_length=128)
    config = text_config(len(processor.tokenizer), **sizes)
    model = models.build(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    params = model.init(jax.random.key(0))
    params["head"]["weight"] *= 8.0
    prompts = [p.example() for p in arithmetic.problems(16, 0, "train", digits=2)]
    return model, params, processor, prompts


def ones(requests):
    return [
        0.1 * request.response.count("1") - 0.01 * len(request.response) for request in requests
    ]


def test_a_batch_of_shared_rows_has_the_same_loss_and_gradient(text_world):
    model, params, processor, prompts = text_world
    data = EncodedExamples(prompts, processor)
    mesh = make_mesh(devices=jax.devices()[:1])
    actor = Actor(
        model, processor, mesh, prompt=plan_shapes(data.sizes, "prompt"), max_new_tokens=24,
        batch_rows=8,
    )  # fmt: skip
    critic = {"model": params, "score_head": heads.init_score_head(model, jax.random.key(1))}
    source = Rollouts(
        prompts=data, sources=prompts, actor=actor, reward=ones, estimator=find_estimator("gae"),
        plan=Plan(prompts=8, samples=2, epochs=2, iterations=1), seed=0, reference=params,
        policy=lambda p: p["policy"], critic=lambda p: p["critic"],
    )  # fmt: skip
    both = {"policy": params, "critic": critic}
    source.set_params(both)
    shared = next(source)
    assert source.figures["sampler_gap"] < 1e-5
    source._packer = Packer(source._packer.length, share=False)
    source._packer.fit([source._shapes.length + 48])
    source.set_params(both)
    own = next(source)
    assert len(shared["tokens"]) < len(own["tokens"]) == 8
    objective = objectives.actor_critic(model, model, value_coef=1.0)
    moved = jax.tree.map(lambda x: 1.05 * x, both)
    run = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b)[0]))
    (loss, gradient), (expected, other) = run(moved, shared), run(moved, own)
    assert abs(loss - expected) < 1e-5 and abs(expected) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, other)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo_lagrangian", "dr_grpo", "rloo", "reinforce_pp"])
def test_shared_rows_change_no_number(text_world, tmp_path, monkeypatch, algorithm):
    """Two iterations of two updates: losses, norms, KL and final parameters."""
    model, params, processor, prompts = text_world
    row = ALGORITHMS[algorithm]
    more = {"kl": {"coef": 0.1}} if row.kl == "reward" else {}
    if row.costs:
        more |= {"cost": lambda requests: [len(r.response) - 9.0 for r in requests]}
    ends, rows = {}, {}
    for share in (True, False):
        place = tmp_path / str(share)
        pack = Packer.pack

        def counted(self, needs, share=share, pack=pack):
            self._share &= share
            packing = pack(self, needs)
            rows.setdefault(share, []).append(len(packing.rows) / len(needs))
            return packing

        monkeypatch.setattr(Packer, "pack", counted)
        ends[share], _ = train(
            algorithm, model=model, params=params, processor=processor, prompts=prompts,
            reward=ones, workdir=place, mesh=make_mesh(devices=jax.devices()[:1]),
            rollout=dict(prompts=8, samples=row.samples, minibatches=2, iterations=2),
            sampling=dict(max_new_tokens=24, batch_rows=8),
            optim=dict(lr=1e-3, schedule="constant", warmup_steps=0, eps=1e-4), **more,
        )  # fmt: skip
        monkeypatch.setattr(Packer, "pack", pack)
    shared, own = (read_metrics(tmp_path / str(share)) for share in (True, False))
    for name in ("loss", "grad_norm", "kl", "approx_kl", "value_loss", "response_length"):
        np.testing.assert_allclose(
            series(shared, name)[1], series(own, name)[1], rtol=1e-4, atol=1e-6, err_msg=name
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ends[True], ends[False])
    assert max(rows[False]) == 1
    if algorithm in ("ppo", "reinforce_pp"):  # one sample per prompt
        assert min(rows[True]) < 1
