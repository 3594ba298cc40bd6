"""The page without a browser: self-contained, complete, compact."""

from __future__ import annotations

import base64
import gzip
import json
import re

import pytest

from resq_compiler.errors import DumpError
from resq_compiler.inspection import dump_files, page


def unpacked(text):
    encoded = re.search(r'<script type="application/octet-stream" id="data">([^<]*)</script>', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(encoded)))


def test_page_is_self_contained_and_has_every_stage(compiled):
    text = (compiled.dump / "index.html").read_text()
    assert not re.search(
        r'(src|href)="(?!data:)|@import|url\(http|fetch\(|XMLHttpRequest', text.replace('href="data:,"', "")
    )
    data = unpacked(text)
    assert [s["info"]["label"] for s in data["stages"]] == [s.label for s in compiled.model.stages]
    for stage in data["stages"]:
        expected = dump_files.read_stage(compiled.dump, stage["info"]["label"])
        assert [dict(zip(page.FIELDS, data["pool"][i], strict=True)) for i in stage["nodes"]] == expected


def test_stages_share_the_nodes_that_did_not_change(compiled):
    data = unpacked((compiled.dump / "index.html").read_text())
    assert len(data["pool"]) < 0.6 * sum(len(s["nodes"]) for s in data["stages"])


def test_field_names_are_those_of_the_script():
    script = (page.resources.files("resq_compiler.inspection") / "static" / "data.js").read_text()
    assert json.loads(re.search(r"const FIELDS = (\[.*\]);", script)[1]) == list(page.FIELDS)


def test_the_layout_library_comes_with_its_licence(compiled):
    text = (compiled.dump / "index.html").read_text()
    assert "Permission is hereby granted" in text and "version:" in text.partition("var dagre=")[2]


def test_page_of_what_is_not_a_dump(tmp_path):
    with pytest.raises(DumpError, match="expected a dump"):
        page.write_page(tmp_path)
