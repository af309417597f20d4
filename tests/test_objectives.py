"""Objectives on tiny models: against transformers end to end, and across batch layouts."""

import functools

import jax
import numpy as np
import pytest

from aa_jax import models, objectives
from aa_jax.errors import ConfigError, DataError
from aa_jax.models import heads

# These programs run once on a few numbers: compiling them is all the time there is.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
IMAGE, PATCHES, RESPONSES = 5, 4, 6
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "text_config": {k: v for k, v in LLAMA.items() if k != "architectures"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
}
# (prompt, chosen, rejected): lengths all differ
PAIRS = [
    ([7, 8, 9, 10], [11, 12, 2], [13, 2]),
    ([14, 15], [16, 17, 18, 19, 2], [20, 21, 22, 2]),
    ([23, 24, 25], [2], [26, 27, 28, 2]),
]


def collate(rows, width=16, image=False, spare=0):
    """Rows of (prompt, responses that share it) -> a batch; `spare` rows of padding follow."""
    size, sequences = len(rows) + spare, len(rows[0][1])
    ints = lambda *shape: np.zeros((size, *shape), np.int32)  # noqa: E731
    batch = {
        "tokens": ints(width),
        "positions": ints(width),
        "intervals": ints(width, 4),
        "target_positions": ints(sequences, RESPONSES),
        "targets": ints(sequences, RESPONSES),
        "loss_mask": np.zeros((size, sequences, RESPONSES), np.float32),
        "last_positions": ints(sequences),
        "sequence_mask": np.zeros((size, sequences), np.float32),
    }
    if image:
        rng = np.random.default_rng(0)
        pixels = rng.normal(size=(size, 1, 3, 8, 8)).astype(np.float32)
        batch["media"] = {"pixel_values": pixels}
        batch["feature_index"] = np.full((size, width), -1, np.int32)
    for b, (prompt, responses) in enumerate(rows):
        if image:
            batch["media"]["pixel_values"][b] = sum(prompt) / 50 - 1
            prompt = [IMAGE] * PATCHES + prompt
            batch["feature_index"][b, :PATCHES] = np.arange(PATCHES)
        end = len(prompt)
        batch["tokens"][b, :end] = prompt
        batch["positions"][b, :end] = np.arange(end)
        batch["intervals"][b, :end, 3] = np.arange(end) + 1
        for s, response in enumerate(responses):
            start, n = end, len(response)
            end = start + n
            batch["tokens"][b, start:end] = response
            batch["positions"][b, start:end] = len(prompt) + np.arange(n)
            for t in range(start, end):
                batch["intervals"][b, t] = (0, len(prompt), start, t + 1)
            predictors = [len(prompt) - 1, *range(start, end - 1)]
            batch["target_positions"][b, s, :n] = predictors
            batch["targets"][b, s, :n] = response
            batch["loss_mask"][b, s, :n] = 1
            batch["last_positions"][b, s] = end - 1
            batch["sequence_mask"][b, s] = 1
    return batch


def shared_rows():
    return [(prompt, [chosen, rejected]) for prompt, chosen, rejected in PAIRS]


def single_rows():
    return [(prompt, [response]) for prompt, *both in PAIRS for response in both]


@pytest.fixture(scope="module")
def llama():
    model = models.build(LLAMA)
    return model, model.init(jax.random.key(0)), model.init(jax.random.key(1))


@pytest.fixture(scope="module")
def llava():
    model = models.build(LLAVA)
    return model, model.init(jax.random.key(0)), model.init(jax.random.key(1))


@functools.cache
def compiled(objective):
    return jax.jit(
        jax.value_and_grad(lambda p, b, r: objective(p, b, **r), has_aux=True),
        compiler_options=QUICK,
    )


def evaluate(objective, params, batch, **roles):
    """(loss, metrics, gradients) under jit."""
    (loss, metrics), grads = compiled(objective)(params, batch, roles)
    return loss, metrics, grads


