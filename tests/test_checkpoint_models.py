"""Every shape of checkpoint: converted, loaded, saved again."""

import pytest
import torch

from .models.checkpoints import CONFIGS, save


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_a_saved_model_finds_its_place(kind, tmp_path):
    """A checkpoint's names lead to the model's own parameters, with its values."""
    from octavo.checkpoint import open_source
    from octavo.checkpoint.names import map_names
    from octavo.checkpoint.skeleton import build_skeleton

    model = save(kind, tmp_path)
    with open_source(tmp_path) as source:
        skeleton = build_skeleton(source.model_config())
        names = map_names(skeleton, source)
        assert names.unexpected == []
        found = {}
        for group in names.groups:
            found.update(group.realize(skeleton, source.read))
    expected = {name: value for name, value in model.state_dict().items() if name in found}
    assert set(dict(model.named_parameters())) <= set(found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
