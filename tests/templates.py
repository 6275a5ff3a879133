"""Chat templates of real model families, short but with their tokens and white space, as data for tests.

Of each: its tokenizer's kind, its control tokens, what it writes for one question ("2+2?") up to the answer (`asked`),
and for the answer "4" from there to the end of the turn (`written`, with `end` the token at which the model stops).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """`kind`: byte (byte-level), spaced (SentencePiece with a space before every text), plain (without one)."""

    kind: str
    template: str | None
    asked: str
    written: str
    end: str
    bos: str | None = None  # put before every text by the tokenizer's own encoding
    eos: str | None = None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # single tokens that are not special
    rstrip: tuple[str, ...] = ()  # tokens that swallow the white space behind them
    generation_ends: tuple[str, ...] = field(default=())  # of the model's generation_config


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
CHATML_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
FAMILIES = {
    "llama 2": Family(
        kind="spaced",
        template="{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        asked="<s>[INST] 2+2? [/INST]",
        written=" 4 </s>",
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
    "llama 3": Family(
        kind="byte",
        template="{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        asked="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        written="4<|eot_id|>",
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        generation_ends=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "mistral": Family(
        kind="spaced",
        template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        asked="<s>[INST] 2+2?[/INST]",
        written=" 4</s>",
        end="</s>",
        bos="<s>",
        eos="</s>",
        special=("[INST]", "[/INST]"),
    ),
    "zephyr": Family("spaced", ZEPHYR, "<s><|user|>\n2+2?</s>\n<|assistant|>\n", "4</s>\n", "</s>", "<s>", "</s>"),
    "no template": Family("plain", None, "<s><|user|>\n2+2?</s>\n<|assistant|>\n", "4</s>\n", "</s>", "<s>", "</s>"),
    "chatml": Family(
        kind="byte",
        template=CHATML + CHATML_ASKS,
        asked="<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        written="4<|im_end|>\n",
        end="<|im_end|>",
        eos="<|endoftext|>",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "chatml without generation prompt": Family(
        kind="spaced",
        template=CHATML,
        asked="<s><|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        written="4<|im_end|>\n",
        end="<|im_end|>",
        bos="<s>",
        eos="</s>",
        added=("<|im_start|>", "<|im_end|>"),
    ),
    "qwen 2.5": Family(
        kind="byte",
        template="{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}" + CHATML + CHATML_ASKS,
        asked="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        written="4<|im_end|>\n",
        end="<|im_end|>",
        eos="<|im_end|>",
        special=("<|im_start|>", "<|endoftext|>"),
        generation_ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen 3": Family(
        kind="byte",
        template=QWEN3,
        asked="<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        written="4<|im_end|>\n",
        end="<|im_end|>",
        eos="<|im_end|>",
        special=("<|im_start|>", "<|endoftext|>"),
        added=("<think>", "</think>"),
        generation_ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma 3": Family(
        kind="plain",
        template=GEMMA,
        asked="<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        written="4<end_of_turn>\n",
        end="<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        special=("<start_of_turn>", "<end_of_turn>"),
        generation_ends=("<eos>", "<end_of_turn>"),
    ),
    "gemma-like, end not special": Family(
        kind="plain",
        template=GEMMA.replace(
            "{{ '<end_of_turn>\n' }}",
            "{{ '<end_of_turn>\n' }}{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% endif %}",
        ),
        asked="<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        written="4<end_of_turn>\n<eos>",
        end="<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        added=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi 3": Family(
        kind="spaced",
        template="{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        asked="<|user|>\n2+2?<|end|>\n<|assistant|>\n",
        written="4<|end|>\n<|endoftext|>",
        end="<|end|>",
        eos="<|endoftext|>",
        added=("<|user|>", "<|assistant|>", "<|end|>"),
        rstrip=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "command r": Family(
        kind="byte",
        template="{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m['role'] "
        "== 'user' else '<|CHATBOT_TOKEN|>') + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        asked="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        written="4<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        special=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "deepseek": Family(
        kind="byte",
        template=DEEPSEEK,
        asked="<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>",
        written="4<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "deepseek r1": Family(
        kind="byte",
        template=DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}"),
        asked="<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n\n</think>\n\n",
        written="4<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
}
