"""`hsaid merge` writes the bytes that `HSAID.merge().save_pretrained()` writes, and transformers loads them.

Each case saves a model, loads it as somebody who trains it does, moves theta, and compares two folders: what the merged
model saves, and what the command makes of the files of W0 and the checkpoint.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from models import FAMILY_SIZES, IDS, SPECIAL, T5, bert, moved
from safetensors.torch import load_file, save_file

from hsaid_kernels import HSAID
from hsaid_kernels.app import cli
from hsaid_kernels.app.architecture import build_trained
from hsaid_kernels.app.merge import weights as merged_weights
from hsaid_kernels.app.merge.base import INDEX
from hsaid_kernels.wrapper.checkpoint import files as checkpoint
from hsaid_kernels.wrapper.heads import prune_heads, remove

BERT = transformers.BertForSequenceClassification


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(transformers.logging, "set_verbosity", lambda _: None)
    monkeypatch.setattr(merged_weights, "PIECE", 2**9)  # so that tensors of these models come in several pieces


@dataclass
class Case:
    """A model, how it is loaded and wrapped, and what is done before theta moves."""

    make: object
    cls: type | None = None
    load: dict = field(default_factory=dict)
    wrap: dict = field(default_factory=dict)
    dim: int = 150
    shards: str | None = None
    before: object = None  # of the model, before it is wrapped
    after: object = None  # of the HSAID, when theta has moved


def causal(name: str, **options):
    sizes = FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2, "max_position_embeddings": 16} | options
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def masked():
    return transformers.BertForMaskedLM(bert().config)


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def train_statistics(hsaid: HSAID) -> None:
    hsaid.train()
    hsaid(torch.randn(2, 3, 32, 32))
    hsaid.eval()


def freeze(model) -> None:
    model.bert.embeddings.requires_grad_(False)


BF16 = {"dtype": torch.bfloat16}
HEAD = {"train_fully": "classifier"}
CASES = {
    "float32": Case(bert),
    "three labels": Case(lambda: bert(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})),
    "DID": Case(bert, wrap={"partition": "did", "normalize": "tensor", "diagonal": "rademacher"}),
    "summed multipliers": Case(bert, wrap={"combine": "sum", "skip": ["attention"]}),
    "bfloat16": Case(bert, load=BF16),
    "float16": Case(bert, load={"dtype": torch.float16}),
    "bfloat16 file in a float32 model": Case(lambda: bert().bfloat16(), load={"dtype": torch.float32}),
    "bfloat16 over float32": Case(bert, wrap=BF16),
    "bfloat16 over float32, some excluded": Case(bert, wrap=BF16 | {"exclude": "embeddings"}),
    "trained fully and excluded": Case(bert, wrap=HEAD | {"exclude": "embeddings"}),
    "frozen": Case(bert, before=freeze),
    "heads": Case(bert, wrap={"partition": "L1+L5|L3|L4"}, dim=400),
    "heads pruned": Case(lambda: bert(num_hidden_layers=2), before=lambda m: remove(prune_heads(m, {1: [0]}))),
    "in shards": Case(bert, shards="8KB"),
    "a base in a classifier": Case(lambda: transformers.BertModel(bert().config), BERT, wrap=HEAD),
    "a language model in a classifier": Case(masked, BERT, wrap={"train_fully": "classifier|pooler"}),
    "a classifier in a base": Case(bert, transformers.BertModel),
    "another number of labels": Case(bert, load={"num_labels": 5, "ignore_mismatched_sizes": True}, wrap=HEAD),
    "tied": Case(masked),
    "tied, in shards": Case(lambda: causal("Llama", tie_word_embeddings=True), shards="20KB"),
    "untied": Case(lambda: causal("Llama")),
    "T5": Case(t5),
    "T5 in float16": Case(t5, load={"dtype": torch.float16}),
    "a tensor for each expert": Case(lambda: causal("Mixtral", num_local_experts=4)),
    "a tensor for each expert, in shards": Case(lambda: causal("Mixtral", num_local_experts=4), shards="50KB"),
    "a tensor for each expert, in bfloat16": Case(lambda: causal("Mixtral", num_local_experts=4), load=BF16),
    "statistics of BatchNorm": Case(resnet, after=train_statistics),
}


def trained(case: Case, folder: Path) -> HSAID:
    """The HSAID of a case, whose W0 is in folder/base and whose checkpoint in folder/task."""
    model = case.make()
    if case.before is not None:
        case.before(model)
    options = {} if case.shards is None else {"max_shard_size": case.shards}
    model.save_pretrained(folder / "base", **options)
    assert (folder / "base" / INDEX).exists() == (case.shards is not None)
    if case.shards:  # in the order in which a loaded model saves its tensors
        type(model).from_pretrained(folder / "base").save_pretrained(folder / "base", **options)
    model = (case.cls or type(model)).from_pretrained(folder / "base", **case.load)
    if case.before is not None:
        case.before(model)
    hsaid = moved(HSAID(model, case.dim, **case.wrap))
    with torch.no_grad():
        for parameter in hsaid.full.values():
            parameter.normal_()
    if case.after is not None:
        case.after(hsaid)
    hsaid.save_pretrained(folder / "task")
    hsaid.merge().save_pretrained(folder / "expected", **options)
    return hsaid


def merge(folder: Path, *more: str, tasks=("task",), out: str = "out") -> None:
    where = [str(folder / task) for task in tasks]
    assert cli.main(["merge", *where, "-o", str(folder / out), "--model", str(folder / "base"), *more]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_files(folder: Path) -> None:
    got, expected = contents(folder / "out"), contents(folder / "expected")
    assert got.keys() == expected.keys()
    assert not [name for name in expected if got[name] != expected[name]]


@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes(name, tmp_path):
    trained(CASES[name], tmp_path)
    merge(tmp_path)
    assert_same_files(tmp_path)


def older(directory: Path) -> None:
    """The checkpoint as versions wrote it that did not describe the model."""
    config, values = checkpoint.read(directory)
    del config["architecture"], config["w0_dtypes"]
    checkpoint.write(directory, config, values)


OLDER = ("float32", "bfloat16", "bfloat16 over float32", "bfloat16 file in a float32 model", "tied", "T5", "untied")


@pytest.mark.parametrize("name", (*OLDER, "trained fully and excluded", "a tensor for each expert"))
def test_the_same_bytes_of_an_older_checkpoint(name, tmp_path):
    trained(CASES[name], tmp_path)
    older(tmp_path / "task")
    merge(tmp_path)
    assert_same_files(tmp_path)


def test_the_same_bytes_of_a_state_dict(tmp_path):
    """As Trainer saves it, which does not describe the model either."""
    hsaid = trained(CASES["trained fully and excluded"], tmp_path)
    shutil.rmtree(tmp_path / "task")
    (tmp_path / "task").mkdir()
    save_file(hsaid.state_dict(), tmp_path / "task" / "model.safetensors")
    merge(tmp_path)
    assert_same_files(tmp_path)


@pytest.mark.parametrize("name", ["float32", "bfloat16 over float32", "a base in a classifier", "three labels"])
def test_transformers_runs_what_was_merged(name, tmp_path):
    hsaid = trained(CASES[name], tmp_path).eval()
    merge(tmp_path)
    with torch.no_grad():
        expected = hsaid(IDS).logits
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(model(IDS).logits, expected)
    assert model.config.id2label == hsaid.model.config.id2label


def test_transformers_generates_by_what_was_merged(tmp_path):
    hsaid = trained(CASES["tied, in shards"], tmp_path).eval()
    merge(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), hsaid.generate(IDS, **options))


@pytest.mark.parametrize("row", [0, 21, 49])
def test_a_row_that_stays(row, tmp_path):
    """In the first piece of the table, across two pieces, and in the last one."""
    hsaid = trained(Case(lambda: bert(pad_token_id=row, hidden_size=24)), tmp_path)
    assert hsaid.padding_rows == {"bert.embeddings.word_embeddings.weight": row}
    merge(tmp_path)
    assert_same_files(tmp_path)


def test_another_dtype(tmp_path):
    hsaid = trained(CASES["in shards"], tmp_path)
    shutil.rmtree(tmp_path / "expected")
    hsaid.merge().bfloat16().save_pretrained(tmp_path / "expected")
    merge(tmp_path, "--dtype", "bfloat16")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    got = {}
    for file in set(index["weight_map"].values()):
        got |= load_file(tmp_path / "out" / file)
    assert got.keys() == index["weight_map"].keys() == expected.keys()
    assert all(got[name].dtype == torch.bfloat16 and torch.equal(got[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (tmp_path / "expected" / "config.json").read_bytes()


def test_names_of_earlier_versions(tmp_path):
    """Of LayerNorm's parameters; transformers saves a model under the names that it was loaded from."""
    trained(CASES["float32"], tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path, {"format": "pt"})
    shutil.rmtree(tmp_path / "expected")
    hsaid = HSAID.from_pretrained(tmp_path / "task", BERT.from_pretrained(tmp_path / "base"))
    hsaid.merge().save_pretrained(tmp_path / "expected")
    assert any("gamma" in name for name in load_file(tmp_path / "expected" / "model.safetensors"))
    merge(tmp_path)
    assert_same_files(tmp_path)


