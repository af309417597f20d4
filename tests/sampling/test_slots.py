"""Continuous batching: the same samples as one by one, whatever slot, lane and neighbours."""

import importlib.util
import re
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from aa_jax.errors import ConfigError, DataError
from aa_jax.models import caches
from aa_jax.sampling import Choice, Forbid, SlotSampler, Stop, generate, make_sampler
from aa_jax.sharding import make_mesh

_spec = importlib.util.spec_from_file_location(
    "sampler_world", Path(__file__).with_name("test_generate.py")
)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
EOS, LENGTH, NEW, VOCAB, prompts = (
    world.EOS, world.LENGTH, world.NEW, world.VOCAB, world.prompts
)  # fmt: skip
llava = world.llava

COUNT, EACH = 7, 5
ENDS = [EOS, 7, 11, 20]


def rows(batch, indices, count):
    """Some prompts, filled up to `count` rows with copies of the first."""
    where = np.concatenate([indices, np.zeros(count - len(indices), int)])
    return jax.tree.map(lambda x: x[where], batch)


def run(llava, batch, seeds, mesh=None, limits=None, asked=lambda indices: None, **options):
    model, params = llava
    sampler = SlotSampler(
        model, mesh or make_mesh(devices=jax.devices()[:1]),
        **{"slots": 3, "samples": seeds.shape[1], "max_new_tokens": NEW, "eos_ids": ENDS,
           **options},
    )  # fmt: skip

    def collate(indices, count):
        asked(indices)
        return rows(batch, indices, count)

    return sampler.run(params, len(seeds), collate, seeds, limits)


@pytest.fixture(scope="module")
def expected(llava):
    """Every (prompt, seed) by the plain sampler, which is tested against full forward passes."""
    model, params = llava
    batch = prompts(COUNT)
    seeds = np.arange(COUNT * EACH, dtype=np.uint32).reshape(COUNT, EACH)
    many = jax.tree.map(lambda x: np.repeat(x, EACH, axis=0), batch)
    sampler = make_sampler(model, max_new_tokens=NEW, eos_ids=ENDS)
    return batch, seeds, generate(sampler, params, many, seeds.reshape(-1))


def assert_same(found, samples):
    """Tokens exactly, log-probs to rounding."""
    flat = [sample for group in found for sample in group]
    assert len(flat) == len(samples.tokens)
    for row, sample in enumerate(flat):
        count = int(samples.mask[row].sum())
        np.testing.assert_array_equal(sample.tokens, samples.tokens[row, :count])
        np.testing.assert_allclose(sample.logps, samples.logps[row, :count], atol=1e-5)
        assert sample.finished == bool(samples.finished[row])


@pytest.mark.parametrize(
    "options",
    [
        dict(slots=3, lanes=2, prefill_rows=1),
        dict(slots=7, lanes=1, prefill_rows=7),
        dict(slots=2, lanes=5, prefill_rows=2),
        dict(slots=16, lanes=8),  # more than there is to do
    ],
    ids=str,
)
def test_a_seed_gives_its_text_in_any_slot_and_lane(llava, expected, options):
    batch, seeds, samples = expected
    assert_same(run(llava, batch, seeds, **options), samples)


@pytest.fixture
def sent(monkeypatch):
    """What devices send each other in a decoding loop: kinds of collectives, with their shapes."""
    found, compiled = [], SlotSampler._compiled

    def recorded(self, *args):
        program = compiled(self, *args)
        if not found:
            kinds = r"= (\S+) (all-\w+|collective-\w+|reduce-scatter)\("
            found.extend(re.findall(kinds, program.as_text()))
        return program

    monkeypatch.setattr(SlotSampler, "_compiled", recorded)
    return found


def test_over_eight_devices(llava, expected, sent):
    batch, seeds, samples = expected
    found = run(llava, batch, seeds, mesh=make_mesh(data=2, fsdp=4), slots=8, lanes=2)
    assert_same(found, samples)
    assert sent == [("s32[]", "all-reduce")]  # how many slots are done, and nothing else


def test_with_one_array_for_all_layers(llava, expected, sent, monkeypatch):
    """As on accelerators, see `models.caches`."""
    monkeypatch.setattr(caches, "for_loop", lambda cache: cache)
    batch, seeds, samples = expected
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    found = run(llava, batch, seeds, mesh=mesh, slots=16, lanes=2)
    assert_same(found, samples)
    assert sent == []  # every device has the whole model, and writes at its own pace


def test_one_sample_of_one_prompt(llava, expected):
    batch, seeds, samples = expected
    (found,) = run(llava, batch, seeds[:1, 3:4], slots=1)
    np.testing.assert_array_equal(found[0].tokens, samples.tokens[3][samples.mask[3] > 0])


