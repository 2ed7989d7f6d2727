"""tuner.demo: an image file in, its probabilities and the evidence out, in the browser."""

import signal
import subprocess
import sys
from importlib.util import find_spec
from urllib.parse import urlsplit

import pytest
from PIL import Image

import tuner
from tuner import demo
from tuner.inference.evidence import Explainer


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), (200, 40, 40)).save(path)
    return path


def test_a_file_is_classified(trained, photo):
    model = tuner.load(trained(), device="cpu")
    probabilities, evidence = demo.classify(Explainer(model), photo)
    assert list(probabilities) == list(model.classes)
    assert list(probabilities.values()) == pytest.approx(model.predict(photo)[0].tolist())
    assert evidence.startswith('<img src="data:image/png;base64,')


def test_a_file_that_is_no_image_is_explained(trained, tmp_path):
    explain = Explainer(tuner.load(trained(), device="cpu"))
    bad = tmp_path / "<b>.png"
    bad.write_text("no image")
    giant = tmp_path / "giant.png"
    Image.new("1", (9000, 9000)).save(giant)
    for path, reason in ((bad, "&lt;b&gt;.png cannot be used as an image"), (giant, "81,000,000 pixels")):
        probabilities, text = demo.classify(explain, path)
        assert probabilities is None
        assert reason in text
    assert demo.classify(explain, None) == (None, "")


def test_a_mistake_is_one_line(call, trained, monkeypatch):
    code, _, err = call("demo", "nowhere")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("nowhere does not exist")
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = call("demo", trained(), "--device", "cpu")
    assert (code, err.splitlines()[-1]) == (1, "tuner.demo needs gradio: pip install 'tuner[demo]'")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
def test_the_page_in_a_browser(chromium, trained, photo):
    """In a process of its own: Gradio leaves event loops open, which is an error here."""
    command = [sys.executable, "-m", "tuner.demo", trained(), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split(",")[0]
            assert address.startswith("http://127.0.0.1:")
            tab, asked = chromium.new_page(), []
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.wait_for_selector("input[type=file]", state="attached")
            tab.set_input_files("input[type=file]", photo)
            tab.wait_for_selector("img[alt^='The image']")
            assert "class" in tab.inner_text("body")
            tab.close()
            local = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
            assert local == {"127.0.0.1"}
            port = str(urlsplit(address).port)
            again = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=120)
            assert again.returncode == 1
            assert again.stderr.splitlines()[-1].startswith(f"port {port} is taken")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
