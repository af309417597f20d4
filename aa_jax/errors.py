"""The errors a user meets: one paragraph each, naming the cause and the fix."""


class AaJaxError(ValueError):
    """Base of every error aa_jax raises on purpose; launchers print it without a traceback."""


class ConfigError(AaJaxError):
    """A config key is unknown, has the wrong type, or names something that does not exist."""


class DataError(AaJaxError):
    """A row, column or file of a dataset cannot be used as asked."""


class MediaError(DataError):
    """An image, audio clip or video cannot be read, or does not match its placeholders."""


class ModelError(AaJaxError):
    """A model configuration is unknown or holds an attribute that is not handled."""


class CheckpointError(AaJaxError):
    """A checkpoint is missing, damaged, or belongs to another model."""
