"""Hugging Face Accelerate; to be started by torchrun, which its launcher needs no MPI for."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from works import asked, run, tell_weights

work = asked()
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = work.model()
optimizer = work.optimizer(model)
loader = DataLoader(work.train_set(), batch_size=work.batch_size, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
loss_function = torch.nn.CrossEntropyLoss()
if work.validates:
    validation_loader = accelerator.prepare(DataLoader(work.validation_set(), batch_size=work.batch_size))


def train(epoch):
    model.train()
    steps, total = 0, 0.0
    for x, y in loader:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total += loss.item()
        steps += 1
    return steps


@torch.no_grad()
def validate():
    model.eval()
    right = count = 0
    for x, y in validation_loader:
        found, wanted = accelerator.gather_for_metrics((model(x).argmax(1), y))
        right += int((found == wanted).sum())
        count += len(wanted)
    return right / count


run(work, train=train, validate=validate, barrier=accelerator.wait_for_everyone, says=accelerator.is_main_process)
if accelerator.is_main_process:
    tell_weights(accelerator.unwrap_model(model))
accelerator.end_training()
