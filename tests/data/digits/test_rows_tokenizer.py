"""Files other programs read: parquet rows through datasets, the processor through transformers."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from aa_jax.data import digits
from aa_jax.data.digits import oracle, prompts, tokenizer
from aa_jax.errors import ConfigError, DataError

# The columns of PKU-Alignment/align-anything, config text-image-to-text.
COLUMNS = """question image response_1 response_2 res_1_from res_2_from
p_response prompt_following_rate_1 prompt_following_rate_2 p_rationale_1 p_rationale_2
o_response objective_rules_rate_1 objective_rules_rate_2 o_rationale_1 o_rationale_2
c_response clarity_rate_1 clarity_rate_2 c_rationale_1 c_rationale_2
i_response information_richness_rate_1 information_richness_rate_2 i_rationale_1 i_rationale_2
s_response safety_rate_1 safety_rate_2 s_rationale_1 s_rationale_2
text_critique_1 text_critique_2 overall_response overall_textfeedback""".split()


def _load(path, cache):
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(cache)
    )


def test_preference_parquet_round_trip(tmp_path):
    annotator = digits.calibrated()
    rows = list(digits.preference_rows(30, 1, annotator=annotator))
    path = digits.write_parquet(rows, tmp_path / "deep" / "train.parquet")
    loaded = _load(path, tmp_path / "cache")
    assert loaded.column_names == COLUMNS == digits.preference_columns()
    assert isinstance(loaded.features["image"], datasets.Image)
    for name in COLUMNS:
        numeric = name.endswith(("_rate_1", "_rate_2")) or name in (
            "overall_response",
            *(f"{letter}_response" for letter in "pocis"),
        )
        if name != "image":
            assert loaded.features[name].dtype == ("int64" if numeric else "string"), name
    for row, example in zip(loaded, digits.evaluation_prompts(30, 1, "train"), strict=True):
        assert isinstance(row["image"], Image.Image)
        assert (np.asarray(row["image"]) == np.asarray(example.image)).all()
        assert row["question"] == example.task.question
        assert row["response_1"] != row["response_2"]
        assert row["overall_response"] in (1, 2)
        assert row["text_critique_1"].startswith("##Critique: ")
        assert " ##Refinement: " in row["text_critique_2"]
        assert row["overall_textfeedback"].startswith("##Reason: ")
        for letter, name in oracle.DIMENSIONS.items():
            first, second = row[f"{name}_rate_1"], row[f"{name}_rate_2"]
            assert first in range(4)
            wins = row["overall_response"] if first == second else 1 + (second > first)
            assert row[f"{letter}_response"] == wins


def test_oracle_rows_tell_the_truth():
    rows = digits.preference_rows(60, 2, "test", meta=True)
    for row in rows:
        task = digits.Task.from_dict(json.loads(row["meta"])["task"])
        truth = oracle.prefer(task, row["response_1"], row["response_2"])
        assert row["overall_response"] == truth or truth == 0
        for number in (1, 2):
            grade = oracle.grade(task, row[f"response_{number}"])
            for name in oracle.DIMENSIONS.values():
                assert row[f"{name}_rate_{number}"] == getattr(grade, name)
            text = oracle.true_feedback(task, row[f"response_{number}"]).text
            assert row[f"text_critique_{number}"] == text


def test_row_by_hand():
    example = digits.evaluation_prompts(1, 0, "test")[0]
    task = digits.Task((3, 7, 1), ("digits", "sum"), "short")
    example = digits.Example("prompt", example.conversation, "", task, example.scene)
    rng = np.random.default_rng(0)
    row = digits.preference_row(example, "3 7 1", "3 7 1 ; 1 1", rng, sources=("a", "b"))
    assert (row["res_1_from"], row["res_2_from"]) == ("a", "b")
    assert (row["prompt_following_rate_1"], row["prompt_following_rate_2"]) == (2, 3)
    assert (row["information_richness_rate_1"], row["information_richness_rate_2"]) == (1, 3)
    assert row["overall_response"] == row["s_response"] == 2
    assert row["text_critique_1"] == (
        "##Critique: digits right , sum missing , form good ##Refinement: add the sum"
    )
    assert row["overall_textfeedback"] == (
        "##Reason: response 2 is better in following and information ."
    )
    with pytest.raises(DataError, match="binary or feedback"):
        digits.preference_row(example, "1", "2", rng, label_from="dice")


def test_rows_are_fixed_by_the_seed():
    annotator = digits.calibrated("flips")
    make = lambda n, seed: list(  # noqa: E731
        digits.preference_rows(n, seed, annotator=annotator, label_from="feedback")
    )
    assert make(10, 3) == make(20, 3)[:10]
    assert make(10, 3) != make(10, 4)


def test_sft_parquet_round_trip(tmp_path):
    examples = digits.sft_examples(20, 0, mix={"answer": 0.8, "feedback": 0.2})
    path = digits.write_parquet(digits.sft_rows(examples), tmp_path / "sft.parquet")
    loaded = _load(path, tmp_path / "cache")
    assert loaded.column_names == ["prompt", "response", "image"]
    for row, example in zip(loaded, examples, strict=True):
        assert row["response"] == example.target
        assert row["prompt"] == example.conversation[0][1].removeprefix("<image>\n")
        assert (np.asarray(row["image"]) == np.asarray(example.image)).all()


def test_sft_rows_of_several_turns(tmp_path):
    examples = digits.sft_examples(5, 0, mix={"revise": 1.0})
    with pytest.raises(DataError, match="messages=True"):
        list(digits.sft_rows(examples))
    path = digits.write_parquet(digits.sft_rows(examples, messages=True), tmp_path / "r.parquet")
    loaded = _load(path, tmp_path / "cache")
    turns = [(turn["role"], turn["content"]) for turn in loaded[0]["messages"]]
    assert turns == examples[0].conversation
    assert loaded[0]["kind"] == "revise"
    with pytest.raises(DataError, match="no rows"):
        digits.write_parquet([], tmp_path / "none.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits.write_processor(tmp_path_factory.mktemp("processor"), 3, 8)


@pytest.fixture(scope="module")
def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_special_tokens(auto):
    assert len(auto) == len(digits.vocabulary()) <= 100
    ids = [auto.pad_token_id, auto.bos_token_id, auto.eos_token_id, auto.unk_token_id]
    assert ids + [auto.image_token_id] == [0, 1, 2, 3, 4]
    assert auto("the sum").input_ids[0] == auto.bos_token_id
    assert auto.padding_side == "right"
    assert len(set(digits.vocabulary())) == len(digits.vocabulary())


def test_no_unknown_token_and_same_text_back(auto):
    """Every text of the world is in the vocabulary and survives encode -> decode."""
    texts = []
    for example in digits.sft_examples(700, 11):
        texts += [turn for _, turn in example.conversation] + [example.target]
    for maker in (digits.calibrated(), None):
        for row in digits.preference_rows(150, 12, annotator=maker):
            skip = ("res_1_from", "res_2_from")
            texts += [v for k, v in row.items() if isinstance(v, str) and k not in skip]
    for task, bad in ((digits.Task((1,), ("sum",), "short"), t) for t in ("", "x 1", "1 ; 2")):
        texts += list(oracle.grade(task, bad).rationales.values())
    for text in texts:
        ids = auto(text, add_special_tokens=False).input_ids
        assert auto.unk_token_id not in ids, text
        plain = " ".join(text.removeprefix("<image>\n").split())
        assert auto.decode(ids, skip_special_tokens=True) == plain
        assert digits.parse(auto.decode(ids, skip_special_tokens=True)) == digits.parse(plain)


def test_chat_template(auto):
    conversation = prompts.refine("give the sum in short form .", "1 2", "fix the sum")
    text = auto.apply_chat_template(prompts.messages(conversation, "1 1"), tokenize=False)
    prompt = auto.apply_chat_template(
        prompts.messages(conversation), tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "USER: <image>\ngive the sum in short form . ASSISTANT: 1 2</s>"
        "USER: ##Refinement: fix the sum . revise the answer . ASSISTANT:"
    )
    assert text == prompt + " 1 1</s>"
    ids = auto(text).input_ids
    assert ids[: len(auto(prompt).input_ids)] == auto(prompt).input_ids
    assert auto.decode(ids[-3:]) == "1 1 </s>"
    plain = [{"role": "user", "content": "give the sum"}]
    assert auto.apply_chat_template(plain, tokenize=False) == "USER: give the sum "
    marked = auto.apply_chat_template(
        prompts.messages(conversation, "1 1"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    spoken = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert auto.decode(spoken) == "1 2 </s> 1 1 </s>"


@pytest.mark.parametrize(("max_digits", "patch"), [(3, 8), (5, 4)])
def test_llava_processor_reads_the_folder(tmp_path, max_digits, patch):
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = digits.write_processor(tmp_path, max_digits, patch)
    images = CLIPImageProcessorPil.from_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings.pop("processor_class")
    processor = LlavaProcessor(images, AutoTokenizer.from_pretrained(folder), **settings)
    example = digits.sft_examples(1, 0, max_digits=max_digits)[0]
    text = processor.tokenizer.apply_chat_template(
        prompts.messages(example.conversation), tokenize=False, add_generation_prompt=True
    )
    batch = processor(text=text, images=example.image, return_tensors="np")
    side = 8 * max_digits
    assert batch["pixel_values"].shape == (1, 3, side, side)
    assert (batch["input_ids"] == 4).sum() == (side // patch) ** 2
    expected = np.asarray(example.image).transpose(2, 0, 1) / 255 / tokenizer.IMAGE_STD
    np.testing.assert_allclose(batch["pixel_values"][0], expected, atol=1e-6)


def test_llava_processor_from_pretrained(folder):
    from transformers import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(folder)
    assert processor.patch_size == 8
    assert processor.image_processor.size["height"] == 24
    assert processor.chat_template == tokenizer.CHAT_TEMPLATE


def test_patch_must_tile_the_canvas(tmp_path):
    with pytest.raises(ConfigError, match="patch 7 does not tile the canvas of 24"):
        digits.write_processor(tmp_path, 3, 7)
    with pytest.raises(DataError, match="max_digits"):
        digits.write_processor(tmp_path, 9)


def test_token_budgets(auto):
    """Prompt text tokens (media aside) stay within what CPU training was planned for."""
    annotator, rng = digits.calibrated(), np.random.default_rng(0)

    def length(conversation):
        text = auto.apply_chat_template(
            prompts.messages(conversation), tokenize=False, add_generation_prompt=True
        )
        return len(auto(text).input_ids) - 1

    for example in digits.evaluation_prompts(300, 1, "train"):
        question = example.task.question
        answer = digits.sample_response(example.task, rng).text
        said = annotator.feedback(example.task, answer, rng)
        assert length(prompts.answer(question)) <= 25
        assert length(prompts.critique(question, answer)) <= 50
        assert length(prompts.refine(question, answer, said.refinement)) <= 70
        assert len(auto(said.text, add_special_tokens=False).input_ids) <= 40
