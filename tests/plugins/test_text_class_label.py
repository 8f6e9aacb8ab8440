"""The `class-label` conditioner: both modes, names, and labels that are none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import ConfigError, InputError, InputTypeError
from ldmkit_text.class_label import ClassLabelConditioner


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_tokens_are_rows_of_the_table(labels: list[int]) -> None:
    conditioner = ClassLabelConditioner.build(num_classes=3, hidden_size=8)
    condition = conditioner(labels)
    assert condition.given() == conditioner.provides == {"tokens_BLC"}
    assert torch.equal(condition.tokens_BLC, conditioner.embedding.weight[labels][:, None])
    assert {key: tuple(value.shape) for key, value in conditioner.state_dict().items()} == {"embedding.weight": (4, 8)}


def test_labels_pass_through_by_number_and_by_name() -> None:
    conditioner = ClassLabelConditioner.build(num_classes=3, mode="labels", names=["cat", "dog", "newt"])
    condition = conditioner(["newt", 0, conditioner.null_input])
    assert condition.given() == conditioner.provides == {"labels_B"}
    assert torch.equal(condition.labels_B, torch.tensor([2, 0, 3]))
    assert not conditioner.state_dict()


def test_labels_follow_the_module_to_its_device() -> None:
    conditioner = ClassLabelConditioner.build(num_classes=3, mode="labels").to("meta")
    assert conditioner([1]).labels_B.device.type == "meta"


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([0, 4], InputError, r"class label 1 is 4, outside 0 to 2 \(3 is the null class\)"),
        ([-1], InputError, "class label 0 is -1"),
        ([1.0], InputTypeError, "class label 0 must be an integer or a name, got 1.0 of type float"),
        ([True], InputTypeError, "bool"),
        (["dgo"], InputError, "class label 0 is 'dgo'.*did you mean 'dog'"),
        (["xyzzy"], InputError, "there are 3 names"),
        ("dog", InputTypeError, "put a single label in a list"),
        (2, InputTypeError, "must be a list, got 2"),
        ([], InputError, "no class labels"),
    ],
)
def test_bad_labels(inputs: object, error: type[Exception], message: str) -> None:
    conditioner = ClassLabelConditioner.build(num_classes=3, names=["cat", "dog", "newt"], hidden_size=4)
    for call in (conditioner.check, conditioner):
        with pytest.raises(error, match=message):
            call(inputs)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 2, "names": ["a"]}, "1 names, 2 classes"),
        ({"num_classes": 2, "names": ["a", "a"]}, "'a' appear more than once"),
        ({"num_classes": 0}, "num_classes"),
        ({"mode": "token"}, "mode"),
    ],
)
def test_bad_configs(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassLabelConditioner.build(**values)


@given(
    num_classes=st.integers(1, 2000),
    mode=st.sampled_from(["tokens", "labels"]),
    hidden_size=st.integers(1, 4096),
    names=st.lists(st.text(max_size=10), unique=True, max_size=5),
)
def test_config_round_trip(num_classes: int, mode: str, hidden_size: int, names: list[str]) -> None:
    values = {"num_classes": len(names) or num_classes, "mode": mode, "hidden_size": hidden_size, "names": names}
    config = ClassLabelConditioner.Config.parse(values)
    assert ClassLabelConditioner.Config.parse_json(config.to_json()) == config
