"""Which columns become prompt, media, responses; labels and feedback; every error."""

import numpy as np
import pytest

from aa_jax.data.example import InvalidRow, Media, Row
from aa_jax.data.templates import TEMPLATES, find_template, from_columns, read
from aa_jax.errors import DataError

AA = {
    "question": "what is it?",
    "response_1": "a cat",
    "response_2": "a dog",
    "overall_response": 2,
    "text_critique_1": "##Critique: wrong ##Refinement: say dog",
    "text_critique_2": "##Critique: right ##Refinement: none",
}


def row(**values):
    return Row.of(values, where="train.parquet:5")


def texts(example):
    return [response.text for response in example.responses]


def test_overall_response_names_the_better_one():
    pair = TEMPLATES["AA_T2T"].preference(row(**AA))
    assert texts(pair) == ["a dog", "a cat"]
    pair = TEMPLATES["AA_T2T"].preference(row(**{**AA, "overall_response": 1}))
    assert texts(pair) == ["a cat", "a dog"]
    assert pair.where == "train.parquet:5" and pair.messages[-1].text == "what is it?"


@pytest.mark.parametrize("label", [0, 3, None, "x", 1.5, True, float("nan"), -1])
def test_other_labels_are_invalid(label):
    with pytest.raises(InvalidRow, match="train.parquet:5.*overall_response") as error:
        TEMPLATES["AA_T2T"].preference(row(**{**AA, "overall_response": label}))
    assert error.value.reason == "invalid label"


@pytest.mark.parametrize("label", ["2", 2.0, np.int64(2)])
def test_integer_labels_in_any_clothes(label):
    pair = TEMPLATES["AA_T2T"].preference(row(**{**AA, "overall_response": label}))
    assert texts(pair) == ["a dog", "a cat"]


@pytest.mark.parametrize("better, expected", [(0, ["no", "yes"]), (1, ["yes", "no"])])
def test_better_response_id(better, expected):
    values = dict(prompt="p", response_0="no", response_1="yes", better_response_id=better)
    assert texts(TEMPLATES["PKUSafeRLHF"].preference(row(**values))) == expected


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"response_1": "a dog "}, "identical responses"),
        ({"response_1": "  "}, "empty response"),
        ({"response_2": None}, "empty response"),
        ({"question": " "}, "empty prompt"),
    ],
)
def test_useless_rows_are_invalid(change, reason):
    with pytest.raises(InvalidRow, match="train.parquet:5") as error:
        TEMPLATES["AA_T2T"].preference(row(**{**AA, **change}))
    assert error.value.reason == reason


def test_missing_column_lists_what_there_is():
    values = {**AA}
    values["overal_response"] = values.pop("overall_response")
    with pytest.raises(DataError) as error:
        TEMPLATES["AA_T2T"].preference(row(**values))
    assert not isinstance(error.value, InvalidRow)
    for word in ("train.parquet:5", "'overall_response'", "'response_1'", "'overal_response'"):
        assert word in str(error.value)
    with pytest.raises(DataError, match="holds a list, not text"):
        TEMPLATES["AA_T2T"].prompt(row(question=["a"]))


def test_supervised_takes_the_answer_or_the_better_response():
    template = TEMPLATES["AA_T2T"]
    assert texts(template.supervised(row(prompt="p", response="r"))) == ["r"]
    assert texts(template.supervised(row(**AA))) == ["a dog"]
    with pytest.raises(DataError, match="no column 'response'"):
        template.supervised(row(prompt="p"))
    with pytest.raises(DataError, match="no preference reading"):
        TEMPLATES["Alpaca"].preference(row(instruction="p", input="", output="o"))
    with pytest.raises(DataError, match="no supervised reading"):
        TEMPLATES["AA_T2T_LLF"].__class__(question=("p",)).supervised(row(p="x"))


def test_image_row(kit):
    data = kit.image_bytes(kit.random_image())
    values = row(**AA, image={"bytes": data, "path": "1.png"})
    pair = TEMPLATES["AA_TI2T"].preference(values)
    assert [part.type for part in pair.messages[0].content] == ["image", "text"]
    assert pair.media[0].mode == "RGB" and pair.media[0].size == (60, 40)
    raw = TEMPLATES["AA_TI2T"].preference(values, decode=False)
    assert isinstance(raw.media[0], Media)
    with pytest.raises(InvalidRow, match="the image is null") as error:
        TEMPLATES["AA_TI2T"].prompt(row(**AA, image=None))
    assert error.value.reason == "no image"


