"""Small checkpoints of the digits world: read by transformers too, and refused by name."""

import json

import jax
import numpy as np
import pytest
import transformers

from aa_jax import models, small_models
from aa_jax.data import sources
from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.dataset import Dataset
from aa_jax.data.processor import Processor
from aa_jax.errors import ConfigError
from aa_jax.models.chameleon.tokenizer import own_image_encoder

SIZES = {
    "text": dict(dim=32, layers=2, heads=2, kv_heads=1, mlp_dim=48, max_length=256),
    "tower": dict(dim=16, layers=1, heads=2, codes=16, embed_dim=4),
}
TEMPLATES = {"T2T": "AA_T2T", "TI2T": "AA_TI2T", "TA2T": "AA_TA2T", "TV2T": "AA_TV2T",
             "T2I": "AA_T2I", "TI2TI": "ti2ti_preference"}  # fmt: skip


@pytest.mark.parametrize("subtask", small_models.SUBTASKS)
def test_model_processor_and_data_belong_together(subtask, tmp_path):
    sizes = {**SIZES, "text": {**SIZES["text"], "kv_heads": 2}} if "I" == subtask[-1] else SIZES
    paths = small_models.write(
        tmp_path, subtask, model=sizes, data=dict(pairs=6, demonstrations=2, held_out=2)
    )
    config = json.loads((tmp_path / "model/config.json").read_text())
    theirs = getattr(transformers, config["architectures"][0]).from_pretrained(paths["model"])
    model, params = models.load(paths["model"])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(p.numel() for p in theirs.parameters()) == count
    processor = Processor.from_pretrained(
        paths["model"], image_encoder=own_image_encoder(model, params)
    )
    rows = sources.open_source(paths["preference"])
    data = Dataset(rows, TEMPLATES[subtask], "preference", processor=processor, strict=True)
    items = [data[i] for i in range(len(data))]
    unknown = processor.tokenizer.unk_token_id
    for item in items:
        assert unknown not in [*item.prompt, *np.concatenate(item.responses)]
    batch = collate(items, plan_shapes(items, "preference"), "preference")
    assert batch["tokens"].max() < model.head(params).shape[0]
    assert np.isfinite(np.asarray(model.hidden_states(params, batch))).all()


def test_a_trained_image_tokenizer_is_taken_over(tmp_path):
    from aa_jax.models.chameleon.tokenizer import build_tokenizer, save_tokenizer

    small_models.write_model(tmp_path / "one", "T2I", **SIZES)
    model, params = models.load(tmp_path / "one")
    tokenizer = build_tokenizer(model.hf_config["vq_config"])
    trained = tokenizer.init(jax.random.key(7))
    save_tokenizer(tmp_path / "vq/model", tokenizer, trained)
    small_models.write_model(tmp_path / "two", "T2I", image_tokenizer=tmp_path / "vq", **SIZES)
    _, taken = models.load(tmp_path / "two")
    for name, leaf in models.names.flatten(taken["vq"]).items():
        np.testing.assert_array_equal(leaf, models.names.flatten(trained)[name])
    assert own_image_encoder(model, params) is not None
    with pytest.raises(ConfigError, match="has other sizes.*codes and embed_dim"):
        small_models.write_model(tmp_path / "x", "T2I", image_tokenizer=tmp_path / "vq")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no small model for 'T2A'; there are T2T, TI2T"):
        small_models.write_model(tmp_path / "m", "T2A")
    with pytest.raises(ConfigError, match="text has no size 'width'; it has dim"):
        small_models.write_model(tmp_path / "m", "T2T", text={"width": 3})
    with pytest.raises(ConfigError, match="no subtask 'T2X'; it has T2T.*T2V"):
        small_models.write_data(tmp_path, "T2X")
    with pytest.raises(ConfigError, match="graded by the oracle"):
        small_models.write_data(tmp_path, "T2I", annotator="bounded")
