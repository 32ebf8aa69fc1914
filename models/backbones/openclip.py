"""Frozen vision-language models from open_clip, and `Frozen`, the base class that transformers' models share.

N images of H x W pixels, M texts of L tokens, D embedding size. Embeddings are the model's output in float32, not
normalized.
"""

import contextlib
import logging
import warnings
from functools import cached_property

import open_clip
import torch

from models.backbones.last_map import LastMap, reconstruction_error
from models.backbones.pixels import Transform
from utils.config import HOME
from utils.errors import UserError, one_of

PREPROCESS = {  # keys of encoder.preprocess and their choices; without choices: one number per color channel
    "mean": (),
    "std": (),
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}
EXTRA = "pip install -r requirements-extra.txt"


class Frozen:
    """A frozen model of either library; a subclass runs the towers in `_image` and `_text` and has the `tokenizer`.

    preprocess: settings of the weights, with keys of PREPROCESS and `size`; encoder.preprocess overrides them. Raises
    UserError for invalid settings.
    """

    def __init__(self, config, device, model, preprocess, dim):
        self.config, self.device, self.dim = config, torch.device(device), dim
        self.model = model.to(self.device).eval().requires_grad_(False)
        auto = "float16" if self.device.type == "cuda" else "float32"
        self.precision = auto if config.precision == "auto" else config.precision
        settings = open_clip.transform.PreprocessCfg(**preprocess | _checked(config.preprocess))
        # The last three steps convert to RGB, convert to floats and normalize.
        self.transform = Transform(open_clip.transform.image_transform_v2(settings, is_train=False).transforms[:-3])
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32, device=self.device)[:, None, None]
            for x in (settings.mean, settings.std)
        )

    def normalize(self, pixels):
        """Move uint8 pixels (N, 3, H, W) to the device and normalize them as in training, to float32."""
        return pixels.to(self.device).float().div_(255).sub_(self.mean).div_(self.std)

    def tokenize(self, texts):
        """Turn M strings into tokens (M, L), int64."""
        return self.tokenizer(texts)

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Encode uint8 pixels (N, 3, H, W) from `transform` to embeddings (N, D)."""
        return self._run(self._image, self.normalize(pixels)).float()

    @torch.inference_mode()
    def encode_tokens(self, tokens):
        """Encode tokens (M, L) to embeddings (M, D)."""
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
        """Encode as `encode_texts` to a Pooled; raises UserError as `pooled_tokens` does."""
        return self.pooled_tokens(self.tokenize(texts))

    @property
    def projection(self):
        """The last linear maps, {"image": Projection, "text": Projection}; raises UserError if a tower has none."""
        return {tower: self._last_map(tower).projection for tower in ("image", "text")}

    def reconstruction_error(self, tower, pooled):
        """Error of the embeddings rebuilt from a Pooled of the "image" or "text" tower: see last_map.py."""
        return reconstruction_error(pooled, self.projection[tower])

    def _last_map(self, tower):
        return LastMap(self.model, tower, self.config.model)

    def _run(self, encode, batch):
        if self.precision == "float32":
            return encode(batch)
        with torch.autocast(self.device.type, getattr(torch, self.precision)):
            return encode(batch)

    def _load_tokenizer(self, name, load, one_end_token=False):
        """Return the tokenizer `load()`, which then pads on the right; raises UserError if it cannot be loaded.

        one_end_token: whether the model was trained on texts with one end token and no start token, as SigLIP was.
        """
        try:
            tokenizer = quietly(load)
        except ImportError as error:
            raise UserError(
                f"the tokenizer {name} of {self.config.model} needs {error.name or 'more packages'}: {EXTRA}."
            ) from None
        except Exception as error:  # whatever the hub's client or a tokenizer's parser raises
            raise UserError(
                f"the tokenizer {name} of {self.config.model} cannot be loaded ({first_sentence(error)}): check the"
                " connection, or name a folder that holds it with --set encoder.tokenizer=FOLDER."
            ) from None
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        inner.padding_side = "right"  # as in training; the default depends on the release of transformers
        if one_end_token:
            expected = [*inner("a", add_special_tokens=False).input_ids, inner.eos_token_id]
            if inner("a").input_ids != expected:
                raise UserError(
                    f"the tokenizer {name} of {self.config.model} does not put one end token after a text, as in the"
                    " model's training: use another release of transformers, or another folder with --set"
                    " encoder.tokenizer=FOLDER."
                )
        return tokenizer


class Backbone(Frozen):
    """A frozen open_clip model, its image transform and its tokenizer.

    config: an Encoder. Raises UserError for an architecture that open_clip does not know, for weights that cannot be
    loaded, and for weights trained with another activation than the architecture's (QuickGELU).
    """

    def __init__(self, config, device="cpu"):
        weights = config.weights_file
        if config.architecture:
            open_clip.add_model_config(HOME / config.architecture)
        bundled = config.model.startswith(("hf-hub:", "local-dir:"))  # architecture and weights in one place
        if not bundled and config.model not in open_clip.list_models():
            raise UserError(f"open_clip has no architecture '{config.model}'; `open_clip.list_models()` lists them.")
        archive = weights is not None and weights.is_file() and _is_jit_archive(weights)
        if archive:
            _check_activation(config, quick_gelu=True)
        elif config.pretrained and not weights and not bundled:
            _check_tag(config)
        torch.manual_seed(0)  # random weights are the same in every process
        pretrained = str(weights) if weights else config.pretrained
        try:
            model = quietly(
                lambda: open_clip.create_model(
                    config.model,
                    pretrained=None if bundled else pretrained,
                    load_weights=config.pretrained is not None,
                    device=torch.device(device),
                    force_custom_text=True,  # the text tower as a module of its own, which `cut_to` needs
                    pretrained_text=False,  # random weights for a Hugging Face text tower, too
                    weights_only=not archive,  # torch refuses to load TorchScript archives with it
                )
            )
        except Exception as error:  # whatever open_clip's downloader or torch raises
            hint = (
                "check the connection, name a local file with --set encoder.pretrained=FILE, or try random weights"
                " with --backbone ViT-B-32-random."
            )
            if weights:
                other = "in loading state_dict" in str(error)  # torch's words for other names or sizes
                hint = "are they of this architecture?" if other else "they are damaged, get them again."
                hint = not_weights(weights) or hint
            raise UserError(
                f"the weights '{config.pretrained}' of {config.model} do not load ({first_sentence(error)}): {hint}"
            ) from None
        preprocess = model.visual.preprocess_cfg if bundled else _preprocess(config)
        preprocess = {key: value for key, value in preprocess.items() if key in PREPROCESS}
        preprocess["size"] = model.visual.image_size
        super().__init__(config, device, model, preprocess, open_clip.get_model_config(config.model)["embed_dim"])
        if self.device.type == "cpu" and self.precision != "float32":
            _put_length_first(model)

    @cached_property
    def tokenizer(self):
        """The tokenizer, loaded at first use; raises UserError if it cannot be loaded."""
        text = open_clip.get_model_config(self.config.model)["text_cfg"]
        one_end_token = text.get("pool_type") == "last"
        if not self.config.tokenizer:
            name = text.get("hf_tokenizer_name", "of open_clip")
            return self._load_tokenizer(name, lambda: open_clip.get_tokenizer(self.config.model), one_end_token)
        options = {"context_length": text.get("context_length", 77), "tokenizer_mode": text.get("tokenizer_mode")}
        options |= text.get("tokenizer_kwargs", {})
        name = self.config.tokenizer
        return self._load_tokenizer(name, lambda: open_clip.tokenizer.HFTokenizer(name, **options), one_end_token)

    def reads_whole(self, text):
        """Whether a string fits into the text tower's window; what does not fit is cut off."""
        inner = getattr(self.tokenizer, "tokenizer", None)  # Hugging Face's, if open_clip wraps one
        length = len(self.tokenizer.encode(text)) + 2 if inner is None else len(inner(text, verbose=False).input_ids)
        return length <= self.tokenizer.context_length

    def _image(self, pixels):
        return self.model.encode_image(pixels, normalize=False)  # CoCa normalizes by default

    def _text(self, tokens):
        length = self._length(tokens)
        with self.cut_to(length):
            return self.model.encode_text(tokens[:, :length].to(self.device), normalize=False)

    def _length(self, tokens):
        """How many tokens of (M, L) affect the output: a causal tower that pools at the end token ignores the rest.

        CoCa pools at an extra token after the last position, which would move: all L count.
        """
        text = self.model.text
        causal = getattr(text, "attn_mask", None) is not None
        if causal and text.pool_type == "argmax" and text.cls_emb is None:
            return int(tokens.argmax(dim=1).max()) + 1
        return tokens.shape[1]

    @contextlib.contextmanager
    def cut_to(self, length):
        """Let the text tower take `length` tokens inside the block: cuts its mask; open_clip cuts the positions."""
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
        """Scale of the cosine in training."""
        return self.model.logit_scale.exp().item()

    @property
    def logit_bias(self):
        """Bias added to the scaled cosine of a sigmoid model; None for other models."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()


def not_weights(path):
    """Say what lies in the place of a file of weights, or of one in a folder, that do not load; "" if unknown."""
    for file in sorted(path.glob("*.[sbp]*")) if path.is_dir() else [path]:  # safetensors, bin, pt, pth
        with open(file, "rb") as opened:
            start = opened.read(200)
        if start.startswith(b"version https://git-lfs"):
            return f"{file} is a pointer of Git LFS, get the file itself with `git lfs pull`."
        if not start:
            return f"{file} is empty, get it again."
        if start.isascii() and start.decode().replace("\n", " ").replace("\r", "").replace("\t", "").isprintable():
            return f"{file} is a text or a web page, get the weights again."
    return ""


def first_sentence(error):
    """First sentence of an exception's message, on one line; its type where it has none."""
    return " ".join(str(error).split()).split(". ")[0][:300] or type(error).__name__


