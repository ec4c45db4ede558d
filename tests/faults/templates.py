"""Chat templates that never end, build something huge, fail, or are no text; and template files that are none."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.base import DONE, REFUSED, Case, Good

KIND = "templates"
BIG = ("10 ** 9", "2000000000", "10 ** 5 * 10 ** 5", "('9' * 9) | int", "1e9 | int")
HUGE = {
    "times": "{{ 'x' * (BIG) }}", "times a list": "{{ [1] * (BIG) }}", "centre": "{{ 'x'.center(BIG) }}",
    "centre filter": "{{ 'x' | center(BIG) }}", "ljust": "{{ 'x'.ljust(BIG) }}", "rjust": "{{ 'x'.rjust(BIG) }}",
    "zfill": "{{ 'x'.zfill(BIG) }}", "expandtabs": "{{ 'a\\tb'.expandtabs(BIG) }}",
    "percent": "{{ '%*d' % (BIG, 1) }}", "percent in words": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>{}}'.format(1, BIG) }}", "format in words": "{{ '{:1000000000}'.format(1) }}",
    "indent": "{{ 'a\\nb' | indent(BIG) }}", "tojson": "{{ [1, [2]] | tojson(indent=BIG) }}",
    "batch": "{{ [1] | batch(BIG, 'x') | list }}", "slice": "{{ [1] | slice(BIG) | list }}",
    "range": "{{ range(BIG) | list }}", "power": "{{ 7 ** (BIG) }}", "bytes": "{{ 'x'.encode().center(BIG) }}",
    "lorem ipsum": "{{ lipsum(n=BIG) }}",
}  # fmt: skip
EACH = {
    "text": "{% set ns.x = ns.x + ns.x %}", "~": "{% set ns.x = ns.x ~ ns.x %}", 
    "list": "{% set ns.x = [ns.x, ns.x] %}",
    "object": "{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "tuple": "{% set ns.x = (ns.x, ns.x) %}",
    "join": "{% set ns.x = [ns.x, ns.x] | join %}", "replace": "{% set ns.x = ns.x.replace('a', ns.x) %}",
    "block": "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", 
    "dict": "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
    "format": "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}", "namespace": "{% set ns.x = namespace(a=ns.x, b=ns.x) %}",
}  # fmt: skip
ENDLESS = {
    "ranges": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "characters": "{% for a in 'abcdefghij' * 9 %}" * 9 + "{% endfor %}" * 9,
    "messages": "{% for a in messages * 99 %}" * 9 + "{% endfor %}" * 9,
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop": "{% for a in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
}
BROKEN = [
    "{% if %}", "{{ foo() }}", "{{ messages[0].x.y }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% include 'x' %}",
    "{% import 'x' as y %}", "{% extends 'x' %}", "{{ '\\ud800' }}", "{{ 1 | nofilter }}", "{{ 1 is notest }}",
    "{% foo %}",
    "{{ ''.__class__ }}{{ ''.__class__.__mro__[1] }}", "{{ " + "(" * 5000, "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{% for a in 5 %}{% endfor %}", "{{ messages[0]['content'](1) }}", "{{ [1, 'a'] | sort }}", "{{ {} | first | x }}",
    "{{ '%d' % 'a' }}", "{{ '{'.format() }}", "{{ range('a') }}", "{% endfor %}",
    "{{ messages | tojson(indent='a', x=1) }}",
    "{{ raise_exception('no') }}", "{{ raise_exception() }}", "{{ strftime_now(7) }}", "{% call f() %}{% endcall %}",
    "{{ 'a' * 2000000 }}", "{{ namespace(__class__=1) }}", "{{ dict(**{1: 2}) }}", "{{ 1 / (1 - 1) ~ 'a' }}",
]  # fmt: skip
FILES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe{{ 1 }}"),
    "no text": lambda path: path.write_bytes(bytes(range(256))),
    "8 MiB": lambda path: path.write_text("a" * (8 << 20)),
    "a sparse file of 4 GiB": lambda path: (path.touch(), os.truncate(path, 4 << 30)),
}
SOUND = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    faults = {f"{name} by {big}": source.replace("BIG", big) for name, source in HUGE.items() for big in BIG}
    for name, each in EACH.items():
        source = f"{{% set ns = namespace(x='aa') %}}{{% for i in range(99) %}}{each}{{% endfor %}}"
        faults[f"{name} doubled"] = source + "{{ ns.x }}"
    faults |= {f"endless {name}": source for name, source in ENDLESS.items()}
    faults |= {f"broken: {source[:40]}": source for source in BROKEN}
    for name, source in faults.items():
        before = rng.random() < 0.5
        whole = source + SOUND if before else SOUND.replace("{{ m.content", f"{source}{{{{ m.content")
        where = rng.choice((_own_file, _in_config, _given_file))
        right = REFUSED | DONE if name.startswith("broken") and "raise" not in name else REFUSED
        yield Case(
            KIND, f"{name} ({where.__name__[1:]}, {'before' if before else 'within'})", where(good, whole), right
        )
    for name, place in FILES.items():
        yield Case(KIND, f"data.template is {name}", _placed(good, place, "given.jinja"), REFUSED, "given.jinja")
        if name != "gone":
            right = REFUSED
            yield Case(KIND, f"chat_template.jinja is {name}", _placed(good, place, "base/chat_template.jinja"), right)


def _own_file(good: Good, source: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        (folder / "base" / "chat_template.jinja").write_text(source)
        return words

    return make


def _in_config(good: Good, source: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "base" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))
        return words

    return make


def _given_file(good: Good, source: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder, data__template="given.jinja")
        (folder / "given.jinja").write_text(source)
        return words

    return make


def _placed(good: Good, place: Callable[[Path], object], name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder, **({"data__template": name} if name == "given.jinja" else {}))
        (folder / name).unlink(missing_ok=True)
        place(folder / name)
        return words

    return make
