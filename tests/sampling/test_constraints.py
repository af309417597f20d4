"""Image spans: whatever the model prefers, every response reads begin, N image tokens, end."""

import jax
import numpy as np
import pytest

from aa_jax import models
from aa_jax.errors import ConfigError, DataError
from aa_jax.sampling import Forbid, ImageSpans, generate, make_sampler

VOCAB, EOS, BEGIN, END, IMAGES = 40, 2, 3, 4, tuple(range(20, 36))
SPAN = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def spans(**changes):
    given = dict(
        image_ids=IMAGES, begin_id=BEGIN, end_id=END, length=SPAN, eos_ids=(EOS,), vocab_size=VOCAB
    )
    return ImageSpans(**{**given, **changes})


@pytest.fixture(scope="module")
def llama():
    model = models.build(CONFIG)
    params = model.init(jax.random.key(0))
    params["head"]["weight"] *= 30.0  # so that the choice of token matters
    return model, params


def prompts(endings):
    """One row per list of tokens, right padded."""
    width = 8
    rows = len(endings)
    tokens = np.zeros((rows, width), np.int32)
    intervals = np.zeros((rows, width, 4), np.int32)
    lengths = np.array([len(row) for row in endings])
    for b, row in enumerate(endings):
        tokens[b, : len(row)] = row
        intervals[b, : len(row), 3] = np.arange(len(row)) + 1
    positions = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
    return {
        "tokens": tokens,
        "positions": positions,
        "intervals": intervals,
        "last_positions": lengths[:, None].astype(np.int32) - 1,
    }


def check_by_hand(ids, begun=None):
    """An automaton of its own: (images, whether the response stands in text at its end)."""
    left, images = begun, 0 if begun is None else 1
    for token in ids:
        if left is None:
            assert token not in IMAGES and token != END
            if token == BEGIN:
                left, images = SPAN, images + 1
        elif left:
            assert token in IMAGES
            left -= 1
        else:
            assert token == END
            left = None
    return images, left is None


@pytest.mark.parametrize(
    ("changes", "new", "temperature"),
    [({}, 21, 1.5), (dict(max_images=1), 16, 1.0), (dict(min_images=2, max_images=2), 14, 1.0),
     (dict(min_images=3), 19, 0.0)],
)  # fmt: skip
def test_every_response_is_whole(llama, changes, new, temperature):
    """Many requests at high temperature, and the tightest budget that can hold what is owed."""
    model, params = llama
    constraint = spans(**changes)
    rows = 64
    rng = np.random.default_rng(0)
    batch = prompts([list(rng.integers(5, 20, rng.integers(1, 8))) for _ in range(rows)])
    sampler = make_sampler(
        model, max_new_tokens=new, eos_ids=[EOS], temperature=temperature, constraint=constraint
    )
    samples = generate(sampler, params, batch, np.arange(rows))
    counts = []
    for tokens, mask in zip(samples.tokens, samples.mask, strict=True):
        ids = tokens[: int(mask.sum())]
        images, in_text = check_by_hand(ids)
        assert in_text, "cut inside an image"
        counts.append(images)
        pieces = constraint.split(ids)
        assert sum(kind == "image" for kind, _ in pieces) == images
        rebuilt = [
            [BEGIN, *piece, END] if kind == "image" else list(piece) for kind, piece in pieces
        ]
        assert sum(rebuilt, []) == list(ids)
    assert min(counts) >= changes.get("min_images", 0)
    assert max(counts) <= changes.get("max_images", 99) and max(counts) > 0


def test_prompts_that_end_inside_an_image(llama):
    """Just begun, half way, one before the end, complete, and an image that ended earlier."""
    model, params = llama
    image = list(IMAGES[:SPAN])
    batch = prompts(
        [
            [7, BEGIN],
            [BEGIN, *image[:2]],
            [9, BEGIN, *image],
            [BEGIN, *image, END],
            [BEGIN, *image, END, 8],
        ]
    )
    sampler = make_sampler(model, max_new_tokens=12, eos_ids=[EOS], constraint=spans(max_images=1))
    samples = generate(sampler, params, batch, np.arange(5))
    begun = [SPAN, SPAN - 2, 0, None, None]
    for row, left in enumerate(begun):
        ids = samples.tokens[row, : int(samples.mask[row].sum())]
        images, in_text = check_by_hand(ids, left)
        assert in_text and images <= 1


