"""The page in a real browser (headless Chromium): opens, folds, expands, finds, compares, no console error."""

from __future__ import annotations

import contextlib
import shutil
import time

import pytest

from resq_compiler.inspection.diagnostic_tables import write_diagnostics

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1500,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    pytest.importorskip("netron", reason="netron is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    with contextlib.suppress(Exception):
        started.quit()


@pytest.fixture
def opened(browser, compiled):
    browser.get((compiled.dump / "index.html").as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def wait_for(browser, script, seconds=30):
    end = time.monotonic() + seconds
    while not browser.execute_script(script):
        assert time.monotonic() < end, f"not true within {seconds} s: {script}; console: {browser.get_log('browser')}"
        time.sleep(0.05)


def find(browser, css):
    return browser.find_elements("css selector", css)


def node_count(browser):
    return len(find(browser, "#canvas g[data-id^='node:']"))


def test_opens_on_the_last_stage_with_blocks_folded(opened):
    assert [b.text.split("\n")[0] for b in find(opened, ".stage b")][0] == "00-capture"
    assert find(opened, ".stage.on b")[0].text == "13-quantize-kv-cache"
    assert len(find(opened, "#canvas g[data-id^='block:']")) == 2
    assert node_count(opened) < 30


def test_a_click_expands_and_folds_a_block(opened):
    before = node_count(opened)
    find(opened, "#canvas g[data-id='block:0']")[0].click()
    assert node_count(opened) > before + 40
    fills = {r.get_attribute("fill") for r in find(opened, "#canvas g[data-id^='node:'] > .box")}
    assert {"#ffffff", "#fbd38d", "#a8cdf5", "#d9c2f0"} <= fills  # float, 4-bit, 8-bit, mixed
    opened.execute_script("graph.centre('block:0', 1)")
    opened.execute_script(
        "document.querySelector(\"#canvas g[data-id='block:0'] > rect\").dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )  # the middle of the frame, where a driver clicks, lies under nodes
    assert node_count(opened) == before


def test_search_finds_marks_and_reveals(opened):
    box = find(opened, "#search")[0]
    box.send_keys("q_proj w8a8")
    assert "2 found" in find(opened, "#hits")[0].text
    assert len(find(opened, "#canvas g.hit[data-id^='block:']")) == 2
    box.send_keys("\n")
    details = find(opened, "#details")[0].text
    linear = "model.layers.0.self_attn.q_proj (q)"
    for expected in ("quantized_linear", "W8A8", linear, "columns 56–64", "quantize-weights", "weight noise"):
        assert expected in details
    assert len(find(opened, "#canvas g.selected")) == 1


def test_a_click_on_a_node_shows_its_details(opened):
    opened.execute_script("graph.reveal(data.stage(current).nodes.find(r => r.facts.Projection).name)")
    find(opened, "#canvas g.selected rect.box")[0].click()
    assert "projection\nU_" in find(opened, "#details")[0].text


def test_wheel_zooms_and_drag_pans(opened):
    from selenium.webdriver import ActionChains

    canvas = find(opened, "#canvas")[0]
    before = opened.execute_script("return {...graph.transform}")
    wheel = "new WheelEvent('wheel', {deltaY: -300, clientX: 600, clientY: 400, cancelable: true})"
    opened.execute_script(f"arguments[0].dispatchEvent({wheel})", canvas)
    zoomed = opened.execute_script("return {...graph.transform}")
    assert zoomed["k"] > before["k"]
    ActionChains(opened).move_to_element_with_offset(canvas, -300, -200).click_and_hold().move_by_offset(60, 40).release().perform()
    moved = opened.execute_script("return {...graph.transform}")
    assert (moved["x"] - zoomed["x"], moved["y"] - zoomed["y"]) == (60, 40)


def test_compares_two_stages_side_by_side(opened):
    find(opened, "button[data-tab='compare']")[0].click()
    find(opened, ".stage[data-index='12']")[0].click()
    assert "14 added, 0 removed" in find(opened, "#difference")[0].text
    find(opened, "#expand-changed")[0].click()
    assert len(find(opened, "#right g[data-id] > .box[fill='#b7e4c0']")) == 14  # the new quantizers
    assert not find(opened, "#left g[data-id] > .box[fill='#b7e4c0']")
    lines = find(opened, "#changes .added")
    lines[0].click()
    assert len(find(opened, "#right g.selected")) == 1
    assert "quantize" in find(opened, "#details")[0].text


def test_linears_lead_to_their_parts(opened):
    find(opened, "button[data-tab='linears']")[0].click()
    rows = find(opened, "#linears tbody tr")
    assert len(rows) == 2 * 13 + 1  # six linears in two parts and down in one, in two blocks, and the head in none
    find(opened, "#linears a[data-node]")[0].click()
    assert "on" in find(opened, "#graph")[0].get_attribute("class").split()
    assert len(find(opened, "#canvas g.selected")) == 1


def test_diagnostics_show_plots_and_tables(browser, compiled, tmp_path):
    from resq_compiler.compiler import trace
    from resq_compiler.inspection.activations import diagnose
    from resq_compiler.tiny import tiny_tokens

    original, ctx = trace(compiled.original)
    found = diagnose(original, ctx.topology, compiled.model.graph_module, tiny_tokens(2, 48))
    shutil.copytree(compiled.dump, tmp_path / "dump")
    write_diagnostics(tmp_path / "dump", found)
    browser.get((tmp_path / "dump" / "index.html").as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    find(browser, "button[data-tab='diagnostics']")[0].click()
    images = find(browser, "#diagnostics img")
    assert len(images) == 4 and all(browser.execute_script("return arguments[0].naturalWidth > 0", i) for i in images)
    assert "down_input" in find(browser, "#diagnostics")[0].text
