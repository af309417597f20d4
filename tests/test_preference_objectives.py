"""Every offline preference loss through its objective, on a tiny Llama."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses, models, objectives
from aa_jax.errors import ConfigError, DataError

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
# (prompt, good response, bad response)
PAIRS = [
    ([7, 8, 9], [11, 12, 2], [13, 2]),
    ([14, 15], [16, 17, 18, 2], [20, 21, 2]),
    ([3, 4, 5], [2], [6, 7, 8, 2]),
    ([9, 3], [5, 2], [4, 4, 2]),
]
WIDTH, SLOTS = 8, 4


def rows(examples):
    """One (prompt, response) per row, causal: the layout both kinds of objective accept."""
    size = len(examples)
    ints = lambda *shape: np.zeros((size, *shape), np.int32)  # noqa: E731
    batch = {
        "tokens": ints(WIDTH),
        "positions": ints(WIDTH),
        "intervals": ints(WIDTH, 4),
        "target_positions": ints(1, SLOTS),
        "targets": ints(1, SLOTS),
        "loss_mask": np.zeros((size, 1, SLOTS), np.float32),
        "sequence_mask": np.ones((size, 1), np.float32),
    }
    for b, (prompt, response) in enumerate(examples):
        end, n = len(prompt) + len(response), len(response)
        batch["tokens"][b, :end] = prompt + response
        batch["positions"][b, :end] = np.arange(end)
        batch["intervals"][b, :end, 3] = np.arange(end) + 1
        batch["target_positions"][b, 0, :n] = np.arange(len(prompt) - 1, end - 1)
        batch["targets"][b, 0, :n] = response
        batch["loss_mask"][b, 0, :n] = 1
    return batch


def pair_batch():
    return rows([(prompt, response) for prompt, *both in PAIRS for response in both])


def kto_batch():
    """The pairs taken apart; under "mismatched" each prompt with another prompt's response."""
    singles = [(prompt, response) for prompt, *both in PAIRS for response in both]
    half = len(singles) // 2
    others = [(p, singles[(i + half) % len(singles)][1]) for i, (p, _) in enumerate(singles)]
    batch = rows(singles)
    return batch | {"label": np.tile([1.0, 0.0], 4).astype(np.float32), "mismatched": rows(others)}


@pytest.fixture(scope="module")
def llama():
    model = models.build(LLAMA)
    return model, model.init(jax.random.key(0)), model.init(jax.random.key(1))


@functools.cache
def sums(model):
    return jax.jit(objectives.compute_ref_logps(model), compiler_options=QUICK)


def value_and_grad(objective):
    return jax.jit(
        jax.value_and_grad(lambda p, b: objective(p, b), has_aux=True), compiler_options=QUICK
    )


def with_reference(model, reference, batch):
    """Reference log-probs in the batch, and in its mismatched part."""
    stored = batch | {"ref_logps": np.asarray(sums(model)(reference, batch))}
    if "mismatched" in batch:
        stored["mismatched"] = with_reference(model, reference, batch["mismatched"])
    return stored


def test_kto_is_the_closed_form_on_the_models_log_probs(llama):
    model, params, reference = llama
    plain = {k: v for k, v in kto_batch().items() if k not in ("label", "mismatched")}
    delta, drift = (
        np.float64(sums(model)(params, part)) - np.float64(sums(model)(reference, part))
        for part in (plain, kto_batch()["mismatched"])
    )
    label = kto_batch()["label"]
    shift = max(drift.mean(), 0.0)
    gap = np.where(label > 0, 1, -1) * 0.3 * (delta[:, 0] - shift)
    want = np.where(label > 0, 1.2, 0.8) / (1 + np.exp(gap))
    options = dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    objective = objectives.kto(model, **options)
    batch = with_reference(model, reference, kto_batch())
    (loss, metrics), grads = value_and_grad(objective)(params, batch)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"].mean, shift, rtol=1e-5, atol=1e-6)
    # The same from the role, and the KL is a constant to the gradient.
    roles = jax.jit(lambda p, b, r: objective(p, b, reference=r)[0], compiler_options=QUICK)
    np.testing.assert_allclose(roles(params, kto_batch(), reference), loss, rtol=1e-6)

    def by_hand(params, batch):
        tokens = objectives.token_logps(model, params, batch)
        logps = losses.sequence_logps(tokens.logps, tokens.mask)[0][:, 0]
        examples = losses.Unpaired(
            logps, batch["ref_logps"][:, 0], batch["label"], jnp.ones(len(label))
        )
        return losses.unpaired_loss(examples, kl=jnp.float32(shift), **options)

    _, expected = value_and_grad(by_hand)(params, batch)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_wpo_weights_are_those_of_all_logits(llama):
    model, params, reference = llama
    batch = with_reference(model, reference, pair_batch())
    hidden = model.hidden_states(params, batch)
    logps = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, model.head(params)))
    rows_ = np.arange(8)[:, None]
    at = np.float64(np.asarray(logps)[rows_, batch["target_positions"][:, 0]])
    taken = np.take_along_axis(at, batch["targets"][:, 0, :, None], -1)[..., 0]
    mask = batch["loss_mask"][:, 0]
    aligned = (taken - np.log((np.exp(at) ** 2).sum(-1))) * mask
    weights = np.exp(aligned.sum(1) / mask.sum(1)).reshape(4, 2).prod(1)
    margin = ((taken * mask).sum(1) - batch["ref_logps"][:, 0]).reshape(4, 2)
    want = weights * np.log1p(np.exp(-0.1 * (margin[:, 0] - margin[:, 1])))
    loss, _ = objectives.preference(model, weighting="wpo")(params, batch)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    with pytest.raises(ConfigError, match="no weighting 'ppo'"):
        objectives.preference(model, weighting="ppo")


