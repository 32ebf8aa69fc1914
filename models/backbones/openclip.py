"""The frozen vision-language model: the only importer of open_clip.

N images of H x W pixels, M texts of L tokens, D embedding size. Embeddings are float32, as the model gives them, not
normalized.
"""

import contextlib
import logging
import warnings
import zipfile
from functools import cached_property

import open_clip
import torch

from models.backbones.last_map import LastMap, reconstruction_error
from models.backbones.pixels import Transform
from utils.config import HOME
from utils.errors import UserError

PREPROCESS = {  # what may be said of an image's way to the model; no choices: a number for each color
    "mean": (),
    "std": (),
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}
EXTRA = "pip install -r requirements-extra.txt"


class Frozen:
    """A frozen model of either library; a subclass runs its towers, `_image` and `_text`, and has the tokenizer.

    preprocess: what is known of the pixels' way to the model, of PREPROCESS, and `size`; the encoder's own goes before.
    Raises UserError for settings that cannot be.
    """

    def __init__(self, config, device, model, preprocess, dim):
        self.config, self.device, self.dim = config, torch.device(device), dim
        self.model = model.to(self.device).eval().requires_grad_(False)
        auto = "float16" if self.device.type == "cuda" else "float32"
        self.precision = auto if config.precision == "auto" else config.precision
        settings = open_clip.transform.PreprocessCfg(**preprocess | _checked(config.preprocess))
        # The model's own transform ends in: to RGB, to floats, normalized.
        *steps, _, _, _ = open_clip.transform.image_transform_v2(settings, is_train=False).transforms
        self.transform = Transform(steps)
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32, device=self.device)[:, None, None]
            for x in (settings.mean, settings.std)
        )

    def normalize(self, pixels):
        """Bring uint8 pixels, (N, 3, H, W), to the device and to the numbers that the model was trained on, float32."""
        return pixels.to(self.device).float().div_(255).sub_(self.mean).div_(self.std)

    def tokenize(self, texts):
        """Turn M strings into tokens, (M, L) int64."""
        return self.tokenizer(texts)

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Encode uint8 pixels as `transform` gives them, (N, 3, H, W), to embeddings (N, D)."""
        return self._run(self._image, self.normalize(pixels)).float()

    @torch.inference_mode()
    def encode_tokens(self, tokens):
        """Encode tokens, (M, L), to embeddings (M, D)."""
        return self._run(self._text, tokens).float()

    def encode_texts(self, texts):
        """Encode M strings to embeddings (M, D)."""
        return self.encode_tokens(self.tokenize(texts))

    @torch.inference_mode()
    def pooled_images(self, pixels):
        """Encode as `encode_images` to a Pooled; raises UserError for an image tower without a last linear map."""
        pixels = self.normalize(pixels)
        return self._last_map("image").read(lambda: self._run(self._image, pixels))

    @torch.inference_mode()
    def pooled_tokens(self, tokens):
        """Encode as `encode_tokens` to a Pooled; raises UserError for a text tower without a last linear map."""
        return self._last_map("text").read(lambda: self._run(self._text, tokens))

    def pooled_texts(self, texts):
        """Encode as `encode_texts` to a Pooled; raises what `pooled_tokens` raises."""
        return self.pooled_tokens(self.tokenize(texts))

    @property
    def projection(self):
        """The last linear map of either tower, {"image": Projection, "text": Projection}; raises as pooling does."""
        return {tower: self._last_map(tower).projection for tower in ("image", "text")}

    def reconstruction_error(self, tower, pooled):
        """How far a Pooled of the "image" or "text" tower is from giving its embeddings: see last_map.py."""
        return reconstruction_error(pooled, self.projection[tower])

    def _last_map(self, tower):
        return LastMap(self.model, tower, self.config.model)

    def _run(self, encode, batch):
        if self.precision == "float32":
            return encode(batch)
        with torch.autocast(self.device.type, getattr(torch, self.precision)):
            return encode(batch)

    def _load_tokenizer(self, name, load, ends=False):
        """Call `load`; raises UserError that names the tokenizer and the way out where it fails.

        ends: whether the model was trained on texts that end in one end token and begin in none, as SigLIP was.
        """
        try:
            tokenizer = quietly(load)
        except ImportError as error:
            raise UserError(
                f"the tokenizer {name} of {self.config.model} needs {error.name or 'more packages'}: {EXTRA}."
            ) from None
        except Exception as error:  # whatever the hub's client or a tokenizer's parser raised
            raise UserError(
                f"the tokenizer {name} of {self.config.model} cannot be had ({said(error)}): check the connection, or"
                " name a folder that holds it with --set encoder.tokenizer=FOLDER."
            ) from None
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        inner.padding_side = "right"  # as all were trained; releases of transformers differ
        if ends and inner("a").input_ids != [*inner("a", add_special_tokens=False).input_ids, inner.eos_token_id]:
            raise UserError(
                f"the tokenizer {name} of {self.config.model} does not put one end token after a text, as the model was"
                " trained: take another release of transformers, or another folder with --set encoder.tokenizer=FOLDER."
            )
        return tokenizer


class Backbone(Frozen):
    """A frozen open_clip model, its image transform and its tokenizer.

    config: an Encoder. Raises UserError for an architecture that open_clip does not know, weights that cannot be had,
    or weights trained with another activation than the architecture's (QuickGELU).
    """

    def __init__(self, config, device="cpu"):
        weights = config.weights_file
        if config.architecture:
            open_clip.add_model_config(HOME / config.architecture)
        own = config.model.startswith(("hf-hub:", "local-dir:"))  # architecture and weights in one place
        if not own and config.model not in open_clip.list_models():
            raise UserError(f"open_clip has no architecture '{config.model}'; `open_clip.list_models()` lists them.")
        archive = weights is not None and weights.is_file() and _is_jit_archive(weights)
        if archive:
            _must_activate(config, True)
        elif config.pretrained and not weights and not own:
            _must_be_known(config)
        torch.manual_seed(0)  # random weights, where asked for, are the same everywhere
        try:
            # The text tower as a module of its own is what can be cut to a batch's longest caption.
            model = quietly(
                lambda: open_clip.create_model(
                    config.model,
                    pretrained=None if own else str(weights) if weights else config.pretrained,
                    load_weights=config.pretrained is not None,
                    device=torch.device(device),
                    force_custom_text=True,
                    pretrained_text=False,  # of a Hugging Face text tower: random is random
                    weights_only=not archive,  # torch loads these archives by itself, and only so
                )
            )
        except Exception as error:  # open_clip raises whatever its downloader or torch raised
            way = (
                "check the connection, name a local file with --set encoder.pretrained=FILE, or try random weights with"
            )
            way = "are they of this architecture?" if weights else f"{way} --backbone ViT-B-32-random."
            what = f"the weights '{config.pretrained}' of {config.model}"
            raise UserError(f"{what} do not load ({said(error)}): {way}") from None
        preprocess = model.visual.preprocess_cfg if own else _settings(config)
        preprocess = {key: value for key, value in preprocess.items() if key in PREPROCESS}
        preprocess["size"] = model.visual.image_size
        super().__init__(config, device, model, preprocess, open_clip.get_model_config(config.model)["embed_dim"])
        if self.device.type == "cpu" and self.precision != "float32":
            _put_length_first(model)

    @cached_property
    def tokenizer(self):
        """The tokenizer, loaded at first use; raises UserError where it cannot be had."""
        text = open_clip.get_model_config(self.config.model)["text_cfg"]
        ends = text.get("pool_type") == "last"
        if not self.config.tokenizer:
            own = text.get("hf_tokenizer_name", "of open_clip")
            return self._load_tokenizer(own, lambda: open_clip.get_tokenizer(self.config.model), ends)
        options = {"context_length": text.get("context_length", 77), "tokenizer_mode": text.get("tokenizer_mode")}
        options |= text.get("tokenizer_kwargs", {})
        name = self.config.tokenizer
        return self._load_tokenizer(name, lambda: open_clip.tokenizer.HFTokenizer(name, **options), ends)

    def reads_whole(self, text):
        """Whether a string fits into the text tower's window; the rest is cut."""
        inner = getattr(self.tokenizer, "tokenizer", None)  # of Hugging Face
        length = len(self.tokenizer.encode(text)) + 2 if inner is None else len(inner(text, verbose=False).input_ids)
        return length <= self.tokenizer.context_length

    def _image(self, pixels):
        return self.model.encode_image(pixels, normalize=False)  # CoCa's would

    def _text(self, tokens):
        length = self._length(tokens)
        with self.cut_to(length):
            return self.model.encode_text(tokens[:, :length].to(self.device), normalize=False)

    def _length(self, tokens):
        """How many tokens of (M, L) can matter: a causal tower that pools at the end token never sees what follows.

        CoCa's pools at a token of its own after the last, whose position would move.
        """
        text = self.model.text
        causal = getattr(text, "attn_mask", None) is not None
        if causal and text.pool_type == "argmax" and text.cls_emb is None:
            return int(tokens.argmax(dim=1).max()) + 1
        return tokens.shape[1]

    @contextlib.contextmanager
    def cut_to(self, length):
        """Let the text tower take `length` tokens inside the block: open_clip slices the positions, not the mask."""
        text = self.model.text
        mask = getattr(text, "attn_mask", None)
        if mask is None or text.cls_emb is not None:
            yield
            return
        text.attn_mask = mask[:length, :length]
        try:
            yield
        finally:
            text.attn_mask = mask

    @property
    def logit_scale(self):
        """Factor on the cosine that the model was trained with."""
        return self.model.logit_scale.exp().item()

    @property
    def logit_bias(self):
        """Number added to the scaled cosine, or None: sigmoid models have one."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()


def said(error):
    """The gist of what a library raised, in one line."""
    return " ".join(str(error).split()).split(". ")[0][:300]


def quietly(load):
    """Call `load` without its logging and warnings: a download that fails is told of once, by who catches it."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    finally:
        logging.disable(logging.NOTSET)


