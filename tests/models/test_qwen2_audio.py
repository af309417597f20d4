"""Qwen2-Audio against transformers: tower, projector and decoder, clips of any length."""

import itertools

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aa_jax import models
from aa_jax.errors import MediaError, ModelError
from aa_jax.models import heads
from aa_jax.models.names import flatten
from aa_jax.sampling import generate, make_sampler

MELS, FRAMES = 10, 48  # 24 positions after the convolutions, 12 features of a whole clip


def audio_config(world, text=None, audio=None, **changes):
    text = world.qwen2_config(**(text or {}))
    text.pop("architectures")
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": world.IMAGE,
        "text_config": text,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": MELS,
            "d_model": 12,
            "encoder_ffn_dim": 20,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "max_source_positions": FRAMES // 2,
            **(audio or {}),
        },
        **changes,
    }


@pytest.fixture(scope="module")
def qwen(world):
    """`world`, which now knows the family."""
    world.CLASSES["Qwen2AudioForConditionalGeneration"] = (
        transformers.Qwen2AudioConfig,
        transformers.Qwen2AudioForConditionalGeneration,
    )
    return world


@pytest.fixture(scope="module")
def small(qwen, tmp_path_factory):
    """(config, transformers model, our model, our parameters, folder)."""
    folder = tmp_path_factory.mktemp("qwen2_audio")
    config = audio_config(qwen, text=dict(max_position_embeddings=256))
    return config, *qwen.pair(config, folder), folder


