"""Helpers shared by the model tests, loaded once by path: test folders are not packages."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world():
    path = Path(__file__).with_name("world.py")
    spec = importlib.util.spec_from_file_location("world", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
