"""README's example prints what README says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example_prints_what_it_says(tmp_path):
    example, printed = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README.read_text(), re.S).groups()
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert f"a checkpoint of {size / 1000:.0f} KB" in README.read_text().replace("\n", " ")
