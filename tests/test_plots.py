import matplotlib.image
import pytest

from granet.plots import learning_curves, plot_run, speed
from granet.run import COLUMNS, RunFolder

LAYERS = [{"name": f"layer{i}", "nnz": 10 * i, "numel": 100, "sparsity": 1 - i / 10} for i in range(1, 9)]


def rows(count: int, validation: bool = True):
    result = [dict.fromkeys(COLUMNS, 0.1 * (index + 1)) | {"epoch": index + 1} for index in range(count)]
    for row in result:
        if not validation:
            row["validation_loss"] = row["validation_accuracy"] = None
    return result


@pytest.mark.parametrize("epochs", [1, 3, 30])
def test_pictures(tmp_path, epochs):
    folder = RunFolder(tmp_path)
    folder.write_metrics(rows(epochs))
    folder.write_layers(LAYERS)
    paths = plot_run(folder)
    assert [path.name for path in paths] == ["learning.png", "sparsity.png", "speed.png", "layers.png"]
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_without_validation_there_is_one_curve():
    both, one = (learning_curves(rows(3, validation)).axes[0] for validation in (True, False))
    assert (len(both.lines), len(one.lines)) == (2, 1)


def test_without_a_choice_there_is_no_share_of_native_products():
    with_share, without = rows(3), rows(3)
    for row in without:
        row["native_share"] = None
    assert [len(speed(each).axes) for each in (with_share, without)] == [2, 1]
