"""Loading a base: folders, shards, configs with random weights; and every way in which a base can be broken."""

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub import scan_cache_dir
from safetensors.torch import load_file, save_file

from data.base_folder import resolve_base
from trainer.models.load import check_base, load_transformer, read_config, read_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(a, b) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def broken(base_folder, tmp_path):
    """A copy of the base that may be damaged."""
    return shutil.copytree(base_folder, tmp_path / "base")


@pytest.fixture
def sharded(make_transformer, tmp_path):
    folder = tmp_path / "sharded"
    make_transformer(seed=7).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_pipeline_folder_transformer_folder_and_shards_are_one_base(base_folder, sharded, make_transformer):
    want = make_transformer(seed=7)
    for folder in (base_folder, base_folder / "transformer", sharded):
        assert same(load_transformer(str(folder)), want)
        assert read_config(str(folder))["num_layers"] == 3
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert torch.equal(read_weights(str(sharded), [name])[name], want.get_parameter(name))
    with pytest.raises(ValueError, match=r"lacks .'nothing'"):
        read_weights(str(sharded), ["nothing"])


def test_config_gives_random_weights_by_seed_and_leaves_the_generator_alone(config_json):
    before = torch.get_rng_state()
    first = load_transformer(str(config_json), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(load_transformer(str(config_json), seed=3), first)
    assert not same(load_transformer(str(config_json), seed=4), first)
    narrow = load_transformer(str(config_json), dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


def test_fields_that_a_config_omits_have_diffusers_defaults(config_json, tiny_config):
    config_json.write_text(json.dumps({"_class_name": "MochiTransformer3DModel", "num_attention_heads": 4}))
    fields = read_config(str(config_json))
    assert (fields["num_layers"], fields["in_channels"], fields["num_attention_heads"]) == (48, 12, 4)


def test_meta_device_makes_shapes_only(base_folder, config_json):
    for base in (base_folder, config_json):
        model = load_transformer(str(base), device="meta", dtype=torch.bfloat16, float32_from=1)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.transformer_blocks[1].attn1.to_q.weight.dtype == torch.float32


def test_narrow_trunk_wide_head_without_rounding(base_folder, make_transformer):
    want = dict(make_transformer(seed=7).named_parameters())
    model = load_transformer(str(base_folder), dtype=torch.bfloat16, float32_from=2)
    for name, value in model.named_parameters():
        wide = name.startswith(("transformer_blocks.2.", "norm_out.", "proj_out.", "pos_frequencies"))
        assert torch.equal(value, want[name] if wide else want[name].bfloat16()), name


def test_missing_bases_are_told_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`hf download genmo/not-downloaded`"):
        resolve_base("genmo/not-downloaded")
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder"):
        check_base(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no transformer/config\.json"):
        check_base(str(tmp_path))
    # A download that broke off: the snapshot is there, the transformer is not.
    (tmp_path / "hub/models--genmo--half/snapshots/0123").mkdir(parents=True)
    monkeypatch.setattr("data.base_folder.scan_cache_dir", lambda: scan_cache_dir(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"incomplete: run `hf download genmo/half` again"):
        check_base("genmo/half")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", r"describes \[1\], expected 'MochiTransformer3DModel'"),
        ('{"_class_name": "LTXVideoTransformer3DModel"}', "'LTXVideoTransformer3DModel', expected 'Mochi.*' or 'Wan"),
        ("{}", "describes None"),
    ],
)
def test_other_configs_are_refused(broken, text, message):
    (broken / "transformer" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_base(str(broken))
    with pytest.raises(ValueError, match=message):
        load_transformer(str(broken))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(broken, keep):
    path = broken / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or truncated"):
        check_base(str(broken))


def test_absent_weights_and_absent_shards(broken, sharded):
    (broken / "transformer" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"lacks {WEIGHTS}"):
        check_base(str(broken))
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        load_transformer(str(sharded))
    (sharded / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        check_base(str(sharded))


def test_weights_that_do_not_fit_the_config(broken):
    path = broken / "transformer" / WEIGHTS
    whole = load_file(path)
    lacking, name = copy.copy(whole), "transformer_blocks.1.attn1.to_q.weight"
    del lacking[name]
    save_file(lacking, path)
    with pytest.raises(ValueError, match=rf"1 tensors differ, e\.g\. {name} \(got none, expected \(16, 16\)\)"):
        load_transformer(str(broken))
    save_file({**whole, name: torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"got \(2, 2\), expected \(16, 16\)"):
        check_base(str(broken))
