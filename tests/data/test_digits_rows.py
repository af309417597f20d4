"""The embedded world goes through the same templates, processor and batches as a real dataset."""

import functools

import numpy as np
import pytest

from aa_jax.data import digits
from aa_jax.data.collate import collate
from aa_jax.data.dataset import Dataset
from aa_jax.data.loader import Loader
from aa_jax.data.processor import Processor
from aa_jax.data.sources import open_source


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits.write_processor(folder / "model", max_digits=3, patch=8)
    annotator = digits.calibrated("flips", "TI2T", pairs=None)
    rows = list(digits.preference_rows(12, 0, "train", annotator=annotator))
    digits.write_parquet(rows, folder / "train.parquet")
    source = open_source(folder / "train.parquet")
    return folder / "model", Processor.from_pretrained(folder / "model"), source, rows


@pytest.mark.parametrize("task, layout", [("preference", "preference"), ("feedback", "supervised")])
def test_rows_become_batches(world, task, layout):
    _, processor, source, _ = world
    data = Dataset(source, "AA_TI2T", task, processor=processor)
    make = functools.partial(collate, shapes=data.shapes(layout), layout=layout)
    batches = list(Loader(data, make, 4))
    assert sum(batch["sequence_mask"][:, 0].sum() for batch in batches) == len(data)
    assert all(
        (batch["feature_index"].max(1)[batch["sequence_mask"][:, 0] > 0] == 8).all()
        for batch in batches
    )


def test_ids_and_pixels_equal_transformers(world):
    from transformers import AutoTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, processor, source, rows = world
    data = Dataset(source, "AA_TI2T", "preference", processor=processor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)
    for i in range(4):
        encoded, example = data[i], data.example(i)
        text = processor.render(example.messages, generation_prompt=True)
        text = text.replace("<image>", "<image>" * 9)
        np.testing.assert_array_equal(encoded.prompt, tokenizer(text).input_ids)
        theirs = pixels(example.media[0], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(encoded.media["pixel_values"][0], theirs)
        for ids, response in zip(encoded.responses, example.responses, strict=True):
            expected = tokenizer(response.text, add_special_tokens=False).input_ids
            assert list(ids) == [*expected, tokenizer.eos_token_id]


def test_the_better_response_is_chosen(world):
    _, _, source, rows = world
    data = Dataset(source, "AA_TI2T", "preference")
    by_row = {
        int(data.example(i).where.rpartition(":")[2]): data.example(i) for i in range(len(data))
    }
    for i, example in by_row.items():
        better = rows[i]["overall_response"]
        texts = [rows[i][f"response_{k}"] for k in (better, 3 - better)]
        assert [r.text for r in example.responses] == texts


def test_feedback_prompts_follow_the_world_s_wording(world):
    from aa_jax.data.digits import prompts

    _, _, source, rows = world
    data = Dataset(source, "AA_TI2T", "feedback", wording=prompts.WORDING)
    example = data.example(0)
    question = rows[0]["question"].replace("<image>", "").strip()
    expected = prompts.critique(question, rows[0]["response_1"])[0][1]
    assert example.messages[0].text == prompts.split_media(expected)[1]
    assert example.responses[0].text == rows[0]["text_critique_1"]
