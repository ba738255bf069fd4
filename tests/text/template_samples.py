"""Chat templates as people publish them, written otherwise than ours of the same format."""

JOINED = """{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
SKIPS_EMPTY_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and m.content %}{{'<|system|>\\n' + m.content + '<|end|>\\n'}}"
    "{% elif m.role == 'user' %}{{'<|user|>\\n' + m.content + '<|end|>\\n'}}{% elif m.role == 'assistant' %}"
    "{{'<|assistant|>\\n' + m.content + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\\n' + message['content'] + "
    "'<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
IM = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
IM += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
