#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2. model.enable_adapters() does not reach wrappers of modules_to_save, which
# model.disable_adapters() has switched off: afterwards the adapter runs with the original module, without a word. And
# model.set_adapter() raises for an adapter without modules_to_save beside one that has some. Seen for LoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification

torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = BertForSequenceClassification(BertConfig(**sizes)).eval()
options = dict(r=2, target_modules=["query"], init_lora_weights=False)
model.add_adapter(LoraConfig(**options), "a")
model.add_adapter(LoraConfig(**options, modules_to_save=["classifier"]), "b")
with torch.no_grad():
    model.classifier.modules_to_save["b"].weight.add_(1)
ids = torch.tensor([[3, 4, 5]])
expected = model(ids).logits
model.disable_adapters()
model.enable_adapters()
found = model(ids).logits
print("as before disable_adapters() and enable_adapters():", torch.equal(found, expected))
assert not torch.equal(found, expected), "not as described: enable_adapters()"
try:
    model.set_adapter("a")
except ValueError as error:
    print("set_adapter('a'):", error)
else:
    raise AssertionError("not as described: set_adapter()")
print("as described")
PYTHON
