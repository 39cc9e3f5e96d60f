import json
import shutil

import pytest

from edgevl.checkpoint import Checkpoint
from edgevl.errors import CheckpointError
from edgevl.preprocess.template import (
    MAX_ADDED_CHARS,
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
    after_system_message,
    default_system_message,
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
    assert template.render(MESSAGES[1:]) == (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(MESSAGES[:2]) == (
        "<|im_start|>system\nSei kurz.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_of_internvl2_end_turns_without_a_newline(load):
    for name in ("Hermes-2", "internlm2-chat"):
        assert load({"template": name}).render(MESSAGES[1:2]) == (
            "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
            "英文名叫InternVL, 是一个有用无害的人工智能助手。<|im_end|>"
            "<|im_start|>user\n你好<|im_end|><|im_start|>assistant\n"
        )


def test_system_message_of_the_configuration(load):
    template = load({"template": "internvl2_5", "system_message": "Be kind."})
    assert template.render(MESSAGES[1:2]).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")


def test_unknown_name_is_refused(load):
    with pytest.raises(CheckpointError, match=r"config.json: template 'phi3-chat'"):
        load({"template": "phi3-chat"})


def test_where_a_template_comes_from(load):
    def mark(letter):
        return letter + CHATML

    def first(template):
        return template.render(MESSAGES)[0]

    stored = {"chat_template": mark("T")}
    assert first(load({}, stored)) == "<"  # config.json names internvl2_5
    assert first(load({"template": "absent"}, stored)) == "T"
    assert load({"template": "absent"}, {}).render(MESSAGES[1:]).count(SYSTEM_2_5) == 1
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": mark("N")}]
    assert first(load({"template": "absent"}, {"chat_template": named})) == "N"
    separate = json.dumps({"chat_template": mark("J")})
    assert first(load({}, stored, chat_template__json=separate)) == "J"
    both = {"chat_template__json": separate, "chat_template__jinja": mark("F")}
    assert first(load({}, stored, **both)) == "F"
    assert first(load(chat_template__json="[", chat_template__jinja=mark("F"))) == "F"
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template"):
        load({"template": "absent"}, {"chat_template": [{"name": "tools", "template": "x"}]})


# The default system message of a text model, as Qwen2.5's template has one.
TEXT_MODEL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
) + CHATML


def test_a_text_model_s_template_is_not_internvl_s(load):
    """A tokenizer saved again by a recent transformers brings it; chat() never looks at it."""
    expected = load().render(MESSAGES[1:])
    assert SYSTEM_2_5 in expected
    stored = json.dumps({"chat_template": TEXT_MODEL})
    for files in ({"chat_template__jinja": TEXT_MODEL}, {"chat_template__json": stored}):
        assert load(**files).render(MESSAGES[1:]) == expected
        assert load({"template": "Hermes-2"}, **files).render(MESSAGES[1:]).count("Qwen") == 0
        # The layout of transformers names none: what is stored is all there is.
        assert "You are Qwen." in load({"template": "absent"}, **files).render(MESSAGES[1:])
    # One with the same default system message, and more, is InternVL's own.
    own = "F" + TEXT_MODEL.replace("You are Qwen.", SYSTEM_2_5)
    assert load(chat_template__jinja=own).render(MESSAGES[1:])[0] == "F"
    # An unknown name with a template beside it: what is there is used.
    unknown = load({"template": "phi3-chat"}, chat_template__jinja=TEXT_MODEL)
    assert "You are Qwen." in unknown.render(MESSAGES[1:])
    assert default_system_message(unknown) == "You are Qwen."


def test_the_variables_and_helpers_of_transformers():
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ tools is none }}{{ strftime_now('%%') }}"
        "{{ {'b': 'é', 'a': [1]} | tojson(true, none, [',', ':'], true) }}"
        "{% generation %}{{ 'g' }}{% endgeneration %}{{ pad_token is defined }}"
        "    {% if true %}\n  x\n    {% endif %}\n"
    )
    template = ChatTemplate(source, "f", {"bos_token": "<s>"})
    rendered = template.render([{"role": "user", "content": c} for c in (" a ", "b", "c")])
    expected = '<s>ab{"b": "<é>", "a": 1}True%{"a":[1],"b":"\\u00e9"}gFalse    '
    assert rendered == expected + "  x\n"


