"""The report page: self-contained, escaped, small, honest about what is missing; and one page on several runs."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qdpo.errors import ConfigError
from qdpo.report.page.facts import read_facts
from qdpo.report.page.page import run_page, write_report
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.run.lines import read_lines
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import ROOT, Quiet, qdpo, tiny_rows, write_jsonl
from tests.run.made import rewrite_json

HOSTILE = "<script>alert('$x$')</script> <img src=http://example.org/a onerror=alert(1)> {{ 7 * 7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose prompts and answers are hostile, and two dropped rows."""
    return made_run(tiny_base, tmp_path_factory.mktemp("report"))


def made_run(tiny_base: Path, folder: Path, **more: object) -> Path:
    rows = [{name: f"{text} {HOSTILE}" for name, text in row.items()} for row in tiny_rows(24)]
    rows[3] = {**rows[3], "chosen": ""}
    pairs = write_jsonl(folder / "pairs.jsonl", rows)
    settings = {
        "model.path": tiny_base, "model.quantization": "none", "model.dtype": "fp32", "model.device": "cpu",
        "data.path": pairs, "data.eval_fraction": 0.3, "train.pairs_per_step": 4, "train.learning_rate": 1e-3,
        "train.optimizer": "adamw", "train.steps": 6, "train.eval_every": 3, "samples.count": 2,
        "samples.max_new_tokens": 6, "output.dir": folder, "output.name": "run", "cache.dir": folder / "cache",
        **more,
    }  # fmt: skip
    run_training(layered.resolve([f"{name}={value}" for name, value in settings.items()]), Quiet())
    run = RunDir(folder / "run")
    lines = [{**line, "after": HOSTILE, "prompt": f"<|im_start|>user\n{HOSTILE}<|im_end|>\n"}
             for line in read_lines(run.samples)]  # fmt: skip
    disk.write_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines))
    return run.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(made, tmp_path / "run")))


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._stack = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._stack = self._stack[:-1]

    def handle_data(self, data: str) -> None:
        self.text += data if self._stack[-1:] != ["style"] else ""


def test_one_run_from_the_command_line(run: RunDir, tmp_path: Path) -> None:
    answer = qdpo("report", str(run.path), cwd=tmp_path)
    assert answer.returncode == 0 and f"report: {run.report}" in answer.stdout, answer.stderr
    page = Elements(run.report.read_text(encoding="utf-8"))
    for heading in ("Findings", "Curves", "Its own answers", "Data", "Settings", "Environment", "How to repeat it"):
        assert heading in page.text
    assert "Reward accuracy" in page.text and "Won most" in page.text
    assert "empty_response" in page.text and "the command line" in page.text and "train.learning_rate" in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 13  # 11 curves and 2 distributions


def test_texts_of_users_are_shown_and_never_obeyed(run: RunDir) -> None:
    source = run_page(read_facts(run.path))
    page = Elements(source)
    assert page.text.count(HOSTILE) >= 8  # prompts and answers of pairs and samples
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_loaded_from_elsewhere(run: RunDir) -> None:
    source = run_page(read_facts(run.path))
    for _, attributes in Elements(source).elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value and value.startswith(("#", "data:")), (name, value)
    style = re.sub(r"<[^>]*>[^<]*</text>", "", source)
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    assert "default-src 'none'" in source


def test_identifiers_are_unique_and_the_page_repeats_itself(run: RunDir) -> None:
    source = run_page(read_facts(run.path))
    found = [attributes["id"] for _, attributes in Elements(source).elements if "id" in attributes]
    assert len(found) == len(set(found)) and source == run_page(read_facts(run.path))


def test_colours_follow_the_page(run: RunDir) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", run_page(read_facts(run.path)), re.DOTALL))
    assert "var(--chosen)" in pictures and "var(--soft)" in pictures
    assert not re.search(r"(?:fill|stroke): ?(?:#|black|white|rgb)", pictures)
    assert not re.search(r'(?:fill|stroke)="(?:#|black|white|rgb)', pictures)


def test_an_unfinished_run(run: RunDir) -> None:
    run.result.unlink()
    shutil.rmtree(run.adapter)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:5]) + lines[5][:30])  # torn
    page = Elements(run_page(read_facts(run.path))).text
    assert "unfinished: 3 of 6 steps" in page and "So far, after 3 of 6 steps: it " in page


