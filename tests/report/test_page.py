"""report.html: what a run leaves, what hostile rows do to it, several runs side by side, and how a browser takes it."""

from __future__ import annotations

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows, save_tiny, write_jsonl

from litft.cli.main import main
from litft.engine.metrics import COLUMNS
from litft.errors import UserError
from litft.report.page import write_report

HOSTILE = (
    "<script>alert(1)</script> \u202egnitirw\u202c \x1b[31m\x00 {{ 7*7 }} </style><img src=//evil.example/x> &amp;"
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.marked: list[str] = []
        self._open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "wbr"):
            self._open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # whole, whatever the rows hold
        self.text += " " * (tag in ("td", "th"))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] == "mark":
            self.marked[-1] += data


def harmless(page: Page) -> None:
    """Nothing in it runs, fetches, or steers the reader's screen."""
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "url(" not in page.source
    assert not set("\x00\x1b\u202e\u202c\x07") & set(page.source)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `a` of hostile rows."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model")
    rows = chat_rows(40)
    rows[0] = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"yes {HOSTILE}"}]}
    write_jsonl(folder / "rows.jsonl", rows)
    for name, lr in (("a", "0.001"), ("b", "0.01")):
        words = ["--data", folder / "rows.jsonl", "--model", folder / "model", "--out", folder / name]
        options = ["--samples.max_new_tokens", 4, "--samples.count", 1, "--trainer.max_steps", 8, "--model.lr", lr]
        assert main(["finetune", "lora", *map(str, [*words, *options])]) == 0
    return folder


def test_a_run_leaves_its_page(runs: Path) -> None:
    page = Page(runs / "a" / "report.html")
    harmless(page)
    facts = json.loads((runs / "a" / "run.json").read_text())
    for said in (f"{facts['losses_after']['val_loss']:.4f}", "36 of 40 read", "8 of 8 steps", "gradient norm"):
        assert said in page.text, said
    for said in (facts["fingerprints"]["data"], "lr: 0.001", facts["versions"]["torch"]):
        assert said in page.text, said
    assert page.tags.count("svg") >= 6 and page.text.count("before") >= 2
    assert facts["answers"][0][0].split()[0] in page.text


def test_the_marked_text_is_what_is_trained(runs: Path) -> None:
    examples = json.loads((runs / "a" / "run.json").read_text())["rows"]["examples"]
    assert len(examples) == 3 and all(sum(len(text) for text, _ in one["pieces"]) for one in examples)
    first = "".join(text for text, trained in examples[0]["pieces"] if trained)
    assert first.startswith("yes <script>") and first.endswith("<|im_end|>")
    page = Page(runs / "a" / "report.html")
    assert "yes <script>alert(1)</script> \\u202egnitirw\\u202c \\x1b[31m\\x00 {{ 7*7 }} </style>" in page.marked[1]
    assert "user" not in page.marked[1]


def test_it_is_written_again_from_the_folder_alone(runs: Path, tmp_path: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(runs / "a", tmp_path / "a"))
    before = (copy / "report.html").read_text()
    assert main(["report", str(copy / "final")]) == 0 and capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert (copy / "report.html").read_text() == before
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in (runs / "a").iterdir())


def test_side_by_side_tells_only_what_differs(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert main(["report", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    page = Page(out)
    harmless(page)
    differs = page.text.partition("What differs between them")[2].split()
    assert "model.lr" in differs and {"0.001", "0.01"} <= set(differs)
    assert "data.train" not in differs and "versions.torch" not in differs
    for run in ("a", "b"):
        facts = json.loads((runs / run / "run.json").read_text())
        assert f"{facts['losses_after']['val_loss']:.4f}" in page.text
    assert {"line s0 d0", "line s1 d0"} <= {value for name, value in page.attributes if name == "class"}


def test_runs_of_the_same_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs / "a", tmp_path / "other" / "a"))
    page = Page(write_report([runs / "a", other], tmp_path / "out.html"))
    assert "other/a" in page.text and f"{runs.name}/a" in page.text
    with pytest.raises(UserError, match="named twice"):
        write_report([other, other], tmp_path / "out.html")


@pytest.mark.parametrize(
    ("outcome", "said"),
    [("running", "not ended"), ("Failed: out of memory <b>", "Failed: out of memory <b> (after 3 steps)")],
)
def test_a_run_that_did_not_end(runs: Path, tmp_path: Path, outcome: str, said: str) -> None:
    copy = Path(shutil.copytree(runs / "a", tmp_path / "a"))
    facts = json.loads((copy / "run.json").read_text())
    for key in ("losses_after", "answers", "rows", "tokens_per_s", "memory", "seconds", "final"):
        facts.pop(key, None)
    (copy / "run.json").write_text(json.dumps(facts | {"outcome": outcome, "steps": 3}))
    (copy / "config.yaml").unlink()
    with open(copy / "metrics.csv", "a") as file:
        file.write("9,0.5,nan")  # torn
    page = Page(write_report([copy]))
    assert said in page.text and page.tags.count("svg") >= 5
    (copy / "metrics.csv").unlink()
    assert "svg" not in Page(write_report([copy])).tags


def test_stopping_and_failing_leave_a_page(runs: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--data", runs / "rows.jsonl", "--model", runs / "model", "--out", tmp_path / "bad"]
    options = ["--samples.count", 0, "--model.max_bad_steps", 0, "--model.lr", 1e30, "--trainer.max_steps", 12]
    code = main(["finetune", "full", *map(str, [*words, *options, "--model.clip", 0])])
    assert code == 1, capsys.readouterr()
    assert "BadLoss" in Page(tmp_path / "bad" / "report.html").text


def test_100_000_records_make_a_small_page(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "a", tmp_path / "a"))
    with open(copy / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(100_000):
            writer.writerow([i, i / 1e5, 2 + i % 7, "", 1e-4, 1.5, 100, 50, 1e3 + i % 11, 500, 0.1, 0.01, 1.5])
    assert len(write_report([copy]).read_bytes()) < 300_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "is not there"),
        (["."], "no run of litft"),
        (["a", "b"], "need --out"),
        (["a", "--out", "notes.txt"], "not overwritten"),
        (["a", "--out", "no/such/place.html"], "cannot be written"),
        (["broken"], "cannot be read"),
    ],
)
def test_mistakes(
    runs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(runs / name)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("[1")
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 5
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False])
def test_in_a_browser(runs: Path, tmp_path: Path, scheme: str, scripts: bool) -> None:
    from playwright.sync_api import sync_playwright

    both = write_report([runs / "a", runs / "b"], tmp_path / "both.html")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in (360, 1280):
            for file in (runs / "a" / "report.html", both):
                context = browser.new_context(
                    viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
                )
                page, asked, said = context.new_page(), [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
                page.goto(file.as_uri())
                assert asked == [file.as_uri()] and not said
                if scripts:
                    wide, text, back = page.evaluate(
                        "[document.documentElement.scrollWidth, getComputedStyle(document.body).color,"
                        " getComputedStyle(document.body).backgroundColor]"
                    )
                    assert wide <= width
                    assert (_light(back) > _light(text)) == (scheme == "light")
                    assert page.locator("svg.chart").first.bounding_box()["width"] > 250
                context.close()
        browser.close()


def _light(colour: str) -> float:
    return sum(float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3])
