"""Feature maps in place of logits, against timm's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resops.models import create_model
from tests.torchvision_ops import timm

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (2, 3), (-1, 1), (0,)])
@pytest.mark.parametrize("training", [True, False])
def test_maps_are_timms(out_indices: tuple[int, ...], training: bool) -> None:
    model: Any = create_model("resnet18", features_only=True, out_indices=out_indices).double()
    ordered = sorted(i % 5 for i in out_indices)  # timm gives them in order only
    theirs = timm().create_model("resnet18", features_only=True, out_indices=ordered).double()
    loaded = model.load_state_dict(theirs.state_dict(), strict=False)
    assert not loaded.missing_keys and not loaded.unexpected_keys  # nothing deeper is there
    model.train(training), theirs.train(training)
    x = torch.randn(2, 3, 65, 48, dtype=torch.float64)
    maps = model(x)
    expected = dict(zip(ordered, theirs(x), strict=True))
    for i, y, info in zip(out_indices, maps, model.feature_info, strict=True):
        torch.testing.assert_close(y, expected[i % 5], rtol=1e-9, atol=1e-9)
        assert info.channels == y.size(1)
        assert y.shape[2:] == (-(-65 // info.reduction), -(-48 // info.reduction))


def test_a_checkpoint_of_the_whole_network_loads() -> None:
    whole = create_model("resnet18")
    features = create_model("resnet18", features_only=True, out_indices=(1, 2))
    loaded = features.load_state_dict(whole.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert {key.split(".")[0] for key in loaded.unexpected_keys} == {"layer3", "layer4", "fc"}


@pytest.mark.parametrize("out_indices", [(5,), (-6,), (1, 1), (4, -1), ()])
def test_wrong_indices(out_indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="out_indices must be different indices of the 5 feature"):
        create_model("resnet18", features_only=True, out_indices=out_indices)
