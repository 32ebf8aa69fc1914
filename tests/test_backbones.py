"""Backbones: preprocessing, tokens, the last linear map, and which mistakes are refused."""

import copy
import io
import json
import math
import os
import pickle
import sys
import zipfile
from types import MethodType

import numpy as np
import open_clip
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers
from fresh import printed
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from datasets.embeddings import encoder_fingerprint
from models.backbones import make_backbone
from models.backbones.last_map import Pooled, Projection, reconstruction_error
from models.backbones.openclip import Backbone
from models.laplace import load_published
from utils.checkpoint import read_run
from utils.config import HOME, Encoder, known, load_backbone
from utils.errors import UserError

YAMLS = [name for name in known("backbones") if name != "given"]
# One for each kind of last layer in open_clip, and all that a YAML names.
FAMILIES = sorted(
    {load_backbone(name).model for name in YAMLS if load_backbone(name).library == "open_clip"} - {"shapes-tiny"}
    | {"convnext_base", "PE-Core-T-16-384", "ViTamin-S", "convnext_large_d"}
)
SIDE = 64  # pixels of the pictures of a shrunk architecture
TINY = {"clip": {"projection_dim": 24}, "siglip": {}, "blip": {"image_text_hidden_size": 24}}
VOCABULARY = ["[PAD]", "[UNK]", "[EOS]", "a", "photo", "of", "cat", "dog"]


def shrunk(name):
    """An open_clip architecture at full width with few layers, small pictures and 1,000 tokens."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = SIDE
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if "layers" in config.get(part, {}):
            config[part]["layers"] = [1] * 4 if isinstance(config[part]["layers"], list) else 2
    config["text_cfg"]["vocab_size"] = 1000
    return config


def shallow(name, *args, create=open_clip.timm_model.timm.create_model, **kwargs):
    """A timm trunk at full width with few layers and small pictures."""
    fewer = {"convnext": {"depths": (1, 1, 1, 1)}, "fastvit": {"layers": (1, 1, 1, 1)}}
    return create(name, *args, **fewer.get(name.split("_")[0], {"depth": 2, "img_size": SIDE}), **kwargs)


def repeating(draw, scale_of):
    """A method of tensors that draws like `draw`, but fills a large one with copies of few numbers.

    Drawing a hundred million weights takes longer than all that is done with them. scale_of: function from the
    method's arguments to the scale of the numbers, whose shift is the first argument.
    """
    few = draw(torch.empty(2**17 - 1), 0, 1)  # a prime number of them, so that rows differ

    def fill(tensor, first, second, **options):
        if tensor.is_meta or tensor.numel() <= len(few):
            return draw(tensor, first, second, **options)
        scaled = few * scale_of(first, second) + first
        return tensor.copy_(scaled.repeat(math.ceil(tensor.numel() / len(few)))[: tensor.numel()].view(tensor.shape))

    return fill


NORMAL = repeating(torch.Tensor.normal_, lambda mean, deviation: deviation)
UNIFORM = repeating(torch.Tensor.uniform_, lambda low, high: high - low)


def shrink(patch, name=None):
    """Let open_clip build trunks of few layers with cheap random weights, and shrink one of its architectures."""
    patch.setattr(open_clip.timm_model.timm, "create_model", shallow)
    patch.setattr(torch.Tensor, "normal_", NORMAL)
    patch.setattr(torch.Tensor, "uniform_", UNIFORM)
    if name:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, name, shrunk(name))


@pytest.fixture
def small(monkeypatch):
    """Make a backbone whose open_clip architecture is shrunk but keeps its name and tags."""
    shrink(monkeypatch)

    def make(name, **settings):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, shrunk(name))
        return make_backbone(Encoder(model=name, **settings))

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """The same shrunk model in float32 and in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, request.param)
        exact = Backbone(Encoder(model=request.param))
        patch.setattr(open_clip, "create_model", lambda *args, **options: copy.deepcopy(exact.model))
        return exact, Backbone(Encoder(model=request.param, precision="bfloat16"))


@pytest.fixture
def family(both):
    return both[0]


