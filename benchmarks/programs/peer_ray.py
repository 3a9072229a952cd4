"""Ray Train. Its workers have no terminal of ours, so that they report what is to be printed to the process that started them."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from works import WORKERS, asked


def loop(config):
    import ray.train
    import torch
    import torch.distributed as dist
    from ray.train.torch import prepare_data_loader, prepare_model
    from torch.utils.data import DataLoader
    from works import run, tell_weights

    work = config["work"]
    os.environ["T0"] = config["t0"]
    torch.set_num_threads(1)
    model = prepare_model(work.model())
    optimizer = work.optimizer(model)
    loader = prepare_data_loader(DataLoader(work.train_set(), batch_size=work.batch_size, shuffle=True))
    loss_function = torch.nn.CrossEntropyLoss()
    if work.validates:
        validation_loader = prepare_data_loader(DataLoader(work.validation_set(), batch_size=work.batch_size))

    def train(epoch):
        model.train()
        loader.sampler.set_epoch(epoch)
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

    said = io.StringIO()
    main = ray.train.get_context().get_world_rank() == 0
    with redirect_stdout(said):
        run(work, train=train, validate=validate, barrier=dist.barrier, says=main)
        if main:
            tell_weights(model.module)
    if main:
        Path(config["said"]).write_text(said.getvalue())


with TemporaryDirectory() as directory:
    said = Path(directory, "said")
    TorchTrainer(
        loop,
        train_loop_config={"work": asked(), "t0": os.environ["T0"], "said": str(said)},
        scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=directory),
    ).fit()
    print(said.read_text(), flush=True)