def test_prompt_has_no_response_and_same_text_keeps_its_own_image(kit):
    images = [kit.image_bytes(kit.random_image(seed)) for seed in (0, 1)]
    prompts = [TEMPLATES["AA_TI2T"].prompt(row(**AA, image=image)) for image in images]
    assert all(p.responses == () for p in prompts)
    assert prompts[0].messages == prompts[1].messages
    assert np.any(np.asarray(prompts[0].media[0]) != np.asarray(prompts[1].media[0]))


@pytest.mark.parametrize(
    "names",
    [
        ("text_critique_1", "text_critique_2"),
        ("text_1_feedback", "text_2_feedback"),
        ("text_feedback_1", "text_feedback_2"),
        ("critique_1", "critique_2"),
    ],
)
def test_feedback_for_each_response(names):
    values = {k: v for k, v in AA.items() if "critique" not in k}
    values |= {names[0]: "##Critique: wrong", names[1]: "##Critique: right"}
    first, second = TEMPLATES["AA_T2T"].feedback(row(**values))
    assert texts(first) == ["##Critique: wrong"] and texts(second) == ["##Critique: right"]
    for example, response in ((first, "a cat"), (second, "a dog")):
        prompt = example.messages[-1].text
        assert prompt.index("what is it?") < prompt.index(response)
    assert (first.meta["response_index"], second.meta["response_index"]) == (0, 1)


def test_feedback_with_its_own_refinement_column():
    values = {**AA, "text_critique_1": "wrong", "text_refinement_1": "say dog"}
    first, _ = TEMPLATES["AA_T2T"].feedback(row(**values))
    assert texts(first) == ["##Critique: wrong\n##Refinement: say dog"]


def test_a_judged_response_stands_behind_its_critique():
    values = {**AA, "text_critique_1": "##Critique: wrong ##Refinement: say dog"}
    values |= {"text_critique_2": "right"}
    bad, good = TEMPLATES["AA_T2T"].judgment(row(**values))
    assert texts(bad) == ["a cat"] and texts(good) == ["a dog"]
    assert (bad.meta["negative"], good.meta["negative"]) == (1, 0)
    assert "wrong" in bad.messages[-1].text and "right" in good.messages[-1].text
    assert "say dog" not in bad.messages[-1].text  # the answer itself is no judgment
    plain = TEMPLATES["AA_T2T"].prompt(row(**values)).messages
    assert bad.meta["plain"] == good.meta["plain"] == plain
    mine = {"judged": "{critique} : {prompt}"}
    assert TEMPLATES["AA_T2T"].judgment(row(**values), wording=mine)[0].messages[-1].text == (
        f"wrong : {plain[-1].text}"
    )
    with pytest.raises(DataError, match="'judged' leaves out {critique}"):
        TEMPLATES["AA_T2T"].judgment(row(**values), wording={"judged": "{prompt}"})


def test_partial_and_missing_feedback():
    one = {**AA, "text_critique_1": None}
    assert len(TEMPLATES["AA_T2T"].feedback(row(**one))) == 1
    with pytest.raises(InvalidRow, match="neither") as error:
        TEMPLATES["AA_T2T"].feedback(row(**{**one, "text_critique_2": ""}))
    assert error.value.reason == "no feedback"
    with pytest.raises(DataError, match="no language feedback"):
        TEMPLATES["GSM8K"].feedback(row(question="q", answer="a"))


def test_llf_prefers_the_refinement():
    values = dict(prompt="p", response="first", refinement="better", critique="##Critique: c")
    template = TEMPLATES["AA_T2T_LLF"]
    assert texts(template.preference(row(**values))) == ["better", "first"]
    (feedback,) = template.feedback(row(**values))
    assert texts(feedback) == ["##Critique: c"] and "first" in feedback.messages[-1].text
    with pytest.raises(InvalidRow) as error:
        template.preference(row(**{**values, "refinement": "first"}))
    assert error.value.reason == "identical responses"


