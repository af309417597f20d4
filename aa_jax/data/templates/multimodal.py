"""Templates with images, audio or video in the prompt and text as the answer."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aa_jax.data.example import InvalidRow, Message, Part, message
from aa_jax.data.templates.base import Side, Template, _Media, _where, column, text_column
from aa_jax.data.templates.text import AA_TEXT, CHOSEN_REJECTED, LLF, PAIR_12, QUESTION
from aa_jax.errors import DataError

IMAGE = (("image", ("image", "images", "image_path", "image_url")),)
AUDIO = (("audio", ("audio_path", "audio")),)
VIDEO = (("video", ("video_path", "video")),)
HELPFUL_SYSTEM = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# Some sets write the placeholder into the text; the image part already stands for it.
IMAGE_MARKS = ("<image>\n", "\n<image>", "<image>")
VIDEO_MARKS = ("<video>\n", "\n<video>", "<video>")


@dataclasses.dataclass(frozen=True)
class SafetyCost(Template):
    """SafeRLHF-V cost: the *less safe* response first, as the cost model ranks it higher.

    ``meta["signs"]`` = minus the harmless rates of (first, second), the graded sign of each cost.
    """

    def order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        safer, other = super().order(row)
        return other, safer

    def extra(self, row, order) -> dict[str, Any]:
        rates = [f"response_{i}_harmless_rate" for i in (1, 2)]
        if order is None or not all(name in row for name in rates):
            return super().extra(row, order)
        signs = tuple(-float(column(row, (rates[i],))) for i in order)
        return {**super().extra(row, order), "signs": signs}


@dataclasses.dataclass(frozen=True)
class Conversation(Template):
    """LLaVA-style ``conversations``: ``[{"from": "human"|"gpt", "value": ...}, ...]``.

    ``<image>`` in a human turn says which turn the image belongs to; without one it belongs to
    the first. The last assistant turn is the response, the earlier ones are history.
    """

    roles: tuple[tuple[str, str], ...] = (
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("system", "system"),
    )

    def _turns(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        roles, turns = dict(self.roles), []
        for turn in column(row, ("conversations", "messages", "conversation"), "conversation"):
            role = turn.get("from", turn.get("role"))
            text = turn.get("value", turn.get("content"))
            if role not in roles or not isinstance(text, str):
                raise DataError(
                    f"{_where(row)}: a turn has role {role!r} and a {type(text).__name__}; "
                    f"expected one of {', '.join(roles)} and text."
                )
            turns.append((roles[role], text))
        while turns and turns[-1][0] != "assistant":
            turns.pop()  # a trailing question nobody answered
        if len(turns) < 2:
            raise InvalidRow("no answered turn", f"{_where(row)}: no question with an answer.")
        return turns

    def messages(self, row: Mapping[str, Any], media: _Media) -> tuple[Message, ...]:
        turns = self._turns(row)[:-1]
        images = list(media.parts(self.media)) if self._has_image(row) else []
        marked = [i for i, (role, text) in enumerate(turns) if role == "user" and "<image>" in text]
        first = marked or [i for i, (role, _) in enumerate(turns) if role == "user"][:1]
        messages = list(self._system())
        for i, (role, text) in enumerate(turns):
            parts: list[Part] = []
            if i in first and images:
                last = i == first[-1]
                count = len(images) if last else max(1, text.count("<image>"))
                parts, images = images[:count], images[count:]
            if role == "user" and "<image>" in text:
                for mark in IMAGE_MARKS:
                    text = text.replace(mark, "")
            messages.append(message(role, text, parts))
        return tuple(messages)

    @staticmethod
    def _has_image(row: Mapping[str, Any]) -> bool:
        # A mixed set holds text-only conversations: no column, or null.
        return any(row.get(name) not in (None, []) for _, names in IMAGE for name in names)

    def _response(self, row, side, media) -> Message:
        text = self._turns(row)[-1][1]
        if not text.strip():
            raise InvalidRow("empty response", f"{_where(row)}: the last answer is empty.")
        return message("assistant", text)


@dataclasses.dataclass(frozen=True)
class QuestionList(Template):
    """Several questions about one image, answered in order."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        questions = column(row, ("questions",), "prompt")
        return "Answer the following questions about the image in order.\n" + "\n".join(questions)

    def _response(self, row, side, media) -> Message:
        return message("assistant", "\n".join(column(row, ("answers",), "response")))


@dataclasses.dataclass(frozen=True)
class MajorityAnswer(Template):
    """OK-VQA: several annotators; the most frequent answer (first on ties)."""

    def _response(self, row, side, media) -> Message:
        answers = column(row, ("answers",), "response")
        return message("assistant", collections.Counter(map(str, answers)).most_common(1)[0][0])


