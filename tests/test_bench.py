"""The benchmarks measure what they say, and report no time for a wrong result. No test looks at a time itself."""

import csv
import itertools
import json

import matplotlib.image
import numpy as np
import pytest
import torch

import bench.__main__ as everything
from bench import held, layers, peers, plots, records, split, step_models, step_time, timing, topk, training
from bench.layer_sets import LayerShape, layer_set
from bench.memory import peak_bytes
from bench.options import Record
from bench.verify import WrongResultError, check_close, check_zero_off
from granet import native
from granet_kernels.cpu_backend import library

REQUIRED = {
    *("model", "batch", "dtype", "threads", "sparsity", "granularity", "implementation"),
    *("ms_median", "ms_p20", "ms_p80", "speedup_over_dense", "gflops", "bytes"),
}
CONV = LayerShape("conv2d", 2, 8, 6, (5, 7), (3, 3), (2, 1), (1, 1))
POINTWISE = LayerShape("conv2d", 2, 8, 6, (3, 4))
LINEAR = LayerShape("linear", 5, 8, 6)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of tiny operations mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestTiming:
    def test_quantiles_by_hand(self):
        values = [40.0, 10.0, 30.0, 20.0, 50.0, 60.0]
        assert [timing.quantile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [10, 20, 35, 50, 60]
        assert timing.quantile([7.0], 0.2) == 7
        assert timing.quantile([1.0, 2.0], 0.25) == 1.25
        assert timing.Timing((0.003, 0.001, 0.002)).columns() == pytest.approx(
            {"ms_median": 2, "ms_p20": 1.4, "ms_p80": 2.6}
        )

    @pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
    def test_no_quantile(self, values, share):
        with pytest.raises(ValueError, match="expected"):
            timing.quantile(values, share)

    def test_candidates_take_turns(self):
        calls = []
        candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
        times = timing.alternate(candidates, rounds=30, warmup={"b": 2}, least_sample=0)
        assert "".join(calls[:5]) == "a" + "bbb" + "c"
        rounds = ["".join(calls[at : at + 3]) for at in range(5, len(calls), 3)]
        assert len(rounds) == 30
        assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
        assert [len(each.seconds) for each in times.values()] == [30, 30, 30]

    @pytest.mark.parametrize("keys", [[], ["a"], ["a", "b"], list("abcde")])
    def test_nobody_follows_itself_and_each_follows_every_other(self, keys):
        calls = [key for order in itertools.islice(timing.orders(keys), 100) for key in order]
        neighbours = set(itertools.pairwise(calls))
        assert neighbours == {pair for pair in itertools.product(keys, keys) if len(keys) == 1 or pair[0] != pair[1]}

    def test_short_calls_are_repeated(self):
        calls = []
        timing.alternate({"a": lambda: calls.append(1)}, rounds=1, least_sample=0.001)
        assert len(calls) > 10

    def test_least_rounds_without_time(self):
        times = timing.alternate({"a": lambda: None}, rounds=10, seconds=-1, least_sample=0)
        assert len(times["a"].seconds) == timing.LEAST_ROUNDS

    def test_budget_passes_on_what_is_left(self):
        budget = timing.Budget(100, 4)
        assert budget.share() == pytest.approx(25, abs=1)
        assert budget.share() == pytest.approx(100 / 3, abs=1)
        assert timing.Budget(None, 2).share() == float("inf")


class TestRecords:
    def test_appends(self, tmp_path):
        path = tmp_path / "new" / "a.csv"
        records.append(path, ("date", "ms"), [{"date": "2026-01-01", "ms": 1 / 3}])
        records.append(path, ("date", "ms"), [{"ms": None, "date": "2026-01-02"}])
        assert path.read_text() == "date,ms\n2026-01-01,0.333333\n2026-01-02,\n"
        assert records.load(path, since="2026-01-02") == [{"date": "2026-01-02", "ms": None}]
        assert len(records.load(path)) == 2

    @pytest.mark.parametrize(("columns", "row"), [(("date",), {"date": 1}), (("date", "ms"), {"date": 1})])
    def test_other_columns_are_refused(self, tmp_path, columns, row):
        path = tmp_path / "a.csv"
        records.append(path, ("date", "ms"), [{"date": "d", "ms": 1}])
        before = path.read_bytes()
        with pytest.raises(ValueError, match="expected"):
            records.append(path, columns, [row])
        assert path.read_bytes() == before

    def test_geometric_mean(self):
        assert records.geometric_mean([1, 4]) == pytest.approx(2)
        assert records.geometric_mean([1, 16], [3, 1]) == pytest.approx(2)

    def test_machine(self):
        assert records.machine().keys() == set(records.MACHINE)
        assert "cores" in records.machine()["cpu"]


class TestRefusal:
    def test_close(self):
        expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
        check_close("y", torch.tensor([3.0, 4.0]), expected)
        for wrong in (torch.tensor([3.0, 4.1]), torch.tensor([3.0, float("nan")]), torch.tensor([3.0])):
            with pytest.raises(WrongResultError, match="y: expected"):
                check_close("y", wrong, expected)

    def test_zero_off_the_mask(self):
        mask = torch.tensor([True, False])
        check_zero_off("dw", torch.tensor([1.0, 0.0]), mask)
        for stray in (1e-30, float("nan")):
            with pytest.raises(WrongResultError, match="1 other"):
                check_zero_off("dw", torch.tensor([1.0, stray]), mask)

    def test_a_wrong_layer_gets_no_row(self, tmp_path, monkeypatch, capsys):
        right = peers.candidate

        def wrong(implementation, direction, shape, operands):
            made = right(implementation, direction, shape, operands)
            if implementation != "granet":
                return made
            return peers.Candidate(lambda: tuple(1.001 * value for value in made.results(made.run())))

        monkeypatch.setattr(layers, "candidate", wrong)
        assert layers.main([*LAYERS, "--csv", str(tmp_path / "a.csv")]) == 1
        found = {row["implementation"] for row in read(tmp_path / "a.csv")}
        assert "granet" not in found
        assert "granet-native" in found
        assert "REFUSED" in capsys.readouterr().err

    def test_a_wrong_step_gets_no_row(self, tmp_path, monkeypatch):
        gradients = step_models.Trainer.gradients

        def wrong(self):
            found = gradients(self)
            if self.implementation == "granet-native":
                found["conv1.weight"] = 1.5 * found["conv1.weight"]
            return found

        monkeypatch.setattr(step_models.Trainer, "gradients", wrong)
        assert step_time.main([*STEP, "--csv", str(tmp_path / "a.csv")]) == 1
        assert "granet-native" not in {row["implementation"] for row in read(tmp_path / "a.csv")}

    def test_a_loss_that_is_not_finite_gets_no_row(self, tmp_path):
        trainer = step_models.Trainer(step_models.Setting("resnet20", 2), "dense")
        next(trainer.model.parameters()).data.fill_(float("nan"))
        record = Record(tmp_path / "a.csv", step_time.COLUMNS)
        assert step_time.measure({("dense", "dense", 0.0): trainer}, record, 1, 0) == []
        assert record.refusals == 1

    def test_a_wrong_selection_gets_no_row(self, tmp_path, monkeypatch):
        monkeypatch.setattr(topk.granet_kernels, "topk_mask", lambda scores, *args, **kwargs: scores > 1)
        assert topk.main(["--units", "100", "--rounds", "1", "--csv", str(tmp_path / "a.csv")]) == 1
        assert not any("granet" in row["implementation"] for row in read(tmp_path / "a.csv"))


class TestPeers:
    @pytest.mark.parametrize("shape", [CONV, POINTWISE, LINEAR], ids=str)
    @pytest.mark.parametrize("direction", peers.DIRECTIONS)
    @pytest.mark.parametrize("implementation", peers.IMPLEMENTATIONS)
    def test_results(self, shape, direction, implementation):
        operands = peers.draw(shape)
        reference = peers.Reference(shape, operands)
        if implementation not in peers.DENSE:
            operands = peers.masked(operands, layers.draw_mask(shape, "unstructured", 0.5))
        made = peers.candidate(implementation, direction, shape, operands)
        if made is None:
            assert (implementation == "csr" and shape is CONV) or "channels_last" in implementation
            return
        reference.check(direction, made.results(made.run()), operands)

    def test_float64_by_hand(self):
        """One image of 1x1 pixel and one weight: y = w x, dx = w g, dw = g x."""
        shape = LayerShape("conv2d", 1, 1, 1)
        operands = peers.Operands(*(torch.full((1, 1, 1, 1), value) for value in (2.0, 3.0, 5.0)))
        reference = peers.Reference(shape, operands)
        right = [torch.full((1, 1, 1, 1), value) for value in (6.0, 15.0, 10.0)]
        reference.check("all", tuple(right), operands)
        for index in range(3):
            wrong = [value + (i == index) for i, value in enumerate(right)]
            with pytest.raises(WrongResultError):
                reference.check("all", tuple(wrong), operands)

    def test_layer_sets(self):
        vgg, resnet = layer_set("vgg19"), layer_set("resnet50-cifar")
        assert sum(shape.count for shape in vgg) == 16
        assert [str(shape).removeprefix("conv 3x3 ") for shape in vgg if shape.in_mean] == [
            *("64->64 at 32x32", "64->128 at 16x16", "128->128 at 16x16", "128->256 at 8x8", "256->256 at 8x8"),
            *("256->512 at 4x4", "512->512 at 4x4", "512->512 at 2x2"),
        ]
        assert sum(shape.count for shape in resnet) == 53
        assert {shape.kernel for shape in resnet} == {(1, 1), (3, 3)}
        assert {shape.stride for shape in resnet} == {(1, 1), (2, 2)}
        assert CONV.y_shape == (2, 6, 3, 7)
        assert CONV.macs == 2 * 6 * 3 * 7 * 8 * 9

    def test_mask_has_exactly_the_kept_units(self):
        assert int(layers.draw_mask(CONV, "unstructured", 0.9).sum()) == round(0.1 * 8 * 6 * 9)
        assert int(layers.draw_mask(CONV, "2:4", 0.5).sum()) == 8 * 6 * 9 // 2


def test_peak_bytes():
    if (found := peak_bytes(lambda: torch.zeros(2**22).add_(1).sum())) is None:
        pytest.skip("not measurable on this system")
    assert found == pytest.approx(2**24, rel=0.1)


class TestPlots:
    def test_break_even_by_hand(self):
        assert plots.break_even({0.9: 4.0, 0.5: 0.5, 0.7: 1.0}) == pytest.approx(0.7)
        assert plots.break_even({0.5: 0.5, 0.9: 2.0}) == pytest.approx(0.7)
        assert plots.break_even({0.8: 2.0, 0.9: 0.5}) is None
        assert plots.break_even({0.8: 1.5, 0.9: 2.0}) is None
        assert plots.break_even({}) is None

    def test_pictures(self, tmp_path):
        plots.save_speedups({"a": {"granet": {0.5: 0.5, 0.9: 2.0}}, "b": {"csr": {0.9: 0.5}}}, tmp_path / "a.png", "t")
        plots.save_split({"dense": {"conv": 3.0, "other": 1.0}}, tmp_path / "b.png", "t")
        for name in ("a.png", "b.png"):
            pixels = matplotlib.image.imread(tmp_path / name)
            assert min(pixels.shape[:2]) > 150
            assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


LAYERS = ["--layers", "resnet20", "--only", "2", "--batch", "2", "--sparsity", "0.5", "--rounds", "1"]
STEP = ["--model", "resnet20", "--batch", "2", "--image-size", "16", "--sparsity", "0.5", "--rounds", "1"]


class TestCommands:
    def test_layers(self, tmp_path, capsys):
        path = tmp_path / "a.csv"
        for expected in (1, 2):
            assert layers.main([*LAYERS, "--csv", str(path)]) == 0
            rows = read(path)
            cases = {(r["layer"], r["direction"], r["implementation"], r["sparsity"]) for r in rows}
            assert len(cases) == 2 * 4 * (len(peers.IMPLEMENTATIONS) - 1)  # csr is for plain products
            assert len(rows) == expected * len(cases)
        assert REQUIRED - {"model"} <= rows[0].keys()
        best = [float(r["speedup_over_dense"]) for r in rows if r["implementation"] in peers.DENSE]
        assert max(best) == 1
        text = capsys.readouterr().out
        assert "| resnet20, all, granet |" in text
        assert (tmp_path / "a.png").exists()

    def test_linear_layers_beside_csr(self, tmp_path, monkeypatch):
        monkeypatch.setattr(layers, "layer_set", lambda name, batch: [LINEAR])
        layers.main(["--layers", "linear", "--sparsity", "0.5", "--rounds", "1", "--csv", str(tmp_path / "a.csv")])
        rows = [row for row in read(tmp_path / "a.csv") if row["implementation"] == "csr"]
        assert [row["direction"] for row in rows] == list(peers.DIRECTIONS)
        flops = [float(row["gflops"]) * float(row["ms_median"]) * 1e6 for row in rows]
        assert flops == pytest.approx([2 * 5 * 24, 2 * 5 * 24, 2 * 5 * 24, 3 * 2 * 5 * 24], rel=1e-4)

    def test_step_time(self, tmp_path, capsys):
        path = tmp_path / "a.csv"
        assert step_time.main([*STEP, "--csv", str(path), "--implementations", *step_models.IMPLEMENTATIONS]) == 0
        rows = read(path)
        assert set(rows[0]) >= REQUIRED | set(records.MACHINE)
        assert [row["implementation"] for row in rows] == list(step_models.IMPLEMENTATIONS)
        assert [float(row["sparsity"]) for row in rows] == [0] * 3 + [0.5] * 4
        assert all(float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"]) for row in rows)
        assert "| resnet20, granet-native | 50% |" in capsys.readouterr().out
        assert (tmp_path / "a.png").exists()

    def test_useful_flops(self):
        setting = step_models.Setting("resnet20", 4, distribution="uniform")
        dense = step_models.Trainer(setting, "dense").useful_flops()
        half = step_models.Trainer(setting, "granet", "unstructured", 0.5).useful_flops()
        convolutions = 9 * (
            3 * 16 * 32**2 + 6 * 16**2 * 32**2 + (16 * 32 + 5 * 32**2) * 16**2 + (32 * 64 + 5 * 64**2) * 8**2
        )
        assert dense == 3 * 2 * 4 * (convolutions + 64 * 10)
        assert half == pytest.approx(dense / 2, rel=1e-3)

    def test_split(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(native, "LEAST_VALUES", 0)  # so that these small images are normed natively, too
        path = tmp_path / "a.csv"
        assert step_time.main([*STEP, "--split", "--csv", str(path)]) == 0
        rows = read(path)
        assert [row["part"] for row in rows] == list(split.PARTS) * 3
        took = [
            {row["part"] for row in rows if row["implementation"] == name and float(row["ms"]) > 0}
            for name in ("dense", "granet")
        ]
        rest = {split.FORWARD, split.NORM, "optimizer"}
        assert took[0] >= {split.DGRAD, split.WGRAD, *rest}
        assert took[1] >= {split.BOTH, *rest}  # all these layers are small
        assert "| resnet20, granet 50% |" in capsys.readouterr().out
        assert (tmp_path / "a-resnet20.png").exists()

    def test_training(self, tmp_path, capsys):
        for name, share in (("one", None), ("two", 0.25)):
            (tmp_path / name).mkdir()
            rows = [
                {"epoch": i, "images_per_second": 100.0 * i, "native_share": share, "sparsity": 0.5} for i in (1, 2)
            ]
            (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            summary = {
                "plan": "rule",
                "test_accuracy": 0.5,
                "sparsity": 0.5,
                "unit_sparsity": 0.5,
                "native_share": share,
            }
            summary |= {"seconds": 9.0, "model": "resnet20", "data": "cifar10", "method": "GraNet"}
            (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        picture = tmp_path / "new" / "a.png"
        assert training.main([str(tmp_path / "one"), str(tmp_path / "two"), "--png", str(picture)]) == 0
        assert "| two | rule | 50.00% | 50.00% | 25% | 100 | 200 | 9 |" in capsys.readouterr().out
        assert matplotlib.image.imread(picture)[..., :3].min() < 0.5
        with pytest.raises(SystemExit):
            training.main([str(tmp_path)])
        assert "expected the folder of a finished run" in capsys.readouterr().err

    def test_topk(self, tmp_path, capsys):
        path = tmp_path / "a.csv"
        assert topk.main(["--units", "7", "1000", "--rounds", "1", "--segments", "3", "--csv", str(path)]) == 0
        rows = read(path)
        assert len(rows) == 2 * 7
        assert tuple(rows[0]) == topk.COLUMNS
        assert "granet, segments" in capsys.readouterr().out
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
    def test_held(self, capsys):
        assert held.main(["--model", "resnet20", "--sparsity", "0.9", "0.98"]) == 0
        dense, sparse = (
            [float(cell) for cell in line.split("|")[3:5]] for line in capsys.readouterr().out.splitlines()[2:]
        )
        assert dense[0] == sparse[0] == 0.3  # 268,336 weights, a byte each
        assert dense[1] > 3 * sparse[1] > 0
        with pytest.raises(SystemExit):
            held.main(["--model", "mlp"])
        assert "mlp does not take images of 32x32 pixels" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--sparsity", "1"], ["--sparsity", "x"], ["--thr", "1"]])
    def test_bad_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit):
            layers.main(arguments)
        assert "error" in capsys.readouterr().err

    def test_a_model_that_does_not_take_the_images(self, capsys):
        with pytest.raises(SystemExit):
            step_time.main(["--model", "resnet20", "mlp", "--image-size", "9"])
        assert "mlp does not take images of 9x9 pixels" in capsys.readouterr().err

    def test_everything_has_a_summary(self, tmp_path):
        """What `make bench` prints in the end comes from the files, and only from this run's rows."""
        layers.main([*LAYERS, "--csv", str(tmp_path / "layers.csv")])
        topk.main(["--units", "100", "--rounds", "1", "--csv", str(tmp_path / "topk.csv")])
        text = everything.summaries(tmp_path, since="")
        assert "resnet20, all, granet" in text
        assert "np.partition" in text
        assert everything.summaries(tmp_path, since="9999") == ""
        (tmp_path / "layers.png").unlink()
        everything.draw(tmp_path, since="9999")
        assert not (tmp_path / "layers.png").exists()
        everything.draw(tmp_path, since="")
        assert (tmp_path / "layers.png").exists()

    def test_stages(self):
        assert sum(stage.share for stage in everything.STAGES) == pytest.approx(1)
        stage = everything.Stage("s", 0.5, ["-c", "import os, sys; sys.exit(sys.argv[1] != '50')", "{seconds}"])
        assert everything.run(stage, 100) == 0
        assert everything.run(stage, 10) == 1


def test_reference_of_selection_is_numpys():
    found = topk.selections(1000, 4)
    mask = found["granet"].run().numpy()
    magnitudes = np.sort(np.abs(torch.randn(1000, generator=torch.Generator().manual_seed(0)).numpy()))
    assert mask.sum() == 100
    assert found["np.partition"].run()[900] == magnitudes[900]