def descend(objective, params, batch, steps=6, lr=0.05):
    """Losses and margins over a few steps of plain gradient descent on one batch."""
    step = value_and_grad(objective)
    found, margins = [], []
    for _ in range(steps):
        (loss, metrics), grads = step(params, batch)
        found.append(float(loss))
        if "margin" in metrics:
            margins.append(float(metrics["margin"].mean))
        params = jax.tree.map(lambda p, g: p - lr * g, params, grads)
    return found, margins


def check_it_learns(name, llama, lr=0.05, **options):
    model, params, _ = llama
    batch = pair_batch()
    if losses.needs_reference(name):
        batch = with_reference(model, params, batch)
    objective = objectives.preference(model, variant=name, **options)
    found, margins = descend(objective, params, batch, lr=lr)
    assert found[-1] < found[0], found
    if name not in ("apo_down", "discopop"):
        assert margins[-1] > margins[0], margins


# Plain descent needs a step that fits the loss's scale.
SETTINGS = {"ipo": {"beta": 1.0}, "sppo": {"beta": 1.0, "lr": 0.002}, "dpop": {"penalty": 1.0}}
DEFAULT = ("simpo", "orpo")


@pytest.mark.parametrize("name", DEFAULT)
def test_a_reference_free_loss_learns_without_reference(name, llama):
    check_it_learns(name, llama)


@pytest.mark.parametrize("name", [n for n in losses.PREFERENCE_LOSSES if n not in DEFAULT])
def test_every_preference_loss_learns(name, llama):
    check_it_learns(name, llama, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", losses.UNPAIRED_LOSSES)
def test_every_unpaired_loss_learns(name, llama):
    model, params, _ = llama
    batch = with_reference(model, params, kto_batch())
    found, _ = descend(objectives.kto(model, variant=name), params, batch)
    assert found[-1] < found[0], found


def cut_batch():
    """Good and bad responses, behind one more token that says which they are, and without it."""
    singles = [(prompt, response) for prompt, *both in PAIRS for response in both]
    judged = [([*prompt, 22 + i % 2], response) for i, (prompt, response) in enumerate(singles)]
    return rows(judged) | {"negative": np.tile([0.0, 1.0], 4), "plain": rows(singles)}


def test_cut_reads_every_response_with_and_without_its_judgment(llama):
    model, params, _ = llama
    batch = cut_batch()
    alone = {k: v for k, v in batch.items() if k not in ("negative", "plain")}
    judged, plain = (
        np.float64(objectives.token_logps(model, params, part).logps[:, 0])
        for part in (alone, batch["plain"])
    )
    mask, bad = batch["loss_mask"][:, 0], batch["negative"][:, None]
    meant = (judged - plain > np.log(1.1)) & (mask * bad > 0)
    assert 0 < meant.sum() < (mask * bad).sum()
    terms = (
        np.where(meant, -0.3 * np.log1p(-np.exp(np.where(meant, plain, -1.0))), -plain) * mask * bad
    )
    want = -(judged * mask).sum() / mask.sum() + terms.sum() / (mask * bad).sum()
    loss, metrics = objectives.cut(model, unlikelihood_weight=0.3)(params, batch)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["inappropriate"].mean, meant.sum() / (mask * bad).sum(), rtol=1e-6
    )
    found, _ = descend(objectives.cut(model), params, batch)
    assert found[-1] < found[0]
    with pytest.raises(ConfigError, match="threshold 0.5 must be at least 1"):
        objectives.cut(model, threshold=0.5)
    with pytest.raises(DataError, match="with and without its judgment"):
        objectives.cut(model)(params, batch["plain"])


def test_errors_say_what_is_missing(llama):
    model, params, reference = llama
    with pytest.raises(DataError, match="'ref_logps'.*reference=<params>"):
        objectives.preference(model, variant="nca")(params, pair_batch())
    batch = kto_batch()
    with pytest.raises(DataError, match="'mismatched'.*apo_zero_unpaired"):
        objectives.kto(model)(params, {k: v for k, v in batch.items() if k != "mismatched"})
    with pytest.raises(DataError, match="'ref_logps'.*compute_ref_logps"):
        objectives.kto(model, variant="bco")(params, batch)
    with pytest.raises(ConfigError, match="no loss of unpaired responses 'simpo'"):
        objectives.kto(model, variant="simpo")
    with pytest.raises(ConfigError, match="'simpo' takes no tau"):
        objectives.preference(model, variant="simpo", tau=1.0)
