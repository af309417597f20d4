"""Written addition and subtraction, for rewards that are rules: problems, steps, a tokenizer.

A solution works through the columns from the right, ``x + y + carry = carry digit``, as one learns
it at school, between ``<think>`` tags, and gives the result between ``<answer>`` tags. Its
demonstrators slip: with a given probability they forget a carry or borrow, so a model that imitates
them is often wrong although it knows every step.
"""

import dataclasses
from pathlib import Path

import numpy as np

from aa_jax.data.example import Example, message
from aa_jax.errors import ConfigError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (
    *("USER:", "ASSISTANT:", "<think>", "</think>", "<answer>", "</answer>"),
    *(str(digit) for digit in range(10)),
    *("+", "-", "=", ",", "?"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """``first operation second``, numbers of `digits` digits; a difference is never negative."""

    first: int
    second: int
    operation: str
    digits: int

    @property
    def question(self) -> str:
        """The user's text; digits stand apart."""
        sides = (_spaced(n, self.digits) for n in (self.first, self.second))
        return f" {self.operation} ".join(sides) + " = ?"

    @property
    def answer(self) -> str:
        """The result with one digit more than the operands, leading zeros included."""
        sign = 1 if self.operation == "+" else -1
        return _spaced(self.first + sign * self.second, self.digits + 1)

    def solution(self, rng: np.random.Generator | None = None, slip: float = 0.0) -> str:
        """The steps and the answer they lead to.

        Args:
          rng: decides where the demonstrator slips; None: nowhere.
          slip: probability that a column's carry or borrow is forgotten.
        """
        sign = 1 if self.operation == "+" else -1
        carry, steps, result = 0, [], []
        for column in range(self.digits):
            x, y = (n // 10**column % 10 for n in (self.first, self.second))
            total = x + sign * (y + carry)
            then, digit = abs(total // 10), total % 10
            if then and rng is not None and rng.random() < slip:
                then = 0
            steps.append(f"{x} {self.operation} {y} {self.operation} {carry} = {then} {digit}")
            result.append(digit)
            carry = then
        # A borrow is never left over: first >= second.
        result.append(carry if sign > 0 else 0)
        answer = " ".join(map(str, reversed(result)))
        return f"<think> {' , '.join(steps)} </think> <answer> {answer} </answer>"

    def example(self, response: str | None = None) -> Example:
        """As data: a prompt, or with a response a demonstration; the answer is the reference."""
        responses = () if response is None else (response,)
        return Example(
            (message("user", self.question),), responses, meta={"reference": self.answer}
        )


def _spaced(number: int, digits: int) -> str:
    return " ".join(f"{number:0{digits}d}")


def problems(count: int, seed: int, split: str, *, digits: int = 2) -> list[Problem]:
    """Problems of a split, drawn with replacement; every fifth pair of operands is a test pair.

    Args:
      count: how many.
      seed: of the draw.
      split: "train" or "test".
      digits: of each operand.

    Raises:
      ConfigError: no such split, or digits below 1.
    """
    if split not in ("train", "test") or digits < 1:
        raise ConfigError(f"split is {split!r} (train or test), digits {digits} (at least 1).")
    rng = np.random.default_rng([seed, split == "test"])
    found: list[Problem] = []
    while len(found) < count:
        first, second = (int(n) for n in rng.integers(0, 10**digits, 2))
        operation = "+-"[rng.integers(2)]
        if operation == "-" and first < second:
            first, second = second, first
        # A fixed scramble of the pair: neighbours fall into different splits.
        held = (first * 7919 + second * 104729) % 5 == 0
        if held == (split == "test"):
            found.append(Problem(first, second, operation, digits))
    return found


def write_processor(folder: str | Path) -> Path:
    """Writes a word-level tokenizer with a chat template; transformers reads it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *WORDS]
    pad, bos, eos, unk = SPECIAL_TOKENS
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, words.index(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
        clean_up_tokenization_spaces=False, padding_side="right", model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return Path(folder)


def model_config(
    *, dim: int = 64, layers: int = 2, heads: int = 4, mlp_dim: int = 160
) -> dict[str, object]:
    """config.json of a small Llama for this vocabulary.

    Args:
      dim: width.
      layers: depth.
      heads: attention heads.
      mlp_dim: width of the SwiGLU.
    """
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": len(SPECIAL_TOKENS) + len(WORDS), "hidden_size": dim,
        "intermediate_size": mlp_dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