def test_unpaired_labels_both_responses():
    good, bad = TEMPLATES["AA_T2T"].unpaired(row(**AA))
    assert (texts(good), good.meta["label"]) == (["a dog"], 1)
    assert (texts(bad), bad.meta["label"]) == (["a cat"], 0)


def test_safety_cost_ranks_the_less_safe_higher_with_graded_signs(kit):
    values = row(
        question="q",
        image=kit.image_bytes(kit.random_image()),
        response_1="safe",
        response_2="unsafe",
        safer_response_id=1,
        more_helpful_response_id=2,
        response_1_harmless_rate=3,
        response_2_harmless_rate=-2,
    )
    cost = TEMPLATES["SafeRLHF_V_Cost"].preference(values)
    assert texts(cost) == ["unsafe", "safe"] and cost.meta["signs"] == (2.0, -3.0)
    assert texts(TEMPLATES["SafeRLHF_V_Reward"].preference(values)) == ["unsafe", "safe"]


def test_llava_conversation(kit):
    data = kit.image_bytes(kit.random_image())
    turns = [
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "unanswered"},
    ]
    template = TEMPLATES["LLaVA_Instruct"]
    example = template.supervised(row(conversations=turns, image=data))
    assert [m.role for m in example.messages] == ["user", "assistant", "user"]
    assert [len(m.media) for m in example.messages] == [0, 0, 1]
    assert example.messages[-1].text == "what is it?" and texts(example) == ["a cat"]
    text_only = template.supervised(row(conversations=turns[:2]))
    assert text_only.media == () and texts(text_only) == ["hi"]
    unmarked = template.supervised(row(conversations=turns[:2], image=data))
    assert len(unmarked.messages[0].media) == 1
    with pytest.raises(InvalidRow, match="no question with an answer"):
        template.supervised(row(conversations=turns[:1]))
    with pytest.raises(DataError, match="role 'robot'"):
        template.supervised(row(conversations=[{"from": "robot", "value": "x"}]))


def test_placeholder_text_is_removed_where_the_format_writes_it(kit):
    data = kit.image_bytes(kit.random_image())
    values = row(question="<image>\nwhat?", image=data, chosen="a", rejected="b")
    pair = TEMPLATES["SPA_VL"].preference(values)
    assert pair.messages[-1].text == "what?" and pair.messages[0].role == "system"
    video = TEMPLATES["AA_TV2T"].prompt(
        row(prompt="<video>\nwhy?", video_path="./v.mp4"), decode=False
    )
    assert video.messages[-1].text == "why?" and video.media[0].path == "./v.mp4"
    literal = TEMPLATES["AA_TI2T"].prompt(row(question="the tag <image>", image=data))
    assert literal.messages[-1].text == "the tag <image>"


