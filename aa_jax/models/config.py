"""Reads a Hugging Face config.json strictly: what is not understood is refused by name."""

from collections.abc import Iterable
from typing import Any

from aa_jax.errors import ModelError
from aa_jax.models.layers import ACTIVATIONS
from aa_jax.models.rope import KINDS, Rope, is_number, unusable

# Attributes every transformers config may carry that leave the forward pass as it is:
# bookkeeping, generation defaults, classification labels, output switches.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
    """.split()
)

# Attributes that would change the model, with the only values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "attention_dropout": (0, 0.0, None),
    "dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
}


class Reader:
    """Takes attributes out of a config dict and collects everything wrong with it.

    Args:
        raw: the decoded config.json, or one of its sub-configs.
        where: how messages name it, e.g. "text_config".
        problems: shared list when several readers report together.
    """

    def __init__(self, raw: dict[str, Any], where: str, problems: list[str] | None = None):
        self.raw = raw
        self.where = where
        self.problems: list[str] = [] if problems is None else problems
        self._seen: set[str] = set()

    def problem(self, name: str, text: str) -> None:
        """Notes that attribute ``name`` is unusable."""
        self.problems.append(f"{self.where}.{name} {text}")

    def get(self, name: str, default: Any) -> Any:
        """The attribute as it stands; absent or null means the default."""
        self._seen.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def size(self, name: str, default: int) -> int:
        """A positive whole number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(name, f"is {value!r}; it must be a positive whole number")
            return default
        return value

    def number(self, name: str, default: float) -> float:
        """A real number, not below 0."""
        value = self.get(name, default)
        if not is_number(value) or value < 0:
            self.problem(name, f"is {value!r}; it must be a number, not below 0")
            return default
        return float(value)

    def token(self, name: str, default: int, vocab_size: int) -> int:
        """A token's id; the default is not held against a smaller vocabulary."""
        value = self.get(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            self.problem(name, f"is {value!r}, not one of {vocab_size} tokens")
            return default
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.problem(name, f"is {value!r}; it must be true or false")
            return default
        return value

    def choice(self, name: str, default: str, choices: Iterable[str]) -> str:
        """One of the names there are."""
        value = self.get(name, default)
        choices = sorted(choices)
        if value not in choices:
            self.problem(name, f"is {value!r}; it must be one of {', '.join(choices)}")
            return default
        return value

    def activation(self, name: str, default: str) -> str:
        """A key of `layers.ACTIVATIONS`."""
        return self.choice(name, default, ACTIVATIONS)

    def section(self, name: str) -> "Reader":
        """A reader for a sub-config that reports to the same list."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.problem(name, f"is {value!r}; it must be an object")
            value = {}
        return Reader(value, f"{self.where}.{name}" if self.where else name, self.problems)

    def rope(
        self, head_dim: int, max_positions: int, *, theta: float = 10000.0, mrope: bool = False
    ) -> Rope:
        """The rotary settings, in either spelling (`rope_parameters`, or `rope_theta` with
        `rope_scaling`).

        Args:
            head_dim: Dh.
            max_positions: max_position_embeddings.
            theta: base wavelength where the config names none.
            mrope: read `mrope_section`, the split of the angles over three position axes.
        """
        theta = self.number("rope_theta", theta)
        old, new = self.get("rope_scaling", {}), self.get("rope_parameters", {})
        name = "rope_scaling" if old else "rope_parameters"  # transformers' order
        if not isinstance(old or new, dict):
            self.problem(name, f"is {old or new!r}; it must be an object")
            return Rope("default", theta, head_dim, max_positions)
        values = {k: v for k, v in (old or new).items() if v is not None}
        kind = str(values.pop("rope_type", values.pop("type", "default")))
        values.pop("type", None)
        theta = values.pop("rope_theta", theta)
        if not is_number(theta) or theta <= 0:
            self.problem("rope_theta", f"is {theta!r}; it must be a number above 0")
            theta = 10000.0
        theta = float(theta)
        sections: tuple[int, ...] = ()
        if mrope:
            kind = "default" if kind == "mrope" else kind
            sections = self._mrope_sections(name, values.pop("mrope_section", (16, 24, 24)))
            if sum(sections) != head_dim // 2:
                self.problem(
                    name,
                    f"has mrope_section {list(sections)}, which must add up to half the head size, "
                    f"{head_dim // 2}",
                )
        if values.pop("partial_rotary_factor", 1.0) != 1.0:
            self.problem(name, "rotates only a part of each head (partial_rotary_factor)")
        if kind not in KINDS:
            self.problem(name, f"has rope_type {kind!r}; handled are {', '.join(sorted(KINDS))}")
            return Rope("default", theta, head_dim, max_positions)
        spec = KINDS[kind]
        for missing in sorted(set(spec.required) - set(values)):
            self.problem(name, f"of type {kind!r} lacks {missing!r}")
        for unknown in sorted(set(values) - set(spec.required) - set(spec.optional)):
            self.problem(name, f"of type {kind!r} holds {unknown!r}, which is not handled")
        wrong = list(unusable(values)) or spec.check(values, head_dim)
        for text in wrong:
            self.problem(name, f"of type {kind!r} {text}")
        if wrong:
            return Rope("default", theta, head_dim, max_positions, (), sections)
        scaling = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Rope(kind, theta, head_dim, max_positions, tuple(sorted(scaling.items())), sections)

    def _mrope_sections(self, name: str, value: Any) -> tuple[int, ...]:
        whole = isinstance(value, list | tuple) and len(value) == 3
        whole = whole and all(type(v) is int and v >= 0 for v in value)
        if not whole:
            self.problem(
                name,
                f"has mrope_section {value!r}; it must be three whole numbers, the angles that "
                "turn with time, height and width",
            )
        return tuple(value) if whole else ()

    def finish(self, inert: Iterable[str] = ()) -> None:
        """Notes every attribute that nobody read and that is not known to be inert."""
        for name in sorted(set(self.raw) - self._seen - INERT - set(inert)):
            value = self.raw[name]
            if name not in NEUTRAL:
                self.problem(name, f"(= {value!r}) is not handled")
            elif not any(value == neutral for neutral in NEUTRAL[name]):
                self.problem(name, f"is {value!r}; only {NEUTRAL[name][0]!r} is handled")

    def raise_problems(self, family: str) -> None:
        """One ModelError that lists all of them, if there are any."""
        if self.problems:
            listed = "\n  - ".join(self.problems)
            raise ModelError(
                f"This {family} configuration cannot be built faithfully:\n  - {listed}\n"
                "Each of these could change the model's outputs, so none is ignored; correct "
                "config.json or use a checkpoint of a supported architecture."
            )