@pytest.fixture(scope="module")
def plain_dpo(llama):
    """The default DPO objective, its batch and what it gives."""
    model, params, reference = llama
    objective, batch = objectives.dpo(model), collate(shared_rows())
    return objective, batch, evaluate(objective, params, batch, reference=reference)


def assert_close(left, right):
    """Float32 agreement, relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()), rtol=1e-5)


@pytest.fixture(scope="module")
def torch_llama(llama, tmp_path_factory):
    """The policy and the reference in transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, *trees = llama
    loaded = []
    for i, params in enumerate(trees):
        folder = tmp_path_factory.mktemp("llama") / str(i)
        models.save(folder, model, params)
        loaded.append(transformers.LlamaForCausalLM.from_pretrained(folder).double())
    return loaded


def torch_logps(model):
    """[pairs, 2] sums of log-probabilities over exactly the response tokens, one row at a time."""
    import torch

    sums = []
    for prompt, (response,) in single_rows():
        ids = torch.tensor([prompt + response])
        log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        picked = log_p.gather(1, ids[0, 1:, None])[:, 0]
        sums.append(picked[len(prompt) - 1 :].sum())
    return torch.stack(sums).reshape(-1, 2)


def test_sft_is_transformers_loss(llama, torch_llama):
    import torch

    model, params, _ = llama
    batch = collate(single_rows())
    ids = torch.zeros((6, 16), dtype=torch.long)
    labels = torch.full((6, 16), -100)
    attention = torch.zeros((6, 16), dtype=torch.long)
    for b, (prompt, (response,)) in enumerate(single_rows()):
        end = len(prompt) + len(response)
        ids[b, :end] = torch.tensor(prompt + response)
        labels[b, len(prompt) : end] = torch.tensor(response)
        attention[b, :end] = 1
    want = torch_llama[0](input_ids=ids, attention_mask=attention, labels=labels).loss
    want.backward()
    loss, metrics, grads = evaluate(objectives.sft(model), params, batch)
    np.testing.assert_allclose(loss, want.item(), rtol=2e-6)
    assert metrics["loss"].count == 19
    head = torch_llama[0].lm_head.weight.grad.numpy()
    np.testing.assert_allclose(grads["head"]["weight"], head, atol=2e-6)
    up = torch_llama[0].model.layers[0].mlp.up_proj.weight.grad.numpy()
    np.testing.assert_allclose(grads["layers"]["mlp"]["up"]["kernel"][0], up.T, atol=2e-6)


def test_dpo_is_the_closed_form_on_transformers_logits(plain_dpo, torch_llama):
    import torch

    for network in torch_llama:
        network.zero_grad()
    logps, ref_logps = (torch_logps(network) for network in torch_llama)
    ratios = logps - ref_logps.detach()
    want = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    want.backward()
    loss, metrics, grads = plain_dpo[2]
    np.testing.assert_allclose(loss, want.item(), rtol=2e-6)
    np.testing.assert_allclose(metrics["chosen_logps"].mean, logps[:, 0].mean().item(), rtol=1e-6)
    rewards = 0.1 * ratios.mean(0).detach().numpy()
    np.testing.assert_allclose(metrics["chosen_rewards"].mean, rewards[0], atol=1e-6)
    np.testing.assert_allclose(metrics["rejected_rewards"].mean, rewards[1], atol=1e-6)
    head = torch_llama[0].lm_head.weight.grad.numpy()
    np.testing.assert_allclose(grads["head"]["weight"], head, atol=2e-6)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_shared_prompt_equals_separate_rows(name, llava):
    """The prompt and its image computed once for both responses: same loss, same gradient."""
    model, params, reference = llava
    shared, single = (collate(rows, 20, image=True) for rows in (shared_rows(), single_rows()))
    if name == "dpo":
        objective = objectives.dpo(model, variant="ipo", sft_coef=0.2, entropy=True)
        roles = {"reference": reference}
    else:
        objective = objectives.reward(model, regularization=0.01, centering=0.1)
        params, roles = {"model": params, "score_head": heads.init_score_head(model, _key())}, {}
        shared["margin"] = np.arange(3, dtype=np.float32)
        single["margin"] = np.arange(3, dtype=np.float32).repeat(2)[:, None]
    assert_close(
        evaluate(objective, params, shared, **roles), evaluate(objective, params, single, **roles)
    )


