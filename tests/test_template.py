import json
import shutil

import pytest

from edgevl.checkpoint import Checkpoint
from edgevl.errors import CheckpointError
from edgevl.preprocess.template import (
    MAX_ADDED_CHARS,
    MAX_TEMPLATE_CHARS,
    JinjaTemplate,
    load_template,
)

MESSAGES = [
    {"role": "system", "content": "Sei kurz."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
]
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def load(mini_checkpoint, tmp_path):
    """Return a function that loads the template of a checkpoint with the given files."""

    def load(config=None, tokenizer=None, **files):
        directory = tmp_path / "checkpoint"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(mini_checkpoint(), directory)
        (directory / "chat_template.jinja").unlink()
        for name, changes in (("config", config), ("tokenizer_config", tokenizer)):
            path = directory / f"{name}.json"
            content = json.loads(path.read_text()) | (changes or {})
            content = {key: value for key, value in content.items() if value != "absent"}
            path.write_text(json.dumps(content))
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)
        with Checkpoint.open(directory) as checkpoint:
            return load_template(checkpoint)

    return load


def test_internvl2_5(load):
    template = load({"template": "internvl2_5"})
    assert template.render(MESSAGES[1:], False) == (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(MESSAGES[:2], False) == (
        "<|im_start|>system\nSei kurz.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_of_internvl2_end_turns_without_a_newline(load):
    for name in ("Hermes-2", "internlm2-chat"):
        assert load({"template": name}).render(MESSAGES[1:2], False) == (
            "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
            "英文名叫InternVL, 是一个有用无害的人工智能助手。<|im_end|>"
            "<|im_start|>user\n你好<|im_end|><|im_start|>assistant\n"
        )


def test_system_message_of_the_configuration(load):
    template = load({"template": "internvl2_5", "system_message": "Be kind."})
    assert template.render(MESSAGES[1:2], False).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n"
    )


def test_unknown_name_is_refused(load):
    with pytest.raises(CheckpointError, match=r"config.json: template 'phi3-chat'"):
        load({"template": "phi3-chat"})


def test_where_a_template_comes_from(load):
    def mark(letter):
        return letter + CHATML

    def first(template):
        return template.render(MESSAGES, False)[0]

    stored = {"chat_template": mark("T")}
    assert first(load({}, stored)) == "<"  # config.json names internvl2_5
    assert first(load({"template": "absent"}, stored)) == "T"
    assert load({"template": "absent"}, {}).render(MESSAGES[1:], False).count(SYSTEM_2_5) == 1
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": mark("N")}]
    assert first(load({"template": "absent"}, {"chat_template": named})) == "N"
    separate = json.dumps({"chat_template": mark("J")})
    assert first(load({}, stored, chat_template__json=separate)) == "J"
    both = {"chat_template__json": separate, "chat_template__jinja": mark("F")}
    assert first(load({}, stored, **both)) == "F"
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template"):
        load({"template": "absent"}, {"chat_template": [{"name": "tools", "template": "x"}]})


def test_the_variables_and_helpers_of_transformers():
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ tools is none }}{{ strftime_now('%%') }}"
        "{% generation %}{{ 'g' }}{% endgeneration %}{{ pad_token is defined }}"
        "    {% if true %}\n  x\n    {% endif %}\n"
    )
    template = JinjaTemplate(source, "f", {"bos_token": "<s>"})
    rendered = template.render([{"role": "user", "content": c} for c in (" a ", "b", "c")], False)
    assert rendered == '<s>ab{"b": "<é>", "a": 1}True%gFalse    ' + "  x\n"


def test_thinking_is_told_only_when_asked_for():
    source = "{{ messages[0].content }}{{ enable_thinking is defined }}{{ enable_thinking }}"
    template = JinjaTemplate(source, "f", {})
    assert template.render(MESSAGES[:1], False) == "Sei kurz.False"
    assert template.render(MESSAGES[:1], True) == "Sei kurz.TrueTrue"


def test_a_template_that_wants_lists_gets_lists():
    source = (
        "{% for m in messages %}{% for c in m.content %}{{ c['text'] }}|{% endfor %}{% endfor %}"
    )
    assert JinjaTemplate(source, "f", {}).render(MESSAGES[:2], False) == "Sei kurz.|你好|"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "malformed"),
        ("{{ messages | nosuchfilter }}", "malformed"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "limit"),
        ("constant", "leaves out the messages"),
        ("{{ raise_exception('no such luck') }}", "no such luck"),
        ("{{ messages[0].content }}{{ 1 // 0 }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses"),
        ("{% include 'other.txt' %}", "refuses"),
        ("{{ 'a' * 3000000000 }}", "operands that large"),
        ("{{ ([0] * 9000000000) | length }}", "operands that large"),
        ("{{ 9 ** 9 ** 9 }}", "of that kind"),
        ("{{ '%9000000000d' % 1 }}", "of that kind"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "refuses"),
        ("{% for i in range(99999) %}{{ '0123456789' }}{% endfor %}", "without end"),
    ],
)
def test_bad_templates_name_their_file(source, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        JinjaTemplate(source, "dir/chat_template.jinja", {})
    assert str(caught.value).startswith("dir/chat_template.jinja: ")
    assert "\n" not in str(caught.value)


def test_arithmetic_of_sensible_size_works():
    source = "{{ messages[0].content }} {{ '=' * 3 }} {{ 7 * 6 }} {{ 9 % 4 }}"
    rendered = JinjaTemplate(source, "f", {}).render([{"role": "user", "content": "hi"}], False)
    assert rendered == "hi === 42 1"


def test_output_is_bounded_by_what_went_in():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    long = "x" * (2 * MAX_ADDED_CHARS)
    template = JinjaTemplate(source, "f", {})
    assert template.render([{"role": "user", "content": long}], False) == long
    doubling = JinjaTemplate(source + source.replace("m.content", "m.content * 9"), "f", {})
    with pytest.raises(CheckpointError, match="without end"):
        doubling.render([{"role": "user", "content": long}], False)


def test_renders_as_transformers_does():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- for message in messages %}\n    {%- if loop.first %}\n{{ bos_token }}\n  {%- endif %}"
        "{{ '<|im_start|>' + message.role }}\n{% if message.content is string %}"
        "{{- message.content.strip() | tojson }}  {% endif %}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}A{% endif %}\n"
    )
    ours = JinjaTemplate(source, "f", {"bos_token": "<s>"}).render(MESSAGES, False)
    (theirs,), _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ours == theirs
