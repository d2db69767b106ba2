"""Checkpoints in repositories of the Hugging Face hub, by `huggingface_hub`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE, read_config


def push(
    save: Callable[[str], None],
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str = "Upload HSAID checkpoint",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a checkpoint, a few kilobytes, and a model card to the Hugging Face hub. Returns the commit's address.

    The model itself is not uploaded. `HSAID.from_pretrained(repo_id, model)` loads the checkpoint.

    Args:
        save: writes the checkpoint into a directory.
        model: the model that was trained.
        repo_id: "name" or "user/name". The repository is created if there is none.
        private: whether a new repository is private. None means the hub's default.
        commit_message, token, revision, create_pr: as in `huggingface_hub.HfApi.upload_folder`.

    Raises ImportError without huggingface_hub, and what it raises.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save(directory)
        Path(directory, "README.md").write_text(card(directory, model, repo_id), encoding="utf-8")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(done)


def card(directory: str, model: nn.Module, repo_id: str) -> str:
    """The model card of a checkpoint: what this is, of which model, and how to load it."""
    config, size = read_config(directory), Path(directory, VALUES_FILE).stat().st_size
    d = config["intrinsic_dim"]
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    known = bool(base) and not os.path.isabs(base) and not Path(base).is_dir()
    kind = type(model).__name__
    header = ["library_name: hsaid_kernels", *([f"base_model: {base}"] if known else []), "tags:", "- hsaid"]
    load = f'{kind}.from_pretrained("{base}")' if known else f"...  # the {kind} that was trained, with its weights"
    header_text = "\n".join(header)
    return f"""---
{header_text}
---

# {repo_id}

The {d:,} values that fine-tune {f"[{base}](https://huggingface.co/{base})" if known else f"a {kind}"}
inside a random subspace (H-SAID), a file of {size:,} bytes. The model's own weights are not here.

| | |
|---|---|
| task | {config["task"]} |
| model | {kind} |
| intrinsic dimension d | {config["intrinsic_dim"]:,} |
| partition | `{config["partition"]}` |

```python
from hsaid_kernels import HSAID

model = {load}
hsaid = HSAID.from_pretrained("{repo_id}", model)
```
"""


def local_directory(directory: str | os.PathLike[str], **options: Any) -> str | os.PathLike[str]:
    """`directory` if there is one, or the folder into which a repository of this name was downloaded.

    `options` are arguments of `huggingface_hub.snapshot_download`. Raises FileNotFoundError if there is neither.
    """
    name = os.fspath(directory)
    if os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~")) or not 1 <= len(name.split("/")) <= 2:
        return directory
    if "/" not in name and not options:  # a missing folder, rather than one of the hub's few names without a user
        return directory
    hub = _hub()
    try:
        return hub.snapshot_download(name, allow_patterns=[VALUES_FILE, CONFIG_FILE], **options)
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"directory: expected one with a checkpoint, or a repository of the hub, got {name!r}: {error}"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
