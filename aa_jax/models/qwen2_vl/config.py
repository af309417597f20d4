"""What of a Qwen2-VL or Qwen2.5-VL config.json decides the model."""

import dataclasses
from typing import Any

from aa_jax.models.config import INERT as BOOKKEEPING
from aa_jax.models.config import Reader
from aa_jax.models.decoder import DecoderConfig, Defaults, read_sizes
from aa_jax.models.qwen.modeling import read_window
from aa_jax.models.rope import is_number

TEXT_DEFAULTS = Defaults(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    max_positions=32768,
    norm_eps=1e-5,
    rope_theta=1e6,
)
# They name tokens of the prompt's text; only the data side writes them.
INERT = ("vision_start_token_id", "vision_end_token_id", "vision_token_id")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        hidden_size: Dv, the tower's width.
        intermediate_size: width inside an MLP.
        num_layers: number of layers.
        num_heads: heads; a head's size is a multiple of 4 (two axes, two numbers per angle).
        num_channels: colour channels.
        patch_size: edge of a patch, pixels.
        frames_per_patch: frames one patch spans.
        merge_size: a square of merge_size² patches makes one feature.
        out_size: width of a feature, the decoder's.
        hidden_act: key of `layers.ACTIVATIONS`.
        rope_theta: base wavelength of the rotary angles.
        gated: Qwen2.5's layers: RMSNorms and a gated MLP, instead of LayerNorms and a plain one.
        window: edge of an attention window in features; None: a frame sees all of itself.
        full_layers: the layers without windows.
        initializer_range: standard deviation of fresh weights.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    patch_size: int
    frames_per_patch: int
    merge_size: int
    out_size: int
    hidden_act: str
    rope_theta: float
    gated: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    initializer_range: float = 0.02

    @property
    def patch_numbers(self) -> int:
        """Numbers in one patch of pixels."""
        return self.num_channels * self.frames_per_patch * self.patch_size**2

    @classmethod
    def read(cls, reader: Reader, *, windowed: bool) -> "VisionConfig":
        """Takes the attributes out of ``reader``; ``windowed`` reads Qwen2.5's tower."""
        heads = _either(reader, "num_heads", "num_attention_heads", 16)
        sizes = dict(
            num_layers=_either(reader, "depth", "num_hidden_layers", 32),
            num_heads=heads,
            num_channels=reader.size("in_channels", 3),
            patch_size=reader.size("patch_size", 14),
            frames_per_patch=reader.size("temporal_patch_size", 2),
            merge_size=reader.size("spatial_merge_size", 2),
            rope_theta=_axial_theta(reader),
            initializer_range=reader.number("initializer_range", 0.02),
        )
        if windowed:
            hidden = reader.size("hidden_size", 3584)
            config = cls(
                hidden_size=hidden,
                intermediate_size=reader.size("intermediate_size", 3420),
                out_size=reader.size("out_hidden_size", 3584),
                hidden_act=reader.activation("hidden_act", "silu"),
                gated=True,
                window=_window(reader, sizes),
                full_layers=_full_layers(reader, sizes["num_layers"]),
                **sizes,
            )
        else:
            hidden = reader.size("embed_dim", 1280)
            config = cls(
                hidden_size=hidden,
                intermediate_size=int(hidden * reader.number("mlp_ratio", 4.0)),
                out_size=reader.size("hidden_size", 3584),
                hidden_act=reader.activation("hidden_act", "quick_gelu"),
                **sizes,
            )
            if not config.intermediate_size:
                reader.problem("mlp_ratio", f"is {reader.raw['mlp_ratio']!r}, which leaves no MLP")
        if hidden % (4 * heads):
            reader.problem(
                "num_heads",
                f"= {heads} does not split the width {hidden} into heads of a multiple of 4",
            )
        for old, value in (
            ("in_chans", config.num_channels),
            ("spatial_patch_size", config.patch_size),
        ):
            if reader.get(old, value) != value:
                reader.problem(old, f"is {reader.raw[old]!r}, but the tower is built for {value}")
        reader.finish(inert=("tokens_per_second",))  # it spaces a video's positions: data's part
        return config


def _either(reader: Reader, name: str, other: str, default: int) -> int:
    """A size with two spellings."""
    value = reader.size(name if name in reader.raw else other, default)
    if name in reader.raw and reader.get(other, value) != value:
        reader.problem(other, f"is {reader.raw[other]!r}, but {name} is {value}")
    return value


