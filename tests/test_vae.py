"""inputs/vae.py: VAEs as diffusers writes them, the pair of encoder and decoder, and the scale of latents."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from inputs.vae import decode, encode, load_vae, read_stats, same_spec, to_latent
from test_irepa import normal
from tests.common import toy_vae


def test_the_pair_of_encoder_and_decoder(vae, tmp_path):
    network, spec = load_vae(str(vae))
    assert (spec["factor"], spec["channels"], spec["scale"], spec["bias"]) == (2, 4, [0.18215] * 4, [0.0] * 4)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    moments = encode(network, images)
    posterior = network.encode(images / 127.5 - 1).latent_dist
    mean, std = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, (posterior.logvar / 2).exp())  # the deviation, not its logarithm
    noise = normal(0, *mean.shape)
    torch.testing.assert_close(to_latent(moments, noise, spec), (mean + std * noise) * 0.18215)
    scale, bias = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.save(dict(latents_scale=scale.view(1, 4, 1, 1), latents_bias=bias.view(1, 4, 1, 1)), tmp_path / "stats.pt")
    stats = {**spec, **dict(zip(("scale", "bias"), read_stats(tmp_path / "stats.pt", 4)))}
    z = to_latent(moments, 0 * noise, stats)
    torch.testing.assert_close(z, (mean - bias.view(4, 1, 1)) * scale.view(4, 1, 1))
    torch.testing.assert_close(decode(network, z, stats), network.decode(mean).sample, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="here holds latents of local with scale"):
        same_spec(spec, stats, "here")
    torch.save(dict(latents_scale=scale), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is no file of .* 'latents_bias' is missing"):
        read_stats(tmp_path / "bad.pt", 4)


def test_a_vae_that_lacks_a_tensor_is_refused(tmp_path):
    file = toy_vae(tmp_path / "lacking", 0) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "quant_conv.bias"}, file)
    with pytest.raises(ValueError, match="lacks 1 tensors, such as quant_conv.bias"):  # and is not left random
        load_vae(str(tmp_path / "lacking"))
    blocks = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4)
    blocks.update(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    AutoencoderTiny(**blocks).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other cannot be loaded"):  # another kind
        load_vae(str(tmp_path / "other"))


def with_config(vae, folder, **changes):
    """A copy of a VAE's folder with other entries in its config."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_a_vaes_own_scale_and_bias_are_those_of_its_config(vae, tmp_path):
    mean, std = [0.1, 0.2, -0.3, 0.0], [1.0, 2.0, 4.0, 0.5]
    shifted = with_config(vae, tmp_path / "sd3", scaling_factor=1.5305, shift_factor=0.0609)
    whitened = with_config(vae, tmp_path / "xl", scaling_factor=0.5, latents_mean=mean, latents_std=std)
    z, wide = normal(1, 2, 4, 8, 8), (1, 4, 1, 1)
    network, spec = load_vae(shifted)
    assert spec["scale"] == [1.5305] * 4 and spec["bias"] == [0.0609] * 4
    torch.testing.assert_close(decode(network, z, spec), network.decode(z / 1.5305 + 0.0609).sample)  # SD3's pipeline
    network, spec = load_vae(whitened)
    latent = z * torch.tensor(std).view(wide) / 0.5 + torch.tensor(mean).view(wide)  # as in SDXL's pipeline
    torch.testing.assert_close(decode(network, z, spec), network.decode(latent).sample)
    half, short = dict(latents_mean=mean), dict(latents_mean=mean[:2], latents_std=std[:2])
    for name, changes in dict(half=half, short=short).items():
        with pytest.raises(ValueError, match="its config has latents_mean .* and 4 channels"):
            load_vae(with_config(vae, tmp_path / name, **changes))


def test_pipelines_variants_and_older_files_load(vae, tmp_path, capsys):
    whole, spec = load_vae(str(vae))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    shutil.copytree(vae, tmp_path / "pipeline/vae")
    assert load_vae(str(tmp_path / "pipeline")).spec == spec
    assert "pipeline is a pipeline: its vae/ is taken" in capsys.readouterr().out
    network = AutoencoderKL.from_pretrained(vae)
    network.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert load_vae(str(tmp_path / "bin")).spec == spec and not capsys.readouterr().out
    network.half().save_pretrained(tmp_path / "half", variant="fp16")
    half = load_vae(str(tmp_path / "half"))
    assert "half holds weights of the variant fp16, which are taken" in capsys.readouterr().out
    assert half.vae.dtype == torch.float32 and half.spec["sha256"] != spec["sha256"]
    state = whole.state_dict()
    assert all(torch.equal(value, state[key].half().float()) for key, value in half.vae.state_dict().items())
    shutil.copytree(vae, tmp_path / "half", dirs_exist_ok=True)
    assert load_vae(str(tmp_path / "half")).spec == spec  # the full weights, where both are there
