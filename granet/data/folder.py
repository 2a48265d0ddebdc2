"""Data sets too large for the device: folders of images, decoded by DataLoader workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from granet.data.config import DataConfig
from granet.data.seeds import derive_seed
from granet.data.split import Batch, Data, Split, split_validation

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

# Published mean and deviation of ImageNet's training images, for pixels in [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def load_folder(config: DataConfig, seed: int, device: torch.device) -> Data:
    """Load `root/train/CLASS/*` and `root/val/CLASS/*`; the images of `val` are the test split.

    Training images are cut out at random (8-100 % of the area, aspect 3/4-4/3), scaled to `image_size` and mirrored by
    a coin; the others have their shorter side scaled to 256/224 of `image_size` and its centre cut out.

    Raises:
        FileNotFoundError: a folder is missing, or holds no classes, or a class holds no images.
        ValueError: train and val have other classes.
    """
    root = Path(str(config.root)).expanduser()
    train, test = _open(root / "train"), _open(root / "val")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{root}: expected the same classes in train/ and val/, got only in one of them: {differing}")
    size = config.image_size or 224
    kept, held_out = split_validation(torch.tensor(train.targets), config.validation, seed)

    def split(folder: ImageFolder, positions: Tensor, training: bool) -> FolderSplit:
        transform = _transform(size, augment=training and config.augment)
        return FolderSplit(folder, positions, transform, config.workers, device, shuffle=training, seed=seed)

    return Data(
        num_classes=len(train.classes),
        image_shape=(3, size, size),
        train=split(train, kept, training=True),
        validation=split(train, held_out, training=False) if len(held_out) else None,
        test=split(test, torch.arange(len(test)), training=False),
    )


class FolderSplit(Split):
    """Images read from files for every batch.

    Each image is transformed with torch's CPU generator seeded by (seed, epoch, image), so that it depends neither on
    the number of workers nor on the batches before.

    A file that is not an image raises ValueError, naming it, when its batch is read.

    Args:
        folder: torchvision's ImageFolder.
        positions: (examples,) int64, which images of `folder` are in this split.
        transform: PIL image -> (3, height, width) uint8.
        workers: decoding processes; 0 decodes in this one.
        device: of the batches.
        shuffle: a new order every epoch; otherwise the stored order.
        seed: of the order and of the transforms.
    """

    def __init__(
        self,
        folder: ImageFolder,
        positions: Tensor,
        transform: Any,
        workers: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__(len(positions), shuffle, seed)
        self.folder = folder
        self.positions = positions
        self.transform = transform
        self.workers = workers
        self.device = device
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1) * 255

    def _batches(self, batches: tuple[Tensor, ...], epoch: int, start: int) -> Iterator[Batch]:
        loader: DataLoader[_Sample] = DataLoader(
            _EpochImages(self.folder, self.transform, self.seed, epoch),
            batch_sampler=[self.positions[batch].tolist() for batch in batches[start:]],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            # Without one of its own, the loader draws from torch's global generator, and a resumed run draws otherwise.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            images, labels = batch
            images = images.to(self.device, non_blocking=True).to(torch.float32)
            yield images.sub_(self._mean).div_(self._std), labels.to(self.device, non_blocking=True)


# An image and its label, or what is wrong with the file. An error raised in a worker would reach the user as that
# worker's traceback, and would keep the workers of this epoch alive in a reference cycle.
_Sample = tuple[Tensor, int] | str


def _collate(samples: list[_Sample]) -> Batch | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    batch: Batch = default_collate(samples)
    return batch


class _EpochImages(Dataset[_Sample]):
    """The images of a folder as one epoch transforms them."""

    def __init__(self, folder: ImageFolder, transform: Any, seed: int, epoch: int) -> None:
        self.folder = folder
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, position: int) -> _Sample:
        path, label = self.folder.samples[position]
        try:
            image = self.folder.loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            return f"{path}: damaged, or not an image ({error})"
        with _cpu_generator(derive_seed("image", self.seed, self.epoch, position)):
            return self.transform(image), label


@contextmanager
def _cpu_generator(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, which torchvision's transforms draw from, and put it back afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _transform(size: int, augment: bool) -> Any:
    from torchvision import transforms

    if augment:
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def _open(folder: Path) -> ImageFolder:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise FileNotFoundError(f"imagenet: expected the folder {folder}/ with a folder of images for each class")
    return ImageFolder(str(folder))
