"""RaySGD's introductory script on torchtrainer: two import lines changed, `ray.init()` gone.

python examples/raysgd_intro.py           CIFAR-10, downloaded to ~/data; without network scikit-learn's digits
python examples/raysgd_intro.py digits    the digits, enlarged to 32x32 colour images
python examples/raysgd_intro.py DIR       an image folder: DIR/train/<class>/* and DIR/test/<class>/*
"""

import sys

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from torchtrainer import TorchTrainer
from torchtrainer.resnet import ResNet18


def image_sets(source, tfms):
    if source == "cifar10":
        return [datasets.CIFAR10("~/data", train=part == "train", transform=tfms) for part in ("train", "test")]
    if source == "digits":
        return digits_sets()
    return [datasets.ImageFolder(f"{source}/{part}", transform=tfms) for part in ("train", "test")]


def digits_sets():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None] / 16, size=32).expand(
        -1, 3, -1, -1
    )
    samples = list(zip(images, digits.target.tolist(), strict=True))
    return samples[:1440], samples[1440:]


def cifar_creator(config):
    """Returns the data loaders that `train` and `validate` use."""
    tfms = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    )
    train_set, validation_set = image_sets(config["source"], tfms)
    train_loader = DataLoader(train_set, batch_size=config["batch"], shuffle=True)
    validation_loader = DataLoader(validation_set, batch_size=config["batch"])
    return train_loader, validation_loader


def optimizer_creator(model, config):
    """Returns an optimizer, or several."""
    return torch.optim.SGD(model.parameters(), lr=config["lr"])


def find_images():
    """The argument, or CIFAR-10 downloaded once by this process, or what there is without network."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    try:
        datasets.CIFAR10("~/data", download=True)
    except (OSError, RuntimeError) as error:
        print(f"CIFAR-10 cannot be downloaded ({error}): training on scikit-learn's digits")
        return "digits"
    return "cifar10"


trainer = TorchTrainer(
    model_creator=ResNet18,  # a function that returns a model
    data_creator=cifar_creator,  # a function that returns data loaders
    optimizer_creator=optimizer_creator,  # a function that returns an optimizer
    loss_creator=torch.nn.CrossEntropyLoss,  # a loss function
    config={"lr": 0.01, "batch": 64, "source": find_images()},  # handed to every creator
    num_workers=2,  # amount of parallelism
    use_gpu=torch.cuda.is_available(),
    use_tqdm=True,
)

stats = trainer.train()
print(stats)
print(trainer.validate())

torch.save(trainer.state_dict(), "checkpoint.pt")
trainer.shutdown()
print("success!")
