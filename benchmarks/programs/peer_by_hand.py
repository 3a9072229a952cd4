"""The loop that people write by hand with DistributedDataParallel; to be started by torchrun."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from works import asked, run, tell_weights

work = asked()
torch.set_num_threads(1)
dist.init_process_group("gloo")
data = work.train_set()
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=work.batch_size, sampler=sampler)
bare = work.model()
model = DistributedDataParallel(bare)
optimizer = work.optimizer(model)
loss_function = torch.nn.CrossEntropyLoss()
if work.validates:
    validation = work.validation_set()
    shares = DistributedSampler(validation, shuffle=False)
    validation_loader = DataLoader(validation, batch_size=work.batch_size, sampler=shares)


def train(epoch):
    model.train()
    sampler.set_epoch(epoch)
    steps, total = 0, 0.0
    for x, y in loader:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
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
    dist.all_reduce(found)
    return float(found[0] / found[1])


run(work, train=train, validate=validate, barrier=dist.barrier, says=dist.get_rank() == 0)
if dist.get_rank() == 0:
    tell_weights(bare)
dist.destroy_process_group()
