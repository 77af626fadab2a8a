"""Chat templates run in a sandbox: what they may say, and what they may not do."""

import contextlib
import datetime
import locale

import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.templates import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo "}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n{% endif %}\n{% endfor %}", "hi\n yo \n"),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":2,"b":1}'),
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


def test_the_date_is_the_one_that_is_given():
    # fails with the clock of the machine, and with the language that a process is set to: both seen
    source = "{{ strftime_now('%d %b %Y, %A, %B, %e %p %H:%M %% %%d %x %c') }}"
    written = "02 Jan 2031, Thursday, January,  2 AM 00:00 % %d 01/02/31 Thu Jan  2 00:00:00 2031"
    for language in ("C", "de_DE.UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_TIME, language)
        try:
            assert ChatTemplate(source).render(CHAT, True, date=datetime.date(2031, 1, 2)) == written
        finally:
            locale.setlocale(locale.LC_TIME, "C")
    with pytest.raises(ConfigError, match="writes the date, and none is fixed"):
        ChatTemplate(source).render(CHAT, True)
    assert ChatTemplate("{{ date_string }}").render(CHAT, True, date_string="26 Jul 2024") == "26 Jul 2024"


def test_what_a_template_reads():
    source = "{% set x = 1 %}{% if enable_thinking %}{{ x }}{% endif %}{% for m in messages %}{{ m }}{% endfor %}"
    assert ChatTemplate(source).variables == {"enable_thinking", "messages"}


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
    with pytest.raises((DataError, ConfigError), match=expected):
        ChatTemplate(source).render(CHAT, True)
