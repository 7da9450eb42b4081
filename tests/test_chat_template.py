import json
import re

import pytest

from zo2jax.models.tokenizers import ChatTemplate


def write(folder, files):
    """Writes bytes, text, or JSON; returns the folder."""
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nYou answer briefly.<|im_end|>\n' }}
{%- endif %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if loop.first and system is not false %}"
    "{% set content = '<<SYS>>\n' + system.strip() + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MANY = """
{%- macro shown(value, depth=0) -%}
    {%- if value is mapping -%}
        {%- for key, item in value | dictsort %}
            {{- '  ' * depth }}{{ key | upper }}={{ shown(item, depth + 1) }}{% endfor -%}
    {%- elif value is iterable and value is not string -%}
        {{ value | map('string') | join(', ') }}
    {%- else -%}
        {{ value }}
    {%- endif -%}
{%- endmacro -%}
{#- a comment -#}
{%- set state = namespace(count=0, seen=[]) %}
{% for message in messages if message.role != 'tool' %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {% set state.count = state.count + 1 %}
    {% if state.count > 4 %}
        {% break %}
    {% endif %}
  [{{ state.count }}/{{ messages | length }}] {{ message | tojson }}
    {% generation %}
    {% set hidden = 'x' %}
    {{ message.content | replace('<', '&lt;') | trim }}
    {% endgeneration %}
    {%- generation -%}  {{ shown(message) }}  {%- endgeneration %}
    {{ message.calls | default([]) | tojson(indent=2) }} {{ hidden | default('unseen') }}
    {{- message.content.split(' ')[-1] | title }}
{% else %}
  nothing
{% endfor %}
{% if tools is none and documents is none and not nowhere %}{{ bos_token }}{% endif %}
{{ unk_token }}{{ strftime_now('%Y') | length }}
{%- if add_generation_prompt %}

>>> {% endif %}
"""
HI = {"role": "user", "content": ' Hi <b>&amp; "ä" 你好</b>\n'}
REPLY = {"role": "assistant", "content": "Hello 'you' 🙂 "}
CONVERSATIONS = {
    "one": [HI],
    "reply": [HI, REPLY],
    "system": [{"role": "system", "content": " Be kind. "}, HI, REPLY, HI],
    "fields": [
        HI | {"calls": [{"name": "f", "arguments": {"x": [1, 2.5, None, True], "é": "</s>"}}], "name": None},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "3"},
        *[REPLY, HI] * 3,
    ],
    "wrong order": [REPLY, HI],
}
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}


REFUSED = {("INST", "wrong order"), ("INST", "fields"), ("CHATML", "fields")}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["CHATML", "INST", "MANY"])
def test_chats_are_rendered_as_by_transformers(template, conversation, byte_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = {"tokenizer.json": byte_tokenizer.to_str(), "chat_template.jinja": globals()[template]}
    folder = write(tmp_path, files | {"tokenizer_config.json": TOKENS | {"unk_token": "?"}})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = CONVERSATIONS[conversation]
    ours = ChatTemplate.from_folder(folder)
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt}
        if (template, conversation) in REFUSED:
            with pytest.raises(Exception) as refusal:
                theirs.apply_chat_template(messages, tokenize=False, **options)
            with pytest.raises(ValueError, match=re.escape(f"{refusal.type.__name__}: {refusal.value}")):
                ours.render(messages, **options)
        else:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.render(messages, **options) == expected


def test_a_chat_worked_by_hand():
    template = ChatTemplate(INST, {"bos_token": "<s>", "eos_token": "</s>"})
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    prompt = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"
    assert template.render(messages, add_generation_prompt=True) == prompt
    assert template.render([*messages, {"role": "assistant", "content": "Ho"}]) == prompt + " Ho </s>"


@pytest.mark.parametrize("source", ["jinja", "config", "list"])
def test_where_templates_are_found(source, tmp_path):
    written = {
        "jinja": {"chat_template.jinja": "right {{ bos_token }}", "tokenizer_config.json": {"chat_template": "wrong"}},
        "config": {"tokenizer_config.json": {"chat_template": "right {{ bos_token }}"}},
        "list": {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "wrong"},
                    {"name": "default", "template": "right {{ bos_token }}"},
                ]
            }
        },
    }[source]
    folder = write(tmp_path, written | {"special_tokens_map.json": {"bos_token": {"content": "<s>"}}})
    assert ChatTemplate.from_folder(folder).render([HI]) == "right <s>"
    assert ChatTemplate.from_folder(str(folder)) == ChatTemplate("right {{ bos_token }}", {"bos_token": "<s>"})


def test_a_folder_without_a_template_is_named(tmp_path):
    for files in ({}, {"tokenizer_config.json": {"chat_template": None}}):
        with pytest.raises(FileNotFoundError, match=r"has no chat_template\.jinja, nor chat_template in"):
            ChatTemplate.from_folder(write(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "x"}]}),
        ("tokenizer_config.json", {"chat_template": ["x"]}),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_damaged_template_files_are_named(name, content, tmp_path):
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + " is damaged"):
        ChatTemplate.from_folder(write(tmp_path, {name: content}))


FAILURES = {  # template, messages, message
    "syntax": ("{% if %}", [HI], "TemplateSyntaxError"),
    "open block": ("{% generation %}", [HI], "TemplateSyntaxError"),
    "raised": ("{{ raise_exception('no system role') }}", [HI], "TemplateError: no system role; rendering .*Hi"),
    "arithmetic": ("{{ 1 // 0 }}", [HI], "ZeroDivisionError"),
    "type": ("{{ 'a' + 1 }}", [HI], "TypeError"),
    "attribute": ("{{ messages[3].role.x }}", [HI], "UndefinedError"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", [HI], "SecurityError"),
    "immutable": ("{{ messages.append(1) }}", [HI], "SecurityError"),
    "no mapping": ("x", ["Hi"], "AttributeError"),
    "no JSON": ("x", [{"role": "user", "content": {1}}], "TypeError.*not JSON serializable"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_a_template_cannot_do_is_one_error(case):
    template, messages, message = FAILURES[case]
    with pytest.raises(ValueError, match="chat template: .*" + message):
        ChatTemplate(template).render(messages)


def test_messages_are_left_as_they_were():
    messages = [{"role": "user", "content": None, "list": [1]}]
    assert ChatTemplate("{% set x = messages[0].list %}{{ x }} {{ messages[0].content is defined }}").render(messages)
    assert messages == [{"role": "user", "content": None, "list": [1]}]
