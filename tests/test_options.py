import pytest
from training_support import small_config

from granet.config import SGD, AdamW, Cosine, TrainConfig, config_yaml
from granet.methods import GMP, GraNet, RigL
from granet.names import UsageError
from granet.options import load_config, parse_config
from granet.recipes import DEFAULT, recipe_path


def test_values_reach_their_fields():
    config = parse_config(
        ["--epochs", "3", "--method.sparsity", "0.8", "--data.validation", "100", "--optimizer=AdamW"],
        recipe_path(DEFAULT),
    )
    assert config.epochs == 3
    assert config.method == GraNet(initial_sparsity=0.5, sparsity=0.8, update_every="2%", prune_until="50%")
    assert config.data.validation == 100
    assert isinstance(config.optimizer, AdamW)


def test_dashes_and_underscores_are_the_same():
    dashes = parse_config(["--batch-size", "7", "--lr-schedule", "Cosine", "--optimizer.weight-decay", "0.1"])
    underscores = parse_config(["--batch_size", "7", "--lr_schedule", "Cosine", "--optimizer.weight_decay", "0.1"])
    assert dashes == underscores
    assert isinstance(dashes.lr_schedule, Cosine)


def test_another_class_keeps_what_the_file_gives_and_nothing_else():
    config = parse_config(["--method", "RigL", "--optimizer", "AdamW", "--optimizer.lr", "0.01"], recipe_path(DEFAULT))
    assert config.method == RigL(sparsity=0.9, update_every="2%")
    assert config.optimizer == AdamW(lr=0.01, weight_decay=0.0005)
    assert parse_config(["--method", "GMP"]).method == GMP()
    assert parse_config(["--method=RigL", "--method", "GMP"]).method == GMP()


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "got list"), ("a: [\n", "not YAML")], ids=["list", "broken"])
def test_file_of_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "arguments",
    [["--exclude", "fc,layer4.*"], ["--exclude=fc, layer4.*"], ["--exclude", '["fc","layer4.*"]']],
    ids=["words", "equals", "json"],
)
def test_lists_may_be_words_with_commas(arguments):
    assert parse_config([*arguments, "--log", "tensorboard"]).exclude == ["fc", "layer4.*"]


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("700", 700), ("68.75%", "68.75%"), ("110 epochs", "110 epochs")]
)
def test_times_keep_their_kind(text, value):
    method = parse_config(["--method.prune_until", text]).method
    assert isinstance(method, GraNet)
    assert method.prune_until == value
    assert type(method.prune_until) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.1"], "unknown option --lr; did you mean optimizer.lr?"),
        (["--method.regrow_until", "x"], "method.regrow_until: expected 'end' or 'prune_end', got 'x'"),
        (["--method.initial_sparsity", "x"], "method.initial_sparsity: expected float, got 'x'"),
        (["--epoch", "3"], "unknown option --epoch; did you mean epochs?"),  # no abbreviations
        (["--methd", "GraNet"], "unknown option --methd; did you mean method?"),
        (["--data.rot", "x"], "unknown option --data.rot; did you mean data.root?"),
        (["--method", "Granett"], "unknown method 'Granett'; did you mean GraNet? (known: "),
        (["--optimizer", "Adamww"], "unknown optimizer 'Adamww'; did you mean AdamW? (known: SGD, AdamW)"),
        (["--lr_schedule", "Cos"], "unknown lr_schedule 'Cos'; did you mean Cosine?"),
        (["--method.sparsty", "1"], "method GraNet has no option 'sparsty'; did you mean sparsity?"),
        (["--method", "RigL", "--method.initial_sparsity", "0"], "method RigL has no option 'initial_sparsity'"),
        (["--optimizer.betas", "[0.9,0.9]"], "optimizer SGD has no option 'betas'"),
        (["--method.sparsity", "1.5"], "GraNet.sparsity: expected a number in [0, 1), got 1.5"),
        (["--epochs", "many"], "epochs: expected int, got 'many'"),
        (["--threads", "all"], "threads: expected int or null, got 'all'"),
        (["--epochs", "0"], "epochs: expected 1 or more, got 0"),
        (["--data.name", "cifar11"], "unknown data set 'cifar11'; did you mean cifar10"),
        (["--method", "Gradual"], "method"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_option_is_named_in_one_line(arguments, message):
    with pytest.raises(UsageError) as caught:
        parse_config(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        small_config(method=RigL(sparsity=0.8), optimizer=AdamW(betas=(0.8, 0.99)), exclude=["0", "*.fc"]),
        small_config(method=GMP(sparsity=0.7), optimizer=SGD(nesterov=True), log=["tensorboard"], clip_grad_norm=1.0),
    ],
    ids=["default", "RigL", "GMP"],
)
def test_yaml_reads_back_equal(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config))
    assert load_config(path) == config


def test_unknown_field_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epoch: 3\n")
    with pytest.raises(UsageError, match=r"config\.yaml.*epoch"):
        load_config(path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("arguments", [["--method", "rigl"], ["--method=RIGL"]])
def test_the_case_of_a_class_does_not_matter(arguments):
    assert type(parse_config(arguments).method).__name__ == "RigL"
