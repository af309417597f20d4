"""A Qwen2-Audio folder trains by the recipes every model trains by."""

import io
import json

import jax
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from aa_jax import models, recipes
from aa_jax.data.audio_features import AudioProcessor
from aa_jax.data.example import Example, Media, Part, message
from aa_jax.data.processor import Processor
from aa_jax.models.names import flatten
from aa_jax.sharding import make_mesh

WORDS = "<|pad|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> one two three what"
WORDS += " user assistant system Audio 1 2 : You are a helpful assistant. digit is it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint: tokenizer, feature extractor, config and weights."""
    words = WORDS.split()
    table = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|unk|>"]))}
    backend = Tokenizer(tokenizer_models.WordLevel(table, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )
    tokenizer.add_tokens(words[:6], special_tokens=True)
    processor = Processor(tokenizer, audio_processor=AudioProcessor(feature_size=8, chunk_length=1))
    path = tmp_path_factory.mktemp("tiny")
    processor.save_pretrained(path)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": processor.audio_token_id,
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "d_model": 8,
            "encoder_ffn_dim": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "max_source_positions": 50,
        },
    }
    model = models.build(config)
    models.save(path / "model", model, model.init(jax.random.key(0)), extra_files_from=path)
    return path / "model"


def examples(responses):
    """Four prompts with one or two clips of different lengths."""
    made = []
    for n in range(4):
        clips, parts = [], []
        for k in range(1 + n % 2):
            stream = io.BytesIO()
            samples = np.random.default_rng((n, k)).normal(size=900 + 700 * n) * 0.1
            soundfile.write(stream, samples, 16000, format="WAV")
            clips.append(Media("audio", data=stream.getvalue()))
            parts.append(Part("audio", index=k))
        made.append(
            Example(
                (message("user", "what digit is it", parts),), responses, tuple(clips), f"t:{n}"
            )
        )
    return made


@pytest.mark.parametrize(
    ("recipe", "responses", "kwargs"),
    [("sft", ("three",), dict(pack_length=60)), ("dpo", ("three", "one two"), {})],
)
def test_two_steps(recipe, responses, kwargs, folder, tmp_path):
    model, params = models.load(folder)
    trained, figures = recipes.train(
        recipe,
        model=model,
        params=params,
        processor=Processor.from_pretrained(folder),
        examples=examples(responses),
        workdir=tmp_path,
        mesh=make_mesh(devices=jax.devices()[:1]),
        batch_rows=2,
        epochs=None,
        steps=2,
        optim=dict(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1),
        frozen=("audio_tower/position/*",),
        log_every=1,
        **kwargs,
    )
    assert figures["examples"] == 4 and figures["steps"] == 2 and not figures["dropped"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    if recipe == "dpo":
        # Before the first step policy and reference are one: log 2 (Rafailov et al., 2023, eq. 7).
        np.testing.assert_allclose(losses[0], np.log(2), atol=1e-5)
    before, after = flatten(params), flatten(trained)
    moved = {path for path in before if np.any(np.asarray(before[path]) != np.asarray(after[path]))}
    assert {"projector/kernel", "audio_tower/conv1/kernel", "language_model/embed/weight"} <= moved
    assert "audio_tower/position/weight" not in moved
