"""What the tests of the data verbs share."""

import pytest

from lora_recipes.__main__ import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `lora-recipes data ...` in the test's folder; the code and what was said."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main(["data", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call