def _checked(preprocess):
    """Give encoder.preprocess back; raises UserError for a key that nothing reads and for a value that cannot be."""
    for key, value in preprocess.items():
        if key not in PREPROCESS:
            raise UserError(f"encoder.preprocess has no '{key}'; it has {', '.join(PREPROCESS)}.")
        choices = PREPROCESS[key]
        three = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        if not (value in choices if choices else three):
            raise UserError(
                f"encoder.preprocess: {key} is {' or '.join(choices) or 'a list of three numbers'}, not {value}."
            )
    return preprocess


def _settings(config):
    """What open_clip says of the pixels: of this tag, or for a file or random weights what the architecture's agree on.

    By itself open_clip takes a file's to be OpenAI's, whatever the architecture.
    """
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    tags = [config.pretrained] if config.pretrained in tags else tags
    said = [open_clip.pretrained.get_pretrained_cfg(config.model, tag) for tag in tags]
    values = {key: [settings.get(key) for settings in said] for key in PREPROCESS}
    return {key: found[0] for key, found in values.items() if found and found.count(found[0]) == len(found)}


def _put_length_first(model):
    """Let open_clip's transformers work on (L, N, D) in place of (N, L, D): the same numbers.

    In half precision on a CPU torch otherwise copies the attention's weights once for each of the L tokens: 11 images a
    second in place of 60 with the 50 tokens of ViT-B/32 on one core, and worse the more tokens there are.
    """
    for module in model.modules():
        if isinstance(module, open_clip.transformer.Transformer):
            module.batch_first = False
            for block in module.resblocks:
                block.attn.batch_first = False


def _must_be_known(config):
    """Raise a UserError unless open_clip has these weights, trained with the activation of this architecture."""
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.pretrained not in tags:
        raise UserError(
            f"'{config.pretrained}' is neither a file nor weights that open_clip has for {config.model}"
            f" ({', '.join(tags) or 'it has none'})."
        )
    # open_clip only warns, and only once the weights are down.
    cfg = open_clip.pretrained.get_pretrained_cfg(config.model, config.pretrained)
    _must_activate(config, cfg.get("quick_gelu", False))


def _must_activate(config, quick):
    """Raise a UserError if there is another architecture that has the activation of the weights: QuickGELU or not."""
    has = open_clip.get_model_config(config.model).get("quick_gelu", False)
    fitting = config.model.removesuffix("-quickgelu") + "-quickgelu" * quick
    if has != quick and fitting != config.model and fitting in open_clip.list_models():
        raise UserError(f"the weights '{config.pretrained}' are not of {config.model} but of {fitting}: use that.")


def _is_jit_archive(path):
    """Whether a file is TorchScript: OpenAI published its weights so, and nobody else."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
