"""What data to train on, as the user writes it."""

from __future__ import annotations

from dataclasses import dataclass

from granet.names import suggestion

NAMES = ("digits", "cifar10", "cifar100", "fashion-mnist", "imagenet", "npz")
_DOWNLOADS = ("cifar10", "cifar100", "fashion-mnist")


@dataclass(frozen=True)
class DataConfig:
    """A data set and how it is read. An option that the data set has no use for is an error.

    Args:
        name: "digits" (in the package), "cifar10", "cifar100", "fashion-mnist", "imagenet" (any folder of images in
            `train/CLASS/` and `val/CLASS/`) or "npz" (any file of arrays, see `granet.data.arrays`).
        root: the folder that holds the data set, or the file for "npz"; none for "digits". "~" is the home folder.
        download: fetch the data set into `root` if it is not there (cifar10, cifar100, fashion-mnist).
        augment: random crops, and flips where they keep the label, of the training images.
        validation: training examples set aside to choose by: a number (int), a fraction (float), or 0 for none.
        workers: processes that decode images (imagenet); 0 decodes in the training process.
        image_size: height and width in pixels after the crop (imagenet, 224 if not given).
    Raises:
        ValueError: unknown name, a value out of range, or an option that does not apply to the data set.
    """

    name: str = "digits"
    root: str | None = None
    download: bool = False
    augment: bool = True
    validation: int | float = 0.1
    workers: int = 0
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            hint = suggestion(self.name, NAMES, most=2)
            raise ValueError(f"unknown data set {self.name!r}{hint} (known: {', '.join(NAMES)})")
        self._check_root()
        self._check_validation()
        if self.download and self.name not in _DOWNLOADS:
            raise ValueError(f"data.download applies to {', '.join(_DOWNLOADS)} only, got it with {self.name!r}")
        if self.workers < 0:
            raise ValueError(f"expected data.workers >= 0, got {self.workers}")
        if self.workers > 0 and self.name != "imagenet":
            raise ValueError(
                f"data.workers applies to imagenet only, got {self.workers} with {self.name!r}: its images lie in the "
                "memory of the device, and no worker reads them"
            )
        if self.image_size is not None and self.name != "imagenet":
            raise ValueError(f"data.image_size applies to imagenet only, got {self.image_size} with {self.name!r}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"expected data.image_size >= 1, got {self.image_size}")

    def _check_root(self) -> None:
        if self.name == "digits" and self.root is not None:
            raise ValueError(f"digits is part of the package and takes no data.root, got {str(self.root)!r}")
        if self.name != "digits" and self.root is None:
            what = "the .npz file" if self.name == "npz" else f"the folder that holds {self.name}"
            raise ValueError(f"data.root is not given: expected the path of {what}")

    def _check_validation(self) -> None:
        value = self.validation
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and value >= 0) and not (isinstance(value, float) and 0 <= value < 1):
            raise ValueError(
                f"expected data.validation as a number of examples (int >= 0) or a fraction (float in [0, 1)), "
                f"got {value!r}"
            )
