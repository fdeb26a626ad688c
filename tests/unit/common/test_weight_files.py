"""Weight files of every format, whole and broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model
from slim_utils.common.model_source import check_files
from slim_utils.layerwise.offload import OffloadedModel
from tests.tiny_models import make_tiny

DOWN = "model.layers.1.mlp.down_proj.weight"
SAFETENSORS, PICKLED = ("model", "safetensors"), ("pytorch_model", "bin")
FORMATS = pytest.mark.parametrize(("stem", "suffix"), [SAFETENSORS, PICKLED])


def save(tensors: dict[str, Any], path: Path, **options: Any) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path, **options)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def sharded(folder: Path, checkpoint: Path, stem: str, suffix: str, **options: Any) -> Path:
    """A copy of ``checkpoint`` in three shards; ``DOWN`` is in the second."""
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = [names[:10], [DOWN, *names[10:20]], [name for name in names[20:] if name != DOWN]]
    parts[0] = [name for name in parts[0] if name != DOWN]
    parts[1] = list(dict.fromkeys(parts[1]))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-00003.{suffix}"
        save({name: state[name] for name in part}, folder / file, **options)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def second(folder: Path) -> Path:
    """The shard of ``DOWN``."""
    return next(path for path in folder.iterdir() if "-00002-of-" in path.name)


@pytest.mark.parametrize("zipped", [True, False])
def test_load_model_of_pickled_shards_equals_safetensors(zipped, checkpoint, tmp_path):
    folder = sharded(tmp_path / "m", checkpoint, *PICKLED, _use_new_zipfile_serialization=zipped)
    expected = load_model(str(checkpoint), "auto", False).state_dict()
    for name, tensor in load_model(str(folder), "auto", False).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    host = OffloadedModel(str(folder), "auto", False, tmp_path / "scratch")
    assert torch.equal(host.read_layer(1)["mlp.down_proj.weight"], expected[DOWN])
    host.close()


BREAKS: dict[str, Callable[[Path], object]] = {
    "no such file": Path.unlink,
    r"\(0 bytes\): damaged or incomplete": lambda path: path.write_bytes(b""),
    r"\([\d,]+ bytes\): damaged or incomplete; download": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "damaged or incomplete": lambda path: path.write_text("<html>404</html>" * 20),
}


@FORMATS
@pytest.mark.parametrize("message", BREAKS)
def test_check_files_with_a_broken_shard_names_it(message, stem, suffix, checkpoint, tmp_path):
    folder = sharded(tmp_path / "m", checkpoint, stem, suffix)
    BREAKS[message](second(folder))
    with pytest.raises(UserError, match=rf"{stem}-00002-of-00003\.{suffix}.*{message}") as error:
        check_files(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@FORMATS
def test_check_files_with_a_wrong_index_names_the_tensor(stem, suffix, checkpoint, tmp_path):
    folder = sharded(tmp_path / "m", checkpoint, stem, suffix)
    path = folder / f"{stem}.{suffix}.index.json"
    index = json.loads(path.read_text())
    elsewhere = index["weight_map"] | {DOWN: index["weight_map"]["lm_head.weight"]}
    novel = index["weight_map"] | {"model.layers.9.weight": index["weight_map"][DOWN]}
    for weight_map, name in ((elsewhere, DOWN), (novel, "model.layers.9.weight")):
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(UserError, match=rf"index\.json lists {name} in .*, which does not have it"):
            check_files(str(folder))
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"{stem}\.{suffix}\.index\.json: damaged"):
            check_files(str(folder))
    path.write_text(json.dumps({"weight_map": {DOWN: "../other.bin"}}))
    with pytest.raises(UserError, match="outside of the folder"):
        check_files(str(folder))


class Code:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_load_model_of_a_pickle_with_code_is_refused_unread(zipped, checkpoint, tmp_path, monkeypatch):
    folder = sharded(tmp_path / "m", checkpoint, *PICKLED)
    state = torch.load(second(folder), weights_only=True)
    torch.save(state | {"extra": Code()}, second(folder), _use_new_zipfile_serialization=zipped)
    monkeypatch.chdir(tmp_path)
    for load in (
        lambda: load_model(str(folder), "auto", False),
        lambda: OffloadedModel(str(folder), "auto", False, tmp_path / "scratch"),
    ):
        with pytest.raises(UserError, match=r"-00002-of-00003\.bin: holds a .*never run; save it as safetensors"):
            load()
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(2)}}, [torch.ones(2)], {}])
def test_check_files_of_other_pickles_names_the_file(content, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(content, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        check_files(str(tmp_path / "m"))


@pytest.mark.parametrize("change", [lambda w: w.to(torch.float8_e4m3fn), lambda w: (w * 10).to(torch.int8)])
def test_load_model_of_bare_quantised_weights_is_refused(change, checkpoint, tmp_path):
    """transformers would cast them, without their scales."""
    shutil.copytree(checkpoint, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    state: dict[str, Tensor] = load_file(path)
    save(state | {DOWN: change(state[DOWN])}, path)
    with pytest.raises(UserError, match=rf"{DOWN} in model\.safetensors is stored as .*; use the unquantised"):
        load_model(str(tmp_path / "m"), "auto", False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float32"}, "float32")],
)
def test_load_model_of_mixed_dtypes_takes_that_of_the_configuration(fields, expected, tmp_path, caplog):
    make_tiny("gqa").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    save(mixed, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    caplog.set_level("INFO")
    model = load_model(str(tmp_path), "auto", False)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{expected}"}
    note = "weights in bfloat16 and float32 are loaded in bfloat16"
    assert (note in caplog.text) == (expected == "bfloat16")
    precise = load_model(str(tmp_path), "float32", False)
    assert torch.equal(precise.model.norm.weight, state["model.norm.weight"])
