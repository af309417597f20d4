"""LLaVA: config.json's `LlavaForConditionalGeneration`."""
