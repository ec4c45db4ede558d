"""The Hub without a network: the real client libraries talk to a hub on the loopback interface.

They read HF_ENDPOINT and HF_HUB_OFFLINE when imported, hence a process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(20)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
REPOS = {
    "prefs": {"train.jsonl": JSONL, "test.jsonl": JSONL, "README.md": "---\nlicense: mit\n---\n"},
    "splits": {"test.jsonl": JSONL, "validation.jsonl": JSONL},
    "single": {"test.jsonl": JSONL},
    "script": {"script.py": "raise SystemExit('this was run')"},
    "gated": {"train.jsonl": JSONL},
    "pictures": {
        "README.md": "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n",
        "train.jsonl": '{"image": null}\n',
    },
}
OPEN_EACH = """
import json, sys
from pathlib import Path
from qdpo.data.read.source import open_source
from qdpo.errors import DataError
for path in sys.argv[1:]:
    try:
        source = open_source(path, shipped=Path("."), limit=5)
        print(json.dumps([source.name, list(source.rows), source.fingerprint, source.revision, source.license]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path):
    for name, files in REPOS.items():
        for file, content in files.items():
            path = tmp_path / "hub" / "datasets" / "acme" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    with HubServer(tmp_path / "hub", gated={"acme/gated"}) as server:
        yield server


@pytest.fixture
def open_each(hub, tmp_path):
    """Opens each path in one new process; returns what came of each. All processes of a test share a cache."""

    def ask(*paths, **more):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        here["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-c", OPEN_EACH, *paths]
        done = subprocess.run(command, env={**clean, **here, **more}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return ask


def test_a_data_set_is_pinned_to_its_commit_kept_and_never_another_one(hub, open_each):
    commit = hub.commit("datasets", "acme/prefs")
    train, named = open_each("acme/prefs", "acme/prefs/test")
    assert train == [f"acme/prefs@{commit[:12]}/train", ROWS[:5], commit, commit, "mit"]
    assert named[0].endswith("/test")
    assert any(asked.endswith(f"{commit}/train.jsonl") for asked in hub.requests)
    assert not any("/resolve/main/" in asked for asked in hub.requests) and not hub.unknown

    hub.requests.clear()
    offline = open_each(
        "acme/prefs", "acme/prefs/test", f"acme/prefs@{commit}", "acme/prefs@abc", "acme/absent", HF_HUB_OFFLINE="1"
    )
    cached, named, pinned, other, absent = offline
    assert cached[1:4] == pinned[1:4] == [ROWS[:5], commit, commit]
    assert named[0].endswith("/test")
    assert f"needed at revision abc, but only {commit} is in the local cache" in other
    assert "not in the local cache, and HF_HUB_OFFLINE forbids" in absent
    assert not hub.requests

    hub.down = True
    (refused,) = open_each("acme/prefs")
    assert "The Hub refused acme/prefs" in refused and "503" in refused


def test_what_can_go_wrong_is_explained(open_each):
    expected = {
        "acme/single": None,
        "acme/splits": "several splits, none of them 'train'. Choose one with data.split=…: test, validation.",
        "acme/prefs/dev": "has no split 'dev'. Choose one with data.split=…: test, train.",
        "acme/gated": "hf auth login",
        "acme/nothing": "the Hub has no such data set, or it is private",
        "acme/prefs@v9": "has no such revision",
        "acme/prefs:huge": "BuilderConfig 'huge' not found. Available: ['default']",
        "acme/script": "scripts are not run",
        "acme/pictures": "pictures or sound in column 'image'",
    }
    for (path, message), answer in zip(expected.items(), open_each(*expected), strict=True):
        if message is None:
            assert answer[0].endswith("/test")  # the only split
        else:
            assert message in answer and path.partition("@")[0].partition(":")[0].removesuffix("/dev") in answer
    assert open_each("acme/gated", HF_TOKEN=TOKEN)[0][1] == ROWS[:5]
    (unreachable,) = open_each("acme/elsewhere", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in unreachable and "HF_HUB_OFFLINE=1" in unreachable
