"""Qwen text models: config.json's `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""