def test_lengths_of_their_own(llava, expected):
    batch, seeds, samples = expected
    limits = np.random.default_rng(0).integers(1, NEW + 1, seeds.shape)
    found = run(llava, batch, seeds, limits=limits, lanes=2)
    for row, (sample, limit) in enumerate(zip(sum(found, []), limits.reshape(-1), strict=True)):
        count = min(int(samples.mask[row].sum()), limit)
        np.testing.assert_array_equal(sample.tokens, samples.tokens[row, :count])
        assert sample.finished == (sample.tokens[-1] in ENDS)


@pytest.mark.parametrize("every", [1, 4])
def test_stop_texts(llava, expected, every):
    """Cut at the first token that completes one, whenever it is looked for."""
    batch, seeds, samples = expected
    stop = Stop(("9", "3 1"), lambda ids: " ".join(map(str, ids)), every=every)
    found = sum(run(llava, batch, seeds, lanes=2, stop=stop), [])
    stopped = 0
    for row, sample in enumerate(found):
        whole = samples.tokens[row][samples.mask[row] > 0]
        texts = [stop.decode(whole[:n]) for n in range(1, len(whole) + 1)]
        cut = next((n for n, t in enumerate(texts, 1) if "9" in t or "3 1" in t), None)
        np.testing.assert_array_equal(sample.tokens, whole[: cut or len(whole)])
        assert len(sample.logps) == len(sample.tokens)
        if cut:
            stopped += 1
            assert sample.finished
    assert 2 < stopped < len(found)


@pytest.mark.parametrize(
    "choice", [Choice(0.0), Choice(0.7, top_k=4, top_p=0.9, min_p=0.05)], ids=["greedy", "cut"]
)
def test_truncation_and_constraints(llava, choice):
    model, params = llava
    batch, seeds = prompts(4, seed=5), np.arange(8, dtype=np.uint32).reshape(4, 2)
    forbidden = Forbid(tuple(range(20, VOCAB)), VOCAB)
    plain = make_sampler(
        model, max_new_tokens=NEW, eos_ids=[EOS], constraint=forbidden,
        temperature=choice.temperature, top_k=choice.top_k, top_p=choice.top_p, min_p=choice.min_p,
    )  # fmt: skip
    many = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    samples = generate(plain, params, many, seeds.reshape(-1))
    assert samples.tokens.max() < 20
    found = run(llava, batch, seeds, eos_ids=[EOS], choice=choice, constraint=forbidden, lanes=2)
    assert_same(found, samples)


def test_a_prompt_is_prefilled_once(llava, expected, monkeypatch):
    """Seven prompts of five samples: seven rows of prefill, not thirty-five."""
    batch, seeds, _ = expected
    asked = []
    model, params = llava
    sampler = SlotSampler(
        model, make_mesh(devices=jax.devices()[:1]), slots=2, lanes=2, samples=EACH,
        max_new_tokens=NEW, eos_ids=ENDS, prefill_rows=1,
    )  # fmt: skip

    def collate(indices, count):
        asked.extend(indices)
        return rows(batch, indices, count)

    sampler.run(params, COUNT, collate, seeds)
    assert asked == list(range(COUNT))
    read = jax.eval_shape(sampler._read_prompts, params, rows(batch, [0], 1))
    shapes = jax.eval_shape(sampler._new_state, read)
    # Of each layer one per slot, and room for responses per lane.
    assert [x.shape for x in shapes["prompt_k"]] == 2 * [(2, 2, LENGTH, 6)]
    assert [x.shape for x in shapes["k"]] == 2 * [(4, 2, NEW, 6)]


def test_the_next_prompts_are_read_while_others_write(llava, expected, monkeypatch):
    batch, seeds, samples = expected
    compiled, asked = SlotSampler._compiled, threading.Event()

    def held_up(self, *args):
        program = compiled(self, *args)

        def decode(*args):
            assert asked.wait(60)
            return program(*args)

        return decode

    monkeypatch.setattr(SlotSampler, "_compiled", held_up)
    wanted = lambda indices: 1 in indices and asked.set()  # noqa: E731
    assert_same(run(llava, batch, seeds, slots=1, asked=wanted), samples)


def test_no_prompts(llava, expected):
    batch, seeds, _ = expected
    assert run(llava, batch, seeds[:0]) == []


def test_prompts_that_cannot_be_read(llava, expected):
    def asked(indices):
        if 3 in indices:
            raise DataError("image 3 is damaged")

    batch, seeds, _ = expected
    with pytest.raises(DataError, match="image 3"):
        run(llava, batch, seeds, slots=1, asked=asked)


def test_what_cannot_be_is_refused(llava, expected):
    batch, seeds, _ = expected
    with pytest.raises(ConfigError, match="slots is 0"):
        run(llava, batch, seeds, slots=0)
    with pytest.raises(ConfigError, match="5 samples of up to 9.*made for 2"):
        run(llava, batch, seeds, samples=2)
    with pytest.raises(ConfigError, match="min_p is 1"):
        Choice(min_p=1.0)
    with pytest.raises(ConfigError, match="stop texts"):
        Stop(("",), str)