def tiny(kind):
    """The configuration of a tiny model of transformers."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 31, "pad_token_id": 0, "bos_token_id": 30}
    vision = sizes | {"hidden_size": 32 if kind == "siglip" else 40, "image_size": 32, "patch_size": 8}
    text |= {"encoder_hidden_size": 40} if kind == "blip" else {}
    return {"model_type": kind, "text_config": sizes | text, "vision_config": vision, **TINY[kind]}


@pytest.fixture(params=TINY)
def hugging(request, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny(request.param)))
    return make_backbone(Encoder(library="transformers", model=request.param, architecture=str(path)))


def some_pixels(backbone, count=2):
    image = PIL.Image.new("RGB", (500, 400))
    shape = (count, *backbone.transform(image).shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def some_tokens(window=77, vocabulary=1000):
    """Random texts of 3 to 9 tokens that end in the last token and are padded with 0: (4, window)."""
    tokens = torch.randint(1, vocabulary - 1, (4, window), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((3, 9, 5, 7)):
        tokens[row, length - 1], tokens[row, length:] = vocabulary - 1, 0
    return tokens


def errors(backbone, tokens):
    """Reconstruction errors of both towers; asserts that pooled and plain encoding give the same embeddings."""
    result = []
    pixels = some_pixels(backbone)
    for tower, pooled, plain in (
        ("image", backbone.pooled_images(pixels), backbone.encode_images(pixels)),
        ("text", backbone.pooled_tokens(tokens), backbone.encode_tokens(tokens)),
    ):
        assert {x.dtype for x in pooled if x is not None} == {torch.float32}
        assert pooled.embedding.shape[1] == backbone.dim
        torch.testing.assert_close(pooled.embedding, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
        result.append(reconstruction_error(pooled, backbone.projection[tower]))
    return result


def test_last_map_of_every_family(family):
    """W phi + b + r is the embedding, for each kind of last layer in open_clip."""
    assert max(errors(family, some_tokens(family.model.text.context_length))) < 1e-4
    siglip = "SigLIP" in family.config.model
    assert (family.pooled_images(some_pixels(family, 1)).residual is not None) == siglip


def test_cutting_is_exact_in_every_family(family):
    tokens = some_tokens(family.model.text.context_length)
    with torch.inference_mode():
        whole = family.model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(family.encode_tokens(tokens), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    cut = family._length(tokens)
    with_class_token = family.config.model.startswith("coca")
    sees_all = with_class_token or "SigLIP" in family.config.model or family.config.model == "MobileCLIP-S1"
    assert cut == (tokens.shape[1] if sees_all else 9)


def test_bfloat16_is_close_in_every_family(both):
    exact, rounded = both
    assert (exact.precision, rounded.precision) == ("float32", "bfloat16")
    pixels, tokens = some_pixels(exact), some_tokens(exact.model.text.context_length)
    for tower, encode, pool, inputs in (
        ("image", "encode_images", "pooled_images", pixels),
        ("text", "encode_tokens", "pooled_tokens", tokens),
    ):
        a, b = getattr(exact, encode)(inputs), getattr(rounded, encode)(inputs)
        assert b.dtype == torch.float32 and not a.equal(b) and torch.cosine_similarity(a, b).min() > 0.999
        pooled = getattr(rounded, pool)(inputs)
        assert {x.dtype for x in pooled if x is not None} == {torch.float32}
        assert reconstruction_error(pooled, rounded.projection[tower]) < 1e-2


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_constructs_at_full_size(name):
    """On torch's meta device, which has shapes but no numbers; named weights exist in open_clip."""
    encoder = load_backbone(name)
    if encoder.library == "open_clip" and encoder.pretrained and not encoder.weights_file:
        assert encoder.pretrained in open_clip.list_pretrained_tags_by_model(encoder.model)
    text = (HOME / "configs" / "backbones" / f"{name}.yaml").read_text()
    encoder.pretrained = None
    with torch.device("meta"):
        backbone = make_backbone(encoder, "meta")
    pixels = some_pixels(backbone).to("meta")
    pooled = backbone.pooled_images(pixels)
    weight = backbone.projection["image"].weight
    assert pooled.embedding.shape == (2, backbone.dim) and weight.shape == (backbone.dim, pooled.pooled.shape[1])
    assert backbone.projection["text"].weight.shape[0] == backbone.dim
    assert f"D = {backbone.dim}" in text or name == "ViT-B-32-random"
    if "million" in text and name != "shapes-tiny":
        assert f"{sum(p.numel() for p in backbone.model.parameters()) / 1e6:.0f} million" in text


