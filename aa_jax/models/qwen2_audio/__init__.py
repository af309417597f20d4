"""Qwen2-Audio: config.json's `Qwen2AudioForConditionalGeneration`."""
