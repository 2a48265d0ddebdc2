import io

from rich.console import Console

from granet.progress import Bar, Lines, epoch_line, reporter

ROW = {
    "epoch": 3,
    "train_loss": 0.5,
    "train_accuracy": 0.75,
    "validation_accuracy": 0.5,
    "sparsity": 0.9,
    "lr": 0.01,
    "images_per_second": 12345.6,
}


def test_line_of_an_epoch():
    line = "epoch  3/10  loss 0.5000  train 75.00%  validation 50.00%  sparsity 90.00%  lr 0.01  12,346 images/s"
    assert epoch_line(ROW, 10) == line
    assert "validation" not in epoch_line({**ROW, "validation_accuracy": None}, 10)


def test_plain_lines_without_a_terminal():
    text = io.StringIO()
    console = Console(file=text)
    with reporter(console) as report:
        assert type(report) is Lines
        report.start(0, 100, 10)
        report.step(0, 1, 5.0, 0.5)
        report.epoch(ROW)
        report.say("[done] 100%")
    assert text.getvalue() == epoch_line(ROW, 10) + "\n[done] 100%\n"


def test_bar_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with reporter(console) as report:
        assert type(report) is Bar
        report.start(0, 100, 10)
        report.step(2, 50, 1234.0, 0.75)
        report.progress.refresh()
        report.epoch(ROW)
    output = text.getvalue()
    assert all(part in output for part in ("epoch 3/10", "50%", "1,234 images/s", "75.00%"))
