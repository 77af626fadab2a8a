"""Chat templates run in a sandbox: what they may say, and what they may not do."""

import datetime

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.text.templates import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo "}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n{% endif %}\n{% endfor %}", "hi\n yo \n"),
        ("{{ messages[0] | tojson }}<é>", '{"role": "user", "content": "hi"}<é>'),
        ("{{ {'é': '<'} | tojson(indent=1) }}", '{\n "é": "<"\n}'),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['content'] | trim }}{% endfor %}",
            "yo",
        ),
        ("{% generation %}{{ bos_token }}{% endgeneration %}{{ add_generation_prompt }}", "<s>True"),
        ("{% if system_message is defined %}x{% endif %}{{ tools is none }}", "True"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_conventions_of_transformers(source, expected):
    assert ChatTemplate(source).render(CHAT, True, bos_token="<s>") == expected


def test_the_date():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(CHAT, True) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "cannot write roles .*: Roles must alternate"),
        ("{% if", "does not parse"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe|undefined"),
        ("{{ (1).missing.more }}", "no attribute"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "ranges of more than"),
        ("{{ 'a' * 10**10 }}", "repetition"),
        ("{{ 10**10**10 }}", "power"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% set x = 'a' * 100000 %}{% for i in range(1000) %}{{ x }}{% endfor %}", "characters of output"),
    ],
)
def test_what_a_template_may_not_do(source, expected):
    with pytest.raises(ConfigError, match=expected):
        ChatTemplate(source).render(CHAT, True)