def test_tied_tensors_that_a_file_has_twice(tmp_path):
    trained(CASES["tied"], tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    first = "bert.embeddings.word_embeddings.weight"
    save_file(tensors | {"cls.predictions.decoder.weight": tensors[first].clone()}, path, {"format": "pt"})
    merge(tmp_path)
    assert_same_files(tmp_path)
    del tensors[first]
    tensors["cls.predictions.decoder.weight"] = load_file(path)[first]
    save_file(tensors, path, {"format": "pt"})  # under its other name only
    merge(tmp_path)
    got = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    expected = transformers.BertForMaskedLM.from_pretrained(tmp_path / "expected")
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters(), strict=True))


def test_what_belongs_to_a_model_goes_with_it(tmp_path):
    """A tokenizer, and the other modules of a SentenceTransformer; no weights in other formats, which are W0's."""
    trained(CASES["float32"], tmp_path)
    base = tmp_path / "base"
    belongs = ("tokenizer.json", "vocab.txt", "chat.jinja", "1_Pooling/config.json", "2_Dense/a/model.safetensors")
    for name in belongs:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "README.md", ".git"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    merge(tmp_path)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "modules.json", *belongs}
    assert (tmp_path / "out" / belongs[-1]).read_text() == belongs[-1]


def test_an_older_merge_in_the_way(tmp_path):
    """Of another layout: what is left of it would be loaded in place of the new one."""
    trained(CASES["in shards"], tmp_path)
    merge(tmp_path)
    shutil.rmtree(tmp_path / "base")
    BERT.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "whole")
    (tmp_path / "out" / "notes.md").write_text("mine")
    again = tmp_path / "again"
    trained(CASES["float32"], again)
    shutil.copytree(tmp_path / "out", again / "out")
    merge(again)
    assert (again / "out" / "notes.md").read_text() == "mine"
    (again / "out" / "notes.md").unlink()
    assert_same_files(again)


