"""A saved model, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(compiled, tmp_path_factory):
    """A saved model that tests copy before they damage it."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    compiled("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))
