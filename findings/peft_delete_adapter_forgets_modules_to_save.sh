#!/usr/bin/env bash
# peft 0.21.2. delete_adapter() of the active adapter sets another one, but does not tell wrappers of modules_to_save of
# which only the other one has a copy: the model then runs the adapter with the original module, without a word. Seen for
# LoRA: adapter "b" has a classifier of its own; after "a", which was active, has been deleted, active_adapters is ["b"],
# and the classifier that runs is the original one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


torch.manual_seed(0)
options = dict(r=2, target_modules=["body"], init_lora_weights=False)
model = get_peft_model(Model(), LoraConfig(**options), "a")
model.add_adapter("b", LoraConfig(**options, modules_to_save=["classifier"]))
x = torch.ones(1, 4)
model.set_adapter("b")
with torch.no_grad():
    model.base_model.model.classifier.modules_to_save["b"].weight.add_(1)
expected = model(x)
model.set_adapter("a")
model.delete_adapter("a")
found, active = model(x), model.active_adapters
print("active:", active, " as before:", torch.equal(found, expected))
assert active == ["b"] and not torch.equal(found, expected), "not as described"
model.set_adapter("b")
assert torch.equal(model(x), expected), "not as described: set_adapter() once more"
print("as described")
PYTHON