def test_transformers_families(hugging):
    kind = hugging.config.model
    tokens = some_tokens(16, 32)
    assert max(errors(hugging, tokens)) < 1e-4
    # Compare with the forward pass of transformers' class.
    pixels = hugging.normalize(some_pixels(hugging))
    cosine = hugging.encode_images(some_pixels(hugging)), hugging.encode_tokens(tokens)
    cosine = torch.nn.functional.normalize(cosine[0]) @ torch.nn.functional.normalize(cosine[1]).T
    with torch.inference_mode():
        if kind == "blip":
            mask = (tokens != 0).long()
            expected = hugging.model(tokens, pixels, use_itm_head=False, attention_mask=mask).itm_score
            assert hugging.logit_scale == pytest.approx(np.exp(2.6592)) and hugging.logit_bias is None
        else:
            logits = hugging.model(tokens, pixels).logits_per_image
            expected = (logits - (hugging.logit_bias or 0)) / hugging.logit_scale
    torch.testing.assert_close(cosine, expected, rtol=1e-4, atol=1e-5)


def test_transformers_load_from_a_folder(hugging, tmp_path):
    kind, pixels = hugging.config.model, some_pixels(hugging)
    hugging.model.save_pretrained(tmp_path / "weights")
    encoder = Encoder(library="transformers", model=kind, pretrained=str(tmp_path / "weights"))
    loaded = make_backbone(encoder)
    assert loaded.encode_images(pixels).equal(hugging.encode_images(pixels))
    assert loaded.mean.flatten()[0].item() == pytest.approx(0.5 if kind == "siglip" else 0.48145466)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "resample": 2}
    processor |= {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 32, "width": 32}}
    path = tmp_path / "weights" / "preprocessor_config.json"
    path.write_text(json.dumps(processor | {"size": {"shortest_edge": 32}}))
    loaded = make_backbone(encoder)
    assert loaded.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "bilinear" in str(loaded.transform.steps) and "CenterCrop" in str(loaded.transform.steps)
    encoder.preprocess = {"resize_mode": "squash"}
    assert "CenterCrop" not in str(make_backbone(encoder).transform.steps)
    path.write_text(json.dumps(processor | {"size": {"shortest_edge": 40}}))
    with pytest.raises(UserError, match=r"resizes to .*40.*, but its model takes 32"):
        make_backbone(encoder)


def test_transformers_refusals(tmp_path):
    def refusal(**settings):
        with pytest.raises(UserError) as refused:
            make_backbone(Encoder(**{"library": "transformers", "model": "mine"} | settings))
        return str(refused.value)

    assert "random weights of mine need its configuration" in refusal()
    assert "there is no folder 'absent'" in refusal(pretrained="absent")
    assert "mine does not load" in refusal(pretrained="hub") and "encoder.pretrained=FOLDER" in refusal(
        pretrained="hub"
    )
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    assert "mine is a 'bert'; supported are clip, siglip, blip" in refusal(architecture=str(tmp_path / "bert.json"))
    config = transformers.AutoConfig.for_model(**tiny("blip"))
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path / "captioner")
    assert "not those of a BlipForImageTextRetrieval" in refusal(pretrained=str(tmp_path / "captioner"))
    assert "encoder.library must be open_clip or transformers, not 'jax'" in refusal(library="jax")