def _axial_theta(reader: Reader) -> float:
    rope = reader.get("rope_parameters", {})
    theta = reader.number("rope_theta", 10000.0)
    if not isinstance(rope, dict) or rope.get("rope_type", "axial") not in ("axial", "default"):
        reader.problem("rope_parameters", f"is {rope!r}; only the rope_type 'axial' is handled")
        return theta
    theta = theta if rope.get("rope_theta") is None else rope["rope_theta"]
    if not is_number(theta) or theta <= 0:
        reader.problem("rope_parameters", f"has rope_theta {theta!r}; it must be a number above 0")
        return 10000.0
    return float(theta)


def _window(reader: Reader, sizes: dict[str, Any]) -> int:
    pixels = reader.size("window_size", 112)
    features = pixels // sizes["merge_size"] // sizes["patch_size"]
    if not features:
        reader.problem("window_size", f"= {pixels} pixels is smaller than one feature")
    return max(features, 1)


def _full_layers(reader: Reader, layers: int) -> tuple[int, ...]:
    indices = reader.get("fullatt_block_indexes", (7, 15, 23, 31))
    if not isinstance(indices, list | tuple) or not all(isinstance(i, int) for i in indices):
        reader.problem("fullatt_block_indexes", f"is {indices!r}; it must be a list of layers")
        return ()
    return tuple(i for i in indices if 0 <= i < layers)


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """The whole model.

    Attributes:
        text: the decoder; its rotary positions have three axes.
        vision: the tower.
        image_token_id: the placeholder that stands for one feature of an image.
        video_token_id: the same for videos.
    """

    text: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    WINDOWED = False

    @classmethod
    def read(cls, reader: Reader) -> "Qwen2VLConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        vision = VisionConfig.read(reader.section("vision_config"), windowed=cls.WINDOWED)
        text_reader = _text_reader(reader)
        text = _read_text(text_reader)
        flat = text_reader is reader
        tied = reader.flag("tie_word_embeddings", False) or text.tied  # either place ties
        config = cls(
            text=dataclasses.replace(text, tied=tied),
            vision=vision,
            image_token_id=reader.token("image_token_id", 151655, text.vocab_size),
            video_token_id=reader.token("video_token_id", 151656, text.vocab_size),
        )
        if config.image_token_id == config.video_token_id:
            reader.problem("video_token_id", f"= {config.video_token_id} is image_token_id too")
        for part in (text_reader, reader.section("vision_config")):
            # transformers reads either part by its own class, whatever it is called.
            if not str(kind := part.get("model_type", "qwen2")).startswith("qwen2"):
                part.problem("model_type", f"is {kind!r}; only parts of Qwen2-VL are handled")
        if vision.out_size != text.hidden_size:
            reader.problem(
                "vision_config",
                f"gives features of width {vision.out_size} to a decoder of {text.hidden_size}",
            )
        if not flat:
            _check_repeated(reader, text_reader)
            text_reader.finish(inert=("image_token_id", "video_token_id", *INERT))
        reader.finish(inert=INERT)
        return config


class Qwen25VLConfig(Qwen2VLConfig):
    """Qwen2.5-VL: the same with windows in the tower."""

    WINDOWED = True


def _text_reader(reader: Reader) -> Reader:
    """The decoder's attributes: in their own section, or, in older files, at the top."""
    return reader.section("text_config") if reader.get("text_config", None) else reader


def _check_repeated(reader: Reader, text: Reader) -> None:
    """Some versions wrote the decoder's attributes in both places."""
    own = {"tie_word_embeddings", "image_token_id", "video_token_id", *INERT, *BOOKKEEPING}
    for name in sorted(set(reader.raw) & set(text.raw) - own):
        if reader.get(name, None) != text.raw[name]:
            reader.problem(
                name, f"is {reader.raw[name]!r}, but text_config.{name} is {text.raw[name]!r}"
            )


def _read_text(reader: Reader) -> DecoderConfig:
    sizes = read_sizes(reader, TEXT_DEFAULTS, mrope=True)
    window = read_window(reader, sizes["num_layers"], first=80)
    if sizes["head_dim"] * sizes["num_heads"] != sizes["hidden_size"]:
        reader.problem(
            "hidden_size",
            f"= {sizes['hidden_size']} is not {sizes['num_heads']} heads of {sizes['head_dim']}",
        )
    return DecoderConfig(**sizes, **window, qkv_bias=True)