@dataclasses.dataclass(frozen=True)
class ReasonedChoice(Template):
    """A-OKVQA: the correct choice and why."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        return f"{super().prompt_text(row)} Give your reasons."

    def _response(self, row, side, media) -> Message:
        choices: Sequence[str] = column(row, ("choices",), "response")
        answer = choices[int(column(row, ("correct_choice_idx",)))]
        reasons = " ".join(column(row, ("rationales",)))
        return message("assistant", f"{answer}. {reasons}" if reasons else answer)


@dataclasses.dataclass(frozen=True)
class FixedQuestion(Template):
    """A captioning or transcription set: the same request for every row."""

    text: str = ""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Transcript(FixedQuestion):
    """LibriSpeech writes in capitals."""

    def _response(self, row, side, media) -> Message:
        return message("assistant", super()._response(row, side, media).text.lower())


@dataclasses.dataclass(frozen=True)
class SoundTags(FixedQuestion):
    """AudioSet: a list of sound events."""

    def _response(self, row, side, media) -> Message:
        events = ", ".join(column(row, ("captions",), "response"))
        return message("assistant", f"The audio contains {events}.")


@dataclasses.dataclass(frozen=True)
class Comparison(Template):
    """AA_textfeedback: both responses in the prompt, the comparative judgement as the answer."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        names = ("question", "response_1", "response_2")
        question, first, second = (text_column(row, (name,), "prompt") for name in names)
        return (
            "Compare two responses to the same question and say which is better.\n"
            f"##Question: {question}\n##Response 1: {first}\n##Response 2: {second}"
        )

    def messages(self, row, media) -> tuple[Message, ...]:
        kinds = [("image", (name,)) for _, (name,) in self.media if row.get(name)]
        return self._system() + (message("user", self.prompt_text(row), media.parts(kinds)),)


_AA_AUDIO = {**AA_TEXT, "question": ("prompt", "question"), "media": AUDIO}
_AA_VIDEO = {**_AA_AUDIO, "media": VIDEO, "strip": VIDEO_MARKS}

MULTIMODAL_TEMPLATES: dict[str, Template] = {
    "AA_TI2T": Template(**AA_TEXT, media=IMAGE),
    "AA_TI2T_LLF": Template(**LLF, media=IMAGE),
    "AA_TA2T": Template(**_AA_AUDIO, system=HELPFUL_SYSTEM),
    "AA_TA2T_LLF": Template(**LLF, media=AUDIO, system=HELPFUL_SYSTEM),
    "AA_TV2T": Template(**_AA_VIDEO),
    "AA_TV2T_LLF": Template(**LLF, media=VIDEO, strip=VIDEO_MARKS),
    "AA_textfeedback": Comparison(
        response=Side(("feedback",)),
        media=tuple(
            ("image", (name,)) for name in ("image_url", "output_image_url_1", "output_image_url_2")
        ),
    ),
    "SafeRLHF_V_Reward": Template(
        question=QUESTION,
        media=IMAGE,
        response=Side(("response",)),
        pair=PAIR_12,
        label=("more_helpful_response_id",),
    ),
    "SafeRLHF_V_Cost": SafetyCost(
        question=QUESTION,
        media=IMAGE,
        response=Side(("response",)),
        pair=PAIR_12,
        label=("safer_response_id",),
    ),
    "RLAIFV": Template(question=QUESTION, media=IMAGE, pair=CHOSEN_REJECTED, strip=IMAGE_MARKS),
    "SPA_VL": Template(
        question=QUESTION,
        media=IMAGE,
        pair=CHOSEN_REJECTED,
        strip=IMAGE_MARKS,
        system=VICUNA_SYSTEM,
    ),
    "Janus_TI2T": Template(
        question=("prompt", "question"),
        media=IMAGE,
        response=Side(("response",)),
        pair=(Side(("better_response",)), Side(("worse_response",))),
    ),
    "LLaVA_Instruct": Conversation(media=IMAGE, response=Side(("conversations",))),
    "LLaVA_Pretrain": Conversation(media=IMAGE, response=Side(("conversations",))),
    "ShareGPT-4o": Conversation(media=IMAGE, response=Side(("conversations",))),
    "GQA": Template(question=("question",), media=IMAGE, response=Side(("answer",))),
    "OK-VQA": MajorityAnswer(question=("question",), media=IMAGE, response=Side(("answers",))),
    "A-OKVQA": ReasonedChoice(question=("question",), media=IMAGE, response=Side(("choices",))),
    "OCRVQA": QuestionList(media=IMAGE, response=Side(("answers",))),
    "VisualGenome": QuestionList(media=IMAGE, response=Side(("answers",))),
    "Qwen2-VL": Template(
        media=VIDEO,
        response=Side(("output",)),
        pair=(Side(("better_output",)), Side(("worse_output",))),
        strip=VIDEO_MARKS,
    ),
    "OpenAQA": Template(
        question=("instruction",),
        media=(("audio", ("audio_id",)),),
        response=Side(("output",)),
        system=HELPFUL_SYSTEM,
    ),
    "AudioCaps": FixedQuestion(
        text="Describe this audio.",
        media=(("audio", ("audiocap_path",)),),
        response=Side(("caption",)),
    ),
    "AudioSet": SoundTags(text="What can be heard?", media=AUDIO, response=Side(("captions",))),
    "LibriSpeech": Transcript(
        text="Write down what is said.", media=AUDIO, response=Side(("text",))
    ),
}
