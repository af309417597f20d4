"""Whisper's audio encoder, used inside multimodal families."""
