"""tuner.report: one page and one model card of a finished run."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from helpers import TINY

BAD = "<script>alert(1)</script>"


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of a CSV file with 90 images, whose first class has markup as its name."""
    from tuner.data import synthetic

    monkeypatch.chdir(tmp_path)
    data = synthetic.load(n=150, classes=3, size=8)
    names = (BAD, "a|b", "=c")
    rows = [
        f"{names[label]},{','.join(map(str, image.flatten().tolist()))}"
        for label, image in zip(data.pool.labels[:90].tolist(), data.pool.images[:90], strict=True)
    ]
    Path("images.csv").write_text("\n".join(["label," + ",".join(f"p{i}" for i in range(64)), *rows]))


def front_matter(card):
    """The YAML in front of a model card."""
    return yaml.safe_load(Path(card).read_text().split("---\n")[1])


def test_the_page_and_the_card_of_a_run(call, command, images, opened):
    code, out = command("data=csv", "data.path=images.csv", "data.test_path=null", *TINY[1:], "hydra.run.dir=run")
    assert code == 0, out
    code, out, err = call("report", "run")
    assert (code, err) == (0, "")
    assert out == "report: run/report.html\nmodel card: run/MODEL_CARD.md; complete what is marked for the owner\n"
    page = Path("run/report.html").read_text()
    assert len(page) < 2e6
    assert BAD not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "://" not in re.sub(r'"data:[^"]*"', "", page)
    tab = opened("run/report.html")
    assert tab.get_by_text(BAD).count() > 0
    result = json.loads(Path("run/result.json").read_text())
    accuracy = f"{result['test_accuracy']:.4f}"
    assert tab.locator(".card").first.inner_text().split()[:3] == ["Test", "accuracy", accuracy]
    wrong = sum(
        line.split(",")[2] != line.split(",")[3]
        for line in Path("run/predictions.csv").read_text().split("\n")
        if line.startswith("test")
    )
    assert tab.locator(".images img").count() == min(wrong, 24)

    card = Path("run/MODEL_CARD.md").read_text()
    assert BAD not in card
    assert "&lt;script&gt;" in card
    assert "a\\|b" in card
    [test] = [
        entry
        for entry in front_matter("run/MODEL_CARD.md")["model-index"][0]["results"]
        if entry["dataset"]["split"] == "test"
    ]
    assert test["metrics"][0] == {
        "type": "accuracy",
        "value": round(result["test_accuracy"], 4),
        "name": "Test accuracy",
    }


def test_a_card_that_somebody_may_have_edited_is_kept(call, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    (run / "MODEL_CARD.md").write_text("mine")
    code, out, _ = call("report", run)
    assert code == 0
    assert "MODEL_CARD.md, which exists: --force" in out
    assert (run / "MODEL_CARD.md").read_text() == "mine"
    assert call("report", run, "--force")[0] == 0
    assert front_matter(run / "MODEL_CARD.md")["pipeline_tag"] == "image-classification"


def test_the_code_in_the_report_runs(call, trained, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert call("report", trained(), "--html", "page.html")[0] == 0
    [python] = re.findall(r"```python\n(.*?)```", Path("MODEL_CARD.md").read_text(), flags=re.DOTALL)
    Image.new("L", (16, 16)).save("photo.jpg")
    exec(compile(python, "MODEL_CARD.md", "exec"), {})


def test_a_run_without_predictions_and_curves_and_data(call, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained("test=false"), run)
    for name in ("predictions.csv", "metrics.csv", "model.safetensors"):
        (run / name).unlink()
    code, out, err = call("report", run)
    assert code == 0, err
    assert "report.html" in out
    assert "<img" not in (run / "report.html").read_text()
    assert "It was not tested." in (run / "MODEL_CARD.md").read_text()


def test_a_data_set_that_has_changed_gives_no_images(call, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    result = json.loads((run / "result.json").read_text())
    result["split_hashes"]["test"] = "0" * 16
    (run / "result.json").write_text(json.dumps(result))
    code, _, err = call("report", run)
    assert code == 0
    assert err.strip() == "the report has no images: the test images of its data set have changed since"


def test_earlier_versions_and_searches(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(Path(__file__).with_name("earlier_version.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in ("run", "multirun/mine/3", "multirun/mine/best"):
        code, _, err = call("report", folder)
        assert code == 0, err
        assert front_matter(f"{folder}/MODEL_CARD.md")["library_name"] == "tuner"
    assert "mean of 3 seeds" in Path("multirun/mine/best/report.html").read_text()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("nowhere", "nowhere does not exist"),
        ("empty", "empty is not a run folder"),
        ("killed", "killed has no result.json: the run is still going, or was killed"),
        ("search", "search is a sweep, not a run; its retrained best is search/best"),
        ("failed", "failed is a run that is failed: only a complete run has a report"),
        ("odd", "class_names in odd/result.json"),
    ],
)
def test_what_is_no_finished_run_is_refused(call, tmp_path, monkeypatch, run, reason):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "killed/conf", "search/best", "failed", "odd"):
        Path(folder).mkdir(parents=True)
    Path("search/best/result.json").write_text("{}")
    Path("failed/result.json").write_text('{"status": "failed"}')
    Path("odd/result.json").write_text('{"status": "complete", "class_names": 3}')
    code, out, err = call("report", run)
    assert (code, out) == (1, "")
    assert err.startswith(reason)
    assert err.count("\n") == 1
