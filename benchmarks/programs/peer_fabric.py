"""Lightning Fabric, which starts its second process itself."""

import lightning
import torch
from torch.utils.data import DataLoader
from works import WORKERS, asked, run, tell_weights

work = asked()
torch.set_num_threads(1)
fabric = lightning.Fabric(accelerator="cpu", devices=WORKERS, strategy="ddp")
fabric.launch()
bare = work.model()
model, optimizer = fabric.setup(bare, work.optimizer(bare))
loader = fabric.setup_dataloaders(DataLoader(work.train_set(), batch_size=work.batch_size, shuffle=True))
loss_function = torch.nn.CrossEntropyLoss()
if work.validates:
    validation_loader = fabric.setup_dataloaders(DataLoader(work.validation_set(), batch_size=work.batch_size))


def train(epoch):
    model.train()
    steps, total = 0, 0.0
    for x, y in loader:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        total += loss.item()
        steps += 1
    return steps


@torch.no_grad()
def validate():
    model.eval()
    found = torch.zeros(2)
    for x, y in validation_loader:
        found += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])
    found = fabric.all_reduce(found, reduce_op="sum")
    return float(found[0] / found[1])


run(work, train=train, validate=validate, barrier=fabric.barrier, says=fabric.is_global_zero)
if fabric.is_global_zero:
    tell_weights(bare)