def test_the_reconstruction_error_sees_a_wrong_map():
    phi, weight = torch.randn(5, 7), torch.randn(3, 7)
    pooled = Pooled(phi @ weight.T + 1, phi, torch.ones(5, 3))
    assert reconstruction_error(pooled, Projection(weight, None)) < 1e-6
    assert reconstruction_error(pooled, Projection(weight, torch.full((3,), 0.1))) > 1e-4
    assert reconstruction_error(pooled._replace(residual=None), Projection(weight, None)) > 1e-4
    spoiled = pooled.embedding.clone()
    spoiled[2, 1] = torch.nan
    assert reconstruction_error(pooled._replace(embedding=spoiled), Projection(weight, None)) == torch.inf


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP"])
def test_a_wrong_projection_is_seen(small, name):
    backbone = small(name)
    pooled, (weight, bias) = backbone.pooled_images(some_pixels(backbone)), backbone.projection["image"]
    assert reconstruction_error(pooled, Projection(weight + 0.01 * weight.flip(1), bias)) > 1e-4


def test_attention_pooling_that_calls_its_linear(small):
    """Newer releases of open_clip call c_proj on all tokens; 3.3 passes its weights to a function."""
    backbone = small("RN50")
    pool, pixels = backbone.model.visual.attnpool, some_pixels(backbone)
    identity = torch.nn.Linear(2048, 2048)
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)

    def calling(self, x):
        linear, self.c_proj = self.c_proj, identity
        token = type(self).forward(self, x)
        self.c_proj = linear
        return linear(torch.stack([token, token + 1], dim=1))[:, 0]

    before = backbone.pooled_images(pixels)
    pool.forward = MethodType(calling, pool)
    after = backbone.pooled_images(pixels)
    torch.testing.assert_close(before[:2], after[:2], rtol=1e-4, atol=1e-5)


def text_folder(folder, ends=True):
    """Write a tiny Hugging Face tokenizer that pads on the left to a folder, and the configuration of a tiny BERT."""
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 2)])
    settings = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "padding_side": "left"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.BertConfig(vocab_size=1000, max_position_embeddings=77, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("proj, dim", [("linear", 24), ("mlp", 24), (None, 32)])
def test_hugging_face_text_towers_of_open_clip(tmp_path, monkeypatch, proj, dim):
    folder = text_folder(tmp_path)
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_proj_type": proj, "context_length": 12}
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "bert-tiny", config)
    backbone = make_backbone(Encoder(model="bert-tiny"))
    texts = ["a photo of a cat", "a dog"]
    assert backbone.tokenize(texts)[1].tolist() == [3, 7, 2] + [0] * 9
    if proj:
        assert max(errors(backbone, backbone.tokenize(texts))) < 1e-4
        assert reconstruction_error(backbone.pooled_texts(texts), backbone.projection["text"]) < 1e-4
        return
    with pytest.raises(UserError, match="the text tower of bert-tiny does not end in a linear map"):
        backbone.pooled_texts(texts)
    assert backbone.encode_texts(texts).shape == (2, dim)


def test_a_text_tower_without_a_linear_map_is_refused(small):
    backbone = small("ViT-SO400M-16-SigLIP-i18n-256")
    assert backbone.pooled_images(some_pixels(backbone)).embedding.shape == (2, 1152)
    with pytest.raises(UserError, match="text tower of ViT-SO400M-16-SigLIP-i18n-256 does not end in a linear map"):
        _ = backbone.projection


def test_an_image_tower_with_something_after_the_map_is_refused(small):
    backbone = small("ViT-B-16-SigLIP")
    backbone.model.visual.trunk.fc_norm = torch.nn.LayerNorm(768)
    with pytest.raises(UserError, match="image tower of ViT-B-16-SigLIP does not end in a linear map"):
        backbone.pooled_images(some_pixels(backbone))


