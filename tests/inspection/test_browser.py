"""The page in a real browser (headless Chromium): opens, folds, expands, finds, compares, no console error."""

from __future__ import annotations

import contextlib
import json
import shutil
import time

import pytest

from resq_compiler.analysis.topology import Topology
from resq_compiler.inspection import dump_files
from resq_compiler.inspection.diagnostic_tables import write_diagnostics
from resq_compiler.inspection.page import write_page

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1500,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
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
def page(browser, compiled):
    """The page as it opens; at the end, nothing went wrong on it."""
    browser.get((compiled.dump / "index.html").as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.fixture
def opened(page):
    """The page with the graph in front."""
    tab(page, "graph")
    return page


def tab(browser, name):
    find(browser, f"button[data-tab='{name}']")[0].click()


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def wait_for(browser, script, seconds=30):
    end = time.monotonic() + seconds
    while not browser.execute_script(script):
        assert time.monotonic() < end, f"not true within {seconds} s: {script}; console: {browser.get_log('browser')}"
        time.sleep(0.05)


def find(browser, css):
    return browser.find_elements("css selector", css)


def node_count(browser):
    return len(find(browser, "#canvas g[data-id^='node:']"))


def test_opens_on_a_summary_with_the_worst_sites_first(page):
    assert "on" in find(page, "#summary")[0].get_attribute("class").split()
    cards = find(page, ".cards")[0].text
    assert "W4A4KV4" in cards and "weights / activations / KV cache" in cards and "MB" in cards
    decibels = [float(cell.text) for cell in find(page, "#sites tbody td:nth-child(5)")]
    assert decibels == sorted(decibels) and len(decibels) == len(
        page.execute_script("return Object.keys(data.manifest.noise)")
    )
    assert len(find(page, "#heat td[data-node]")) == len(decibels)  # of two blocks


def test_a_site_of_the_summary_leads_to_its_node(page):
    cell = find(page, "#heat td[title^='blocks.1.down_input']")[0]
    cell.click()
    assert len(find(page, "#canvas g.selected")) == 1
    details = find(page, "#details")[0].text
    assert "blocks.1.down_input" in details and "signal to noise" in details
    tab(page, "summary")
    box = find(page, "#site-filter")[0]
    box.send_keys("kv blocks.0")
    shown = [row.text for row in find(page, "#sites tbody tr") if row.is_displayed()]
    assert len(shown) == 2 and all("blocks.0" in text for text in shown)


def test_a_click_on_a_heading_sorts(page):
    block = find(page, "#sites thead th")[2]
    for expected in (False, True):
        block.click()
        values = [cell.text for cell in find(page, "#sites tbody td:nth-child(3)")]
        assert values == sorted(values, reverse=expected)


def test_opens_on_the_last_stage_with_blocks_folded(opened):
    assert [b.text.split("\n")[0] for b in find(opened, ".stage b")][0] == "00-capture"
    assert find(opened, ".stage.on b")[0].text == "15-quantize-kv-cache"
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
    assert find(opened, "#hits")[0].text == "1 of 2 found"
    details = find(opened, "#details")[0].text
    linear = "model.layers.0.self_attn.q_proj (q)"
    for expected in ("quantized_linear", "W8A8", linear, "columns 56–64", "quantize-weights", "weight noise"):
        assert expected in details
    assert len(find(opened, "#canvas g.selected")) == 1


def test_a_click_on_a_node_shows_its_details(opened):
    opened.execute_script("graph.reveal(data.stage(current).nodes.find(r => r.facts.Projection).name)")
    find(opened, "#canvas g.selected rect.box")[0].click()
    assert "projection\nU_" in find(opened, "#details")[0].text


def test_readers_are_named_with_the_operator_they_are_now(opened):
    opened.execute_script("reveal(current, data.stage(current).nodes.find((r) => r.target === 'quantize').name)")
    readers = find(opened, "#details .users")[0].text
    assert "quantized_linear W8A8" in readers  # the name alone is that of the node before its inputs were quantized


def test_nothing_is_cut_off_in_a_small_window(page):
    page.set_window_size(1060, 570)
    beyond = """const [name] = arguments; showTab(name); const bar = document.querySelector(`#${name} .toolbar`).getBoundingClientRect();
        return [...document.querySelectorAll(`#${name} .toolbar > *`)].filter((e) => e.getBoundingClientRect().right > bar.right).length"""
    try:
        assert [page.execute_script(beyond, name) for name in ("graph", "compare")] == [0, 0]
    finally:
        page.set_window_size(1500, 900)


def test_colours_by_noise(opened):
    from selenium.webdriver.support.ui import Select

    Select(find(opened, "#colour")[0]).select_by_value("noise")
    assert "dB" in find(opened, "#legend")[0].text
    folded = find(opened, "#canvas g[data-id='block:0']")[0].text
    lowest = opened.execute_script(
        "return Math.min(...noiseSites(data, data.stage(current)).filter(s => s.block === 0).map(s => s.db))"
    )
    assert f"lowest {lowest:.1f} dB" in folded


def test_the_keyboard_does_what_the_list_of_keys_says(opened):
    press(opened, "[")
    assert find(opened, ".stage.on b")[0].text == "14-quantize-activations"
    press(opened, "]")
    press(opened, "e")
    assert node_count(opened) > 100
    press(opened, "c")
    assert node_count(opened) < 30
    press(opened, "/", "attention", "\n")
    assert "attention" in find(opened, "#canvas g.selected")[0].text
    press(opened, "\ue00c")  # escape
    assert find(opened, "#search")[0].get_attribute("value") == "" and not find(opened, "#canvas g.selected")
    press(opened, "3")
    assert "on" in find(opened, "#compare")[0].get_attribute("class").split()


def test_the_address_leads_to_the_same_node(opened):
    find(opened, "#search")[0].send_keys("q_proj w4a4", "\n")
    name = opened.execute_script("return graph.selected")
    address = opened.current_url
    assert address.endswith(f"#graph:15-quantize-kv-cache:{name}")
    tab(opened, "linears")
    assert opened.current_url.endswith("#linears")
    opened.get("about:blank")
    opened.get(address)
    wait_for(opened, "return document.body.dataset.ready === 'yes'")
    assert find(opened, "#canvas g.selected")[0].get_attribute("data-id") == f"node:{name}"


def test_a_failed_compile_opens_at_the_failing_node(browser, compiled, tmp_path):
    shutil.copytree(compiled.dump, tmp_path / "dump")
    manifest = json.loads((tmp_path / "dump" / "dump.json").read_text())
    name = next(
        r["name"]
        for r in dump_files.read_stage(compiled.dump, "05-find-topology")
        if r["target"] == "attention" and r["block"] == 1
    )
    kept = [s for s in manifest["stages"] if s["label"] <= "05-find-topology"]
    kept[-1] |= {"failed": f"pass 5: node {name}: does not fit", "failed_node": name}
    (tmp_path / "dump" / "dump.json").write_text(json.dumps({**manifest, "stages": kept, "noise": {}, "summary": {}}))
    browser.get(write_page(tmp_path / "dump").as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    assert find(browser, "#canvas g.failed.selected")[0].get_attribute("data-id") == f"node:{name}"
    assert "does not fit" in find(browser, ".stage.on .failed")[0].text
    tab(browser, "summary")
    assert "failed" in find(browser, ".cards")[0].text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_wheel_zooms_and_drag_pans(opened):
    from selenium.webdriver import ActionChains

    canvas = find(opened, "#canvas")[0]
    before = opened.execute_script("return {...graph.transform}")
    wheel = "new WheelEvent('wheel', {deltaY: -300, clientX: 600, clientY: 400, cancelable: true})"
    opened.execute_script(f"arguments[0].dispatchEvent({wheel})", canvas)
    zoomed = opened.execute_script("return {...graph.transform}")
    assert zoomed["k"] > before["k"]
    ActionChains(opened).move_to_element_with_offset(canvas, -300, -200).click_and_hold().move_by_offset(
        60, 40
    ).release().perform()
    moved = opened.execute_script("return {...graph.transform}")
    assert (moved["x"] - zoomed["x"], moved["y"] - zoomed["y"]) == (60, 40)


def test_compares_two_stages_side_by_side(opened):
    find(opened, "button[data-tab='compare']")[0].click()
    find(opened, ".stage[data-index='14']")[0].click()
    assert "14 added, 0 removed" in find(opened, "#difference")[0].text
    find(opened, "#expand-changed")[0].click()
    assert len(find(opened, "#right g[data-id] > .box[fill='#b7e4c0']")) == 14  # the new quantizers
    assert not find(opened, "#left g[data-id] > .box[fill='#b7e4c0']")
    assert "added" in find(opened, "#legend")[0].text
    lines = find(opened, "#changes .added")
    lines[0].click()
    assert len(find(opened, "#right g.selected")) == 1
    assert "quantize" in find(opened, "#details")[0].text


def test_steps_through_changes_and_both_pictures_move_together(opened):
    tab(opened, "compare")
    find(opened, ".stage[data-index='14']")[0].click()
    find(opened, "#expand-changed")[0].click()
    seen = []
    for _ in range(2):
        find(opened, "#next-change")[0].click()
        seen.append(opened.execute_script("return document.querySelector('#changes').dataset.at"))
        assert len(find(opened, "#left g.selected")) == len(find(opened, "#right g.selected")) == 1
    assert seen[0] != seen[1]
    assert opened.execute_script("return document.querySelector('#changes b').textContent").startswith(
        "weight_only_linear"
    )
    opened.execute_script("left.zoom(0.5)")
    scales = opened.execute_script("return [left.transform.k, right.transform.k]")
    assert scales[0] == scales[1]


def test_linears_lead_to_their_parts(opened):
    tab(opened, "linears")
    rows = find(opened, "#linears tbody tr")
    assert len(rows) == 2 * 13 + 1  # six linears in two parts and down in one, in two blocks, and the head in none
    assert [a.text for a in rows[0].find_elements("css selector", "td.chain a")] == [
        "columns",
        "quantize",
        "quantized_linear",
        "add",
    ]
    find(opened, "#linears a[data-linear]")[0].click()
    assert "on" in find(opened, "#graph")[0].get_attribute("class").split()
    assert len(find(opened, "#canvas g.selected")) == 1
    assert len(find(opened, "#canvas g.hit[data-id^='node:']")) == 7  # two columns, quantizers and products, one sum


def test_a_linear_leads_back_to_the_original_one(opened):
    tab(opened, "linears")
    find(opened, "#linears a[data-stage]")[0].click()
    assert find(opened, ".stage.on b")[0].text == "05-find-topology"
    assert "linear" in find(opened, "#canvas g.selected")[0].text


def test_diagnostics_show_plots_and_tables(browser, compiled, tmp_path):
    from resq_compiler.api import trace
    from resq_compiler.inspection.activations import diagnose
    from resq_compiler.tiny import tiny_tokens

    original, ctx = trace(compiled.original)
    found = diagnose(original, ctx.facts.get(Topology), compiled.model.graph_module, tiny_tokens(2, 48))
    shutil.copytree(compiled.dump, tmp_path / "dump")
    write_diagnostics(tmp_path / "dump", found)
    browser.get((tmp_path / "dump" / "index.html").as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    tab(browser, "diagnostics")
    images = find(browser, "#diagnostics img")
    assert len(images) == 4 and all(browser.execute_script("return arguments[0].naturalWidth > 0", i) for i in images)
    assert "down_input" in find(browser, "#diagnostics")[0].text
    browser.execute_script("document.querySelector('#diagnostics a[data-node]').click()")
    details = find(browser, "#details")[0].text
    assert "kurtosis after U" in details and "QSUR" in details