def quietly(load):
    """Return `load()`, without logging and warnings: the caller reports a failed download, once."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    finally:
        logging.disable(logging.NOTSET)


def _checked(preprocess):
    """Return encoder.preprocess; raises UserError for an unknown key or an invalid value."""
    for key, value in preprocess.items():
        if key not in PREPROCESS:
            raise UserError(f"encoder.preprocess has no '{key}'; it has {', '.join(PREPROCESS)}.")
        three = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        if PREPROCESS[key]:
            one_of(f"encoder.preprocess: {key}", value, PREPROCESS[key], UserError)
        elif not three:
            raise UserError(f"encoder.preprocess: {key} must be a list of three numbers, not {value}.")
    return preprocess


def _preprocess(config):
    """Preprocessing that open_clip has for this tag; for a file or random weights, that on which all tags agree.

    By itself open_clip would take OpenAI's for a file of any architecture.
    """
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.pretrained in tags:
        tags = [config.pretrained]
    entries = [open_clip.pretrained.get_pretrained_cfg(config.model, tag) for tag in tags]
    preprocess = {}
    for key in PREPROCESS:
        values = [entry.get(key) for entry in entries]
        if values and all(value == values[0] for value in values):
            preprocess[key] = values[0]
    return preprocess


def _put_length_first(model):
    """Let open_clip's transformers work on (L, N, D) instead of (N, L, D), with the same results.

    In half precision on a CPU, torch otherwise copies the attention's weights once per token: with the 50 tokens of
    ViT-B/32, 11 instead of 60 images per second on one core, and fewer with more tokens.
    """
    for module in model.modules():
        if isinstance(module, open_clip.transformer.Transformer):
            module.batch_first = False
            for block in module.resblocks:
                block.attn.batch_first = False


def _check_tag(config):
    """Raise UserError unless open_clip has these weights, trained with the activation of this architecture."""
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.pretrained not in tags:
        raise UserError(
            f"'{config.pretrained}' is neither a file nor weights that open_clip has for {config.model}"
            f" ({', '.join(tags) or 'it has none'})."
        )
    # open_clip itself only warns, after the download.
    cfg = open_clip.pretrained.get_pretrained_cfg(config.model, config.pretrained)
    _check_activation(config, cfg.get("quick_gelu", False))


def _check_activation(config, quick_gelu):
    """Raise UserError if the weights, trained with or without QuickGELU, are of the architecture's other variant."""
    has_quick_gelu = open_clip.get_model_config(config.model).get("quick_gelu", False)
    fitting = config.model.removesuffix("-quickgelu") + ("-quickgelu" if quick_gelu else "")
    if has_quick_gelu != quick_gelu and fitting != config.model and fitting in open_clip.list_models():
        raise UserError(f"the weights '{config.pretrained}' are not of {config.model} but of {fitting}: use that.")


def _is_jit_archive(path):
    """Whether a file is a TorchScript archive, the format in which OpenAI alone published weights.

    It is asked exactly as torch.load asks it, which unpickles whatever else it is told to trust.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    try:
        return torch._C.PyTorchFileReader(str(path)).has_record("constants.pkl")
    except RuntimeError:  # a damaged zip
        return False
