"""LLaVA-NeXT: config.json's `LlavaNextForConditionalGeneration`."""
