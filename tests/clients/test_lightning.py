"""Lightning's Trainer trains a LightningModule that has an HSAID in place of its model."""

import copy
from pathlib import Path

import pytest
import torch
from models import bert, same, snapshot
from torch import nn
from torch.utils.data import DataLoader

from hsaid_kernels import HSAID

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

ROWS = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": torch.tensor(i % 2)} for i in range(16)]


class Classifier(lightning.LightningModule):
    """Draws the same dropout in each step of each run, and notes what it has seen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.repeated: dict[str, list[bool]] = {"training": [], "validation": []}

    def training_step(self, batch, index):
        torch.manual_seed(self.global_step)
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self._repeat("training", batch)
        return loss

    def validation_step(self, batch, index):
        self._repeat("validation", batch)
        self.log("val_loss", self.model(**batch).loss)

    def _repeat(self, stage: str, batch) -> None:
        """Whether two calls give the same, as they do without dropout."""
        with torch.no_grad():
            self.repeated[stage].append(torch.equal(self.model(**batch).logits, self.model(**batch).logits))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def module(**options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(HSAID(bert(), 60, **options))  # the one line that is changed


def trainer(directory: Path, epochs: int = 3, **changes) -> "lightning.Trainer":
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    settings = dict(accelerator="cpu", default_root_dir=directory, max_epochs=epochs, enable_checkpointing=False)
    return lightning.Trainer(**(quiet | settings | changes))


def loader() -> DataLoader:
    return DataLoader(ROWS, batch_size=4)


def keeping(directory: Path) -> dict:
    """Options of `trainer`, to keep a checkpoint of each epoch."""
    checkpoint = callbacks.ModelCheckpoint(directory, "{epoch}", save_top_k=-1, every_n_epochs=1)
    return dict(enable_checkpointing=True, callbacks=[checkpoint])


def test_trains_and_validates(tmp_path):
    classifier = module()
    before = snapshot(classifier.model.model)
    run = trainer(tmp_path)
    run.fit(classifier, loader(), loader())
    assert len(classifier.losses) == 12 and classifier.losses[-1] < 0.9 * classifier.losses[0]
    assert classifier.model.theta.all() and same(classifier.model.model.state_dict(), before)
    (validated,) = run.validate(classifier, loader(), verbose=False)
    plain = Classifier(classifier.model.merge())
    assert trainer(tmp_path).validate(plain, loader(), verbose=False) == [validated]
    assert validated["val_loss"] == run.callback_metrics["val_loss"] < classifier.losses[0]


def test_dropout_is_on_again_after_validation(tmp_path):
    classifier = module()
    trainer(tmp_path, 2, val_check_interval=1).fit(classifier, loader(), loader())  # validated after each step
    assert len(classifier.repeated["training"]) == 8 and not any(classifier.repeated["training"])
    assert len(classifier.repeated["validation"]) > 8 and all(classifier.repeated["validation"])


@pytest.mark.parametrize("options", [{}, {"partition": "did", "train_fully": "classifier"}])
def test_resuming_continues_bit_for_bit(tmp_path, options):
    whole = module(**options)
    trainer(tmp_path, **keeping(tmp_path)).fit(whole, loader())
    resumed = module(**options)
    trainer(tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == whole.losses[4:]
    assert same(resumed.state_dict(), whole.state_dict()) and resumed.model.theta.any()
    restarted = module(**options)
    trainer(tmp_path, 2).fit(restarted, loader())  # which is as many steps, without the checkpoint
    assert restarted.losses != resumed.losses and not torch.equal(restarted.model.theta, resumed.model.theta)


def test_a_checkpoint_is_loaded_without_training(tmp_path):
    classifier = module()
    run = trainer(tmp_path, 1)
    run.fit(classifier, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").stat().st_size < 30_000
    fresh = HSAID(copy.deepcopy(classifier.model).unwrap(), 60)
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", model=fresh, map_location="cpu")
    assert loaded.model is fresh and same(loaded.state_dict(), classifier.state_dict())
    assert same(fresh.merge().state_dict(), classifier.model.merge().state_dict())


def test_accumulates_clips_and_casts(tmp_path):
    """Gradients of four batches, clipped, in bfloat16: one step, that of the batches' mean within its precision."""
    classifiers = module(), module()
    for classifier in classifiers:
        for inner in classifier.modules():
            if isinstance(inner, nn.Dropout):
                inner.p = 0.0
    settings = dict(accumulate_grad_batches=4, gradient_clip_val=1e-3)
    trainer(tmp_path, 1, **settings, precision="bf16-mixed").fit(classifiers[0], loader())
    trainer(tmp_path, 1, gradient_clip_val=1e-3).fit(classifiers[1], DataLoader(ROWS, batch_size=16))
    one, other = (classifier.model.theta.detach() for classifier in classifiers)
    assert one.dtype == torch.float32 and not torch.equal(one, other)
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9


def test_the_average_of_the_weights(tmp_path):
    """Lightning's callback averages theta and the multipliers, and puts the average into the module at the end."""

    class Noting(callbacks.Callback):
        def __init__(self):
            self.thetas: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer, module, *_):
            self.thetas.append(module.model.theta.detach().clone())

    classifier, noting = module(), Noting()
    before = snapshot(classifier.model.model)
    averaging = callbacks.WeightAveraging()
    trainer(tmp_path, 1, callbacks=[noting, averaging]).fit(classifier, loader())
    expected = torch.stack(noting.thetas).mean(0)
    assert torch.allclose(classifier.model.theta, expected, atol=1e-6) and not torch.equal(noting.thetas[-1], expected)
    assert same(classifier.model.model.state_dict(), before)
    batch = next(iter(loader()))
    classifier.eval()
    assert torch.equal(classifier.model(**batch).logits, classifier.model.merge()(**batch).logits)
