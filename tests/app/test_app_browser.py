"""The page in a real Chromium: what is picked is what is made or shown, and nothing leaves the machine."""

import base64
import contextlib
import http.client
import inspect
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image
from tiny_runs import edit_flags

from mutor_img import sampling
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.common.images import write_png

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name, there in (("Gradio", find_spec("gradio")), ("playwright", find_spec("playwright")),
                                    ("Chromium", CHROMIUM)) if not there]

pytestmark = [pytest.mark.app, pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; "
                                                                        "make test-app installs what pip can")]
PATIENCE = 120_000  # milliseconds
EVIL = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of ten updates and two pictures, and one whose name and files mean harm."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("demo", EVIL):
        write_checkpoint(root / name, 10, {}, {"kind": "generator"}, 1)
        (root / name / "config.yaml").write_text(f"train: {{steps: 20, note: {EVIL!r}}}\n")
        (root / name / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "loss": 1 / step, f"val_{EVIL}": 2.0}) + "\n" for step in range(1, 11)))
        for step in (5, 10):
            write_png(root / name / "pictures" / f"samples_{step:08d}.png", Image.new("RGB", (8, 8 * step)))
    (root / EVIL / "metrics.jsonl").write_text("3\n")
    return root


@pytest.fixture(scope="module")
def server(two_runs, runs, free_port, tmp_path_factory):
    """The real command, with two checkpoints and a folder of runs."""
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "mutor_img.app", "--checkpoint", two_runs[0], "--compare", two_runs[1], "--runs",
             str(runs), "--port", str(free_port)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = process.stdout.readline()
    assert line == f"http://127.0.0.1:{free_port} (Ctrl-C ends it)\n", log.read_text()
    yield SimpleNamespace(url=line.split()[0], port=free_port, process=process, log=log)
    process.send_signal(signal.SIGINT)  # Ctrl-C
    process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    """The page, just opened; whatever it asks another machine for is noted in ``page.strangers``."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.strangers, page.complaints = [], []
    page.on("console", lambda line: page.complaints.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:"))
            else page.strangers.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#generate")
    yield page
    page.close()


def set_number(page, control, value):
    box = page.locator(f"#{control} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def pick_class(page, word):
    box = page.locator("#classes input")
    box.fill(word)
    box.press("Enter")
    box.press("Tab")  # closes the list, which would lie over what is below


def wait_for_status(page, words):
    page.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words)


def shown_images(page, place):
    """Return the sample numbers and the images (N, H, W, 3) of a grid."""
    tags = page.locator(f"#grid-{place} img")
    urls = tags.evaluate_all("all => all.map(image => [image.dataset.sample, image.src, image.naturalWidth])")
    assert all(int(width) == 8 for _, _, width in urls)  # Chromium could draw them
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for _, url, _ in urls]
    return [int(number) for number, _, _ in urls], np.stack(images)


def test_what_is_picked_is_made_side_by_side_and_equals_sample_py(page, two_runs, tmp_path, monkeypatch):
    pick_class(page, "fox")
    pick_class(page, "cat")
    page.get_by_label("random").check()
    for control, value in (("count", 11), ("seed", 7), ("cfg_scale", 3.5), ("temperature", 0.9), ("top_k", 9)):
        set_number(page, control, value)
    page.click("#generate")
    wait_for_status(page, "22 images in")
    commands = [line for line in page.locator("#commands .cm-content").inner_text().splitlines() if line]
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for place, command in enumerate(commands):
        words = shlex.split(command)
        for flag, value in (("--checkpoint", two_runs[place]), ("--classes", "2,0"), ("--labels", "random"),
                            ("--seed", "7"), ("--cfg-scale", "3.5"), ("--temperature", "0.9"), ("--top-k", "9"),
                            ("--top-p", "1.0"), ("--num-samples", "11")):
            assert words[words.index(flag) + 1] == value
        numbers, images = shown_images(page, place)
        made = np.load(sampling.main(words[2:]))
        assert sorted(numbers) == list(range(11)) and np.array_equal(images, made["arr_0"][numbers])
        assert [made["arr_1"][number] for number in numbers] == sorted(made["arr_1"]) and set(made["arr_1"]) == {0, 2}
        assert page.locator(f"#grid-{place} figcaption").all_inner_texts() == ["cat 0", "red fox 2"]
        assert two_runs[place] in page.locator(f"#grid-{place}").inner_text()
    assert not np.array_equal(*(shown_images(page, place)[1] for place in range(2)))


@pytest.mark.parametrize(("control", "value", "words"), [
    ("temperature", 0, "temperature is 0.0; give a value in (0.0"), ("top_k", 99, "top_k is 99"),
    ("seed", "", "seed is empty; give a number"), ("count", 1000, "number of images is 1000"),
])
def test_a_bad_value_is_a_message_and_a_better_one_goes_on(page, server, control, value, words):
    set_number(page, control, value)
    page.click("#generate")
    wait_for_status(page, words)
    assert page.locator("#status [role=alert]").is_visible() and page.locator("#grid-0 img").count() == 0
    set_number(page, control, 1)
    page.click("#generate")
    wait_for_status(page, "images in")
    assert page.locator("#grid-0 img").count() == (1 if control == "count" else 20)
    assert "Traceback" not in server.log.read_text()


def test_the_guidance_scale_cannot_go_below_one(page):
    set_number(page, "cfg_scale", 0.5)
    set_number(page, "count", 1)
    page.click("#generate")
    wait_for_status(page, "2 images in")
    assert page.locator("#commands .cm-content").inner_text().count("--cfg-scale 1.0 ") == 2


def test_stop_keeps_what_was_made(page):
    set_number(page, "count", 256)
    page.click("#generate")
    page.wait_for_selector("#grid-1 img")
    page.click("#stop")
    wait_for_status(page, "Stopped.")
    made = page.locator("#grid-1 img").count()
    page.wait_for_timeout(500)
    assert 0 < made == page.locator("#grid-1 img").count() == 256 - page.locator("#grid-1 .pending").count() < 256


def test_an_image_is_uploaded_shown_and_kept(page, two_runs, tmp_path):
    edit_flags(tmp_path)
    page.locator("#edit button").first.click()
    for control, file in (("keep", "photo.png"), ("mask", "mask.png")):
        page.locator(f"#{control} input[type=file]").set_input_files(tmp_path / file)
        page.wait_for_function("id => document.querySelector(`#${id} img`)?.naturalWidth == 8", arg=control)
    set_number(page, "count", 2)
    page.click("#generate")
    wait_for_status(page, "4 images in")
    words = shlex.split(page.locator("#commands .cm-content").inner_text().splitlines()[0])
    kept, made = (Path(words[words.index(flag) + 1]) for flag in ("--keep", "--mask"))
    assert (kept.name, made.name) == ("photo.png", "mask.png") and kept.is_file()
    assert kept.read_bytes() == (tmp_path / "photo.png").read_bytes()


def test_nothing_leaves_the_machine(page, server):
    set_number(page, "count", 3)
    page.click("#generate")
    wait_for_status(page, "6 images in")
    page.wait_for_timeout(500)
    assert page.strangers == [] and page.complaints == []
    sockets = psutil.Process(server.process.pid).net_connections()
    assert {s.laddr for s in sockets if s.status == psutil.CONN_LISTEN} == {("127.0.0.1", server.port)}
    assert {s.raddr.ip for s in sockets if s.raddr} <= {"127.0.0.1"}


def test_another_website_cannot_upload_or_show_the_page(browser, server):
    page = browser.new_page(bypass_csp=True)  # a website that allows itself everything
    answer = page.goto(server.url.replace("127.0.0.1", "localhost"))  # to Chromium another site
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
    with page.expect_response("**/gradio_api/upload") as answer:
        page.evaluate("url => void fetch(url, {method: 'POST', mode: 'no-cors', body: new FormData()})",
                      f"{server.url}/gradio_api/upload")
    assert answer.value.status == 403
    page.close()


def choose_run(page, name):
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#runs td")
    page.locator("#run input").click()
    page.get_by_role("option", name=name, exact=True).click()


def open_run(page, name):
    choose_run(page, name)
    page.wait_for_function(
        "name => document.querySelector('#run-head .mutor-title')?.innerText.startsWith(name + ' ·')", arg=name)


def heights(page, place):
    """Return the heights of the pictures there, as Chromium has drawn them."""
    page.wait_for_function("place => [...document.querySelectorAll(place + ' img')].every(image => image.complete)",
                           arg=place)
    return page.locator(f"{place} img").evaluate_all("all => all.map(image => image.naturalHeight)")


def test_a_run_is_browsed(page):
    open_run(page, "demo")
    state = page.locator("#run-head .mutor-title").inner_text()
    assert state == "demo · generator · 10 of 20 · stopped; the same command goes on"
    assert len(heights(page, "#run-curves")) == 1 and heights(page, "#run-pictures") == [80]
    page.locator("#pictures input").click()
    page.get_by_role("option", name="samples after update 5", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#run-pictures img').length == 2")
    assert heights(page, "#run-pictures") == [40, 80]
    assert page.strangers == []


def test_a_broken_run_is_a_line_and_its_texts_are_no_markup(page):
    open_run(page, EVIL)
    assert "metrics.jsonl, line 1: must be a JSON object" in page.locator("#run-curves [role=alert]").inner_text()
    page.locator("#run-config summary").click()
    assert EVIL in page.locator("#run-config pre").inner_text()
    open_run(page, "demo")
    assert page.title() == "mutor_img"


def test_a_run_that_has_begun_since_appears_after_refresh(page, runs):
    open_run(page, "demo")
    write_checkpoint(runs / "newer", 1, {}, {"kind": "tokenizer"}, 1)
    page.click("#refresh")
    page.wait_for_function("document.querySelector('#runs').innerText.includes('newer')")
    open_run(page, "newer")


def test_a_request_for_what_is_not_listed_opens_nothing(page, server, two_runs):
    page.route("**/queue/join*", lambda route: route.continue_(
        post_data=route.request.post_data.replace('"demo"', json.dumps(two_runs[0]))))
    choose_run(page, "demo")
    page.wait_for_selector("#run-head [role=alert]")
    assert "no such run any more" in page.locator("#run-head").inner_text()
    assert page.locator("#run-curves img").count() == 0 and "Traceback" not in server.log.read_text()


def test_a_request_that_is_too_large_is_refused_before_it_is_sent(server):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.putrequest("POST", "/gradio_api/queue/join")
        connection.putheader("Content-Length", str(2**40))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413 and "the page takes at most 262,144 here" in answer.read().decode()


def test_a_public_address_is_told_or_refused_in_one_line(monkeypatch):
    from mutor_img.app import page as drawn

    signature = inspect.signature(drawn.networking.setup_tunnel)
    monkeypatch.setattr(drawn.networking, "setup_tunnel", lambda *given: signature.bind(*given) and "https://public")
    assert drawn._public_address("127.0.0.1", 7860) == "https://public"

    def offline(*given):
        raise RuntimeError("Could not get share link\nfrom Gradio API Server.")

    monkeypatch.setattr(drawn.networking, "setup_tunnel", offline)
    with pytest.raises(UserError, match=r"^--share: no public address \(Could not get share link from .*; leave"):
        drawn._public_address("127.0.0.1", 7860)