def test_tokenizers_that_cannot_be_loaded(small, monkeypatch, tmp_path):
    backbone = small("ViT-B-16-SigLIP")
    message = r"the tokenizer timm/ViT-B-16-SigLIP of ViT-B-16-SigLIP "
    with pytest.raises(UserError, match=message + r"cannot be loaded .* --set encoder\.tokenizer=FOLDER"):
        backbone.encode_texts(["a cat"])
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message + "needs transformers: pip install -r"):
        patch.setitem(sys.modules, "transformers", None)
        backbone.encode_texts(["a cat"])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="need it: pip install -r"):
        patch.setitem(sys.modules, "transformers", None)
        make_backbone(Encoder(library="transformers"))
    backbone = small("ViT-B-16-SigLIP", tokenizer=text_folder(tmp_path))
    assert backbone.tokenize(["A photo, of a dog!"]).tolist() == [
        [3, 4, 5, 3, 7, 2] + [0] * 58
    ]  # canonicalized, padded
    assert backbone.encode_texts(["a cat"]).shape == (1, 768)
    backbone = small("ViT-B-16-SigLIP", tokenizer=text_folder(tmp_path / "endless", ends=False))
    with pytest.raises(UserError, match="does not put one end token after a text, as in the model's training"):
        backbone.encode_texts(["a cat"])


def test_tokens_of_transformers(hugging, tmp_path):
    with pytest.raises(UserError, match="with random weights has no tokenizer"):
        hugging.tokenize(["a cat"])
    hugging.config.tokenizer = text_folder(tmp_path)
    texts = ["a cat", "a photo of a dog", "a " * 30]
    assert hugging.tokenize(texts[:2]).shape == (2, 16 if hugging.config.model == "siglip" else 6)
    assert hugging.tokenize(texts).shape == (3, 16)
    assert [hugging.reads_whole(text) for text in texts] == [True, True, False]
    alone, among = hugging.encode_texts(texts[:1]), hugging.encode_texts(texts)[:1]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-6)


def test_reads_whole(small):
    backbone = small("ViT-B-32")
    assert backbone.reads_whole("a cat") and not backbone.reads_whole("a cat and " * 40)


def saved(backbone, path):
    torch.save(backbone.model.state_dict(), path)
    return str(path)


def test_weights_in_a_file_are_normalized_as_their_architecture_is(small, tmp_path):
    for name, mean in (("ViT-B-16-SigLIP", 0.5), ("ViT-B-32", 0.48145466), ("ViT-L-14", 0.48145466)):
        random = small(name)
        backbone = small(name, pretrained=saved(random, tmp_path / "weights.pt"))
        pixels = some_pixels(backbone)
        assert backbone.encode_images(pixels).equal(random.encode_images(pixels))
        assert backbone.mean.flatten()[0].item() == pytest.approx(mean)
        assert ("CenterCrop" in str(backbone.transform.steps)) == (mean != 0.5)
    # open_clip's tags of ViT-L-14 disagree, so that the YAML says what LAION's were trained with.
    encoder = load_backbone("ViT-L-14-laion2b")
    backbone = small("ViT-L-14", preprocess=encoder.preprocess)
    assert backbone.mean.flatten()[0].item() == 0.5


def test_invalid_settings_are_named(small):
    for settings, message in (
        ({"preprocess": {"crop": 1}}, "encoder.preprocess has no 'crop'; it has mean, std, interpolation, resize_mode"),
        ({"preprocess": {"mean": 0.5}}, "encoder.preprocess: mean must be a list of three numbers, not 0.5"),
        ({"preprocess": {"resize_mode": "pad"}}, "resize_mode must be shortest, longest or squash, not 'pad'"),
    ):
        with pytest.raises(UserError, match=message):
            small("ViT-B-32", **settings)


@pytest.mark.filterwarnings("ignore")  # torch's own, of tracing
def test_archives_of_openai_want_quickgelu(small, tmp_path):
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", shrunk("ViT-B-32-quickgelu"))
        plain = open_clip.create_model("ViT-B-32-quickgelu").eval()
    plain.__dict__["attn_mask"] = plain._buffers.pop("attn_mask")  # a constant of OpenAI's archives, which have others
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(plain).pop(name, None)
        plain.register_buffer(name, torch.tensor(0))
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    path = str(tmp_path / "ViT-B-32.pt")
    torch.jit.trace(plain, (torch.zeros(1, 3, SIDE, SIDE), some_tokens()[:1]), check_trace=False).save(path)
    with pytest.raises(UserError, match="are not of ViT-B-32 but of ViT-B-32-quickgelu"):
        small("ViT-B-32", pretrained=path)
    backbone = small("ViT-B-32-quickgelu", pretrained=path)
    with torch.inference_mode():
        assert backbone.encode_images(pixels).equal(plain.encode_image(backbone.normalize(pixels)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS, get the file itself"),
        (b"<!DOCTYPE html>\r\n<html>404</html>", "a text or a web page, get the weights again."),
        (b"", "empty, get it again."),
        (b"\0" * 300, "they are damaged, get them again."),
    ],
)
@pytest.mark.parametrize("name", ["mine.pt", "mine.safetensors"])
def test_weights_that_are_no_weights_are_named(tmp_path, content, sentence, name):
    (tmp_path / name).write_bytes(content)
    encoder = load_backbone("shapes-tiny")
    encoder.pretrained = str(tmp_path / name)
    with pytest.raises(UserError) as refused:
        make_backbone(encoder)
    assert sentence in str(refused.value)


