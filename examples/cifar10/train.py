"""Trains an image classifier on several workers and prints its accuracy.

python examples/cifar10/train.py --download              CIFAR-10, downloaded once to ~/data
python examples/cifar10/train.py --data DIR              an image folder: DIR/train/<class>/* and DIR/test/<class>/*
python examples/cifar10/train.py                         CIFAR-10 if it is in ~/data, else scikit-learn's digits
torchrun --nproc-per-node 2 examples/cifar10/train.py    the same script under a launcher

With --kill RANK a worker process is killed in the middle of the second epoch: the others go on, and the result is the same.
When it was interrupted by a signal, a preempted machine or a crash, the same command goes on where it was.
"""

import torchtrainer

torchtrainer.prestart()  # the workers import torch while this script does

import argparse
import os
import signal
import threading
import time
from pathlib import Path

import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms

from torchtrainer import BATCH_SIZE, TorchTrainer
from torchtrainer.resnet import ResNet18

INSTANT_S = 0.01
CHANNEL_MEANS, CHANNEL_STDS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["auto", "cifar10", "digits", "folder"], default="auto")
    parser.add_argument(
        "--data", metavar="DIR", help="image folder with train/ and test/, one folder per class in each"
    )
    parser.add_argument("--root", default="~/data", metavar="DIR", help="where CIFAR-10 is (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="download CIFAR-10 to --root if it is not there")
    parser.add_argument("--model", choices=["auto", "cnn", "resnet18"], default="auto", help="auto: cnn for digits")
    parser.add_argument("--num-workers", type=int, default=2, help="ranks that train together (default: %(default)s)")
    parser.add_argument("--loader-workers", type=int, default=0, help="loader processes of each rank")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="over all workers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--use-gpu", action="store_true", help="fail without GPUs instead of training on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tqdm", action="store_true", help="no progress bar")
    parser.add_argument("--kill", type=int, metavar="RANK", help="kill the process of this rank in the second epoch")
    args = parser.parse_args()
    if args.kill is not None and args.kill not in range(args.num_workers):
        parser.error(f"--kill {args.kill}: the ranks are 0 to {args.num_workers - 1}")
    return choose_dataset(parser, args)


def choose_dataset(parser, args):
    """Settles what "auto" means, so that every worker is told the same."""
    root = Path(args.root).expanduser()
    if args.dataset == "auto":
        has_cifar10 = args.download or (root / "cifar-10-batches-py").is_dir()
        args.dataset = "folder" if args.data else "cifar10" if has_cifar10 else "digits"
    if args.dataset == "folder":
        if not args.data:
            parser.error("--dataset folder needs --data DIR")
        for part in ("train", "test"):
            if not (Path(args.data) / part).is_dir():
                parser.error(f"--data {args.data} has no folder {part}/")
    if args.dataset == "cifar10":  # here and not in the data creator: one download, whatever the number of workers
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "download.lock"):  # under torchrun every process comes here
            datasets.CIFAR10(root, download=args.download)
    if args.model == "auto":
        args.model = "cnn" if args.dataset == "digits" else "resnet18"
    return args


def image_transforms():
    as_tensor = [transforms.ToTensor(), transforms.Normalize(CHANNEL_MEANS, CHANNEL_STDS)]
    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return transforms.Compose(augmentation + as_tensor), transforms.Compose([transforms.Resize((32, 32)), *as_tensor])


def cifar10_sets(config):
    augmented, plain = image_transforms()
    root = Path(config["root"]).expanduser()
    return datasets.CIFAR10(root, train=True, transform=augmented), datasets.CIFAR10(root, train=False, transform=plain)


def folder_sets(config):
    augmented, plain = image_transforms()
    data = Path(config["data"])
    augmented = transforms.Compose([transforms.Resize((32, 32)), augmented])
    return datasets.ImageFolder(data / "train", augmented), datasets.ImageFolder(data / "test", plain)


def digits_sets(config):
    """1,797 handwritten digits, 8x8 pixels each, that come with scikit-learn."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def data_creator(config):
    make_sets = {"cifar10": cifar10_sets, "folder": folder_sets, "digits": digits_sets}[config["dataset"]]
    train_set, test_set = make_sets(config)
    loading = {
        "batch_size": config[BATCH_SIZE],
        "num_workers": config["loader_workers"],
        "pin_memory": torch.cuda.is_available(),
    }
    return DataLoader(train_set, shuffle=True, **loading), DataLoader(test_set, **loading)


def conv_block(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def model_creator(config):
    if config["model"] == "resnet18":
        return ResNet18(config)
    return nn.Sequential(
        conv_block(1 if config["dataset"] == "digits" else 3, 32),
        conv_block(32, 64),
        nn.MaxPool2d(2),
        conv_block(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 128, config["num_classes"]),
    )


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9, weight_decay=5e-4, nesterov=True)


def scheduler_creator(optimizer, config):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config["epochs"])


def class_count(args):
    return len(list((Path(args.data) / "train").iterdir())) if args.dataset == "folder" else 10


def kill_later(trainer, rank, delay_s):
    """Kills the process of a rank while the pass that comes is under way, to show what happens then."""

    def kill():
        pid = next(process.pid for process in trainer.status().processes if rank in process.ranks)
        os.kill(pid, signal.SIGKILL)

    threading.Timer(delay_s, kill).start()


def main():
    args = parse_args()
    trainer = TorchTrainer(
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        scheduler_creator=scheduler_creator,
        loss_creator=nn.CrossEntropyLoss,
        config={**vars(args), "num_classes": class_count(args), BATCH_SIZE: args.batch_size},
        num_workers=args.num_workers,
        use_gpu=args.use_gpu or "auto",
        precision=args.precision,
        scheduler_step_freq="epoch",
        use_tqdm=not args.no_tqdm,
        seed=args.seed,
    )
    with trainer:
        print(f"training {args.model} on {args.dataset} with {args.num_workers} workers")
        seconds = 0.0
        for epoch in range(1, args.epochs + 1):
            if epoch == 2 and args.kill is not None:
                kill_later(trainer, args.kill, delay_s=seconds / 2)
            start = time.perf_counter()
            trained = trainer.train()
            seconds = time.perf_counter() - start
            tested = trainer.validate()
            # After an interruption, calls that were completed before return at once.
            pace = f"{trained['num_samples'] / seconds:,.0f} samples/s" if seconds > INSTANT_S else "done before"
            print(
                f"epoch {epoch:3d}/{args.epochs}  train loss {trained['train_loss']:.4f}  test loss {tested['val_loss']:.4f}  "
                f"accuracy {tested['val_accuracy']:.2%}  {pace}"
            )
        print(f"accuracy on {tested['num_samples']:,} test images: {tested['val_accuracy']:.2%}")


main()
