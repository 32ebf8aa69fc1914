"""The frozen vision-language model: the only importer of open_clip."""

import contextlib
import logging

import open_clip
import torch

from utils.config import HOME
from utils.errors import UserError


class Backbone:
    """A frozen open_clip model, its image transform and its tokenizer.

    config: an Encoder. Raises UserError for an architecture that open_clip does not know, weights that cannot be had,
    or weights trained with another activation than the architecture's (QuickGELU).
    """

    def __init__(self, config, device="cpu"):
        self.config, self.device = config, torch.device(device)
        weights = config.weights_file
        if config.architecture:
            open_clip.add_model_config(HOME / config.architecture)
        if config.model not in open_clip.list_models():
            raise UserError(f"open_clip has no architecture '{config.model}'; `open_clip.list_models()` lists them.")
        if config.pretrained and not weights:
            _must_be_known(config)
        torch.manual_seed(0)  # random weights, where asked for, are the same everywhere
        logging.disable(logging.CRITICAL)  # a download that fails is told of below, once
        try:
            # The text tower as a module of its own is what can be cut to a batch's longest caption.
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                config.model,
                pretrained=str(weights) if weights else config.pretrained,
                device=self.device,
                force_custom_text=True,
            )
        except Exception as error:  # open_clip raises whatever its downloader or torch raised
            said = " ".join(str(error).split()).split(". ")[0][:300]
            way = (
                "check the connection, name a local file with --set encoder.pretrained=FILE, or try random weights with"
            )
            way = "are they of this architecture?" if weights else f"{way} --backbone ViT-B-32-random."
            what = f"the weights '{config.pretrained}' of {config.model}"
            raise UserError(f"{what} do not load ({said}): {way}") from None
        finally:
            logging.disable(logging.NOTSET)
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(config.model)
        self.dim = self.encode_texts([""]).shape[1]

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Encode transformed images, (N, 3, H, W), to embeddings as the model gives them, (N, D), not normalized."""
        return self.model.encode_image(pixels.to(self.device)).float()

    @torch.inference_mode()
    def encode_texts(self, texts):
        """Encode N strings to embeddings as the model gives them, (N, D), not normalized."""
        tokens = self.tokenizer(texts)
        length = self._length(tokens)
        with self.cut_to(length):
            return self.model.encode_text(tokens[:, :length].to(self.device)).float()

    def reads_whole(self, text):
        """Whether a string fits into the text tower's window (True where that cannot be told); the rest is cut."""
        encode = getattr(self.tokenizer, "encode", None)
        return encode is None or len(encode(text)) + 2 <= self.tokenizer.context_length

    def _length(self, tokens):
        """How many tokens of (N, L) can matter: a causal tower that pools at the end token never sees what follows."""
        if getattr(self.model.text, "pool_type", None) == "argmax" and self.model.text.attn_mask is not None:
            return int(tokens.argmax(dim=1).max()) + 1
        return tokens.shape[1]

    @contextlib.contextmanager
    def cut_to(self, length):
        """Let the text tower take `length` tokens inside the block: open_clip slices the positions, not the mask."""
        text = self.model.text
        mask = getattr(text, "attn_mask", None)
        if mask is not None:
            text.attn_mask = mask[:length, :length]
        try:
            yield
        finally:
            if mask is not None:
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


def _must_be_known(config):
    """Raise a UserError unless open_clip has these weights, trained with the activation of this architecture."""
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.pretrained not in tags:
        raise UserError(
            f"'{config.pretrained}' is neither a file nor weights that open_clip has for {config.model}"
            f" ({', '.join(tags) or 'it has none'})."
        )
    # open_clip only warns, and only once the weights are down.
    wanted = open_clip.pretrained.get_pretrained_cfg(config.model, config.pretrained).get("quick_gelu", False)
    if wanted != open_clip.get_model_config(config.model).get("quick_gelu", False):
        fitting = config.model + "-quickgelu" if wanted else config.model.removesuffix("-quickgelu")
        raise UserError(f"the weights '{config.pretrained}' are not of {config.model} but of {fitting}: use that.")
