"""What families with a tower and a decoder share: features stand where their tokens are."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from aa_jax.errors import ModelError
from aa_jax.models.decoder import Batch, Cache, Decoder
from aa_jax.models.layers import place_features


class Multimodal(nnx.Module):
    """A base that needs ``language_model`` (a `Decoder`), ``dtype`` and ``encode_media``."""

    language_model: Decoder
    dtype: Any

    def head_weight(self) -> Float[Array, "V D"]:
        """The output head, one row per token of the vocabulary."""
        return self.language_model.head_weight()

    def embed(self, batch: Batch, features: Float[Array, "B F D"] | None) -> Float[Array, "B T D"]:
        """Token embeddings with the features put where their tokens stand."""
        x = self.language_model.embed(batch["tokens"], self.dtype)
        if features is None and "media" in batch:
            features = self.encode_media(batch["media"])
        if (features is None) != ("feature_index" not in batch):
            raise ModelError(
                "A batch with images needs both 'feature_index' and either 'media' or features; "
                f"this one has {sorted(batch)} and features "
                f"{'given' if features is not None else 'absent'}. Build it with "
                "aa_jax.data.collate, or drop the images for a text-only batch."
            )
        if features is None:
            return x
        return place_features(x, features, batch["feature_index"])

    def hidden_states(
        self, batch: Batch, features: Float[Array, "B F D"] | None
    ) -> Float[Array, "B T D"]:
        """Family interface."""
        x = self.embed(batch, features)
        return self.language_model.run(x, batch["positions"], batch["intervals"])

    def prefill(
        self, batch: Batch, cache_size: int, features: Float[Array, "B F D"] | None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Family interface."""
        return self.language_model.run_prefill(self.embed(batch, features), batch, cache_size)

    def decoder(self) -> Callable[[Array, Cache], tuple[Array, Cache]]:
        """Family interface."""
        return self.language_model.decoder()
