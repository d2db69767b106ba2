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
    of_hub: dict[str, Any] = dict(private=private, token=token, revision=revision, create_pr=create_pr)
    with tempfile.TemporaryDirectory() as directory:
        save(directory)
        Path(directory, "README.md").write_text(card(directory, model, repo_id), encoding="utf-8")
        return upload(directory, repo_id, commit_message=commit_message, **of_hub)


def upload(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **of_hub: Any,
) -> str:
    """Uploads the files of a directory, and returns the commit's address; see `push`."""
    api = _hub().HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **of_hub))


def card(directory: str, model: nn.Module, repo_id: str) -> str:
    """The model card of a checkpoint: what this is, of which model, and how to load it."""
    config, size = read_config(directory), Path(directory, VALUES_FILE).stat().st_size
    d = config["intrinsic_dim"]
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    known = _is_on_hub(base)
    kind = type(model).__name__
    load = f'{kind}.from_pretrained("{base}")' if known else f"...  # the {kind} that was trained, with its weights"
    return f"""{_header("hsaid_kernels", base)}

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


def card_of_merged(repo_id: str, base: str) -> str:
    """The model card of a merged model, whose W0 are the weights of `base`."""
    known = f"[{base}](https://huggingface.co/{base})" if _is_on_hub(base) else "A model"
    return f"""{_header("transformers", base)}
# {repo_id}

{known} that was fine-tuned inside a random subspace (H-SAID) and merged: an ordinary model, to be loaded by
`from_pretrained("{repo_id}")`.
"""


def _header(library: str, base: str) -> str:
    lines = [f"library_name: {library}", *([f"base_model: {base}"] if _is_on_hub(base) else []), "tags:", "- hsaid"]
    return "\n".join(["---", *lines, "---", ""])


def _is_on_hub(base: str) -> bool:
    return bool(base) and not os.path.isabs(base) and not Path(base).is_dir()


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
