"""Configs are typed and complete: what is not understood is refused by name; recipes are what they say."""

import dataclasses

import pytest

from hotcold.errors import FormatError, HotcoldError, InputError
from hotcold.sparsify.config import Config, Text, load_config, recipes
from hotcold.sparsify.methods.relu import relu_config

# ProSparse, appendix L, table 6: (peak, accumulated step), tokens of all steps
TABLE_6 = {
    "llama-2-7b": (
        [(0, 5000), (5e-3, 6000), (5e-2, 10000), (5e-2, 12000), (2e-1, 16000), (2e-1, 16500)],
        34.60e9,
        3e-5,
    ),
    "llama-2-13b": (
        [(0, 5500), (5e-3, 6750), (1e-2, 10750), (1e-2, 11000), (2e-2, 15000), (2e-2, 16000)],
        134.22e9,
        5e-5,
    ),
    "minicpm-1b": (
        [(0, 10000), (1e-3, 15000), (5e-3, 20000), (5e-3, 25000), (5e-2, 35000)],
        466.94e9,
        None,
    ),
}


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipes())
def test_recipes_load(name):
    config = load_config(name)
    assert config.model is not None
    assert config.l1_schedule()(config.steps) == config.l1.stages[-1][0]


@pytest.mark.parametrize("name", TABLE_6)
def test_recipes_are_the_papers_stages(name):
    stages, tokens, lr = TABLE_6[name]
    config = load_config(name)
    assert list(config.l1.stages) == stages
    assert config.steps * config.step_tokens == pytest.approx(tokens, rel=1e-3)
    assert config.loss.lm == 1
    assert lr is None or config.learning.lr == lr


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    config = load_config(write(tmp_path, "steps: 7\nlearning: {lr: 1e-4}\ntext: [{source: a.txt}]\n"))
    default = Config()
    assert (config.steps, config.learning.lr, config.text) == (7, 1e-4, (Text("a.txt", 1.0),))
    assert dataclasses.replace(config, steps=1000, learning=default.learning, text=default.text) == default


@pytest.mark.parametrize(
    "name", ["relu", "drelu", "fatrelu_0.05", "relu2", "shifted_relu_0.1", "thresholded_silu_0.1"]
)
def test_what_can_be_exported_can_be_trained(name):
    assert Config(activation=name).activation == name


def test_an_empty_file_is_the_default(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "config.yaml: unknown key 'stepz'; did you mean 'steps'?"),
        ("l1: {stage: []}", "config.yaml: l1: unknown key 'stage'; did you mean 'stages'?"),
        ("qqqq: 7", "config.yaml: unknown key 'qqqq'; known are model, activation"),
        ("steps: many", "config.yaml: steps: a value of another type (got 'many', expected int)"),
        ("steps: true", "config.yaml: steps: a value of another type (got True, expected int)"),
        ("pack: 1", "config.yaml: pack: a value of another type (got 1, expected bool)"),
        ("learning: {lr: fast}", "learning: lr: a value of another type (got 'fast', expected a number)"),
        ("precision: fp8", "precision: a value of another type (got 'fp8', expected bf16 | fp32)"),
        ("l1: {stages: 3}", "l1: stages: a value of another type (got 3, expected a list)"),
        ("l1: {stages: [[0, 1, 2]]}", "stages[0]: wrong list length (got 3, expected 2)"),
        ("model: {n_layers: 3}", "model: keys are missing (expected d_model, d_ff)"),
        ("text: [{share: 1}]", "text[0]: keys are missing (expected source)"),
        ("- steps", "not a mapping of keys to values"),
        ("steps: 0", "steps: out of range (got 0, expected >= 1)"),
        ("quantize_from: 2", "quantize_from: out of range (got 2.0, expected 0 to 1)"),
        ("l1: {stages: [[0.1, 5]]}", "stage 0 of the L1 schedule must have peak 0"),
        ("l1: {target_sparsity: 80}", "l1.target_sparsity: out of range (got 80.0, expected 0 to 1)"),
        ("loss: {kl: 0}", "loss: every term of the loss is off (expected lm, kl or ffn > 0)"),
        ("activation: silu", "activation: gives no zeros, so it is not trained (got silu, expected relu"),
        ("activation: mish", "activation: gives no zeros, so it is not trained (got mish, expected relu"),
        ("text: []", "text: shares of the text sources must be positive"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_yaml_and_no_file(tmp_path):
    with pytest.raises(FormatError, match="not YAML"):
        load_config(write(tmp_path, "a: [1,"))
    with pytest.raises(InputError, match=r"nowhere: .*expected a YAML file or one of llama-2-13b \| "):
        load_config("nowhere")


def test_the_digest_changes_with_what_is_trained_and_not_with_how_often_it_is_saved():
    config = Config()
    saved_more = dataclasses.replace(config, checkpoints=dataclasses.replace(config.checkpoints, every=1))
    assert saved_more.digest() == config.digest()
    assert dataclasses.replace(config, seed=1).digest() != config.digest()


def test_the_quick_method_shares_its_tokens_out():
    config = relu_config(tokens=100_000)
    assert (config.steps + config.warm_start.steps) * config.step_tokens <= 100_000
    assert (config.steps + config.warm_start.steps + 1) * config.step_tokens > 100_000
    assert config.l1_schedule()(config.steps) == 0.03
    assert relu_config(tokens=2048, quantize=False).quantize_step >= relu_config(tokens=2048).steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 7}, "--tokens: too few tokens"),
        ({"generated": 1.5}, "--generated: out of range"),
        ({"l1": -1}, "--l1: the L1 factor must not be negative"),
        ({"l1_reduction": "max"}, "--l1-reduction: unknown reduction"),
    ],
)
def test_the_quick_method_refuses_what_is_out_of_range(options, message):
    with pytest.raises(HotcoldError, match=message):
        relu_config(**options)
