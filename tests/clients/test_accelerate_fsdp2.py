"""Accelerate shards an HSAID by FSDP2, theta with the rest, in two processes; the checkpoint loads into a whole model.

Run as a script, this file is one of the processes.
"""

import os
import sys

import pytest
import torch
from models import bert, relative
from processes import in_two_processes, leave

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper.weights import launches

pytest.importorskip("accelerate")

SIZES = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3)


def wrapped(memory: str) -> HSAID:
    torch.manual_seed(0)
    return HSAID(bert(**SIZES).eval(), 90, memory=memory, train_fully="classifier")


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    return [(torch.randint(50, (8, 7)), torch.randint(2, (8,))) for _ in range(4)]


def main(folder: str) -> None:
    import torch.distributed as dist
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    launches.SMALLEST_TABLE = 1
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate itself takes FSDP2 on accelerators only.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    hsaid = wrapped("block")
    optimizer = torch.optim.AdamW(hsaid.parameter_groups())
    hsaid, optimizer = accelerator.prepare(hsaid, optimizer)
    assert type(hsaid._parameters["theta"]).__name__ == "DTensor"
    losses = []
    for ids, labels in batches():
        rows = slice(accelerator.process_index, None, accelerator.num_processes)
        loss = hsaid(ids[rows], labels=labels[rows]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    with torch.no_grad():
        logits = hsaid(batches()[0][0]).logits
    accelerator.unwrap_model(hsaid).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save({"losses": losses, "logits": logits}, f"{folder}/found.pt")
    dist.destroy_process_group()
    leave()


def test_trains_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 1)
    in_two_processes(__file__, str(tmp_path))
    found = torch.load(tmp_path / "found.pt")

    one, losses = wrapped("step"), []
    optimizer = torch.optim.AdamW(one.parameter_groups())
    for ids, labels in batches():
        loss = one(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    torch.manual_seed(0)
    loaded = HSAID.from_pretrained(tmp_path, bert(**SIZES).eval())
    with torch.no_grad():
        logits = loaded(batches()[0][0]).logits
        assert torch.equal(logits, found["logits"]) and relative(logits, one(batches()[0][0]).logits) <= 1e-3
    assert os.path.getsize(tmp_path / "hsaid.safetensors") < 10_000


if __name__ == "__main__":
    main(*sys.argv[1:])
