"""`verify` finds every flipped bit and every contradiction; `inspect` says what is there."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.inspect import describe
from hotcold.convert.bundle.manifest import BundleFile, Manifest
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.gguf.write import copied, planned, write_gguf
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.digest import seal
from hotcold.errors import FormatError, HotcoldError, InputError
from hotcold.files.gguf import GGUFFile
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import PredictorBundle


@pytest.fixture(scope="module")
def original(make_model, make_predictors, tmp_path_factory) -> Path:
    model = make_model()
    out = tmp_path_factory.mktemp("bundles") / "b"
    predictors = PredictorBundle.load(make_predictors(model))
    options = {"folder": model, "predictors": predictors, "options": ExportOptions(attention_rows=True)}
    export_bundle(HFCheckpoint(model), out, name="m", fingerprint=fingerprint(str(model)), **options)
    return out


@pytest.fixture
def bundle(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "b"))


def found(bundle: Path) -> str:
    """What is wrong, as one line."""
    return "; ".join(map(str, verify_bundle(bundle)))


def sign(bundle: Path, **changes: object) -> None:
    """Write the manifest anew, with right hashes, so that only contradictions are left to be found."""
    values = json.loads((bundle / "manifest.json").read_text()) | changes
    values["files"] = {
        name: BundleFile.of(bundle / name, entry["role"]) for name, entry in values["files"].items()
    }
    known = {name: values[name] for name in Manifest.__dataclass_fields__}
    storage.write_json(bundle / "manifest.json", Manifest(**known).to_json())


def rewrite(path: Path, edit) -> None:
    """Write a GGUF file again with the metadata and tensor plans that `edit` changes in place."""
    file = GGUFFile(path)
    exact = {int: np.uint32, float: np.float32}
    metadata = {k: exact.get(type(v), lambda same: same)(v) for k, v in file.metadata.items()}
    plans = {name: copied(tensor) for name, tensor in file.tensors.items()}
    edit(metadata, plans)
    write_gguf(path, metadata, list(plans.values()), magic=file.magic)


def test_a_good_bundle(bundle, capsys):
    assert verify_bundle(bundle) == []
    assert main(["verify", str(bundle)]) == 0
    assert capsys.readouterr().out.endswith("no problems found\n")


def test_bundles_without_predictors_or_tokenizer_are_good(make_model, tmp_path):
    model = make_model("silu")
    export_bundle(HFCheckpoint(model), tmp_path / "a", name="m", fingerprint="0" * 64, folder=model)
    export_bundle(HFCheckpoint(model), tmp_path / "b", name="m", fingerprint="0" * 64)
    assert verify_bundle(tmp_path / "a") == verify_bundle(tmp_path / "b") == []


def test_a_sparse_model_without_predictors_is_good_with_and_without_its_form_by_neurons(
    make_model, tmp_path, capsys
):
    """Bundles of before had the dense file alone."""
    model = make_model()
    export_bundle(HFCheckpoint(model), tmp_path / "b", name="m", fingerprint="0" * 64, folder=model)
    assert verify_bundle(tmp_path / "b") == []
    assert main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == []
    manifest = Manifest.read(tmp_path / "b")
    files = {path: file for path, file in manifest.files.items() if file.role != "sparse"}
    (tmp_path / "b" / "m.powerinfer.gguf").unlink()
    rewritten = replace(manifest, files=files).to_json()
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(rewritten))
    assert verify_bundle(tmp_path / "b") == []


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_thousand_flipped_bits_are_found(bundle):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    files = [bundle / name for name in Manifest.read(bundle).files]
    for file in rng.choices(files, k=1000):
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert "damaged" in found(bundle), f"seed {seed}: bit {bit} of {file.name}"
        flip(file, bit)
    assert verify_bundle(bundle) == []


def test_every_flipped_bit_of_the_manifest_is_found(bundle):
    path = bundle / "manifest.json"
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        with pytest.raises(FormatError):
            Manifest.read(bundle)
        flip(path, bit)


def test_missing_cut_and_foreign_files_are_all_named(bundle):
    (bundle / "config.json").unlink()
    (bundle / "stray.bin").write_bytes(b"x")
    with (bundle / "m.gguf").open("r+b") as file:
        file.truncate(1000)
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("/etc/hostname")
    lines = [str(problem) for problem in verify_bundle(bundle)]
    assert [line.split(": ")[0].removeprefix(f"{bundle}/") for line in lines] == [
        "stray.bin", "m.gguf, bytes", "tokenizer.json", "config.json",
    ]  # fmt: skip


def test_the_command_lists_what_is_wrong_and_fails(bundle, capsys):
    flip(bundle / "m.gguf", 9)
    assert main(["verify", str(bundle)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"FormatError: {bundle}/m.gguf, sha256: damaged")
    assert err.startswith("hotcold verify: error: ")
    assert "problems found: 1" in err


def drop_output(metadata, plans):
    del plans["output.weight"]


def add_tensor(metadata, plans):
    plans["extra"] = planned("extra", (32,), "F32", lambda: np.zeros(32))


def change(key, value):
    def edit(metadata, plans):
        metadata[key] = value

    return edit


def drop(key):
    def edit(metadata, plans):
        del metadata[key]

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop_output, "tensors does not agree"),
        (add_tensor, "tensors does not agree"),
        (change("hotcold.model_fingerprint", "0" * 64), "hotcold.model_fingerprint does not agree"),
        (change("hotcold.activation", "drelu"), "hotcold.activation does not agree"),
        (change("hotcold.predictor.thresholds", np.zeros(3, np.float32)), "thresholds does not agree"),
        (change("hotcold.hot.neurons", np.zeros(240, np.int32)), "hotcold.hot.neurons does not agree"),
        (change("llama.rope.freq_base", np.float32(1e6)), "llama.rope.freq_base does not agree"),
        (change("tokenizer.ggml.pre", "qwen2"), "tokenizer.ggml.pre does not agree"),
        (drop("tokenizer.ggml.merges"), "tokenizer.ggml.merges: missing metadata key"),
    ],
)
def test_a_contradiction_in_the_sparse_file_is_found(bundle, edit, message):
    rewrite(bundle / "m.powerinfer.gguf", edit)
    sign(bundle)
    assert message in found(bundle)


def drop_rows(metadata, plans):
    del plans["blk.1.attn_v_t.weight"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop_rows, "tensors does not agree"),
        (change("general.architecture", "llama"), "general.architecture does not agree"),
        (change("hotcold.model_fingerprint", "0" * 64), "hotcold.model_fingerprint does not agree"),
    ],
)
def test_a_contradiction_in_the_attention_file_is_found(bundle, edit, message):
    rewrite(bundle / "m.attention.gguf", edit)
    sign(bundle)
    assert f"m.attention.gguf: {message}" in found(bundle)


def test_further_metadata_is_allowed(bundle):
    rewrite(bundle / "m.gguf", change("hotcold.note", "made at home"))
    sign(bundle)
    assert verify_bundle(bundle) == []


def test_another_type_of_tensor_is_found(bundle):
    def as_f16(metadata, plans):
        plans["blk.0.attn_q.weight"] = planned(
            "blk.0.attn_q.weight", (64, 64), "F16", lambda: np.zeros((64, 64))
        )

    rewrite(bundle / "m.gguf", as_f16)
    sign(bundle)
    assert "tensor blk.0.attn_q.weight (got F16 (64, 64), expected Q4_0 (64, 64))" in found(bundle)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "silu"}, "activation does not agree"),
        ({"llama_cpp_exact": False}, "llama_cpp_exact does not agree"),
        ({"quant": "q8_0"}, "general.file_type does not agree"),
        ({"head_quant": "f16"}, "tensor token_embd.weight"),
        ({"predictor_quant": "f16"}, "tensor blk.0.fc1.weight"),
        ({"hot_frequency": 0.9}, "hotcold.hot.counts does not agree"),
        ({"model_fingerprint": "1" * 64}, "predictors of another model"),
        ({"name": "other"}, "files does not agree"),
    ],
)
def test_a_contradiction_in_the_manifest_is_found(bundle, changes, message):
    sign(bundle, **changes)
    assert message in found(bundle)


def altered(bundle: Path, edit) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    edit(values)
    (bundle / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "edit, field",
    [
        (lambda m: m.pop("format"), "format"),
        (lambda m: m.update(version=2), "version"),
        (lambda m: m.update(version=True), "version"),
        (lambda m: m.pop("name"), "name"),
        (lambda m: m.update(quant=4), "quant"),
        (lambda m: m.update(files=[]), "files"),
        (lambda m: m.update(color="red"), "color"),
        (lambda m: m.update(name="other"), "sha256"),
        (lambda m: m.pop("sha256"), "sha256"),
    ],
)
def test_a_broken_manifest_names_the_field(bundle, edit, field):
    altered(bundle, edit)
    with pytest.raises(FormatError) as caught:
        verify_bundle(bundle)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "name, entry, field",
    [
        ("../x", {"role": "dense", "bytes": 1, "sha256": "0" * 64}, "files"),
        ("/etc/passwd", {"role": "dense", "bytes": 1, "sha256": "0" * 64}, "files"),
        ("a/b", {"role": "dense", "bytes": 1, "sha256": "0" * 64}, "files"),
        ("x", {"role": "dense", "bytes": 1}, "x"),
        ("x", [], "x"),
        ("x", {"role": "virus", "bytes": 1, "sha256": "0" * 64}, "x.role"),
        ("x", {"role": "dense", "bytes": -1, "sha256": "0" * 64}, "x"),
        ("x", {"role": "dense", "bytes": 1.0, "sha256": "0" * 64}, "x.bytes"),
        ("x", {"role": "dense", "bytes": 1, "sha256": "0" * 63 + "G"}, "x"),
    ],
)
def test_a_broken_entry_names_the_field(bundle, name, entry, field):
    def edit(values):
        values["files"][name] = entry
        del values["sha256"]
        values["sha256"] = seal(values)

    altered(bundle, edit)
    with pytest.raises(FormatError) as caught:
        Manifest.read(bundle)
    assert caught.value.field == field


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(InputError):
        verify_bundle(tmp_path)


def test_inspect_a_bundle(bundle, capsys):
    assert main(["inspect", str(bundle), "--json"]) == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (described["kind"], described["activation"]) == ("bundle", "relu")
    assert described["layers"][1] == {"layer": 1, "rank": 32, "threshold": -0.25, "hot": 80}
    assert described["hot_neurons"] == [list(range(80, 160))] * 3
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "predictors/model.safetensors" in text
    assert "1      32    -0.2500    80   80-159" in text


def test_inspect_files_and_predictors(bundle, capsys):
    assert main(["inspect", str(bundle / "m.powerinfer.gguf"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["kind"], described["magic"]) == ("gguf", "PWRI")
    assert described["metadata"]["hotcold.predictor.ranks"] == [32, 32, 32]
    row = {
        "name": "blk.0.ffn_down_t.weight",
        "shape": [160, 64],
        "type": "Q4_0",
        "bytes": 160 * 64 // 32 * 18,
    }
    assert row in described["tensors"]
    assert sum(described["bytes_by_type"].values()) == sum(t["bytes"] for t in described["tensors"])
    assert main(["inspect", str(bundle / "m.gguf")]) == 0
    text = capsys.readouterr().out
    assert "smallthinker.expert_count: 1" in text
    assert "blk.0.ffn_gate_exps.weight  1×160×64" in text
    assert main(["inspect", str(bundle / "predictors"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [described[key] for key in ("kind", "n_layers", "d_model", "d_ff")] == ["predictors", 3, 64, 160]


def test_inspect_a_gpu_index(tmp_path, capsys):
    GpuIndex([np.array([0, 1, 2, 5], np.int32), np.array([], np.int32)], 8, 1 << 20).write(tmp_path / "i")
    assert main(["inspect", str(tmp_path / "i")]) == 0
    text = capsys.readouterr().out
    assert "vram_capacity: 1048576" in text
    assert "0      4    0.5000  0-2, 5" in text and "1      0    0.0000  none" in text


@pytest.mark.parametrize(
    "metadata, field",
    [
        ({"powerinfer.sparse_threshold": "low"}, "powerinfer.sparse_threshold"),
        ({"hotcold.predictor.thresholds": np.zeros(2, np.float32)}, "hotcold.predictor.thresholds"),
        ({"hotcold.hot.counts": "many"}, "hotcold.hot.counts"),
        ({"hotcold.hot.counts": np.ones(1, np.uint32)}, "hotcold.hot.neurons"),
        (
            {"hotcold.hot.counts": np.ones(1, np.uint32), "hotcold.hot.neurons": np.ones(2, np.int32)},
            "hotcold.hot.counts",
        ),
    ],
)
def test_inspect_names_metadata_that_does_not_fit(tmp_path, metadata, field):
    fc1 = planned("blk.0.fc1.weight", (4, 8), "F32", lambda: np.zeros((4, 8), np.float32))
    write_gguf(tmp_path / "m", metadata, [fc1], magic="PWRI")
    with pytest.raises(FormatError) as caught:
        describe(tmp_path / "m")
    assert caught.value.field == field


def test_inspect_refuses_what_it_does_not_know(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path, message in ((tmp_path, "nothing to inspect"), (tmp_path / "x.gguf", "version")):
        assert main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(HotcoldError):
        GGUFFile(tmp_path / "x.gguf")
