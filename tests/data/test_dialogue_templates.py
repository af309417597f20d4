"""HH-RLHF, UltraFeedback and RLHF-V rows, in the layout of their data cards."""

import json

import pytest

from aa_jax.data.example import InvalidRow, Row
from aa_jax.data.templates import TEMPLATES
from aa_jax.errors import DataError

HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Name a colour.\n\nAssistant: "


def row(**values):
    return Row.of(values, where="f.jsonl:3")


def turns(example):
    return [(turn.role, turn.text) for turn in example.messages]


def test_hh_rlhf():
    values = row(chosen=HH + "Red.", rejected=HH + "No: Human: never mind.")
    pair = TEMPLATES["HH-RLHF"].preference(values)
    assert turns(pair) == [("user", "Hi."), ("assistant", "Hello!"), ("user", "Name a colour.")]
    assert [r.text for r in pair.responses] == ["Red.", "No: Human: never mind."]
    assert turns(TEMPLATES["HH-RLHF"].prompt(values)) == turns(pair)
    assert TEMPLATES["HH-RLHF"].prompt(values).responses == ()
    (answer,) = TEMPLATES["HH-RLHF"].supervised(values).responses
    assert answer.text == "Red."
    assert [e.meta["label"] for e in TEMPLATES["HH-RLHF"].unpaired(values)] == [1, 0]


def test_ultrafeedback():
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]

    def dialogue(answer):
        return [*start, {"role": "assistant", "content": answer}]

    pair = TEMPLATES["UltraFeedback"].preference(
        row(prompt="1 + 1?", chosen=dialogue("2"), rejected=dialogue("3"), score_chosen=8.0)
    )
    assert turns(pair) == [("system", "Be brief."), ("user", "1 + 1?")]
    assert [r.text for r in pair.responses] == ["2", "3"]


def test_rlhf_v():
    text = json.dumps({"question": "What is it?", "chosen": "A dog.", "rejected": "A cat."})
    values = row(image=b"\x89PNG", text=text, ds_name="RLHF-V")
    pair = TEMPLATES["RLHF-V"].preference(values, decode=False)
    assert turns(pair) == [("user", "What is it?")] and len(pair.media) == 1
    assert [r.text for r in pair.responses] == ["A dog.", "A cat."]


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("HH-RLHF", dict(chosen=HH + "a", rejected=HH.replace("colour", "fruit") + "b"),
         "different prompts"),
        ("HH-RLHF", dict(chosen=HH + "a", rejected=HH + "a"), "identical responses"),
        ("HH-RLHF", dict(chosen=HH, rejected=HH + "b"), "empty response"),
        ("HH-RLHF", dict(chosen=HH + "a\n\nHuman: why?", rejected=HH + "b"),
         "no answer to a prompt"),
        ("RLHF-V", dict(image=b"x", text="{"), "broken JSON"),
        ("RLHF-V", dict(image=b"x", text=json.dumps(dict(question="q", chosen="", rejected="b"))),
         "empty response"),
    ],
)  # fmt: skip
def test_useless_rows_are_counted_by_reason(name, values, reason):
    with pytest.raises(InvalidRow, match="f.jsonl:3") as error:
        TEMPLATES[name].preference(row(**values), decode=False)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("HH-RLHF", dict(chosen="plain", rejected="text"), "is no dialogue.*chosen_rejected"),
        ("UltraFeedback", dict(chosen=[{"text": "x"}], rejected=[]), "is no dialogue"),
        ("RLHF-V", dict(image=b"x", text="[1]"), "no JSON object"),
        ("RLHF-V", dict(image=b"x", text=json.dumps({"question": "q", "chosen": "c"})),
         "no column 'rejected'"),
    ],
)  # fmt: skip
def test_other_formats_are_named(name, values, words):
    with pytest.raises(DataError, match=words):
        TEMPLATES[name].preference(row(**values), decode=False)
