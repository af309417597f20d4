"""Llama: config.json's `LlamaForCausalLM`."""
