"""Qwen2-VL and Qwen2.5-VL: `Qwen2VL...` and `Qwen2_5_VLForConditionalGeneration`."""
