"""How conversations with audio are written where a checkpoint folder does not say.

Qwen2-Audio's published folders hold a text template only; its processor numbers the clips.
"""

AUDIO_TOKEN = "<|AUDIO|>"

QWEN2_AUDIO_TEMPLATE = (
    "{% set clips = namespace(seen=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{% set clips.seen = clips.seen + 1 %}"
    "{{ 'Audio ' ~ clips.seen ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