def test_log_probs_are_still_those_of_the_whole_vocabulary(llama):
    """Forced tokens included: a trainer scores the same tokens without any constraint."""
    model, params = llama
    batch = prompts([[7, BEGIN], [9, 10, 11, BEGIN]])
    sampler = make_sampler(
        model, max_new_tokens=8, eos_ids=[EOS], temperature=0.7, constraint=spans(max_images=1)
    )
    samples = generate(sampler, params, batch, np.arange(2))
    for row, length in enumerate([2, 4]):
        count = int(samples.mask[row].sum())
        whole = [*batch["tokens"][row, :length], *samples.tokens[row, :count]]
        steps = np.arange(len(whole), dtype=np.int32)
        intervals = np.zeros((1, len(whole), 4), np.int32)
        intervals[0, :, 3] = steps + 1
        hidden = model.hidden_states(
            params,
            {
                "tokens": np.array([whole], np.int32),
                "positions": steps[None],
                "intervals": intervals,
            },
        )
        logits = np.asarray(hidden[0] @ model.head(params).T, np.float64) / 0.7
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logps[length - 1 + i, whole[length + i]] for i in range(count)]
        np.testing.assert_allclose(samples.logps[row, :count], expected, atol=1e-4)


def test_forbidden_tokens_never_come(llama):
    """Greedy is the argmax of what is left; sampled, none of them ever appears."""
    model, params = llama
    batch = prompts([[7, 8], [9]] * 32)
    free = generate(
        make_sampler(model, max_new_tokens=1, eos_ids=[EOS], temperature=0.0),
        params, batch, np.arange(64),
    )  # fmt: skip
    first = tuple(sorted({int(token) for token in free.tokens[:, 0]}))
    constraint = Forbid(first, VOCAB)
    greedy = make_sampler(
        model, max_new_tokens=1, eos_ids=[EOS], temperature=0.0, constraint=constraint
    )
    found = generate(greedy, params, batch, np.arange(64)).tokens[:, 0]
    inputs = {k: batch[k] for k in ("tokens", "positions", "intervals")}
    hidden = np.asarray(model.hidden_states(params, inputs))
    logits = hidden[np.arange(64), batch["last_positions"][:, 0]] @ np.asarray(model.head(params)).T
    logits[:, first] = -np.inf
    np.testing.assert_array_equal(found, logits.argmax(-1))
    sampler = make_sampler(
        model, max_new_tokens=6, eos_ids=[EOS], temperature=3.0, constraint=Forbid(IMAGES, VOCAB)
    )
    assert not np.isin(generate(sampler, params, batch, np.arange(64)).tokens, IMAGES).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Forbid((50,), 40), "between 50 and 50.*40 tokens"),
        (lambda: spans(image_ids=(20, 40)), "image tokens lie between 20 and 40"),
        (lambda: spans(begin_id=END), "must all be different"),
        (lambda: spans(begin_id=20), "must all be different"),
        (lambda: spans(length=0), "length is 0"),
        (lambda: spans(min_images=2, max_images=1), "min_images is 2 and max_images 1"),
        (lambda: spans(min_images=-1), "min_images is -1"),
        (lambda: spans(min_images=2).check(12), "max_new_tokens is 12.*need 13"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    "ids",
    [
        [BEGIN, 20, 21, 22, END],
        [BEGIN, 20, 21, 22, 23],
        [7, 21],
        [END],
        [BEGIN, 20, 21, 9, 22, END],
    ],
)
def test_broken_responses_are_named(ids):
    with pytest.raises(DataError, match="response 5: token . .* no whole image"):
        spans().split(ids, "response 5")