class Opened:
    """What a pickle may do: here it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_cannot_run_code(tmp_path):
    """Not even a zip that looks like TorchScript, the one format that torch reads without `weights_only`."""
    torch.save(Opened(tmp_path / "ran"), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "zip.pt", "w") as disguised:
        for name in plain.namelist():
            disguised.writestr(name, plain.read(name))
        disguised.writestr(f"{name.split('/')[0]}/code/x.py", "")
    with open(tmp_path / "both.pt", "wb") as both:  # a pickle to those who begin in front, a zip to others
        both.write(pickle.dumps(Opened(tmp_path / "ran")))
        with zipfile.ZipFile(both, "w") as archive:
            archive.writestr("both/code/x.py", "")
            archive.writestr("both/constants.pkl", "")
    for name in ("plain.pt", "zip.pt", "both.pt"):
        encoder = load_backbone("shapes-tiny")
        encoder.pretrained = str(tmp_path / name)
        with pytest.raises(UserError, match="do not load"):
            make_backbone(encoder)
    torch.save({"identity": Opened(tmp_path / "ran")}, tmp_path / "adaptor.pt")
    for name in ("A_img", "A_txt", "B_img", "B_txt"):
        torch.save(Opened(tmp_path / "ran"), tmp_path / f"{name}_analytic.pt")
    np.savez(tmp_path / "factors.npz", A_img=np.array([Opened(tmp_path / "ran")]))
    for read, file in ((read_run, "adaptor.pt"), (load_published, "."), (load_published, "factors.npz")):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / file)
    assert not (tmp_path / "ran").exists()


def photo(*size, mode="RGB", seed=0):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "MobileCLIP-S1"])
def test_pixels_are_open_clips(small, name):
    """Shortest, squash and bilinear; bit by bit."""
    backbone = small(name)
    tag = open_clip.list_pretrained_tags_by_model(name)[0]
    settings = open_clip.pretrained.get_pretrained_cfg(name, tag)
    settings = {key: settings[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    theirs = open_clip.image_transform(backbone.model.visual.image_size, is_train=False, **settings)
    for number, size in enumerate([(640, 480), (131, 400), (SIDE, SIDE), (30, 20)]):
        for mode in ("RGB", "RGBA", "L", "LA"):
            image = photo(*size, mode=mode, seed=number)
            pixels = backbone.transform(image)
            assert pixels.dtype == torch.uint8
            torch.testing.assert_close(backbone.normalize(pixels[None])[0], theirs(image), rtol=0, atol=0)


@pytest.fixture(scope="module")
def transform():
    with torch.device("meta"):
        return Backbone(Encoder(model="ViT-B-32"), "meta").transform


def stored(image, kind, **options):
    """Write an image to memory and open it again."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return PIL.Image.open(file)