def second_task(folder: Path, case: Case, name: str = "second") -> HSAID:
    """Another task of the same basis and W0, in folder/name."""
    cls = case.cls or type(case.make())
    hsaid = moved(HSAID(cls.from_pretrained(folder / "base", **case.load), case.dim, **case.wrap))
    with torch.no_grad():
        for parameter in hsaid.full.values():
            parameter.normal_()
    hsaid.save_pretrained(folder / name)
    return hsaid


@pytest.mark.parametrize("name", ["float32", "bfloat16", "heads", "trained fully and excluded", "T5 in float16"])
def test_two_tasks_at_once(name, tmp_path):
    """W0 plus the weighted sum of what each task adds to it, rounded once."""
    case = CASES[name]
    tasks = [trained(case, tmp_path), second_task(tmp_path, case)]
    merge(tmp_path, "--weights", "0.5", "-0.25", tasks=("task", "second"))
    got = load_file(tmp_path / "out" / "model.safetensors")
    w0 = load_file(tmp_path / "base" / "model.safetensors")
    merged = [dict(task.merge().named_parameters()) for task in tasks]
    for key, value in got.items():
        own = w0[key].to(value.dtype).double()
        # Updates in float32, which a merged model in fewer bits has rounded away.
        assert value.dtype == merged[0][key].dtype
        expected = own + 0.5 * (merged[0][key].double() - own) - 0.25 * (merged[1][key].double() - own)
        scale = max(tensor[key].abs().max().item() for tensor in merged)
        assert (value.double() - expected).abs().max() <= 2 * torch.finfo(value.dtype).eps * scale


def test_a_part_of_a_task(tmp_path):
    """One checkpoint with a weight: what is projected and what is trained fully go the same part of the way."""
    hsaid = trained(CASES["trained fully and excluded"], tmp_path)
    merge(tmp_path, "--weights", "0.5")
    got = load_file(tmp_path / "out" / "model.safetensors")
    w0 = load_file(tmp_path / "base" / "model.safetensors")
    for name, value in hsaid.merge().named_parameters():
        assert torch.allclose(got[name], (w0[name] + value.detach()) / 2, atol=1e-6)


def test_one_task_of_two_is_that_task(tmp_path):
    trained(CASES["float32"], tmp_path)
    second_task(tmp_path, CASES["float32"])
    merge(tmp_path, "--weights", "1", "0", tasks=("task", "second"))
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load_file(tmp_path / "out" / "model.safetensors").items())


def test_a_new_head_of_two_tasks(tmp_path):
    """It is in no file: the mean of both is known, any other sum is not."""
    case = CASES["a base in a classifier"]
    tasks = [trained(case, tmp_path), second_task(tmp_path, case)]
    merge(tmp_path, "--weights", "0.25", "0.75", tasks=("task", "second"))
    got = load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"]
    expected = 0.25 * tasks[0].full["classifier.weight"] + 0.75 * tasks[1].full["classifier.weight"]
    assert torch.allclose(got, expected.detach(), rtol=1e-6)
    command = ["merge", str(tmp_path / "task"), str(tmp_path / "second"), "--model", str(tmp_path / "base")]
    assert cli.main([*command, "-o", str(tmp_path / "no"), "--weights", "1", "1"]) == 2
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_describes_its_model(tmp_path):
    hsaid = trained(CASES["T5 in float16"], tmp_path)
    config = checkpoint.read_config(tmp_path / "task")
    assert config["architecture"]["architectures"] == ["T5ForConditionalGeneration"]
    kept = {name for name, dtype in config["w0_dtypes"].items() if dtype == "float32"}
    assert config["w0_dtypes"]["*"] == "float16"
    assert kept == {name for name, p in hsaid.model.named_parameters() if p.dtype == torch.float32} != set()
    model = build_trained(config["architecture"])
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in hsaid.model.named_parameters()
    ]
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in model.parameters())
