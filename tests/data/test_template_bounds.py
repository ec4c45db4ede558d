"""Chat templates that never end, build something huge or fail: one exception, in little time and memory."""

import threading
import time
from copy import copy

import pytest
from transformers import PreTrainedTokenizerFast

from qdpo.data.tokens import template_bounds
from qdpo.data.tokens.template_bounds import TemplateFault, probe_template, render
from tests.data.template_tokenizers import FAMILIES, tokenizer_of

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
GROWTH = "{% set ns = namespace(x='ab', l=[1], t=(1,), d={'a': 1}) %}{% for i in range(90) %}EACH{% endfor %}"
HUGE = {
    "times": "{{ 'x' * 10**9 }}",
    "list times": "{{ ([1] * 10**9)|length }}",
    "times in steps": "{{ 'x' * (10**5 * 10**5) }}",
    "centre": "{{ 'x'.center(10**9) }}",
    "centre filter": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(10**9) }}",
    "bytes": "{{ 'x'.encode().rjust(10**9) }}",
    "to_bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 10**9) }}",
    "format nested text": "{{ '{:>{}}'.format(1, '9' * 9) }}",
    "format map": "{{ '{a:>{b}}'.format_map({'a': 1, 'b': 10**9}) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format filter star": "{{ '%*d'|format(10**9, 1) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "join filter": "{% set x = 'a' * 1000000 %}{{ range(9999)|join(x) }}",
    "join of a generator": "{% set x = 'a' * 1000000 %}{{ range(9999)|map('string')|join(x) }}",
    "join of an iterator": "{% set x = 'a' * 1000000 %}{{ x.join(range(9999)|map('string')) }}",
    "join of a view": "{% set x = 'a' * 1000000 %}{{ dict.fromkeys(range(9999)).keys()|join(x) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replace nothing": "{% set x = 'a' * 1000000 %}{{ x.replace('', x) }}",
    "replace filter": "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
    "translate": "{{ ('a' * 1000).translate({97: 'x' * 1000000}) }}",
    "indent": "{{ 'a\\n\\nb'|indent(10**9) }}",
    "indent by text": "{{ ('a\\n' * 1000)|indent('x' * 1000000) }}",
    "tojson": "{{ [1, [2]]|tojson(indent=10**9) }}",
    "tojson by text": "{{ ([[1]] * 1000)|tojson(indent='x' * 1000000) }}",
    "wordwrap": "{{ ('a b ' * 100)|wordwrap(1, wrapstring='x' * 10000000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "sum": "{{ ([[1] * 10000] * 10)|sum(start=[])|length }}",
    "fromkeys": "{{ dict.fromkeys(range(9999), 'a' * 1000000) }}",
    "map": "{{ range(9999)|map('replace', '', 'a' * 1000000)|list }}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
    "doubled": GROWTH.replace("EACH", "{% set ns.x = ns.x + ns.x %}"),
    "doubled by ~": GROWTH.replace("EACH", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by set": GROWTH.replace("EACH", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "doubled by macro": "{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}"
    + GROWTH.replace("EACH", "{% set ns.x = f(ns.x) %}"),
    "doubled by format": GROWTH.replace("EACH", "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}"),
    "doubled by percent": GROWTH.replace("EACH", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "nested lists": GROWTH.replace("EACH", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "nested tuples": GROWTH.replace("EACH", "{% set ns.t = (ns.t, ns.t) %}") + "{{ ns.t }}",
    "nested dicts": GROWTH.replace("EACH", "{% set ns.d = dict(a=ns.d, b=ns.d) %}") + "{{ ns.d|tojson }}",
    "slices": "{% set ns = namespace(l=[], s='x' * 9999999) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [ns.s[i:]] %}{% endfor %}",
    "output": "{% set x = 'a' * 9999999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "literal output": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "power": "{{ (9 ** 99999) ** 99999 > 1 }}",
    "squares": GROWTH.replace("EACH", "{% set n = ns.x if i else 9 %}{% set ns.x = n * n %}"),
}  # fmt: skip
ENDLESS = {
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set x = 'a' * 1000 %}" + "{% for i in x %}" * 6 + "{% endfor %}" * 6,
    "macros": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "filters": "{% set ns = namespace(x=range(99999)) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x|map('string') %}{% endfor %}",
}
BROKEN = {
    "\n{% if %}": "line 2 of the chat template: it is not valid jinja",
    "\n\n{{ foo() }}": "line 3 of the chat template: UndefinedError: 'foo' is undefined",
    "{{ messages[0].a.b }}": "has no attribute 'a'",
    "{{ 1 + 'a' }}": "line 1 of the chat template: TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}": "line 2 of the chat template: it calls itself without end",
    "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}": "it calls itself without end",
    "{% include 'x' %}": "no loader",
    "{% import 'x' as y %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ '\\ud800' }}": "half of a surrogate pair",
    "{{ 1|nofilter }}": "No filter named 'nofilter'",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{% if 1 %}" * 300 + "{% endif %}" * 300: "nested too deeply",
    "a" * 2_000_000: "2,000,000 characters",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return copy(tokenizer_of("chatml"))  # the one of all tests keeps its template


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE.keys())
def test_template_that_builds_something_huge_is_stopped(tokenizer, source):
    tokenizer.chat_template, started = source, time.thread_time()
    with pytest.raises(TemplateFault, match=r"it (builds|pads|formats|calculates|is given)") as caught:
        render(tokenizer, TURNS)
    assert caught.value.bound and caught.value.line == 1 and not caught.value.refused
    assert time.thread_time() - started < 3


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_template_without_end_is_stopped_in_any_thread(tokenizer, source, monkeypatch):
    monkeypatch.setattr(template_bounds, "SECONDS", 0.2)
    tokenizer.chat_template, faults = source, []

    def ask() -> None:
        try:
            render(tokenizer, TURNS)
        except TemplateFault as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    ask()
    for thread in threads:
        thread.join()
    assert len(faults) == 3 and all(fault.bound and fault.line == 1 for fault in faults)


@pytest.mark.parametrize(("source", "said"), BROKEN.items(), ids=[key[:20] for key in BROKEN])
def test_any_failure_of_a_template_is_one_exception_with_its_line(tokenizer, source, said):
    tokenizer.chat_template = source
    with pytest.raises(TemplateFault) as caught:
        render(tokenizer, TURNS)
    assert said in str(caught.value) and not caught.value.refused
    with pytest.raises(TemplateFault):
        probe_template(tokenizer)


def test_refusal_is_told_from_a_broken_template(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(TemplateFault, match=r"\Ano system message\Z") as caught:
        render(tokenizer, TURNS)
    assert caught.value.refused
    probe_template(tokenizer)


def test_branch_that_is_not_taken_costs_nothing(tokenizer):
    tokenizer.chat_template = "{% if messages|length > 99 %}{{ 'x' * 10**9 }}{% endif %}ok"
    assert render(tokenizer, TURNS) == "ok"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_transformers(family):
    tokenizer = tokenizer_of(family)
    user, answer = TURNS
    chats = [[user], TURNS, [*TURNS, user], [{"role": "system", "content": "Be brief."}, *TURNS]]
    for turns in chats:
        for options in ({"add_generation_prompt": True}, {}, {"enable_thinking": False}):
            for tools in (None, TOOLS):
                try:
                    wanted = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
                except Exception as error:
                    with pytest.raises(TemplateFault, match=r".+") as caught:
                        render(tokenizer, turns, tools, **options)
                    assert str(error) in str(caught.value)
                else:
                    assert render(tokenizer, turns, tools, **options) == wanted


EVERYTHING = """{%- macro line(a, b='!') -%}{{ a ~ b }}{{ caller() if caller else '' }}{%- endmacro -%}
{%- set ns = namespace(n=0, seen=[]) -%}
{% generation %}{{ messages|length }}{% endgeneration %}
{%- for m in messages if m.role != 'system' -%}
  {%- if loop.index > 5 %}{% break %}{% endif -%}
  {%- set ns.n = ns.n + 1 -%}{%- set ns.seen = ns.seen + [m.role] -%}
  {% set block %} {{ m.content|trim }} {% endset %}
  {{ block|upper }}{{ line(m['content'], b='%s-%d' % (m.role, loop.index0)) }}{% call line('x') %}y{% endcall %}
  {{ m.content[::-1] }} {{ (m.content + 'z').split('?')[0] }} {{ [m.role, 1, none, true] }} {{ {'a': m.role} }}
{%- else -%}none{% endfor %}
{{ ns.seen|join(', ') }} {{ ns.seen|map('upper')|list }} 
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ tools|tojson(indent=2) if tools }} {{ tools|tojson if tools }} {{ 7 % 3 }} {{ 2 ** 5 }} {{ 3 * 4 }} {{ 'ab' * 3 }}
{{ bos_token }}{{ eos_token }} {{ undefined_one }} {{ none }} {{ (1, 2) + (3,) }} {{ '{:>5}|{a}'.format('x', a=1) }}
{% for k, v in {'a': 1}|dictsort %}{{ k }}={{ v }}{% endfor %}{{ 'a b'|title|replace('A', 'c')|center(9) }}|
{{ messages|map(attribute='role')|unique|sort|first }} {{ 'x' in 'xyz' }} {{ range(3)|sum }} 
{{ cycler('a', 'b').next() }}
{% filter upper %}done{% endfilter %}{{ dict(a=1).items()|list }} {{ 1.5|round|int }} {{ messages[-1:]|length }}"""


def test_every_construct_of_jinja_writes_the_same(tokenizer):
    tokenizer.chat_template = EVERYTHING
    for tools in (None, TOOLS):
        wanted = tokenizer.apply_chat_template(TURNS * 4, tools=tools, tokenize=False)
        assert render(tokenizer, TURNS * 4, tools) == wanted


def test_the_watching_thread_passes_over_what_is_done(tokenizer, monkeypatch):
    tokenizer.chat_template = "{% for i in range(3000) %}{{ i }}{% endfor %}"
    render(tokenizer, TURNS)
    monkeypatch.setattr(template_bounds, "SECONDS", 0.0)
    monkeypatch.setattr(template_bounds, "POLL_S", 0.001)
    ended = 0
    for _ in range(60):
        try:
            render(tokenizer, TURNS)
        except TemplateFault:
            ended += 1
    time.sleep(0.05)  # a late exception would come here
    assert ended