def test_photographs_are_turned_upright(transform):
    upright = photo(60, 40)
    exif = PIL.Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        lying = stored(upright, "PNG", exif=exif)
        assert transform(lying).equal(transform(PIL.ImageOps.exif_transpose(lying))), orientation
    assert not transform(lying).equal(transform(upright))
    assert transform(stored(upright, "PNG", exif=b"Exif\0\0MM\xd7*\0\0\0\x08")).equal(transform(upright))  # damaged


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_half_an_image_is_not_taken_for_one(transform, kind):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(200, 200).save(file, kind, exif=exif)
    half = io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(OSError), PIL.Image.open(half) as image:
        transform(image)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(transform, mode):
    gray = np.arange(100, dtype=np.uint8).reshape(10, 10) * 2
    wide = gray.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]) * 257
    image = PIL.Image.frombytes(mode, (10, 10), wide.tobytes())
    assert transform(image).equal(transform(PIL.Image.fromarray(gray)))
    if mode == "I;16":
        assert transform(stored(image, "PNG")).equal(transform(image))
    if mode == "I":
        assert transform(PIL.Image.fromarray(gray.astype(np.int32))).equal(transform(PIL.Image.fromarray(gray)))


def test_gray_values_without_a_range_are_refused(transform):
    with pytest.raises(ValueError, match="gray values in floating point have no agreed range"):
        transform(PIL.Image.new("F", (9, 9), 0.5))
    for value in (-1, 65536):
        with pytest.raises(ValueError, match="gray values beyond 16 bits have no agreed range"):
            transform(PIL.Image.new("I", (9, 9), value))


def test_every_mode_becomes_rgb_before_it_is_resized(transform):
    image = photo(64, 48)
    for mode in ("CMYK", "YCbCr", "HSV", "P", "1"):
        converted = image.convert(mode)
        assert transform(converted).equal(transform(converted.convert("RGB"))), mode
    transparent = stored(image.quantize(16), "PNG", transparency=3)
    assert transparent.mode == "P" and transform(transparent).equal(transform(transparent.convert("RGBA")))
    assert transform(stored(image.convert("CMYK"), "JPEG", quality=95)).shape == (3, 224, 224)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_is_taken(transform, kind):
    frames = [photo(32, 32, seed=seed) for seed in range(2)]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert moving.n_frames == 2 and transform(moving).equal(transform(stored(frames[0], kind, **options)))


def test_ribbons_are_cut_before_they_are_resized(transform, small):
    for size in ((1, 20_000), (20_000, 1), (1, 1)):
        assert transform(photo(*size)).shape == (3, 224, 224)
    ribbon = whole = photo(1000, 30)
    for step in transform.steps:
        whole = step(whole)
    whole = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    assert (transform(ribbon).int() - whole.int()).abs().max() <= 3  # of 255: the resize begins at another phase
    squash = small("ViT-B-16-SigLIP").transform
    assert squash(ribbon).equal(torch.from_numpy(np.array(squash.steps[0](ribbon))).permute(2, 0, 1))  # all is kept


def test_a_loading_process_needs_no_model_library(transform, tmp_path):
    (tmp_path / "transform").write_bytes(pickle.dumps(transform))
    code = (
        "import pickle, sys, PIL.Image; transform = pickle.load(open(sys.argv[1], 'rb'));"
        "print(transform(PIL.Image.new('RGB', (9, 9))).shape, {'open_clip', 'timm', 'transformers'} & {*sys.modules})"
    )
    assert printed(code, tmp_path / "transform") == "torch.Size([3, 224, 224]) set()\n"
    assert len(pickle.dumps(transform)) < 2000


def test_a_folder_of_open_clip_is_architecture_and_weights(tmp_path):
    """As on the hub: weights, and open_clip_config.json with architecture and preprocessing."""
    original = Backbone(load_backbone("shapes-tiny"))
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    metadata = {"model_cfg": open_clip.get_model_config("shapes-tiny"), "preprocess_cfg": settings}
    metadata["model_cfg"]["custom_text"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(metadata))
    torch.save(original.model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = Encoder(model=f"local-dir:{tmp_path}", pretrained="hub")
    backbone = make_backbone(encoder)
    tokens = original.tokenize(["a photo", "a red circle"])
    assert backbone.dim == 64 and (backbone.encode_tokens(tokens) == original.encode_tokens(tokens)).all()
    assert (backbone.tokenize(["a photo", "a red circle"]) == tokens).all()
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    first = encoder_fingerprint(encoder)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(metadata) + " ")
    assert encoder_fingerprint(encoder) != first