def test_a_run_that_has_only_begun(run: RunDir) -> None:
    for path in (run.result, run.samples, run.eval_pairs, run.metrics):
        path.unlink()
    page = Elements(run_page(read_facts(run.path))).text
    assert "Nothing can be said yet" in page and "Won most" not in page


def test_a_loss_without_a_reference(tiny_base: Path, tmp_path: Path) -> None:
    made = made_run(tiny_base, tmp_path, **{"loss.name": "simpo", "samples.count": 0})
    page = Elements(run_page(read_facts(made))).text
    assert "proxy kl" not in page.lower().split("<summary>the rules</summary>")[0] and "reward accuracy" in page


def test_without_a_tokenizer_there_are_no_texts_of_pairs(run: RunDir) -> None:
    record = disk.read_json(run.record)
    rewrite_json(run.record, {**record, "base": {**record["base"], "folder": "gone"}})
    shutil.rmtree(run.adapter)
    page = Elements(run_page(read_facts(run.path))).text
    assert "no tokenizer.json" in page and "Won most" not in page


def test_a_run_of_an_earlier_version(run: RunDir) -> None:
    run.eval_pairs.unlink()
    kept = ("row", "prompt", "before", "after", "before_tokens", "after_tokens")
    lines = [{name: line[name] for name in kept} for line in read_lines(run.samples)]
    disk.write_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines))
    assert "Its own answers" in run_page(read_facts(run.path))


def test_findings_are_on_the_page(run: RunDir) -> None:
    lines = [
        {**record, "kl": 99.0, "rewards/chosen": -50.0} if "loss" in record else record
        for record in read_lines(run.metrics)
    ]
    record = disk.read_json(run.record)
    rewrite_json(run.record, {**record, "settings": {**record["settings"], "train.pairs_per_step": 16}})
    disk.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    source = run_page(read_facts(run.path))
    page = Elements(source).text
    assert "<code>qdpo metrics displacement</code>" in source
    assert "The proxy kl of recent steps is 99 nats a token (bound: 10)." in page and "first seen after step 3" in page


def test_a_long_run_is_still_a_small_page(run: RunDir) -> None:
    (record,) = [line for line in read_lines(run.metrics) if line["step"] == 6 and "loss" in line]
    long = [{**record, "step": step, "loss": 0.3 + (step * 7919 % 101) / 500} for step in range(1, 20001)]
    disk.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in long))
    samples = read_lines(run.samples) * 200
    wordy = [{**line, "before": "word " * 9000} for line in samples]
    disk.write_text(run.samples, "".join(json.dumps(line) + "\n" for line in wordy))
    size = len(run_page(read_facts(run.path)).encode())
    assert size < 250_000, size


def test_several_runs_are_compared(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(Path(shutil.copytree(run.path, tmp_path / "<b>other</b>" / "other")).rename(tmp_path / "other&<i>"))
    record = disk.read_json(other.record)
    rewrite_json(other.record, {**record, "settings": {**record["settings"], "loss.beta": 0.3}})
    target = write_report([run.path, other.path], tmp_path / "both.html")
    source = target.read_text(encoding="utf-8")
    page = Elements(source)
    assert "loss.beta" in page.text and "0.3" in page.text and "train.learning_rate" not in page.text
    assert "other&<i>" in page.text and "<i>" not in re.sub(r'<i style="[^"]*"></i>', "", source)
    with pytest.raises(ConfigError, match="at most 6"):
        write_report([run.path] * 7, None)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run"):
        write_report([tmp_path], None)


def test_without_matplotlib_it_is_said_what_to_type(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'qdpo\[report\]'"):
        write_report([run.path], None)
    assert not run.report.exists()


def test_no_torch_is_loaded(run: RunDir) -> None:
    code = (
        "import sys; from pathlib import Path; from qdpo.report.page.page import write_report; "
        f"write_report([Path({str(run.path)!r})], None); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1400])
def test_in_a_browser_it_asks_for_nothing_and_complains_of_nothing(run: RunDir, tmp_path: Path, width: int) -> None:
    page, log = write_report([run.path], None), tmp_path / "net.json"
    answer = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
         f"--window-size={width},900", f"--screenshot={tmp_path / 'shot.png'}", f"file://{page.absolute()}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert (tmp_path / "shot.png").stat().st_size > 10_000
    assert "CONSOLE" not in answer.stderr, answer.stderr
    asked = re.findall(r'"url":"(\w+://[^"]*)"', log.read_text(errors="replace"))
    assert not [url for url in asked if "example.org" in url or "w3.org" in url], asked
