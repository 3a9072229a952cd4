"""Trains and evaluates a classifier, in the style of torchvision's reference scripts.

Written here, after the interface of torchvision's ``references/classification/train.py``: its options, a ``utils`` module beside
it, ``init_distributed_mode`` by environment variables, ``DistributedSampler``, ``MetricLogger``, ``save_on_master``. The original is
in no package, and asks for a GPU per rank as soon as it is launched; this one trains on the processor.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time

import torch
import torch.utils.data
import torchvision
import utils
from torch import nn
from torchvision import transforms


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args):
    model.train()
    metric_logger = utils.MetricLogger(delimiter="  ")
    for batch in metric_logger.log_every(data_loader, args.print_freq, f"Epoch: [{epoch}]"):
        image, target = (part.to(device) for part in batch)
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()
        (acc1,) = utils.accuracy(output, target)
        metric_logger.update(len(image), loss=loss.item(), acc1=acc1)


def evaluate(model, criterion, data_loader, device, args):
    model.eval()
    metric_logger = utils.MetricLogger(delimiter="  ")
    with torch.inference_mode():
        for batch in metric_logger.log_every(data_loader, args.print_freq, "Test:"):
            image, target = (part.to(device) for part in batch)
            output = model(image)
            (acc1,) = utils.accuracy(output, target)
            metric_logger.update(len(image), loss=criterion(output, target).item(), acc1=acc1)
    metric_logger.synchronize_between_processes()
    print(f"Test: Acc@1 {metric_logger.acc1.global_avg!r} Loss {metric_logger.loss.global_avg!r}")


def load_data(args):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
    size = (3, args.crop_size, args.crop_size)
    dataset = torchvision.datasets.FakeData(args.samples, size, args.classes, transform)
    dataset_test = torchvision.datasets.FakeData(args.samples // 2, size, args.classes, transform, random_offset=7)
    if args.distributed:
        train_sampler = torch.utils.data.distributed.DistributedSampler(dataset)
        test_sampler = torch.utils.data.distributed.DistributedSampler(dataset_test, shuffle=False)
    else:
        train_sampler = torch.utils.data.RandomSampler(dataset)
        test_sampler = torch.utils.data.SequentialSampler(dataset_test)
    return dataset, dataset_test, train_sampler, test_sampler


def main(args):
    if args.output_dir:
        os.makedirs(args.output_dir, exist_ok=True)
    utils.init_distributed_mode(args)
    print(args)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    dataset, dataset_test, train_sampler, test_sampler = load_data(args)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": False}
    data_loader = torch.utils.data.DataLoader(dataset, sampler=train_sampler, **loading)
    data_loader_test = torch.utils.data.DataLoader(dataset_test, sampler=test_sampler, **loading)

    print("Creating model")
    model = torchvision.models.get_model(args.model, weights=None, num_classes=args.classes).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    model_without_ddp = model
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model)
        model_without_ddp = model.module
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1

    print("Start training")
    start_time = time.time()
    for epoch in range(args.start_epoch, args.epochs):
        if args.distributed:
            train_sampler.set_epoch(epoch)
        train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args)
        lr_scheduler.step()
        evaluate(model, criterion, data_loader_test, device, args)
        if args.output_dir:
            checkpoint = {
                "model": model_without_ddp.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
            }
            utils.save_on_master(checkpoint, os.path.join(args.output_dir, f"model_{epoch}.pth"))
            utils.save_on_master(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))
    print(f"Training time {datetime.timedelta(seconds=int(time.time() - start_time))}")
    utils.end_distributed_mode(args)


def get_args_parser():
    parser = argparse.ArgumentParser(description="Classification Training")
    parser.add_argument("--model", default="mobilenet_v3_small", type=str)
    parser.add_argument("--device", default="cpu", type=str)
    parser.add_argument("-b", "--batch-size", default=8, type=int, help="images per rank")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("-j", "--workers", default=1, type=int)
    parser.add_argument("--lr", default=0.05, type=float)
    parser.add_argument("--label-smoothing", default=0.1, type=float)
    parser.add_argument("--clip-grad-norm", default=None, type=float)
    parser.add_argument("--crop-size", default=32, type=int)
    parser.add_argument("--samples", default=64, type=int)
    parser.add_argument("--classes", default=4, type=int)
    parser.add_argument("--print-freq", default=2, type=int)
    parser.add_argument("--output-dir", default="", type=str)
    parser.add_argument("--resume", default="", type=str)
    parser.add_argument("--start-epoch", default=0, type=int)
    parser.add_argument("--seed", default=3, type=int)
    parser.add_argument("--world-size", default=1, type=int)
    parser.add_argument("--dist-url", default="env://", type=str)
    parser.add_argument(
        "--local-rank", "--local_rank", default=None, type=int, help="given by torch.distributed.launch"
    )
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
