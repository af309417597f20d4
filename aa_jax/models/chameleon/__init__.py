"""Chameleon: config.json's `ChameleonForConditionalGeneration`, and its VQGAN image tokenizer."""
