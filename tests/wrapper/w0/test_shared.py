"""Processes that have mapped the same file of weights share W0, whatever they do with it.

Run as a script, this file is such a process: PATH MODE, where MODE is that of `HSAID(memory=)`, or "copied".
"""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import ENVIRONMENT, mapping
from safetensors.torch import load_file, save_file
from torch import nn

from hsaid_kernels import HSAID

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="smaps: expected Linux")
WIDTH, LAYERS = 512, 8
BYTES = 4 * WIDTH * WIDTH * LAYERS


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def use(hsaid: HSAID, directory: str) -> HSAID:
    """What is done with an HSAID from its first step to the next program."""
    optimizer = torch.optim.SGD(hsaid.parameters(), 0.1)
    for _ in range(2):
        hsaid(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    hsaid.to("cpu:0").to(torch.float32)  # where Accelerate's processes without a GPU put a model
    hsaid.add_task("other")
    hsaid.set_task("other")
    with torch.no_grad():
        hsaid.eval()(torch.ones(2, WIDTH))
    hsaid.state_dict()
    hsaid.save_pretrained(directory)
    hsaid.merge(inplace=True)
    hsaid.unmerge()
    hsaid.merge()
    return HSAID.from_pretrained(directory, hsaid.unwrap(), memory=hsaid.memory)


def measured(path: str, *modes: str) -> list[dict[str, int]]:
    """What processes of these modes hold of the file while all of them do."""
    save_file(layers().state_dict(), path)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    processes = [subprocess.Popen([sys.executable, __file__, path, mode], **pipes) for mode in modes]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * len(modes)
        found = []
        for process in processes:  # the others wait
            process.stdin.write("measure\n")
            process.stdin.flush()
            found.append(json.loads(process.stdout.readline()))
        return found
    finally:
        for process in processes:
            process.communicate(timeout=60)


def test_w0_is_in_memory_once(tmp_path):
    found = measured(str(tmp_path / "model.safetensors"), "step", "block")
    assert all(one["Anonymous"] == 0 for one in found)  # nothing of it has been written to
    assert all(one["Rss"] >= BYTES for one in found)
    assert BYTES <= sum(one["Pss"] for one in found) < 1.05 * BYTES


def test_a_copy_would_be_noticed(tmp_path):
    (found,) = measured(str(tmp_path / "model.safetensors"), "copied")
    assert found["Anonymous"] >= BYTES


if __name__ == "__main__":
    path, mode = sys.argv[1:]
    model = layers()
    model.load_state_dict(load_file(path), assign=True)
    if mode == "copied":
        for own in model.parameters():
            own.data.add_(0.0)
    with tempfile.TemporaryDirectory() as directory:
        hsaid = use(HSAID(model, 50, "did", memory="step" if mode == "copied" else mode), directory)
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(mapping(next(iter(hsaid.w0().values())))), flush=True)
        sys.stdin.readline()  # until the other one has measured, too