def _key():
    return jax.random.key(3)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_padding_rows_and_columns_change_nothing(name, llama):
    model, params, reference = llama
    rows = single_rows() if name == "sft" else shared_rows()
    small, large = collate(rows), collate(rows, width=21, spare=2)
    large["tokens"][-2:] = 39  # and what padding rows hold does not matter
    large["loss_mask"][-1] = 1
    objective, roles = objectives.sft(model, z_loss=0.01, entropy=True), {}
    if name == "dpo":
        objective, roles = objectives.dpo(model, sft_coef=1.0), {"reference": reference}
    results = [evaluate(objective, params, batch, **roles) for batch in (small, large)]
    assert_close(*results)


def test_stored_reference_logps_equal_those_of_the_step(llama, plain_dpo):
    model, params, reference = llama
    objective, batch, want = plain_dpo
    compute = jax.jit(objectives.compute_ref_logps(model), compiler_options=QUICK)
    stored = compute(reference, batch)
    assert stored.shape == (3, 2)
    assert_close(evaluate(objective, params, batch | {"ref_logps": np.asarray(stored)}), want)


def test_the_first_step_starts_at_log_two(llama, plain_dpo):
    """Policy and reference are the same numbers: nothing to tell the responses apart yet."""
    params = llama[1]
    objective, batch, _ = plain_dpo
    loss, metrics, grads = evaluate(objective, params, batch, reference=params)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["margin"].total == 0 and metrics["accuracy"].mean == 0.5
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0


def test_no_gradient_reaches_the_reference(llama, plain_dpo):
    _, params, reference = llama
    objective, batch, _ = plain_dpo
    grad = jax.jit(
        jax.grad(lambda r: objective(params, batch, reference=r)[0]), compiler_options=QUICK
    )
    grads = grad(reference)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_small_steps_of_the_policy_raise_the_margin(llama, plain_dpo):
    _, params, reference = llama
    objective, batch, (_, before, grads) = plain_dpo
    moved = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    after = evaluate(objective, moved, batch, reference=reference)[1]
    assert after["margin"].mean > before["margin"].mean
    assert after["loss"].mean < before["loss"].mean


def test_reward_reads_the_last_real_token(llama):
    model, params, _ = llama
    tree = {"model": params, "score_head": heads.init_score_head(model, _key())}
    batch = collate(shared_rows())
    scores = jax.jit(lambda tree, batch: heads.score(model, tree, batch), compiler_options=QUICK)
    scores = np.asarray(scores(tree, batch), np.float64)
    loss, metrics, _ = evaluate(objectives.reward(model, regularization=0.001), tree, batch)
    gap = scores[:, 0] - scores[:, 1]
    want = np.log1p(np.exp(-gap)).mean() + 0.001 * (scores**2).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"].mean, gap.mean(), rtol=1e-5)


def test_blocks_of_logits_do_not_change_the_gradient(llama, plain_dpo):
    model, params, reference = llama
    _, batch, want = plain_dpo
    objective = objectives.dpo(model, chunk=5)
    assert_close(evaluate(objective, params, batch, reference=reference), want)


def test_errors_come_before_the_first_step(llama):
    model, params, _ = llama
    with pytest.raises(ConfigError, match="no preference loss 'dpo'.*'sigmoid'"):
        objectives.dpo(model, variant="dpo")
    with pytest.raises(ConfigError, match="'ipo' takes no label_smoothing"):
        objectives.dpo(model, variant="ipo", label_smoothing=0.1)
    batch = collate(shared_rows())
    with pytest.raises(DataError, match="'ref_logps'.*reference=<params>"):
        objectives.dpo(model)(params, batch)
    with pytest.raises(DataError, match="has 5 sequences"):
        odd = {k: v[:5] for k, v in collate(single_rows()).items()}
        jax.eval_shape(objectives.dpo(model), params, odd, params)