FORMATS = {
    "Alpaca": (dict(instruction="add", input="1 2", output="3"), "add 1 2", "3"),
    "GSM8K": (dict(question="1+1", answer="2"), "1+1", "2"),
    "TLDR": (dict(content="long", summary="s"), "summarize the following text: long", "s"),
    "Aligner": (dict(question="q", answer="a", correction="c"), "##ANSWER: a", "##CORRECTION: c"),
    "O1_T2T": (
        dict(prompt="p", thoughts=[{"title": "t", "content": "c"}], answer="a"),
        "p",
        "<think>**t**\nc\n\n</think>a",
    ),
    "Math-Zero-RL": (dict(question="1+1", answer="2"), "1+1", "2"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_text_formats(name):
    values, prompt, answer = FORMATS[name]
    example = TEMPLATES[name].supervised(row(**values))
    assert prompt in example.messages[-1].text and texts(example) == [answer]


IMAGE_FORMATS = {
    "GQA": (dict(question="q", answer="a"), "q", "a"),
    "OK-VQA": (dict(question="q", answers=["x", "y", "y"]), "q", "y"),
    "A-OKVQA": (
        dict(question="q", choices=["u", "v"], correct_choice_idx=1, rationales=["r."]),
        "q",
        "v. r.",
    ),
    "OCRVQA": (dict(questions=["a", "b"], answers=["1", "2"]), "a\nb", "1\n2"),
}


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_image_formats(name, kit):
    values, prompt, answer = IMAGE_FORMATS[name]
    values = {**values, "image": kit.image_bytes(kit.random_image())}
    example = TEMPLATES[name].supervised(row(**values))
    assert prompt in example.messages[-1].text and texts(example) == [answer]
    assert len(example.media) == 1


def test_audio_formats():
    wave = {"array": [0.0, 0.1], "sampling_rate": 16000}
    pair = TEMPLATES["AA_TA2T"].preference(row(**AA, prompt="p", audio_path=wave))
    assert pair.messages[0].role == "system" and pair.media[0].sampling_rate == 16000
    speech = TEMPLATES["LibriSpeech"].supervised(row(audio=b"RIFF", text="HELLO"))
    assert texts(speech) == ["hello"]


def test_generated_media_are_responses(kit):
    images = [kit.image_bytes(kit.random_image(seed)) for seed in (0, 1)]
    values = row(prompt="draw", image_1=images[0], image_2=images[1], overall_image=2)
    pair = TEMPLATES["AA_T2I"].preference(values)
    assert [r.content[0].index for r in pair.responses] == [0, 1]
    expected = np.asarray(kit.random_image(1))
    np.testing.assert_array_equal(np.asarray(pair.media[0]), expected)
    tie = row(caption="c", label_0=0.5, label_1=0.5, jpg_0=images[0], jpg_1=images[1])
    with pytest.raises(InvalidRow, match="tie"):
        TEMPLATES["Pickapic"].preference(tie)
    won = TEMPLATES["Pickapic"].preference(row(**{**tie, "label_0": 0, "label_1": 1}))
    np.testing.assert_array_equal(np.asarray(won.media[0]), expected)
    sora = dict(prompt_text="p", helpfulness="video_1")
    sora |= {f"video_{i}": {"video_path": f"{i}.mp4"} for i in (0, 1)}
    videos = TEMPLATES["SafeSora"].preference(row(**sora), decode=False)
    assert [item.path for item in videos.media] == ["1.mp4", "0.mp4"]
    better, worse = TEMPLATES["AA_T2I"].unpaired(values)
    assert (better.meta["label"], worse.meta["label"]) == (1, 0)
    for alone, whole in ((better, 0), (worse, 1)):  # each with its own medium, at index 0
        assert [part.index for part in alone.responses[0].media] == [0]
        np.testing.assert_array_equal(np.asarray(alone.media[0]), np.asarray(pair.media[whole]))


def test_own_columns(kit):
    data = kit.image_bytes(kit.random_image())
    template = from_columns({"prompt": "q", "image": "pic", "chosen": "good", "rejected": "bad"})
    pair = template.preference(row(q="what?", pic=data, good="yes", bad="no"))
    assert texts(pair) == ["yes", "no"] and len(pair.media) == 1
    labelled = from_columns({"prompt": "q", "response_1": "a", "response_2": "b", "label": "l"})
    assert texts(labelled.preference(row(q="?", a="x", b="y", l=2))) == ["y", "x"]
    judged = from_columns({"prompt": "q", "response": "a", "critique": "c"})
    (feedback,) = judged.feedback(row(q="?", a="x", c="bad"))
    assert texts(feedback) == ["bad"] and texts(judged.supervised(row(q="?", a="x"))) == ["x"]


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"prompt": "q", "answer": "a"}, "unknown answer"),
        ({"response": "a"}, "'prompt' is missing"),
        ({"prompt": "q", "chosen": "a"}, "'chosen' needs rejected"),
        ({"prompt": "q", "critique": "c"}, "needs 'response'"),
    ],
)
def test_wrong_own_columns(columns, words):
    with pytest.raises(DataError, match=words):
        from_columns(columns)


def test_find_template_errors():
    with pytest.raises(DataError, match="Did you mean 'AA_TI2T'"):
        find_template("AA_TI2")
    with pytest.raises(DataError, match="not both"):
        find_template("AA_TI2T", {"prompt": "q"})
    with pytest.raises(DataError, match="Unknown task 'dpo'.*preference"):
        read(TEMPLATES["AA_T2T"], "dpo", row(**AA))
    template = TEMPLATES["AA_T2T"]
    assert find_template(template) is template