def test_thinking_is_told_only_when_something_is_said_of_it():
    """As transformers does: templates such as Qwen3's tell false from absent."""
    source = "{{ messages[0].content }}{{ enable_thinking is defined }}{{ enable_thinking }}"
    template = ChatTemplate(source, "f", {})
    assert template.render(MESSAGES[:1]) == "Sei kurz.False"
    assert template.render(MESSAGES[:1], False) == "Sei kurz.TrueFalse"
    assert template.render(MESSAGES[:1], True) == "Sei kurz.TrueTrue"


LIST = "{% for c in m.content %}{{ c['text'] }}|{% endfor %}"
TEXT = "{{ m.content + '!' }}"


@pytest.mark.parametrize(
    ("system", "user", "assistant", "expected"),
    [
        (LIST, LIST, LIST, "Sei kurz.|你好|Hi|Why?|"),
        (TEXT, LIST, TEXT, "Sei kurz.!你好|Hi!Why?|"),
        (LIST, TEXT, TEXT, "Sei kurz.|你好!Hi!Why?!"),
        (TEXT, TEXT, LIST, "Sei kurz.!你好!Hi|Why?!"),
        (TEXT, TEXT, TEXT, "Sei kurz.!你好!Hi!Why?!"),
        ("", LIST, LIST, "你好|Hi|Why?|"),  # no system messages
    ],
)
def test_each_role_gets_lists_or_strings_as_the_template_wants_them(
    system, user, assistant, expected
):
    source = (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{system}"
        f"{{% elif m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
    )
    assert ChatTemplate(source, "f", {}).render(MESSAGES) == expected


def test_a_template_that_refuses_a_role_is_known_by_its_own_words():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        f"{{% endif %}}{LIST}{{% endfor %}}"
    )
    template = ChatTemplate(source, "f", {})
    assert template.render(MESSAGES[1:]) == "你好|Hi|Why?|"
    with pytest.raises(CheckpointError, match="no system"):
        template.render(MESSAGES)


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
        ChatTemplate(source, "dir/chat_template.jinja", {})
    assert str(caught.value).startswith("dir/chat_template.jinja: ")
    assert "\n" not in str(caught.value)


def test_arithmetic_of_sensible_size_works():
    source = "{{ messages[0].content }} {{ '=' * 3 }} {{ 7 * 6 }} {{ 9 % 4 }}"
    rendered = ChatTemplate(source, "f", {}).render([{"role": "user", "content": "hi"}])
    assert rendered == "hi === 42 1"


def test_output_is_bounded_by_what_went_in():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    long = "x" * (2 * MAX_ADDED_CHARS)
    template = ChatTemplate(source, "f", {})
    assert template.render([{"role": "user", "content": long}]) == long
    doubling = ChatTemplate(source + source.replace("m.content", "m.content * 9"), "f", {})
    with pytest.raises(CheckpointError, match="without end"):
        doubling.render([{"role": "user", "content": long}])


def test_renders_as_transformers_does():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- for message in messages %}\n    {%- if loop.first %}\n{{ bos_token }}\n  {%- endif %}"
        "{{ '<|im_start|>' + message.role }}\n{% if message.content is string %}"
        "{{- message.content.strip() | tojson }}  {% endif %}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}A{% endif %}\n"
    )
    ours = ChatTemplate(source, "f", {"bos_token": "<s>"}).render(MESSAGES)
    (theirs,), _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("order", "expected"), [("system user", "<|im_end|>"), ("user system", "")]
)
def test_what_follows_the_system_message(order, expected):
    """Nothing, where the user's comes first: its end would be taken for the system message's."""
    written = "{{ m.content }}<|im_end|>{% endfor %}"
    source = "".join(
        f"{{% for m in messages if m.role == '{role}' %}}{written}" for role in order.split()
    )
    assert after_system_message(ChatTemplate(source, "f", {})) == expected