def count(frames):
    """transformers' `_get_feat_extract_output_lengths`."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def audio_batch(world, rows, width, mels=MELS, frames=FRAMES, seed=0):
    """Rows of clips, each given by its frames: text, clip, text, clip, ..., text."""
    rng = np.random.default_rng(seed)
    lengths = [2 + sum(count(clip) + 1 for clip in clips) for clips in rows]
    batch = world.text_batch(lengths, width, seed=seed)
    most = max(map(len, rows))
    signal = rng.normal(size=(len(rows), most, mels, frames)).astype(np.float32)
    index = np.full((len(rows), width), -1, np.int32)
    feature_lengths = np.zeros((len(rows), most), np.int32)
    for row, clips in enumerate(rows):
        at = 1
        for number, clip in enumerate(clips):
            n = count(clip)
            batch["tokens"][row, at : at + n] = world.IMAGE
            index[row, at : at + n] = index[row].max() + 1 + np.arange(n)
            feature_lengths[row, number] = clip
            at += n + 1
    media = {"input_features": signal, "feature_lengths": feature_lengths}
    return {**batch, "feature_index": index, "media": media}


def torch_audio(world, batch, pad_left=0):
    """(inputs of the transformers model, mask of the real tokens)."""
    inputs, mask = world.torch_inputs(batch, pad_left=pad_left)
    media = batch["media"]
    real = media["feature_lengths"] > 0
    frames = media["feature_lengths"][real]
    inputs["input_features"] = torch.tensor(media["input_features"][real])
    steps = np.arange(media["input_features"].shape[-1])
    inputs["feature_attention_mask"] = torch.tensor((steps[None] < frames[:, None]).astype(int))
    return inputs, torch.tensor(mask)


CASES = {
    "one to three clips": ({}, [[48, 13, 3], [20]]),
    "one key head, another activation": (
        dict(
            text=dict(num_key_value_heads=1),
            audio=dict(activation_function="gelu_new", num_mel_bins=7, encoder_layers=1),
        ),
        [[47], [5, 46]],
    ),
}


def check_parity(qwen, config, rows, folder):
    """Logits <= 1e-4, gradients <= 1e-4 relative, padding on either side."""
    sizes = config["audio_config"]
    frames = 2 * sizes["max_source_positions"]
    batch = audio_batch(qwen, rows, 32, mels=sizes["num_mel_bins"], frames=frames)
    reference, model, params = qwen.pair(config, folder)
    real = qwen.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    out, grads = qwen.evaluate(model)(params, batch, labels)
    inputs, mask = torch_audio(qwen, batch)
    expected = reference(**inputs).logits[mask]
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    qwen.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    qwen.assert_same_gradients(model, grads, reference)
    inputs, mask = torch_audio(qwen, batch, pad_left=3)
    with torch.no_grad():
        left = reference(**inputs).logits[mask]
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, qwen, tmp_path):
    changes, rows = CASES[case]
    check_parity(qwen, audio_config(qwen, **changes), rows, tmp_path)


GRID = list(itertools.product((1, 2, 4), (24, 25), ([[48], [3, 30]], [[4, 5, 6], [7]])))


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "positions", "rows"), GRID)
def test_logits_and_gradients_grid(kv_heads, positions, rows, qwen, tmp_path):
    """Key heads x even and odd positions x clips, with the other options drawn per case."""
    number = GRID.index((kv_heads, positions, rows))
    text = dict(num_key_value_heads=kv_heads, hidden_act=("silu", "gelu")[number % 2])
    audio = dict(
        max_source_positions=positions,
        encoder_attention_heads=(1, 3, 6)[number % 3],
        activation_function=("gelu", "relu", "quick_gelu")[number % 3],
        num_mel_bins=5 + number,
    )
    check_parity(qwen, audio_config(qwen, text=text, audio=audio), rows, tmp_path)


def test_features_of_a_row_stand_without_gaps(small, qwen):
    """The tower's and projector's output clip by clip, NaN behind them; cached or cut short, the
    same."""
    _, reference, model, params, _ = small
    batch = audio_batch(qwen, [[20, 3, 48], [9]], 40)
    inputs, _ = torch_audio(qwen, batch)
    features = np.asarray(jax.jit(model.encode_media)(params, batch["media"]))
    tower = jax.jit(model.tower_features)(params, batch["media"])
    assert tower.shape == (2, 3, 12, 12) and features.shape == (2, 36, 16)
    with torch.no_grad():
        heard = (inputs["feature_attention_mask"].sum(-1) - 1) // 2 + 1
        seen = torch.arange(FRAMES // 2)[None] < heard[:, None]
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
        states = reference.model.audio_tower(inputs["input_features"], attention_mask=bias)
        expected = reference.model.multi_modal_projector(states.last_hidden_state).numpy()
    rows = [np.concatenate([expected[i, : count(n)] for i, n in enumerate([20, 3, 48])])]
    rows.append(expected[3, : count(9)])
    for row, wanted in enumerate(rows):
        np.testing.assert_allclose(features[row, : len(wanted)], wanted, atol=1e-5)
        assert np.isnan(features[row, len(wanted) :]).all()
    cached = {"tower_features": tower, "feature_lengths": batch["media"]["feature_lengths"]}
    again = jax.jit(model.encode_media)(params, cached)
    np.testing.assert_allclose(again, features, atol=1e-5)
    # Two frames of padding behind the longest clip are all the convolutions read.
    short = audio_batch(qwen, [[18, 3], [9]], 40)
    whole = np.asarray(jax.jit(model.encode_media)(params, short["media"]))
    media = short["media"]
    cut = {**media, "input_features": media["input_features"][..., :20]}
    found = np.asarray(jax.jit(model.encode_media)(params, cut))
    np.testing.assert_allclose(found[:, :6], whole[:, :6], atol=1e-5)


def test_greedy_text_is_transformers(small, qwen):
    """64 tokens after prompts of unequal length with two clips and one."""
    _, reference, model, params, _ = small
    batch = audio_batch(qwen, [[48, 13], [20]], 19)
    sampler = make_sampler(model, max_new_tokens=64, eos_ids=[10**6], temperature=0.0)
    samples = generate(sampler, params, batch, np.arange(2))
    inputs, _ = torch_audio(qwen, batch, pad_left=1)
    del inputs["position_ids"]
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = reference.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(samples.tokens, expected[:, inputs["input_ids"].shape[1] :])


def test_packing_prefixes_and_scores(small, qwen):
    """Two examples in one row, and a pair behind one prompt, against rows of their own."""
    _, _, model, backbone, _ = small
    params = {"model": backbone, "score_head": heads.init_score_head(model, jax.random.key(1))}
    score = jax.jit(lambda p, b: heads.score(model, p, b))
    hidden = jax.jit(model.hidden_states)
    apart = audio_batch(qwen, [[20, 9], [13]], 24)
    lengths = apart["last_positions"][:, 0] + 1
    expected = np.asarray(hidden(backbone, apart))
    clips = apart["media"]["input_features"]
    row = {
        "tokens": np.zeros((1, 24), np.int32),
        "positions": np.zeros((1, 24), np.int32),
        "intervals": np.zeros((1, 24, 4), np.int32),
        "feature_index": np.full((1, 24), -1, np.int32),
        "media": {
            "input_features": np.concatenate([clips[0], clips[1, :1]])[None],
            "feature_lengths": np.array([[20, 9, 13]], np.int32),
        },
        "last_positions": np.array([[lengths[0], lengths.sum()]], np.int32),
    }
    start, features = 1, 0
    for example, n in enumerate(lengths):
        where, steps = slice(start, start + n), np.arange(n)
        row["tokens"][0, where] = apart["tokens"][example, :n]
        row["positions"][0, where] = steps
        row["intervals"][0, where, 2] = start
        row["intervals"][0, where, 3] = start + steps + 1
        index = apart["feature_index"][example, :n]
        row["feature_index"][0, where] = np.where(index >= 0, index + features, -1)
        start, features = start + n, features + index.max() + 1
    found = np.asarray(hidden(backbone, row))[0]
    np.testing.assert_allclose(found[1 : 1 + lengths[0]], expected[0, : lengths[0]], atol=1e-5)
    np.testing.assert_allclose(found[1 + lengths[0] : start], expected[1, : lengths[1]], atol=1e-5)
    np.testing.assert_allclose(score(params, row)[0], score(params, apart)[:, 0], atol=1e-5)
    # The first example's last two tokens and one other answer, behind what comes before them.
    prompt, end = int(lengths[0]) - 2, int(lengths[0])
    pair = {key: value[:1].copy() for key, value in apart.items() if key != "media"}
    pair["media"] = {
        "input_features": row["media"]["input_features"],
        "feature_lengths": np.array([[20, 9, 0]], np.int32),
    }
    pair["tokens"][0, end] = 33
    pair["positions"][0, end] = prompt
    pair["intervals"][0, prompt:end, 1] = prompt
    pair["intervals"][0, prompt:end, 2] = prompt
    pair["intervals"][0, end] = [0, prompt, end, end + 1]
    pair["last_positions"] = np.array([[end - 1, end]], np.int32)  # one program for all rows
    other = {key: value[:1].copy() for key, value in apart.items() if key != "media"}
    other |= {key: pair[key] for key in ("media", "last_positions")}
    other["tokens"][0, prompt] = 33
    shared = np.asarray(hidden(backbone, pair))[0]
    np.testing.assert_allclose(shared[:end], expected[0, :end], atol=1e-5)
    alone = np.asarray(hidden(backbone, other))[0]
    np.testing.assert_allclose(shared[end], alone[prompt], atol=1e-5)


@pytest.mark.parametrize("layout", ["as written", "in memory"])
def test_folders(layout, small, qwen, tmp_path):
    """transformers reads what is written; both of its own layouts are read."""
    _, reference, model, params, folder = small
    models.save(tmp_path / "out", model, params)
    cls = transformers.Qwen2AudioForConditionalGeneration
    again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), reference.state_dict()[name].numpy(), name)
    if layout == "in memory":
        named = {k: np.ascontiguousarray(v) for k, v in reference.state_dict().items()}
        save_file(named, tmp_path / "out" / "model.safetensors")
    loaded = flatten(models.load(tmp_path / "out")[1])
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
    before, after = load_file(folder / "model.safetensors"), tmp_path / "out/model.safetensors"
    if layout == "as written":
        assert load_file(after).keys() == before.keys()


def test_qwen2_audio_7b_builds_from_its_published_config():
    """Sizes of Qwen/Qwen2-Audio-7B-Instruct, counted by transformers on the meta device."""
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layerdrop": 0.0,
        "d_model": 1280,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "init_std": 0.02,
        "max_source_positions": 1500,
    }
    text = {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "vocab_size": 156032,
    }
    published = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": audio,
        "audio_token_index": 151646,
        "ignore_index": -100,
        "model_type": "qwen2_audio",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vocab_size": 156032,
    }
    model = models.build(published)
    kept = {k: v for k, v in text.items() if k != "torch_dtype"}
    with torch.device("meta"):
        config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=kept)
        reference = transformers.Qwen2AudioForConditionalGeneration(config)
    number = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract())) == number


def test_refusals(small, qwen):
    _, _, model, params, _ = small
    with pytest.raises(ModelError, match="audio_config is of model_type 'whisper'"):
        models.build(audio_config(qwen, audio=dict(model_type="whisper")))
    with pytest.raises(ModelError, match="encoder_layerdrop is not 0"):
        models.build(audio_config(qwen, audio=dict(encoder_layerdrop=0.1)))
    with pytest.raises(ModelError, match="d_model = 12 does not split into 5 heads"):
        models.build(audio_config(qwen, audio=dict(encoder_attention_heads=5)))
    with pytest.raises(ModelError, match="audio_token_index is 40, not one of 40 tokens"):
        models.build(audio_config(qwen, audio_token_index=40))
    batch = audio_batch(qwen, [[20]], 10)
    for shape in ((1, 1, MELS, 50), (1, 1, MELS + 1, 48), (1, 1, MELS, 47)):
        media = {**batch["media"], "input_features": np.zeros(shape, np.float32)}
        with pytest.raises(MediaError, match=r"10 mel bands and up to 48 frames"):
            jax.eval_shape(model.encode_media, params, media)
    wrong = {k: v for k, v in batch.items() if k != "media"}
    with pytest.raises(ModelError, match="'media' or features"):
        jax.eval_shape(model.hidden_states, params, wrong)
    batch["feature_index"][0, 3] = 5  # five features are there: 0 to 4
    assert np.isnan(np.asarray(jax.jit(model.hidden_states)(params, batch))[0, 3:7]).all()
